"""What comes in: bodies of bounded size, and images that are looked at before any pixel is decoded."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import msgspec
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from raysseg.config import MIN_SIDE
from raysseg.data.files import IMAGE_FORMATS
from raysseg.hosting import Http
from raysseg.masks import IMAGE_ERRORS, explain
from raysseg.serve.fetch import fetch
from raysseg.serve.refusal import Refusal

_JSON_BYTES = 2**21
_JPEG_SCANS = 100  # each of which costs as much as the whole image
_PNG_DEPTH = 24  # place of the byte
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
        raise _too_large(http.max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        body = await _read_form(request, http)
    elif kind == "application/json":
        keys = _to_keys(b"".join([chunk async for chunk in _bounded(request, min(http.max_bytes, _JSON_BYTES))]))
        body = Body(await fetch(str(keys["uri"]), http) if "uri" in keys else None, keys)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = Body(b"".join([chunk async for chunk in _bounded(request, http.max_bytes)]), {})
    else:
        given = kind or "no Content-Type"
        raise Refusal(
            415, f"received {given}; allowed: multipart/form-data with a file `image`, image/*, application/json"
        )
    if body.image is not None:
        await asyncio.to_thread(check_image, body.image, http)
    return body


async def _read_form(request: Request, http: Http) -> Body:
    try:
        form = await MultiPartParser(
            request.headers, _bounded(request, http.max_bytes), max_files=1, max_fields=4, max_part_size=_JSON_BYTES
        ).parse()
    except (MultiPartException, KeyError, UnicodeError, LookupError) as error:
        raise Refusal(400, f"the multipart body can't be read ({error}); send one file `image`") from error
    file, prompt = form.get("image"), form.get("prompt")
    if isinstance(file, str):
        raise Refusal(400, "the field `image` is text; send it as a file")
    keys = _to_keys(prompt.encode(errors="replace")) if isinstance(prompt, str) else {}
    image = await file.read() if file is not None else None
    await form.close()
    return Body(image, keys)


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, f"the request is too large; allowed: {max_bytes} bytes")


def _to_keys(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the JSON can't be read: {error}; send one object") from error


def check_image(data: bytes, http: Http) -> None:
    """Looks at an image's head; no pixel is decoded.

    Raises:
        Refusal: it is no image that is taken, or too large or too small.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            (width, height), kind, mode, is_deep = file.size, file.format, file.mode, _is_deep(file, data)
            is_single = _is_single(file)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(http) from error
    except UnidentifiedImageError as error:
        begin = data.lstrip()[:16]
        plain = re.sub(rb"[^ -~].*", b"", begin, flags=re.DOTALL)
        shown = f"begins with {plain or begin!r}" if begin else "is empty"
        raise Refusal(415, f"the image {shown}, which is of no kind that is taken; {_ALLOWED}") from error
    except IMAGE_ERRORS as error:
        raise Refusal(422, f"the image can't be read ({explain(error)}); write the file anew") from error
    if max(height, MIN_SIDE) * max(width, MIN_SIDE) > http.max_pixels:  # short sides are enlarged for models
        raise _too_many_pixels(http)
    if min(height, width) < http.min_side:
        raise Refusal(422, f"the image is {width}x{height}; allowed: sides from {http.min_side} pixels on")
    if not is_single:
        raise Refusal(415, f"the {kind} holds several pages; {_ALLOWED}")
    if mode not in _MODES or is_deep:
        raise Refusal(415, f"the {kind} has pixels of the mode {mode}{', 16 bits' * is_deep}; {_ALLOWED}: convert it")
    if kind == "JPEG" and data.count(b"\xff\xda") > _JPEG_SCANS:
        raise Refusal(415, f"the JPEG has more than {_JPEG_SCANS} scans; save it anew")


def _is_single(file: Image.Image) -> bool:
    """Whether there is one page: to count them takes long where there are many."""
    try:
        file.seek(1)
    except EOFError:
        return True
    return False


def _is_deep(file: Image.Image, data: bytes) -> bool:
    """Whether channels have more than 8 bits; Pillow's modes tell that of grey alone."""
    if isinstance(file, TiffImageFile):
        return any(bits > 8 for bits in file.tag_v2.get(BITSPERSAMPLE, (1,)))
    return file.format == "PNG" and data[_PNG_DEPTH] > 8


def _too_many_pixels(http: Http) -> Refusal:
    return Refusal(413, f"the image has too many pixels; allowed: {http.max_pixels}. Scale or cut it first")
