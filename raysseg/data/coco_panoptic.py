"""The `coco_panoptic` format: segments of one JSON file, their regions as colours of PNG files, a folder of images."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask

from raysseg import rle, storage
from raysseg.config import CocoPanopticSource
from raysseg.data.classes import Vocabulary
from raysseg.data.coco import (
    JSON_ROWS,
    MANIFEST,
    CocoCategory,
    CocoImage,
    find_rows,
    read_categories,
    read_json,
    to_lists,
    to_sample_ids,
    write_json,
)
from raysseg.data.decode import decode_rgb
from raysseg.data.files import READERS, read_file, read_rows, write_image
from raysseg.data.index import Failure, SampleIndex, Written
from raysseg.masks import IMAGE_ERRORS, IdMap, pack_id_map, to_dense, to_numbers
from raysseg.schema import ClassMap, InputError, Sample, Segment

__all__ = ["MANIFEST", "finish", "read_index", "read_samples", "read_vocabulary", "write_part"]


class _Segment(msgspec.Struct):
    id: int
    category_id: int
    iscrowd: int = 0
    score: float | None = None


class _Annotation(msgspec.Struct):
    image_id: int
    file_name: str
    segments_info: list[_Segment]


class _Content(msgspec.Struct):
    images: list[CocoImage]
    annotations: list[_Annotation]
    categories: list[CocoCategory]


def read_vocabulary(source: CocoPanopticSource) -> Vocabulary:
    """The categories of the annotations file."""
    return read_categories(source.annotations)


def read_index(source: CocoPanopticSource) -> SampleIndex:
    """Reads the annotations file; every image is a sample, every sample its own group.

    Raises:
        InputError: the file is no COCO panoptic file, an image has no annotation or two, a segment no category, or two
            images would share a sample id.
    """
    content = read_json(source.annotations, _Content)
    sample_ids = to_sample_ids(source.annotations, content.images)
    found = find_rows(source.annotations, content.images, [a.image_id for a in content.annotations])
    if not np.array_equal(np.sort(found), np.arange(len(content.images))):
        times = np.bincount(found, minlength=len(content.images))
        row = int((times != 1).argmax())
        raise InputError(
            f"{source.annotations}: the image {content.images[row].file_name!r} has {times[row]} annotations; "
            "give each image one, which may have no segments"
        )
    annotations = [content.annotations[i] for i in found.argsort()]
    known = {category.id for category in content.categories}
    segments = [(row, s) for row, annotation in enumerate(annotations) for s in annotation.segments_info]
    for row, segment in segments:
        if segment.category_id not in known:
            raise InputError(
                f"{source.annotations}: segment {segment.id} of {annotations[row].file_name} has category_id "
                f"{segment.category_id}, which is none of `categories`; add the category"
            )
    values = pa.table(
        {
            "id": pa.array([s.id for _, s in segments], pa.int64()),
            "class_id": pa.array([s.category_id for _, s in segments], pa.int32()),
            "is_crowd": pa.array([bool(s.iscrowd) for _, s in segments], pa.bool_()),
            "score": pa.array([s.score for _, s in segments], pa.float64()),
        }
    )
    references = pa.table(
        {
            "sample_id": pa.array(sample_ids, pa.string()),
            "image_id": pa.array([image.id for image in content.images], pa.int64()),
            "image": pa.array([image.file_name for image in content.images], pa.string()),
            "height": pa.array([image.height for image in content.images], pa.int32()),
            "width": pa.array([image.width for image in content.images], pa.int32()),
            "mask": pa.array([annotation.file_name for annotation in annotations], pa.string()),
            "segments": to_lists(values, np.array([row for row, _ in segments], np.int64), len(annotations)),
        }
    )
    return SampleIndex(source, references, np.arange(len(annotations), dtype=np.int64))


def read_samples(source: CocoPanopticSource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
    """Reads the files of some samples, several at a time; the colours of a PNG become places in `segments`."""

    def read(row: dict[str, Any]) -> Sample:
        image = read_file(source.images, row["image"]) if with_images else None
        mask = read_file(source.masks, row["mask"])
        assert mask is not None, "every row of the index names one"
        ids = [segment.pop("id") for segment in row["segments"]]
        numbers = _to_numbers(mask, ids, (row["height"], row["width"]))
        segments = tuple(Segment(**segment, rle=None) for segment in row["segments"])
        return Sample(row["sample_id"], image, row["height"], row["width"], pack_id_map(numbers), segments)

    # what lies on disk waits on decoding: more threads than cores take twice the CPU time
    folders = [source.masks, *([source.images] if with_images and source.images is not None else [])]
    return read_rows(read, references, READERS if any(map(storage.is_remote, folders)) else 2)


def _to_numbers(data: bytes, segment_ids: list[int], size: tuple[int, int]) -> IdMap:
    """1 + place of each pixel's segment, 0 for void, (H, W).

    Raises:
        InputError: the PNG can't be decoded, has another size, or other segments than the annotations file.
    """
    pixels = _decode_mask(data)
    if pixels.shape[:2] != size:
        raise InputError(
            f"the panoptic PNG is {pixels.shape[1]}x{pixels.shape[0]}, the annotations file says {size[1]}x{size[0]} "
            "(width x height); pair the right files"
        )
    return number_segments(pixels, segment_ids)


def _decode_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """(H, W, 3); plain RGB by OpenCV, in half of Pillow's time, and what it refuses by Pillow, which says why."""
    is_plain = data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x02"  # 8 bits a channel, no palette, no transparency
    if is_plain and (pixels := decode_rgb(data)) is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            return np.array(file.convert("RGB"))
    except IMAGE_ERRORS as error:
        raise InputError(f"the panoptic PNG can't be decoded ({error}); write the file anew") from error


