"""What one would serve a bundle with instead of raysseg: FastAPI alone, and LitServe, each as a process.

Usage: python -m benchmarks.serve_peers fastapi|fastapi-threads|litserve BUNDLE PORT

They decode, predict and encode as raysseg does, to the same bytes; only the serving differs. LitServe is no dependency.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, File, Response

from raysseg.data.decode import Pixels, decode_image
from raysseg.masks import View
from raysseg.predictor import Predictor
from raysseg.serve.answers import to_answer
from raysseg.serve.segment import find_bundle

MODEL_NAME = "bench"
BATCH = 16
BATCH_WAIT_S = 0.005


class Model:
    """A bundle, and how its answers begin."""

    def __init__(self, uri: str) -> None:
        self.predictor = Predictor(uri)
        task = self.predictor.bundle.task
        self._head: dict[str, Any] = {"model": MODEL_NAME, "version": find_bundle(uri)[1], "task": task}

    def predict(self, images: Sequence[Pixels]) -> list[View]:
        return self.predictor.predict(images)

    def encode(self, view: View, image: Pixels) -> bytes:
        return to_answer(view, image, self.predictor.bundle.classes, "json", self._head).body

    def answer(self, image: bytes) -> bytes:
        """All of it: from a file to an answer."""
        pixels = decode_image(image)
        return self.encode(self.predict([pixels])[0], pixels)


def build_fastapi(model: Model, threads: int) -> FastAPI:
    """Each image alone, in one of so many threads."""
    app, executor = FastAPI(), ThreadPoolExecutor(threads)

    async def segment(image: Annotated[bytes, File()]) -> Response:
        body = await asyncio.get_running_loop().run_in_executor(executor, model.answer, image)
        return Response(body, media_type="application/json")

    app.add_api_route("/segment", segment, methods=["POST"], response_model=None)
    app.add_api_route("/health", lambda: {"status": "ok"})
    return app


def _serve_fastapi(threads: int) -> Callable[[str, int], None]:
    def run(uri: str, port: int) -> None:
        uvicorn.run(build_fastapi(Model(uri), threads), host="127.0.0.1", port=port, log_level="warning")

    return run


def _serve_litserve(uri: str, port: int) -> None:
    from benchmarks import serve_litserve

    serve_litserve.run(uri, port)


PEERS: dict[str, Callable[[str, int], None]] = {
    "fastapi": _serve_fastapi(1),
    "fastapi-threads": _serve_fastapi(40),  # as many as Starlette gives to functions that are not async
    "litserve": _serve_litserve,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("bundle")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    PEERS[options.peer](options.bundle, options.port)


if __name__ == "__main__":
    main()
