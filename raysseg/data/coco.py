"""The `coco` format: instances of one JSON file, as polygons or RLE, and a folder of images.

The JSON is read once, where the index is made. Each annotation's segmentation stays the text that it was, in an Arrow
column that Ray's object store holds once a node; it becomes RLE when its sample is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pycocotools import mask as coco_mask

from raysseg import rle, storage
from raysseg.config import CocoSource
from raysseg.data.classes import Category, Vocabulary, to_categories
from raysseg.data.files import read_file, read_rows, write_image
from raysseg.data.index import Failure, SampleIndex, Written
from raysseg.masks import to_numbers
from raysseg.schema import ClassMap, InputError, Sample, Segment

T = TypeVar("T")


class CocoImage(msgspec.Struct):
    """An entry of `images`."""

    id: int
    file_name: str
    height: int
    width: int


class CocoCategory(msgspec.Struct):
    """An entry of `categories`."""

    id: int
    name: str
    color: tuple[int, int, int] | None = None
    isthing: int = 1


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int
    segmentation: msgspec.Raw
    id: int = 0
    iscrowd: int = 0
    score: float | None = None
    area: float | None = None
    bbox: list[float] | None = None


class _Content(msgspec.Struct):
    images: list[CocoImage]
    annotations: list[_Annotation]
    categories: list[CocoCategory]


class _Result(msgspec.Struct):
    """An entry of COCO results, which are a list of these and nothing else."""

    image_id: int
    category_id: int
    score: float
    segmentation: msgspec.Raw = msgspec.Raw(b"")
    bbox: list[float] | None = None


class _Categories(msgspec.Struct):
    categories: list[CocoCategory]


class _UncompressedRle(msgspec.Struct):
    counts: list[int]
    size: tuple[int, int]


class _CompressedRle(msgspec.Struct):
    counts: str
    size: tuple[int, int]


def read_vocabulary(source: CocoSource) -> Vocabulary:
    """The categories of the annotations file."""
    return read_categories(source.annotations)


def read_index(source: CocoSource) -> SampleIndex:
    """Reads the annotations file; every image is a sample, every sample its own group.

    Raises:
        InputError: the file is no COCO instances file, an annotation has no image or no category, or two images would
            share a sample id.
    """
    return _to_index(source, read_json(source.annotations, _Content))


def _to_index(source: CocoSource, content: _Content) -> SampleIndex:
    images, annotations = content.images, content.annotations
    sample_ids = to_sample_ids(source.annotations, images)
    rows = find_rows(source.annotations, images, [annotation.image_id for annotation in annotations])
    known = {category.id for category in content.categories}
    for annotation in annotations:
        if annotation.category_id not in known and not source.is_skipping:  # else its sample is, where it is used
            raise InputError(
                f"{source.annotations}: annotation {annotation.id} has category_id {annotation.category_id}, which is "
                "none of `categories`; add the category, or remove the annotation"
            )
    references = pa.table(
        {
            "sample_id": pa.array(sample_ids, pa.string()),
            "image_id": pa.array([image.id for image in images], pa.int64()),
            "image": pa.array([image.file_name for image in images], pa.string()),
            "height": pa.array([image.height for image in images], pa.int32()),
            "width": pa.array([image.width for image in images], pa.int32()),
            "annotations": _to_column(annotations, rows, len(images)),
        }
    )
    return SampleIndex(source, references, np.arange(len(images), dtype=np.int64))


def _to_column(annotations: Sequence[_Annotation], rows: npt.NDArray[np.int64], num_rows: int) -> pa.Array:
    """Annotations as one list a sample; `rows` are their samples' places."""
    boxes = [a.bbox if a.bbox is not None and len(a.bbox) == 4 else None for a in annotations]
    values = pa.table(
        {
            "id": pa.array([a.id for a in annotations], pa.int64()),
            "class_id": pa.array([a.category_id for a in annotations], pa.int32()),
            "is_crowd": pa.array([bool(a.iscrowd) for a in annotations], pa.bool_()),
            "score": pa.array([a.score for a in annotations], pa.float64()),
            "segmentation": pa.array([bytes(a.segmentation) for a in annotations], pa.large_binary()),
            "area": pa.array([a.area for a in annotations], pa.float64()),
            "box": pa.array(boxes, pa.list_(pa.float64(), 4)),
        }
    )
    return to_lists(values.take(pa.array(np.argsort(rows, kind="stable"))), rows, num_rows)


