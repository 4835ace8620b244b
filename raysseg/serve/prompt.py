"""A prompted model in two halves: one looks at an image once, the other answers prompts about what it has seen.

What the first has made of an image is known by the hash of the image's file. Whoever keeps it, the answering half asks
for it by that key alone; so any of its replicas answers any prompt.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec
import numpy as np

from raysseg import storage
from raysseg.catalogue import PROMPT_MODELS
from raysseg.config import S3, ServedPrompt
from raysseg.data.decode import Pixels, decode_image
from raysseg.masks import MaskSet
from raysseg.models.sam import Automatic, Embedding, Part, PromptModel, to_best
from raysseg.runtime import log_to_stderr
from raysseg.schema import Prompt
from raysseg.serve.answers import MEDIA_TYPES, Answer, to_json, to_mask_entry
from raysseg.serve.cache import Cache
from raysseg.serve.refusal import Refusal
from raysseg.serve.thread import ModelThread


class Embeddings(Protocol):
    """Keeps what the encoder has made."""

    async def find(self, key: str) -> Embedding | None:
        """By the key of an image; None where it is not there, or no more."""

    async def get(self, key: str, image: bytes) -> Embedding:
        """The same, made where it is missing; once, however many ask for it."""


class Encoder:
    """Looks at images.

    Args:
        served: the model.
        s3: of the job.
        device: torch's name of it; default: the GPU where there is one, else the CPU.
    """

    def __init__(self, served: ServedPrompt, s3: S3, device: str | None = None) -> None:
        self._model, self._thread = _load(served, s3, device, "encoder"), ModelThread(f"{served.prompt} encoder")

    async def embed(self, image: bytes) -> Embedding:
        """What it makes of a checked image file; raises InputError where that can't be decoded."""
        pixels = await asyncio.to_thread(decode_image, image)
        return await self._thread.run(self._model.embed, pixels)

    async def check_health(self) -> None:
        """Runs the model, unless that is idle talk; raises where it can't."""
        await self._thread.check(lambda: self._thread.run(self._model.embed, _PROBE))


class Prompter:
    """Answers prompts.

    Args:
        name: that requests give.
        served: the model.
        s3: of the job.
        embeddings: what the encoder has made.
        device: as Encoder's.
    """

    def __init__(
        self, name: str, served: ServedPrompt, s3: S3, embeddings: Embeddings, device: str | None = None
    ) -> None:
        self._model, self._thread = _load(served, s3, device, "decoder"), ModelThread(f"{served.prompt} decoder")
        self._name, self._served, self._embeddings = name, served, embeddings
        self._last: Embedding | None = None

    async def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        return to_card(self._name, self._served)

    async def upload(self, key: str, image: bytes) -> Answer:
        """Has a checked image file looked at, for prompts to come."""
        height, width = (await self._embeddings.get(key, image)).size
        return Answer(msgspec.json.encode({"image": key, "height": height, "width": width}), MEDIA_TYPES["json"])

    async def prompt(self, key: str, image: bytes | None, prompt: Prompt) -> Answer:
        """The masks that a prompt asks for.

        Raises:
            Refusal: the image is not known, and did not come along.
            InputError: the prompt does not fit the image.
        """
        embedding = await self._find(key, image)
        return self._to_answer(await self._thread.run(self._model.prompt, embedding, prompt))

    async def everything(self, key: str, image: bytes | None) -> Answer:
        """Masks of all that is in the image; raises as `prompt` does."""
        embedding = await self._find(key, image)
        automatic = Automatic(points_per_side=self._served.points_per_side)
        found, steps = [], self._model.iter_found(embedding, automatic)
        while (step := await self._thread.run(next, steps, None)) is not None:  # prompts come in between
            found.append(step)
        return self._to_answer(await asyncio.to_thread(to_best, found, embedding.size, automatic))

    async def check_health(self) -> None:
        """Runs the model on the image that was prompted last, unless that is idle talk; raises where it can't."""
        if (last := self._last) is not None:
            await self._thread.check(lambda: self._thread.run(self._model.prompt, last, _CORNER))

    async def _find(self, key: str, image: bytes | None) -> Embedding:
        found = await (self._embeddings.find(key) if image is None else self._embeddings.get(key, image))
        if found is None:
            raise Refusal(404, f"image: {key[:12]}... is not known, or no more; upload it again")
        self._last = found
        return found

    def _to_answer(self, found: MaskSet) -> Answer:
        scores = found.scores.tolist() if found.scores is not None else [None] * len(found)
        entries = [to_mask_entry(encoded, found.size, score) for encoded, score in zip(found.rles, scores, strict=True)]
        head = {"model": self._name, "version": self._served.prompt}
        return Answer(to_json(head, found.size, "masks", entries), MEDIA_TYPES["json"])


class EmbeddingsHere:
    """Keeps embeddings in this process, beside the encoder that makes them."""

    def __init__(self, encoder: Encoder, max_bytes: int) -> None:
        self._encoder = encoder
        self._cache: Cache[Embedding] = Cache(lambda embedding: embedding.nbytes, max_bytes)

    async def find(self, key: str) -> Embedding | None:
        """By the key of an image."""
        return self._cache.find(key)

    async def get(self, key: str, image: bytes) -> Embedding:
        """The same, made where it is missing."""
        return await self._cache.get(key, lambda: self._encoder.embed(image))


def to_card(name: str, served: ServedPrompt) -> dict[str, Any]:
    """What `/v1/models` says of a prompted model."""
    empty: dict[str, Any] = {"task": None, "classes": [], "metrics": {}}
    return {"name": name, "kind": "prompt", "model": served.prompt, **empty, "version": served.prompt}


_PROBE: Pixels = np.zeros((64, 64, 3), np.uint8)
_CORNER = Prompt(points=((0, 0),), labels=(1,))


def _load(served: ServedPrompt, s3: S3, device: str | None, part: Part) -> PromptModel:
    log_to_stderr()
    storage.use_s3(s3.endpoint, s3.region, s3.anonymous)
    weights = served.weights or PROMPT_MODELS[served.prompt]
    return PromptModel(weights, device=device, precision=served.precision, parts=(part,))
