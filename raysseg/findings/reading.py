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
from raysseg.data.coco import to_rle
from raysseg.data.decode import decode_image
from raysseg.data.files import read_file
from raysseg.data.index import Failure, SampleIndex
from raysseg.findings.facts import Problem, SampleFacts, to_facts
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
    """The index of a source that leaves nothing unsaid: bad samples are its failures."""
    return read_index(source.model_copy(update={"on_error": "skip"}))


def iter_share(task: Task, share: int) -> Iterator[Block]:
    """The facts of every so-manieth chunk; the next one is read meanwhile."""
    chunks = task.chunks[share :: task.num_shares]

    def load(number: int) -> list[tuple[Sample, list[Problem]]]:
        name, start = chunks[number]
        index = task.indices[name]
        return read(index.take(np.arange(start, min(start + ROWS, len(index)))))

    for (name, start), samples in zip(chunks, read_ahead(load, range(len(chunks)), threads=1), strict=True):
        facts = [
            to_facts(sample, name, start + place, task.classes, problems)
            for place, (sample, problems) in enumerate(samples)
        ]
        yield pack(name, start, facts)


def unpaired(name: str, index: SampleIndex) -> Block:
    """What listing a split has left out."""
    failures = sorted(index.failures, key=lambda failure: failure.sample_id)
    facts = [SampleFacts(name, -1, f.sample_id, problems=(Problem("missing_pair", f.reason),)) for f in failures]
    return pack(name, -1, facts)


def read(part: SampleIndex) -> list[tuple[Sample, list[Problem]]]:
    """Some samples, and what is wrong with reading them."""
    return [
        _read_rest(part.take(np.array([row])), sample) if isinstance(sample, Failure) else (sample, [])
        for row, sample in enumerate(read_samples(part))
    ]


def _read_rest(single: SampleIndex, failure: Failure) -> tuple[Sample, list[Problem]]:
    """What can be read of a sample that a reader refuses, and why it does."""
    row: dict[str, Any] = single.references.to_pylist()[0]
    problems = list(_missing_files(single.source, row))
    has_image = not problems
    if isinstance(single.source, CocoSource):
        single, refused = _without_invalid(single, row)
        problems += refused
        (again,) = read_samples(single, with_images=has_image)
        if isinstance(again, Sample):
            return again, problems
    image = _read_image(single.source, row) if has_image else None
    if not problems:
        problems = [Problem(_kind_of(single.source, image), failure.reason)]
    return Sample(failure.sample_id, image, 0, 0, None), problems


def _missing_files(source: AnySource, row: Mapping[str, Any]) -> Iterator[Problem]:
    for key, column in _FILES:
        folder, name = getattr(source, key, None), row.get(column)
        if folder is not None and isinstance(name, str) and not storage.exists(storage.join(folder, name)):
            yield Problem("missing_pair", f"{name} is not in {folder}")


def _without_invalid(single: SampleIndex, row: Mapping[str, Any]) -> tuple[SampleIndex, list[Problem]]:
    """A COCO sample less the annotations that can't be read."""
    size, problems, kept = (row["height"], row["width"]), [], []
    for annotation in row["annotations"]:
        try:
            to_rle(annotation["segmentation"], size)
            kept.append(annotation)
        except InputError as error:
            problems.append(Problem("invalid_segmentation", f"annotation {annotation['id']} {error}"))
    column = single.references.schema.get_field_index("annotations")
    values = pa.array([kept], single.references.schema.field("annotations").type)
    return replace(single, references=single.references.set_column(column, "annotations", values)), problems


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
