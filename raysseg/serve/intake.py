"""What comes in: bodies of bounded size, and images that are looked at before any pixel is decoded."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import msgspec
from PIL import Image, UnidentifiedImageError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from raysseg.data.files import IMAGE_FORMATS
from raysseg.hosting import Http
from raysseg.masks import IMAGE_ERRORS, explain
from raysseg.serve.fetch import fetch
from raysseg.serve.refusal import Refusal

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_ALLOWED = f"allowed: {', '.join(IMAGE_FORMATS)} of one page, RGB, grey or palette, 8 bits a channel"


class Body(NamedTuple):
    """What a request holds: an image file, checked, and the keys of its JSON."""

    image: bytes | None
    keys: dict[str, Any]


async def read_body(request: Request, http: Http) -> Body:
    """Reads a request: multipart (file `image`, JSON in `prompt`), JSON (`uri` names an image), or the image itself.

    Raises:
        Refusal: it is too large, of another kind, or not an image that is taken.
    """
    if (announced := request.headers.get("content-length", "")).isdigit() and int(announced) > http.max_bytes:
        raise _too_large(http)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        body = await _read_form(request, http)
    elif kind == "application/json":
        keys = _to_keys(b"".join([chunk async for chunk in _bounded(request, http)]))
        body = Body(await fetch(str(keys["uri"]), http) if "uri" in keys else None, keys)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = Body(b"".join([chunk async for chunk in _bounded(request, http)]), {})
    else:
        given = kind or "no Content-Type"
        raise Refusal(
            415, f"received {given}; allowed: multipart/form-data with a file `image`, image/*, application/json"
        )
    if body.image is not None:
        check_image(body.image, http)
    return body


async def _read_form(request: Request, http: Http) -> Body:
    parser = MultiPartParser(request.headers, _bounded(request, http), max_files=1, max_fields=4)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise Refusal(400, f"the multipart body can't be read ({error}); send one file `image`") from error
    file, prompt = form.get("image"), form.get("prompt")
    if isinstance(file, str):
        raise Refusal(400, "the field `image` is text; send it as a file")
    keys = _to_keys(prompt.encode()) if isinstance(prompt, str) else {}
    image = await file.read() if file is not None else None
    await form.close()
    return Body(image, keys)


async def _bounded(request: Request, http: Http) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > http.max_bytes:
            raise _too_large(http)
        yield chunk


def _too_large(http: Http) -> Refusal:
    return Refusal(413, f"the request is too large; allowed: {http.max_bytes} bytes")


def _to_keys(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the JSON can't be read: {error}; send one object") from error


def check_image(data: bytes, http: Http) -> None:
    """Looks at an image's head; no pixel is decoded.

    Raises:
        Refusal: it is no image that is taken, or too large or too small.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            (width, height), kind, mode = file.size, file.format, file.mode
            pages = getattr(file, "n_frames", 1)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(http) from error
    except UnidentifiedImageError as error:
        begin = data.lstrip()[:16]
        shown = f"begins with {begin!r}" if begin else "is empty"
        raise Refusal(415, f"the image {shown}, which is of no kind that is taken; {_ALLOWED}") from error
    except IMAGE_ERRORS as error:
        raise Refusal(422, f"the image can't be read ({explain(error)}); write the file anew") from error
    if height * width > http.max_pixels:
        raise _too_many_pixels(http)
    if min(height, width) < http.min_side:
        raise Refusal(422, f"the image is {width}x{height}; allowed: sides from {http.min_side} pixels on")
    if pages > 1:
        raise Refusal(415, f"the {kind} holds {pages} pages; {_ALLOWED}")
    if mode not in _MODES:
        raise Refusal(415, f"the {kind} has pixels of the mode {mode}; {_ALLOWED}: convert it first")


def _too_many_pixels(http: Http) -> Refusal:
    return Refusal(413, f"the image has too many pixels; allowed: {http.max_pixels}. Scale or cut it first")