def number_segments(pixels: npt.NDArray[np.uint8], segment_ids: Sequence[int]) -> IdMap:
    """1 + place of each pixel's segment, 0 for void, (H, W), of (H, W, 3) RGB.

    Raises:
        InputError: there are other segments than those named.
    """
    coded = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA).view("<u4").ravel()
    # along the rows colours seldom change: looked up are runs, not pixels
    ends = np.append(np.flatnonzero(coded[1:] != coded[:-1]), coded.size - 1)
    lengths = np.diff(ends, prepend=-1)
    colours = coded[ends] & np.uint32(0xFFFFFF)
    known = np.array([0, *segment_ids], np.uint32)
    order = known.argsort()
    place = np.searchsorted(known[order], colours).clip(max=len(known) - 1)
    numbers: IdMap = order[place].astype(np.uint8 if len(known) <= 256 else np.uint16)
    is_unknown = known[numbers] != colours
    if is_unknown.any():
        share = lengths[is_unknown].sum() / coded.size
        raise InputError(
            f"the panoptic PNG holds segment {int(colours[is_unknown][0])} ({share:.1%} of its pixels), which "
            "`segments_info` lacks; add it, or paint those pixels black (void)"
        )
    areas = np.bincount(numbers, lengths, len(known))
    if not areas[1:].all():
        lost = known[1:][areas[1:] == 0][0]
        raise InputError(f"the panoptic PNG has no pixel of segment {lost}; remove it from `segments_info`")
    return numbers.repeat(lengths).reshape(pixels.shape[:2])


# --- writing ------------------------------------------------------------------------------------------------------


def write_part(
    uri: str,
    number: int,
    samples: Sequence[Sample],
    classes: ClassMap,
    *,
    rows_per_group: int,
    names: Sequence[str] | None = None,
) -> Written:
    """Writes images and PNG files; a pixel of several instances goes to the smallest one, which is noted.

    Of a label image every class becomes one segment; that of things is a crowd, since they are not told apart.
    """
    images, annotations, lost = [], [], []
    for place, sample in enumerate(samples):
        numbers, segments, reasons = _to_disjoint(sample, classes)
        colours = _spread(segments, classes)
        mask, out = f"{sample.sample_id}.png", io.BytesIO()
        Image.fromarray(colours.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3][numbers]).save(out, "PNG")
        storage.write_bytes(storage.join(uri, "panoptic", mask), out.getvalue())
        name = write_image(storage.join(uri, "images"), sample) if names is None else names[place]
        images.append(msgspec.json.encode(CocoImage(0, name, sample.height, sample.width)))
        entries = list(_describe(numbers, segments, colours))
        annotations.append([msgspec.json.encode({"file_name": mask, "segments_info": entries})])
        if hidden := len(segments) - len(entries):
            reasons.append(f"{hidden} segments without a pixel of their own are left out")
        if reasons:
            lost.append(Failure(sample.sample_id, "; ".join(reasons)))
    rows = {"sample_id": [sample.sample_id for sample in samples], "image": images, "annotations": annotations}
    return Written(pa.table(rows, schema=JSON_ROWS), tuple(lost))


def _to_disjoint(sample: Sample, classes: ClassMap) -> tuple[IdMap, tuple[Segment, ...], list[str]]:
    """1 + place of each pixel's segment, 0 for void, (H, W); the segments; what is lost."""
    if sample.segments is not None:
        numbers, overlap = to_numbers(sample)
        lost = [f"{overlap} pixels of several instances belong to the smallest one"] if overlap else []
        return numbers, sample.segments, lost
    labels = to_dense(sample, classes).labels
    present = [i for i in np.unique(labels).tolist() if i != classes.ignore]
    table = np.zeros(classes.ignore + 1, np.uint16)
    table[present] = np.arange(1, len(present) + 1)
    return table.take(labels), tuple(Segment(classes.ids[i], classes.things[i], None, None) for i in present), []


def _spread(segments: Sequence[Segment], classes: ClassMap) -> npt.NDArray[np.int64]:
    """Segment ids, which are colours: near that of the class, and distinct; the first is 0, void's."""
    ids = [0]
    for segment in segments:
        red, green, blue = classes.colours[classes.ids.index(segment.class_id)]
        colour = red + 256 * green + 65536 * blue
        while colour in ids:
            colour = (colour + 41) % 2**24  # red by red
        ids.append(colour)
    return np.array(ids)


def _describe(numbers: IdMap, segments: Sequence[Segment], colours: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The entries of `segments_info`, of segments that have a pixel."""
    for number, segment in enumerate(segments, 1):
        encoded = {"size": numbers.shape, "counts": rle.from_mask(numbers == number)}
        if area := int(coco_mask.area(encoded)):
            yield {
                "id": int(colours[number]),
                "category_id": segment.class_id,
                "area": area,
                "bbox": coco_mask.toBbox(encoded).tolist(),
                "iscrowd": int(segment.is_crowd),
            } | ({} if segment.score is None else {"score": segment.score})


def finish(uri: str, parts: Iterable[pa.Table], classes: ClassMap) -> None:
    """Writes the annotations file."""
    write_json(uri, parts, classes, lambda number, annotation: annotation)
