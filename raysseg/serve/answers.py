"""What goes out: a prediction as JSON with RLE, as an id map, as an overlay or as polygons."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from raysseg import masks, report, rle
from raysseg.data.decode import Pixels
from raysseg.masks import LabelMap, MaskSet, View
from raysseg.schema import ClassMap
from raysseg.serve.refusal import Refusal

Form = Literal["json", "ids", "overlay", "polygons"]

MEDIA_TYPES: dict[Form, str] = {
    "json": "application/json",
    "ids": "image/png",
    "overlay": "image/png",
    "polygons": "application/geo+json",
}


class Answer(NamedTuple):
    """A body, and what it is."""

    body: bytes
    media_type: str


class Region(NamedTuple):
    """A segment of a prediction: its number, class index, score and mask."""

    number: int
    class_index: int
    score: float | None
    rle: bytes


def choose_form(accept: str, asked: str | None) -> Form:
    """The form of an answer, by the `as` of a request, else by its Accept header.

    Raises:
        Refusal: there is no such form.
    """
    if asked is not None:
        if asked not in get_args(Form):
            raise Refusal(400, f"as: received {asked!r}; allowed: {', '.join(get_args(Form))}")
        return asked  # type: ignore[return-value]
    wanted = sorted(map(_to_preference, accept.lower().split(",")), key=lambda preference: -preference.weight)
    for media_type, parameters, weight in wanted:
        if weight > 0:
            if media_type in ("", "*/*", "application/*", "application/json"):
                return "json"
            if media_type in ("image/png", "image/*"):
                return "overlay" if parameters.get("as") == "overlay" else "ids"
            if media_type == "application/geo+json":
                return "polygons"
    raise Refusal(406, f"Accept: received {accept!r}; allowed: application/json, image/png, application/geo+json")


class _Preference(NamedTuple):
    media_type: str
    parameters: dict[str, str]
    weight: float


def _to_preference(text: str) -> _Preference:
    media_type, *rest = (part.strip() for part in text.split(";"))
    parameters = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in rest)}
    try:
        return _Preference(media_type, parameters, float(parameters.get("q", 1)))
    except ValueError:
        return _Preference(media_type, parameters, 0.0)


def to_answer(view: View, image: Pixels, classes: ClassMap, form: Form, head: dict[str, Any]) -> Answer:
    """A prediction in one of its forms.

    Args:
        view: what the model has found.
        image: (H, W, 3) RGB.
        classes: of the model.
        form: see Form.
        head: what JSON begins with, such as the model's name.
    """
    match form:
        case "json":
            size = (image.shape[0], image.shape[1])
            body = to_json(head, size, "segments", [_to_segment(region, size, classes) for region in to_regions(view)])
        case "ids":
            body = _to_ids(view, classes)
        case "overlay":
            labels, regions = report.flatten(view, classes)
            body = to_png(report.paint_labels(image, labels, classes, regions))
        case "polygons":
            body = msgspec.json.encode(_to_features(view, (image.shape[0], image.shape[1]), classes))
    return Answer(body, MEDIA_TYPES[form])


def to_json(
    head: dict[str, Any], image: Pixels | tuple[int, int], key: str, entries: Sequence[dict[str, Any]]
) -> bytes:
    """An answer of entries about one image."""
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image
    return msgspec.json.encode({**head, "height": height, "width": width, key: entries})


def to_mask_entry(encoded: bytes, size: tuple[int, int], score: float | None) -> dict[str, Any]:
    """A mask with COCO's keys."""
    compressed = {"size": list(size), "counts": encoded}
    box, area = coco_mask.toBbox(compressed).tolist(), int(coco_mask.area(compressed))
    return {"score": score, "bbox": box, "area": area, "segmentation": {**compressed, "counts": encoded.decode()}}


def to_regions(view: View) -> Iterator[Region]:
    """The segments of a prediction, numbered from 1; each class of a label map is one, without a score."""
    if isinstance(view, MaskSet):
        scores = view.scores.tolist() if view.scores is not None else [None] * len(view)
        yield from map(Region, range(1, len(view) + 1), view.class_ids.tolist(), scores, view.rles)
        return
    segments = masks.to_regions(view) if isinstance(view, LabelMap) else view
    has_scores = not isinstance(view, LabelMap) and segments.scores is not None
    for number, index in enumerate(segments.class_ids.tolist(), 1):
        score = float(segments.scores[number - 1]) if has_scores and segments.scores is not None else None
        yield Region(number, index, score, rle.from_mask(segments.numbers == number))


def _to_segment(region: Region, size: tuple[int, int], classes: ClassMap) -> dict[str, Any]:
    names = {"category_id": classes.ids[region.class_index], "category": classes.names[region.class_index]}
    return {"id": region.number, **names, **to_mask_entry(region.rle, size, region.score)}


def _to_ids(view: View, classes: ClassMap) -> bytes:
    if isinstance(view, LabelMap):
        return masks.encode_id_map(masks.to_ids(view.labels, classes), classes)
    numbers = masks.to_numbers(masks.to_sample("", view, classes))[0]
    return masks.encode_id_map(numbers.astype(np.uint8 if len(view) < 256 else np.uint16))


def to_png(pixels: Pixels) -> bytes:
    """The picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


# --- polygons -----------------------------------------------------------------------------------------------------


def _to_features(view: View, size: tuple[int, int], classes: ClassMap) -> dict[str, Any]:
    features = []
    for region in to_regions(view):
        entry = _to_segment(region, size, classes)
        del entry["segmentation"]
        polygons = to_polygons(rle.to_mask(rle.to_runs(region.rle, size), size))
        geometry = {"type": "MultiPolygon", "coordinates": polygons}
        features.append({"type": "Feature", "id": entry.pop("id"), "properties": entry, "geometry": geometry})
    return {"type": "FeatureCollection", "features": features}


def to_polygons(mask: npt.NDArray[np.bool_]) -> list[list[list[tuple[int, int]]]]:
    """The outlines of a mask, along the edges of its pixels: polygons of rings of (x, y), the outer one first.

    OpenCV goes through the middles of border pixels. On a mask of twice the size these are quarters of the pixels, and
    each lies beside one corner of its pixel: the outline's.
    """
    doubled = cv2.resize(mask.view(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = [_to_ring((contour[:, 0] + 1) // 2) for contour in contours]
    parents = tree[0, :, 3].tolist() if rings else []
    polygons = {i: [ring] for i, (ring, parent) in enumerate(zip(rings, parents, strict=True)) if parent < 0}
    for ring, parent in zip(rings, parents, strict=True):
        if parent >= 0:
            polygons[parent].append(ring)
    return list(polygons.values())


def _to_ring(corners: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    """A closed ring of the corners, (N, 2), at which the outline turns."""
    corners = corners[(corners != np.roll(corners, 1, 0)).any(1)]
    before, after = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
    turns = corners[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]].tolist()
    return [(x, y) for x, y in [*turns, turns[0]]]