def read_predictions(source: CocoSource, truth: SampleIndex, classes: ClassMap) -> SampleIndex:
    """Reads a data set whose annotations carry scores, or COCO results.

    Results have the samples of the truth, in its order; where there is none, nothing was detected.

    Args:
        source: of either.
        truth: the samples that results are of.
        classes: whose ids they have.

    Raises:
        InputError: as read_index; or a result is of an image or a category that the truth lacks.
    """
    content = read_json(source.annotations, cast("type[_Content | list[_Result]]", _Content | list[_Result]))
    if isinstance(content, _Content):
        return _to_index(source, content)
    if "annotations" not in truth.references.column_names:
        raise InputError(
            f"{source.annotations}: holds COCO results, which name images by `id`, but `data` of format "
            f"{truth.source.format!r} has none; give `data` as coco, or predictions with `images` of their own"
        )
    place = {image_id: row for row, image_id in enumerate(truth.references["image_id"].to_pylist())}
    categories = {*classes.index_of, *classes.dropped}
    annotations = []
    for number, result in enumerate(content, 1):
        try:
            if result.image_id not in place:
                raise InputError(f"has image_id {result.image_id}, which is none of the ground truth's `images`")
            if result.category_id not in categories:
                raise InputError(f"has category_id {result.category_id}, which is none of the ground truth's")
            annotations.append(_to_annotation(number, result))
        except InputError as error:
            raise InputError(f"{source.annotations}: result {number} {error}; mend or remove it") from error
    rows = np.array([place[result.image_id] for result in content], np.int64)
    column = truth.references.schema.get_field_index("annotations")
    lists = _to_column(annotations, rows, len(truth))
    return SampleIndex(source, truth.references.set_column(column, "annotations", lists), truth.groups)


def _to_annotation(number: int, result: _Result) -> _Annotation:
    """As pycocotools completes a result: a box, if there is one, gives the area, and the mask where there is none."""
    segmentation, area = result.segmentation, None
    if result.bbox:
        if len(result.bbox) != 4:
            raise InputError(f"has a bbox of {len(result.bbox)} numbers; allowed: x, y, width, height")
        x, y, width, height = result.bbox
        area = width * height
        if not bytes(segmentation):
            corners = [x, y, x, y + height, x + width, y + height, x + width, y]
            segmentation = msgspec.Raw(msgspec.json.encode([corners]))
    elif not bytes(segmentation):
        raise InputError("has neither a segmentation nor a bbox")
    return _Annotation(
        result.image_id, result.category_id, segmentation, number, score=result.score, area=area, bbox=result.bbox
    )


