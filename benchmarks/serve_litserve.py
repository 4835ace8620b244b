"""A bundle behind LitServe, in batches, as its documentation has it; a peer, and no dependency of ours."""

# no `from __future__ import annotations`: LitServe reads the signatures below

from typing import Annotated

import litserve  # type: ignore[import-untyped,unused-ignore]
from fastapi import File, Response

from benchmarks.serve_peers import BATCH, BATCH_WAIT_S, Model
from raysseg.data.decode import Pixels, decode_image
from raysseg.masks import View


class Api(litserve.LitAPI):  # type: ignore[misc]
    """The hooks; all but the intake runs in one worker process."""

    def __init__(self, uri: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_S, api_path="/segment")
        self._uri = uri

    def setup(self, device: str) -> None:
        self._model = Model(self._uri)

    def decode_request(self, request: Annotated[bytes, File(alias="image")]) -> Pixels:
        return decode_image(request)

    def batch(self, inputs: list[Pixels]) -> list[Pixels]:
        return inputs

    def predict(self, images: list[Pixels]) -> list[tuple[View, Pixels]]:
        return list(zip(self._model.predict(images), images, strict=True))

    def unbatch(self, output: list[tuple[View, Pixels]]) -> list[tuple[View, Pixels]]:
        return output

    def encode_response(self, output: tuple[View, Pixels]) -> Response:
        return Response(self._model.encode(*output), media_type="application/json")


def run(uri: str, port: int) -> None:
    """Until a signal ends it."""
    server = litserve.LitServer(Api(uri), accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", generate_client_file=False)
