"""What /docs says of each route, with examples."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

DESCRIPTION = (
    "Segments images with trained models, and by prompts. Images are JPEG, PNG, TIFF or WebP. "
    "Errors are `application/problem+json`; their `detail` says what to mend."
)

_KEY = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_RLE = {"size": [192, 256], "counts": "Ph02m500O1O1N2O1O1O1N2"}
_MASK = {"score": 0.97, "bbox": [24, 40, 61, 33], "area": 1480, "segmentation": _RLE}
_CARD = {
    "name": "camvid",
    "kind": "segment",
    "model": "segformer-b0",
    "task": "semantic",
    "classes": [{"id": 8, "name": "car", "colour": [64, 0, 128], "isthing": True}],
    "metrics": {"val/miou": 0.61},
    "version": "3f2a9c01d4e7",
}
_SIZE = {"height": 192, "width": 256}


def _responses(example: object, *statuses: int, status: int = 200) -> dict[str, Any]:
    done = {"description": "Done", "content": {"application/json": {"example": example}}}
    return {str(status): done, **{str(code): _problem(HTTPStatus(code)) for code in statuses}}


def _problem(status: HTTPStatus) -> dict[str, Any]:
    example = {"title": status.phrase, "status": status, "detail": "what is wrong, what is allowed, what to do"}
    return {"description": status.phrase, "content": {"application/problem+json": {"example": example}}}


def _body(example: dict[str, Any]) -> dict[str, Any]:
    image = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"image": image, "prompt": {"type": "string"}}, "required": ["image"]}
    content = {
        "multipart/form-data": {"schema": form},
        "image/jpeg": {"schema": image},
        "image/png": {"schema": image},
        "application/json": {"schema": {"type": "object"}, "example": example},
    }
    return {"required": True, "content": content}


_ERRORS = (400, 401, 403, 404, 413, 415, 422, 503, 504)
_AS = {
    "name": "as",
    "in": "query",
    "description": "The form of the answer; wins over Accept.",
    "schema": {"type": "string", "enum": ["json", "ids", "overlay", "polygons"]},
}

MODELS = {"responses": _responses({"models": [_CARD]}, 401)}
MODEL = {"responses": _responses(_CARD, 401, 404)}
SEGMENT: dict[str, Any] = {
    "parameters": [_AS],
    "requestBody": _body({"uri": "s3://bucket/images/0001.jpg"}),
    "responses": _responses(
        {
            "model": "camvid",
            "version": "3f2a9c01d4e7",
            "task": "semantic",
            **_SIZE,
            "segments": [{"id": 1, "category_id": 8, "category": "car", **_MASK}],
        },
        406,
        *_ERRORS,
    ),
}
SEGMENT["responses"]["200"]["content"] |= {"image/png": {}, "application/geo+json": {}}
IMAGES = {
    "requestBody": _body({"uri": "s3://bucket/images/0001.jpg"}),
    "responses": _responses({"image": _KEY, **_SIZE}, *_ERRORS, status=201),
}
_MASKS = {"model": "sam", "version": "sam-vit-base", **_SIZE, "masks": [_MASK]}
PROMPT = {
    "requestBody": _body({"image": _KEY, "points": [[120, 80], [30, 30]], "labels": [1, 0], "multimask": True}),
    "responses": _responses(_MASKS, *_ERRORS),
}
EVERYTHING = {"requestBody": _body({"image": _KEY}), "responses": _responses(_MASKS, *_ERRORS)}
HEALTH = {"responses": _responses({"status": "ok"})}
