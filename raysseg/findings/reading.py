"""Reads samples whatever is wrong with them: what readers refuse comes back as problems, beside what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg import storage
from raysseg.config import AnySource, CocoSource, YoloSource
from raysseg.data import read_index, read_samples
from raysseg.data.batches import read_ahead
from raysseg.data.coco import read_boxes, to_rle
from raysseg.data.decode import decode_image
from raysseg.data.files import read_file
from raysseg.data.index import Failure, SampleIndex
from raysseg.findings.facts import Boxes, Problem, SampleFacts, to_facts
from raysseg.findings.store import Block, pack
from raysseg.schema import ClassMap, InputError, Sample

ROWS = 16  # samples read in one go

_FILES = (("images", "image"), ("masks", "mask"), ("labels", "labels"))
"""The key of a source's folder, and the column of the files in it."""


@dataclass(frozen=True)
class Task:
    """What every share of the work needs; `classes` is None where they follow from the masks."""

    indices: Mapping[str, SampleIndex]
    classes: ClassMap | None
    num_shares: int

    @property
    def chunks(self) -> list[tuple[str, int]]:
        """Split and first row of what is read in one go."""
        return [(name, start) for name, index in self.indices.items() for start in range(0, len(index), ROWS)]


def open_index(source: AnySource) -> SampleIndex:
    """The index of a source that leaves nothing unsaid: bad samples are its failures, and boxes a column of it."""
    index = read_index(source.model_copy(update={"on_error": "skip"}))
    if isinstance(source, CocoSource):
        return replace(index, references=index.references.append_column("boxes", read_boxes(source)))
    return index


def iter_share(task: Task, share: int) -> Iterator[Block]:
    """The facts of every so-manieth chunk; the next one is read meanwhile."""
    chunks = task.chunks[share :: task.num_shares]

    def load(number: int) -> list[tuple[Sample, Boxes | None, list[Problem]]]:
        name, start = chunks[number]
        index = task.indices[name]
        return read(index.take(np.arange(start, min(start + ROWS, len(index)))))

    for (name, start), samples in zip(chunks, read_ahead(load, range(len(chunks)), threads=1), strict=True):
        facts = [
            to_facts(sample, name, start + place, task.classes, boxes, problems)
            for place, (sample, boxes, problems) in enumerate(samples)
        ]
        yield pack(name, start, facts)


def unpaired(name: str, index: SampleIndex) -> Block:
    """What listing a split has left out."""
    failures = sorted(index.failures, key=lambda failure: failure.sample_id)
    facts = [SampleFacts(name, -1, f.sample_id, problems=(Problem("missing_pair", f.reason),)) for f in failures]
    return pack(name, -1, facts)


def read(part: SampleIndex) -> list[tuple[Sample, Boxes | None, list[Problem]]]:
    """Some samples, their boxes where the format has any, and what is wrong with reading them."""
    found = []
    for row, sample in enumerate(read_samples(part)):
        single = part.take(np.array([row]))
        problems: list[Problem] = []
        if isinstance(sample, Failure):
            single, sample, problems = _read_rest(single, sample)
        found.append((sample, _to_boxes(single.references), problems))
    return found


def _to_boxes(references: pa.Table) -> Boxes | None:
    if "boxes" not in references.column_names:
        return None
    boxes = references["boxes"][0].values
    return np.stack([boxes.field(side).to_numpy(zero_copy_only=False) for side in range(4)], axis=1)


def _read_rest(single: SampleIndex, failure: Failure) -> tuple[SampleIndex, Sample, list[Problem]]:
    """What can be read of a sample that a reader refuses, and why it does."""
    row: dict[str, Any] = single.references.to_pylist()[0]
    problems = list(_missing_files(single.source, row))
    has_image = not problems
    if isinstance(single.source, CocoSource):
        single, refused = _without_invalid(single, row)
        problems += refused
        (again,) = read_samples(single, with_images=has_image)
        if isinstance(again, Sample):
            return single, again, problems
    image = _read_image(single.source, row) if has_image else None
    if not problems:
        problems = [Problem(_kind_of(single.source, image), failure.reason)]
    return single, Sample(failure.sample_id, image, 0, 0, None), problems


def _missing_files(source: AnySource, row: Mapping[str, Any]) -> Iterator[Problem]:
    for key, column in _FILES:
        folder, name = getattr(source, key, None), row.get(column)
        if folder is not None and isinstance(name, str) and not storage.exists(storage.join(folder, name)):
            yield Problem("missing_pair", f"{name} is not in {folder}")


def _without_invalid(single: SampleIndex, row: Mapping[str, Any]) -> tuple[SampleIndex, list[Problem]]:
    """A COCO sample less the annotations that can't be read."""
    size, problems, kept = (row["height"], row["width"]), [], []
    for place, annotation in enumerate(row["annotations"]):
        try:
            to_rle(annotation["segmentation"], size)
            kept.append(place)
        except InputError as error:
            problems.append(Problem("invalid_segmentation", f"annotation {annotation['id']} {error}"))
    references = single.references
    for name in ("annotations", "boxes"):
        column = references.schema.get_field_index(name)
        values = pa.array([[row[name][place] for place in kept]], references.schema.field(name).type)
        references = references.set_column(column, name, values)
    return replace(single, references=references), problems


def _read_image(source: AnySource, row: Mapping[str, Any]) -> bytes | None:
    name = row.get("image")
    try:
        return read_file(getattr(source, "images", None), name) if isinstance(name, str) else None
    except storage.StorageError:
        return None


def _kind_of(source: AnySource, image: bytes | None) -> str:
    """What a refused sample suffers from: its image, or else its annotation."""
    if isinstance(source, YoloSource) and image is not None:
        try:
            decode_image(image)
        except InputError:
            return "unreadable"
        return "invalid_segmentation"
    return "unreadable"
