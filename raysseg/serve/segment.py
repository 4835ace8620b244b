"""A bundle that answers requests: decoding, batches, encoding, and moving on to another bundle between two of them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from raysseg import bundle as bundles
from raysseg import storage
from raysseg.bundle import Bundle
from raysseg.config import S3, ServedBundle
from raysseg.data.decode import Pixels, decode_image
from raysseg.masks import View
from raysseg.predictor import Predictor
from raysseg.runtime import log_to_stderr
from raysseg.section import seconds_of
from raysseg.serve.answers import Answer, Form, to_answer
from raysseg.serve.batcher import Batcher
from raysseg.serve.refusal import Refusal
from raysseg.serve.thread import ModelThread

logger = logging.getLogger(__name__)

_GPU_PIXELS = 4_000_000  # of a batch
_CPU_PIXELS = 4_000_000  # of an image that goes through whole: 12 s a million of SegFormer-B0's, one thread


@dataclass(frozen=True)
class _Loaded:
    """A bundle in memory; requests go on with the one that they began with."""

    identity: str
    predictor: Predictor
    batcher: Batcher[Pixels, View]
    max_pixels: float

    @property
    def head(self) -> dict[str, Any]:
        """What its answers begin with."""
        return {"version": self.identity, "task": self.predictor.bundle.task}


class Segmenter:
    """A model behind the interface; its methods run in one event loop.

    Args:
        name: that requests give.
        served: the bundle, and how it is run.
        s3: of the job.
        device: torch's name of it; default: the GPU where there is one, else the CPU.
    """

    def __init__(self, name: str, served: ServedBundle, s3: S3, device: str | None = None) -> None:
        log_to_stderr()
        storage.use_s3(s3.endpoint, s3.region, s3.anonymous)
        self._name, self._served, self._device = name, served, device
        self._thread = ModelThread(name)
        self._loaded: _Loaded | None = None
        self._following: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def reconfigure(self, config: Mapping[str, str]) -> None:
        """Takes up the bundle of a configuration, `{"bundle": URI}`, while the one before still answers."""
        await self._move_to(config["bundle"])
        if self._following is not None:
            self._following.cancel()
        if self._served.follow is not None:
            self._following = asyncio.create_task(self._follow(config["bundle"]))

    async def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        loaded = self._ready()
        return to_card(self._name, loaded.predictor.bundle, loaded.identity)

    async def segment(self, image: bytes, form: Form) -> Answer:
        """A checked image file's prediction.

        Raises:
            InputError: the file can't be decoded.
            Refusal: it has more pixels than the model can see at once.
        """
        loaded = self._ready()
        pixels = await asyncio.to_thread(decode_image, image)
        _check_pixels(loaded, pixels)
        view = await self._predict(loaded, pixels)
        head = {"model": self._name, **loaded.head}
        return await asyncio.to_thread(to_answer, view, pixels, loaded.predictor.bundle.classes, form, head)

    async def check_health(self) -> None:
        """Runs the model, unless it has just come to results or is at work; raises where it can't or is stuck."""
        loaded = self._ready()
        await self._thread.check(lambda: self._predict(loaded, _PROBE))

    def _ready(self) -> _Loaded:
        assert self._loaded is not None, "reconfigure comes first"
        return self._loaded

    async def _predict(self, loaded: _Loaded, pixels: Pixels) -> View:
        height, width = loaded.predictor.input_size(pixels)
        return await loaded.batcher.submit(pixels, loaded.predictor.batch_key(pixels), height * width)

    async def _follow(self, uri: str) -> None:
        pause_s = seconds_of(self._served.follow) if self._served.follow else None
        assert pause_s is not None
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._move_to(uri)
            except Exception as error:  # what answers now goes on answering
                logger.warning("%s: the bundle stays as it is; %s can't be taken up: %s", self._name, uri, error)

    async def _move_to(self, uri: str) -> None:
        async with self._turn:
            bundle_uri, identity = await asyncio.to_thread(find_bundle, uri)
            if self._loaded is not None and self._loaded.identity == identity:
                return
            loaded = await asyncio.to_thread(self._load, bundle_uri, identity)
            await self._predict(loaded, _PROBE)  # a bundle that can't run does not take over
            self._loaded = loaded
            logger.info("%s: answers by %s, version %s", self._name, bundle_uri, identity)

    def _load(self, uri: str, identity: str) -> _Loaded:
        served = self._served
        predictor = Predictor(uri, device=self._device, precision=served.precision, inference=served.inference)
        batch_pixels = served.batch_pixels or (_GPU_PIXELS if predictor.is_on_gpu else 1)
        max_pixels = served.max_pixels or (inf if predictor.is_on_gpu else _CPU_PIXELS)
        return _Loaded(identity, predictor, Batcher(predictor.predict, self._thread, batch_pixels), max_pixels)


def _check_pixels(loaded: _Loaded, pixels: Pixels) -> None:
    height, width = loaded.predictor.input_size(pixels)
    if loaded.predictor.sees_whole_images and height * width > loaded.max_pixels:
        raise Refusal(
            413,
            f"the model would see {width}x{height} pixels at once; allowed: {loaded.max_pixels}. Scale or cut it, "
            "or have the model served with `inference.tile` or a larger `max_pixels`",
        )


_PROBE: Pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def find_bundle(uri: str) -> tuple[str, str]:
    """The bundle at a URI, or the best one of the run there; and its version, 12 hex digits.

    Raises:
        StorageError: there is neither.
    """
    if not storage.exists(storage.join(uri, bundles.MANIFEST)) and storage.exists(storage.join(uri, "best.json")):
        uri = storage.join(uri, json.loads(storage.read_text(storage.join(uri, "best.json")))["bundle"])
    return uri, bundles.identify(uri)[:12]


def read_card(name: str, served: ServedBundle) -> dict[str, Any]:
    """The card of a bundle that need not be in memory anywhere."""
    uri, identity = find_bundle(served.bundle)
    return to_card(name, bundles.read(uri), identity)


def to_card(name: str, bundle: Bundle, identity: str) -> dict[str, Any]:
    """What `/v1/models` says of a bundle."""
    classes = bundle.classes
    columns = zip(classes.ids, classes.names, classes.colours, classes.things, strict=True)
    return {
        "name": name,
        "kind": "segment",
        "model": bundle.model,
        "task": bundle.task,
        "classes": [dict(zip(("id", "name", "colour", "isthing"), values, strict=True)) for values in columns],
        "metrics": {key: value for key, value in bundle.metrics.items() if value == value},  # NaN is not JSON
        "version": identity,
    }
