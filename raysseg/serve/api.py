"""The HTTP interface, version 1: its routes, whatever answers behind them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from raysseg.hosting import Http
from raysseg.schema import InputError, Prompt
from raysseg.serve import openapi
from raysseg.serve.answers import Answer, Form, choose_form
from raysseg.serve.intake import Body, read_body
from raysseg.serve.refusal import Refusal
from raysseg.serve.watch import Counts, Watch, answer_problem, read_token

logger = logging.getLogger(__name__)

PLAYGROUND = Path(__file__).parent / "playground"

Endpoint = TypeVar("Endpoint")


class Segmenting(Protocol):
    """What answers for a bundle; see segment.Segmenter."""

    async def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""

    async def segment(self, image: bytes, form: Form) -> Answer:
        """A checked image file's prediction."""


class Prompting(Protocol):
    """What answers for a prompted model; see prompt.Prompter."""

    async def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""

    async def upload(self, key: str, image: bytes) -> Answer:
        """Has an image looked at."""

    async def prompt(self, key: str, image: bytes | None, prompt: Prompt) -> Answer:
        """The masks that a prompt asks for."""

    async def everything(self, key: str, image: bytes | None) -> Answer:
        """Masks of all that is in the image."""


def build_api(segmenting: Mapping[str, Segmenting], prompting: Mapping[str, Prompting], http: Http) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        segmenting: what answers for bundles, by name.
        prompting: what answers for prompted models, by name.
        http: token and limits.

    Raises:
        InputError: the environment lacks the token that is to be asked for.
    """
    counts = Counts([*segmenting, *prompting])
    api = _Api(segmenting, prompting, http, counts)
    app = FastAPI(title="raysseg", version=version("raysseg"), description=openapi.DESCRIPTION)
    token = read_token(http)
    app.add_middleware(Watch, counts=counts, token=token, timeout_s=http.timeout_s)
    for kind in (InputError, HTTPException):
        app.add_exception_handler(kind, answer_problem)
    described = [Depends(HTTPBearer(auto_error=False))] if token is not None else []  # Watch is what asks for it
    add = partial(app.add_api_route, dependencies=described)
    add("/v1/models", api.list_models, openapi_extra=openapi.MODELS)
    add("/v1/models/{name}", api.describe, openapi_extra=openapi.MODEL)
    add("/v1/models/{name}/segment", api.segment, methods=["POST"], openapi_extra=openapi.SEGMENT)
    add("/v1/models/{name}/images", api.upload, methods=["POST"], status_code=201, openapi_extra=openapi.IMAGES)
    add("/v1/models/{name}/prompt", api.prompt, methods=["POST"], openapi_extra=openapi.PROMPT)
    add("/v1/models/{name}/everything", api.everything, methods=["POST"], openapi_extra=openapi.EVERYTHING)
    app.add_api_route("/healthz", api.is_up, openapi_extra=openapi.HEALTH)
    app.add_api_route("/metrics", api.count, include_in_schema=False)
    app.add_api_route("/", api.show_page, include_in_schema=False)
    app.mount("/playground", StaticFiles(directory=PLAYGROUND))
    return app


class _Api:
    def __init__(
        self,
        segmenting: Mapping[str, Segmenting],
        prompting: Mapping[str, Prompting],
        http: Http,
        counts: Counts,
    ) -> None:
        self._segmenting, self._prompting, self._http, self._counts = segmenting, prompting, http, counts

    # --- models ---

    async def list_models(self) -> Response:
        """The models, with their classes and metrics."""
        endpoints: list[Segmenting | Prompting] = [*self._segmenting.values(), *self._prompting.values()]
        cards = await asyncio.gather(*(endpoint.card() for endpoint in endpoints))
        return _json({"models": cards})

    async def describe(self, name: str) -> Response:
        """One model."""
        endpoints: dict[str, Segmenting | Prompting] = {**self._segmenting, **self._prompting}
        return _json(await _known(name, endpoints).card())

    async def segment(self, name: str, request: Request) -> Response:
        """What an image shows."""
        endpoint = _known(name, self._segmenting, self._prompting)
        form = choose_form(request.headers.get("accept", ""), request.query_params.get("as"))
        body = await read_body(request, self._http)
        return _respond(await endpoint.segment(_needed(body.image), form))

    # --- prompted models ---

    async def upload(self, name: str, request: Request) -> Response:
        """Has an image looked at, for prompts that name it by its hash."""
        endpoint = _known(name, self._prompting, self._segmenting)
        image = _needed((await read_body(request, self._http)).image)
        return _respond(await endpoint.upload(_to_key(image), image), 201)

    async def prompt(self, name: str, request: Request) -> Response:
        """The masks that a prompt asks for, best first."""
        endpoint = _known(name, self._prompting, self._segmenting)
        key, image, keys = _keyed(await read_body(request, self._http))
        return _respond(await endpoint.prompt(key, image, to_prompt(keys)))

    async def everything(self, name: str, request: Request) -> Response:
        """Masks of all that is in an image."""
        endpoint = _known(name, self._prompting, self._segmenting)
        key, image, _ = _keyed(await read_body(request, self._http))
        return _respond(await endpoint.everything(key, image))

    # --- the rest ---

    async def is_up(self) -> Response:
        """Whether requests are taken in."""
        return _json({"status": "ok"})

    async def count(self) -> Response:
        """The counts of this process, for Prometheus."""
        return Response(self._counts.as_text(), media_type="text/plain; version=0.0.4")

    async def show_page(self) -> Response:
        """The playground."""
        return FileResponse(PLAYGROUND / "index.html")


def _known(name: str, of: Mapping[str, Endpoint], others: Mapping[str, object] | None = None) -> Endpoint:
    if name in of:
        return of[name]
    if others and name in others:
        raise Refusal(404, f"the model {name!r} has no such action; allowed here: {', '.join(of) or 'no model'}")
    raise Refusal(404, f"there is no model {name!r}; allowed: {', '.join({**of, **(others or {})})}")


def _needed(image: bytes | None) -> bytes:
    if image is None:
        raise Refusal(400, "there is no image; send a file `image`, or the image itself, or a `uri`")
    return image


def _to_key(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


def _keyed(body: Body) -> tuple[str, bytes | None, dict[str, Any]]:
    """The key of the image that a body holds or names; the image; the other keys."""
    if body.image is not None:
        return _to_key(body.image), body.image, body.keys
    key = body.keys.get("image")
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
        raise Refusal(400, f"image: received {key!r}; allowed: the 64 hex digits that an upload has answered")
    return key, None, body.keys


class _Mask(msgspec.Struct):
    counts: str


class _PromptKeys(msgspec.Struct):
    """The keys of a prompt in JSON."""

    points: Annotated[list[tuple[float, float]], msgspec.Meta(max_length=100)] = []
    labels: list[int] | None = None
    box: tuple[float, float, float, float] | None = None
    mask: _Mask | None = None
    multimask: bool = True


def to_prompt(keys: Mapping[str, Any]) -> Prompt:
    """A prompt from the keys of JSON; all points are of the object where there are no labels.

    Raises:
        Refusal: they are none.
        InputError: they don't fit together.
    """
    try:
        given = msgspec.convert(keys, _PromptKeys)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"the prompt can't be read: {error}") from error
    return Prompt(
        points=tuple(given.points),
        labels=tuple(given.labels if given.labels is not None else [1] * len(given.points)),
        box=given.box,
        mask=given.mask.counts.encode() if given.mask is not None else None,
        is_multimask=given.multimask,
    )


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _respond(answer: Answer, status: int = 200) -> Response:
    return Response(answer.body, status, media_type=answer.media_type)
