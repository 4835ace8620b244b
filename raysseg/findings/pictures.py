"""Samples as the page shows them: the image under its labels, with the segments that are meant in boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from raysseg import masks
from raysseg.data.decode import Pixels, decode_image
from raysseg.findings.facts import to_id_map
from raysseg.findings.reading import Task, read
from raysseg.report import Labels, Picture, outline, paint_labels, picture_size, resize_labels, to_data_uri
from raysseg.schema import ClassMap, InputError, Sample

_LOUD = (255, 32, 96)  # of boxes


class Wanted(NamedTuple):
    """A sample to draw: its split, its row there, and the segments to put into boxes."""

    split: str
    row: int
    segments: tuple[int, ...]


class Shot(NamedTuple):
    """A drawn sample."""

    wanted: Wanted
    picture: Picture


def iter_shots(task: Task, wanted: Sequence[Wanted]) -> Iterator[Shot]:
    """Draws samples, those of which anything can be shown."""
    assert task.classes is not None, "colours are those of classes"
    for item in wanted:
        ((sample, _),) = read(task.indices[item.split].take(np.array([item.row])))
        if (pixels := draw(sample, task.classes, item.segments)) is not None:
            size = (pixels.shape[1], pixels.shape[0])
            yield Shot(item, Picture(sample.sample_id, to_data_uri(pixels), size))


def draw(sample: Sample, classes: ClassMap, segments: Sequence[int]) -> Pixels | None:
    """The sample's image under its labels, either alone if the other is of no use; None without both."""
    image = _image(sample)
    ids = _ids(sample, classes)
    if ids is None:
        return None if image is None else _fitted(image, picture_size(*image.shape[:2]))
    size = picture_size(*(ids.shape[:2] if image is None else image.shape[:2]))
    base = np.full((size[1], size[0], 3), 127, np.uint8) if image is None else _fitted(image, size)
    numbers = resize_labels(ids, size)
    painted = paint_labels(base, _to_classes(numbers, sample, classes), classes)
    if sample.segments is not None:  # what lies between segments is not wrong: it shows as it is
        painted = np.where(numbers[..., None] > 0, painted, base)
    painted = outline(painted.astype(np.float64), numbers)
    for number in segments:
        x, y, width, height = cv2.boundingRect((numbers == number).view(np.uint8))
        if width:
            cv2.rectangle(painted, (x - 3, y - 3), (x + width + 2, y + height + 2), _LOUD, 2)
    return painted


def _image(sample: Sample) -> Pixels | None:
    try:
        return None if sample.image is None else decode_image(sample.image)
    except InputError:
        return None


def _ids(sample: Sample, classes: ClassMap) -> masks.IdMap | None:
    try:
        return to_id_map(sample, classes)
    except InputError:
        return None


def _fitted(image: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _to_classes(ids: Labels, sample: Sample, classes: ClassMap) -> Labels:
    """Class indices, of ids or of numbers of segments; what has no class is ignored."""
    index_of = classes.index_of
    table = np.full(65536, classes.ignore, classes.dtype)
    if sample.segments is None:
        table[list(index_of)] = list(index_of.values())
    else:
        table[1 : len(sample.segments) + 1] = [
            classes.ignore if s.is_crowd else index_of.get(s.class_id, classes.ignore) for s in sample.segments
        ]
    return table.take(ids)
