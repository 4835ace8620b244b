"""What encoders have made of images, kept on the cluster: by an actor that outlives every replica."""

from __future__ import annotations

import asyncio

import ray
from ray import serve

from raysseg.models.sam import Embedding
from raysseg.schema import InputError
from raysseg.serve.cache import Cache
from raysseg.serve.refusal import Refusal
from raysseg.serve.replica import TRIES, Replica, ask

STORE = "embeddings"
"""The actor's name, within the deployment that answers prompts."""


class EmbeddingStore(Replica):
    """The actor that owns what an encoder has made: Ray's objects die with whoever put them.

    Args:
        encoder: name of the deployment.
        max_bytes: of what is kept.
    """

    def __init__(self, encoder: str, max_bytes: int) -> None:
        self._encoder = encoder
        self._cache: Cache[tuple[ray.ObjectRef, int]] = Cache(lambda entry: entry[1], max_bytes)

    async def find(self, key: str) -> list[ray.ObjectRef]:
        """A list of the embedding's reference; empty where it is not there, or no more."""
        found = self._cache.find(key)
        return [found[0]] if found else []

    async def get(self, key: str, image: bytes) -> list[ray.ObjectRef]:
        """The same, made where it is missing; once, however many ask for it.

        Raises:
            InputError: the image can't be decoded.
        """
        return [(await self._cache.get(key, lambda: self._make(image)))[0]]

    async def forget(self, key: str) -> list[ray.ObjectRef]:
        """Makes room for one whose object was lost."""
        self._cache.drop(key)
        return []

    async def num_made(self) -> int:
        """How many embeddings the encoder has made."""
        return self._cache.num_made

    async def _make(self, image: bytes) -> tuple[ray.ObjectRef, int]:
        handle = serve.get_deployment_handle(self._encoder, serve.get_deployment_actor_context().app_name)
        embedding: Embedding = await ask(handle, "embed", image)
        return ray.put(embedding), embedding.nbytes


class StoredEmbeddings:
    """The embeddings of that actor, as replicas see them."""

    async def find(self, key: str) -> Embedding | None:
        """By the key of an image."""
        try:
            return await found[0] if (found := await self._call("find", key)) else None
        except ray.exceptions.ObjectLostError:  # its owner has died since
            return None

    async def get(self, key: str, image: bytes) -> Embedding:
        """The same, made where it is missing."""
        for _ in range(TRIES):
            (reference,) = await self._call("get", key, image)
            try:
                embedding: Embedding = await reference
            except ray.exceptions.ObjectLostError:
                await self._call("forget", key)
            else:
                return embedding
        raise Refusal(503, "the embedding was lost; ask again in a moment", 5)

    async def _call(self, method: str, *arguments: object) -> list[ray.ObjectRef]:
        for pause_s in (1, 3, 5):
            try:
                store = serve.get_deployment_actor(STORE)
            except ValueError:  # it is being replaced
                await asyncio.sleep(pause_s)
                continue
            try:
                found = await store.call.remote(method, *arguments)
            except ray.exceptions.RayActorError:
                await asyncio.sleep(pause_s)
            else:
                if isinstance(found, InputError):
                    raise found
                references: list[ray.ObjectRef] = found
                return references
        raise Refusal(503, "the embeddings can't be reached; ask again in a moment", 5)