def read_samples(source: CocoSource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
    """Reads the images of some samples, several at a time, and turns their annotations to RLE."""

    def read(row: dict[str, Any]) -> Sample:
        size = (row["height"], row["width"])
        image = read_file(source.images, row["image"]) if with_images else None
        segments = tuple(_to_segment(annotation, size) for annotation in row["annotations"])
        return Sample(row["sample_id"], image, *size, None, segments)

    return read_rows(read, references)


def _to_segment(annotation: dict[str, Any], size: tuple[int, int]) -> Segment:
    try:
        encoded = to_rle(annotation["segmentation"], size)
    except InputError as error:
        raise InputError(f"annotation {annotation['id']} {error}") from error
    box = tuple(annotation["box"]) if annotation["box"] is not None else None
    return Segment(
        annotation["class_id"], annotation["is_crowd"], annotation["score"], encoded, annotation["area"], box
    )


_as_segmentation = msgspec.json.Decoder(list[list[float]] | dict[str, Any]).decode


def to_rle(segmentation: bytes, size: tuple[int, int]) -> bytes:
    """Compressed RLE of an annotation's `segmentation`, which is JSON: polygons, or RLE of either kind.

    Args:
        segmentation: as the file has it.
        size: (height, width) of the image.

    Raises:
        InputError: it is malformed, or an RLE is not of this size.
    """
    try:
        value = _as_segmentation(segmentation)
        if isinstance(value, list):
            return rle.from_polygons(value, size)
        found: _CompressedRle | _UncompressedRle
        if isinstance(value.get("counts"), str):
            found = msgspec.convert(value, _CompressedRle)
        else:
            found = msgspec.convert(value, _UncompressedRle)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InputError(
            f"has a segmentation that can't be read ({error}); allowed: a list of polygons, or RLE as "
            '{"counts": ..., "size": [height, width]}'
        ) from error
    if found.size != size:
        raise InputError(
            f"has an RLE of {found.size[1]}x{found.size[0]}, but its image has {size[1]}x{size[0]} (width x height); "
            "encode it anew"
        )
    if isinstance(found, _UncompressedRle):
        return rle.from_counts(found.counts, size)
    encoded = found.counts.encode()
    rle.to_runs(encoded, size)  # whether it fits
    return encoded


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
    """Writes the images; all segments become RLE, those of id maps and stuff too.

    Raises:
        InputError: a sample has labels of classes alone.
    """
    images, annotations = [], []
    for place, sample in enumerate(samples):
        if sample.segments is None:
            raise InputError(
                f"{sample.sample_id}: has labels of classes alone, which COCO instances can't hold; "
                "write output.format masks or coco_panoptic"
            )
        name = write_image(storage.join(uri, "images"), sample) if names is None else names[place]
        images.append(msgspec.json.encode(CocoImage(0, name, sample.height, sample.width)))
        annotations.append([msgspec.json.encode(found) for found in _to_annotations(sample)])
    rows = {"sample_id": [sample.sample_id for sample in samples], "image": images, "annotations": annotations}
    return Written(pa.table(rows, schema=JSON_ROWS))


def _to_annotations(sample: Sample) -> Iterator[dict[str, Any]]:
    assert sample.segments is not None
    numbers = to_numbers(sample)[0] if sample.id_map is not None else None
    for number, segment in enumerate(sample.segments, 1):
        encoded = rle.from_mask(numbers == number) if numbers is not None else segment.rle
        assert encoded is not None, "segments without an id map carry their own RLE"
        size = [sample.height, sample.width]
        compressed = {"size": size, "counts": encoded}
        yield {
            "category_id": segment.class_id,
            "segmentation": {"size": size, "counts": encoded.decode()},
            "area": int(coco_mask.area(compressed)) if segment.area is None else segment.area,
            "bbox": coco_mask.toBbox(compressed).tolist() if segment.box is None else segment.box,
            "iscrowd": int(segment.is_crowd),
        } | ({} if segment.score is None else {"score": segment.score})


def finish(uri: str, parts: Iterable[pa.Table], classes: ClassMap) -> None:
    """Writes the annotations file."""
    write_json(uri, parts, classes, lambda number, annotation: {"id": number, **annotation})


RESULTS = "results.json"


@storage.persistent
def write_results(uri: str, parts: Iterable[pa.Table]) -> None:
    """Writes COCO results, whose areas and boxes are those of the masks: a box of its own would change the areas."""
    with storage.open_output(storage.join(uri, RESULTS)) as file:
        file.write(b"[")
        _write_items(file, ({key: a[key] for key in _RESULT_KEYS} for a in _iter_annotations(parts)))
        file.write(b"]")


_RESULT_KEYS = ("image_id", "category_id", "segmentation", "score")


# --- what all formats with annotation files share -----------------------------------------------------------------


def read_json(uri: str, kind: type[T]) -> T:
    """Reads a file into structs, which keep what they name; raises InputError if that is not in it."""
    try:
        return msgspec.json.decode(storage.read_bytes(uri), type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InputError(f"{uri}: not the COCO file that it should be: {error}") from error


def read_categories(uri: str) -> Vocabulary:
    """COCO's categories of an annotations file."""
    categories = read_json(uri, _Categories).categories
    return Vocabulary(tuple(Category(c.id, c.name, c.color, bool(c.isthing)) for c in categories))


def to_sample_ids(uri: str, images: Sequence[CocoImage]) -> list[str]:
    """The images' file names less their suffixes; raises InputError if there is no image, or one id stands for two."""
    if not images:
        raise InputError(f"{uri}: `images` is empty; there is nothing to read")
    sample_ids = [str(PurePosixPath(image.file_name).with_suffix("")) for image in images]
    if len(set(sample_ids)) < len(sample_ids):
        first = {name: i for i, name in reversed(list(enumerate(sample_ids)))}
        twice = next(i for i, name in enumerate(sample_ids) if first[name] != i)
        raise InputError(
            f"{uri}: the images {images[first[sample_ids[twice]]].file_name!r} and {images[twice].file_name!r} share "
            "one stem, which is to name the sample; rename one"
        )
    return sample_ids


def find_rows(uri: str, images: Sequence[CocoImage], image_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """For each annotation the place of its image; raises InputError if there is none, or an image's id stands twice."""
    place = {image.id: row for row, image in enumerate(images)}
    if len(place) < len(images):
        raise InputError(f"{uri}: two images share one `id`; give each its own")
    rows = np.array([place.get(image_id, -1) for image_id in image_ids], np.int64)
    if (rows < 0).any():
        lost = image_ids[int((rows < 0).argmax())]
        raise InputError(f"{uri}: an annotation has image_id {lost}, which is none of `images`; add the image")
    return rows


def to_lists(values: pa.Table, rows: npt.NDArray[np.int64], num_rows: int) -> pa.Array:
    """One list a sample, of structs that stand sample by sample; `rows` are their samples' places, in any order."""
    offsets = np.concatenate([[0], np.bincount(rows, minlength=num_rows).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values.combine_chunks().to_struct_array().combine_chunks())


MANIFEST = "annotations.json"

JSON_ROWS = pa.schema(
    [("sample_id", pa.string()), ("image", pa.binary()), ("annotations", pa.list_(pa.large_binary()))]
)
"""What a part of a COCO data set leaves for its end: JSON without the numbers that only the whole can give."""


def to_image_ids(sample_ids: Sequence[str]) -> list[int]:
    """The numbers that sample ids are, as in COCO's own file names; else 1, 2, 3, ..."""
    if all(name.isdecimal() for name in sample_ids) and len({int(name) for name in sample_ids}) == len(sample_ids):
        return [int(name) for name in sample_ids]
    return list(range(1, len(sample_ids) + 1))


@storage.persistent
def write_json(
    uri: str,
    parts: Iterable[pa.Table],
    classes: ClassMap,
    describe: Callable[[int, dict[str, Any]], dict[str, Any]],
) -> None:
    """Writes an annotations file, one part in memory at a time.

    Args:
        uri: folder of the data set.
        parts: rows of JSON_ROWS, and the images' own ids as `image_id` where they have some.
        classes: the categories.
        describe: an annotation, counted from 1, as the file has it.
    """
    with storage.open_output(storage.join(uri, MANIFEST)) as file:
        file.write(b'{"images":[')
        images = (
            (image_id, image)
            for part, ids in _with_image_ids(parts)
            for image_id, image in zip(ids, part["image"].to_pylist(), strict=True)
        )
        _write_items(file, ({**msgspec.json.decode(image), "id": image_id} for image_id, image in images))
        file.write(b'],"annotations":[')
        _write_items(file, (describe(number, a) for number, a in enumerate(_iter_annotations(parts), 1)))
        file.write(b'],"categories":' + msgspec.json.encode(to_categories(classes, "color")) + b"}")


def _iter_annotations(parts: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    for part, image_ids in _with_image_ids(parts):
        for image_id, encoded in zip(image_ids, part["annotations"].to_pylist(), strict=True):
            for annotation in encoded:
                yield {"image_id": image_id, **msgspec.json.decode(annotation)}


def _with_image_ids(parts: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, list[int]]]:
    """Each part with the ids of its images: their own, or what their names give."""
    given: Iterator[int] | None = None
    for part in parts:
        if "image_id" in part.column_names:
            yield part, part["image_id"].to_pylist()
            continue
        given = given or iter(to_image_ids([name for part in parts for name in part["sample_id"].to_pylist()]))
        yield part, list(islice(given, len(part)))


def _write_items(file: IO[bytes], items: Iterable[dict[str, Any]]) -> None:
    for i, item in enumerate(items):
        file.write(b"," * (i > 0) + msgspec.json.encode(item))
