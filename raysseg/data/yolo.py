"""The `yolo` format: a folder of images, and text files of polygons in shares of the image's sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from raysseg import rle, storage
from raysseg.config import YoloSource
from raysseg.data.classes import Category, Vocabulary
from raysseg.data.files import IMAGE_SUFFIXES, decode_head, files_by_stem, read_file, read_rows
from raysseg.data.index import Failure, SampleIndex
from raysseg.schema import InputError, Sample, Segment


def read_vocabulary(source: YoloSource) -> Vocabulary | None:
    """The `names` of the data set's YAML file, a list or a mapping of numbers to names."""
    if source.names is None:
        return None
    try:
        names = yaml.safe_load(storage.read_text(source.names))["names"]
        items = names.items() if isinstance(names, dict) else enumerate(names)
        return Vocabulary(tuple(Category(int(number), str(name)) for number, name in items))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source.names}: holds no `names` ({error!r}); write a list of names, or a mapping of numbers to names"
        ) from error


def read_index(source: YoloSource) -> SampleIndex:
    """Pairs images with label files; an image without one holds no instance.

    Raises:
        InputError: an empty folder, a label file without its image (unless the source skips), a stem twice.
    """
    images, labels = (
        files_by_stem(source.images, IMAGE_SUFFIXES),
        files_by_stem(source.labels, frozenset({".txt"})),
    )
    lost = sorted(labels.keys() - images)
    failures = tuple(Failure(stem, f"{stem}: {labels[stem]} has no image in {source.images}") for stem in lost)
    if failures and not source.is_skipping:
        raise InputError(
            f"{source.labels}: {len(lost)} of {len(labels)} label files have no image of the same stem in "
            f"{source.images}, such as {labels[lost[0]]}; add the images, or set on_error: skip"
        )
    stems = sorted(images)
    references = pa.table(
        {
            "sample_id": pa.array(stems, pa.string()),
            "image": pa.array([images[stem] for stem in stems], pa.string()),
            "labels": pa.array([labels.get(stem) for stem in stems], pa.string()),
        }
    )
    return SampleIndex(source, references, np.arange(len(stems), dtype=np.int64), failures)


def read_samples(source: YoloSource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
    """Reads the files of some samples, several at a time; images are always read, since only they know their size."""

    def read(row: dict[str, Any]) -> Sample:
        image, text = read_file(source.images, row["image"]), read_file(source.labels, row["labels"])
        assert image is not None, "every row of the index names one"
        size = decode_head(image).size
        lines = (text or b"").decode(errors="replace").splitlines()
        segments = tuple(
            _to_segment(line, number, size) for number, line in enumerate(lines, 1) if line and not line.isspace()
        )
        return Sample(row["sample_id"], image if with_images else None, *size, None, segments)

    return read_rows(read, references)


def _to_segment(line: str, number: int, size: tuple[int, int]) -> Segment:
    """`class x1 y1 x2 y2 ...`, coordinates as shares of the width and the height."""
    words = line.split()
    try:
        class_id, shares = int(words[0]), np.array(words[1:], np.float64)
    except ValueError as error:
        raise InputError(f"line {number} of the labels can't be read ({error}); write class x1 y1 x2 y2 ...") from error
    if len(shares) == 4:
        raise InputError(f"line {number} of the labels holds a box; draw a polygon of three points or more")
    if len(shares) < 6 or len(shares) % 2 or not np.isfinite(shares).all():
        raise InputError(
            f"line {number} of the labels has {len(shares)} coordinates; allowed: x, y of three points or more"
        )
    height, width = size
    polygon: list[float] = (shares.reshape(-1, 2) * (width, height)).ravel().tolist()
    return Segment(class_id, False, None, rle.from_polygons([polygon], size))
