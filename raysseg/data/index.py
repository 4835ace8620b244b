"""What a data set holds, by reference: names and places of samples, not their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raysseg import storage
from raysseg.config import AnySource
from raysseg.data.classes import Vocabulary
from raysseg.schema import ClassMap, Sample

_MOST_BYTES = 2**31 - 1  # of a chunk of strings, offsets included
_ROWS = 1 << 16  # whose names are looked at in one go


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that can't be read or used, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class SampleIndex:
    """The samples of a source, in its own order.

    Attributes:
        source: where they come from.
        references: one row a sample: ``sample_id``, and whatever its format needs to find it.
        groups: (N,) int64, samples that are read in one piece share a number; contiguous, ascending.
        failures: samples that were left out while listing, only where the source skips.
    """

    source: AnySource
    references: pa.Table
    groups: npt.NDArray[np.int64]
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def sample_ids(self) -> list[str]:
        """Names, in the index's order."""
        names: list[str] = self.references["sample_id"].to_pylist()
        return names

    @property
    def ranking(self) -> list[str]:
        """Names in the order in which ties are broken: of COCO's image ids, as its own tools have it; else sorted."""
        if "image_id" not in self.references.column_names:
            return sorted(self.sample_ids)
        order = self.references["image_id"].to_numpy().argsort(kind="stable")
        names: list[str] = self.references["sample_id"].take(pa.array(order)).to_pylist()
        return names

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the names of the samples, their order, and how they are grouped; pickled with the index."""
        digest = hashlib.sha256()
        for number, batch in enumerate(self.references.select(["sample_id"]).to_batches(max_chunksize=_ROWS)):
            digest.update(b"\n" * (number > 0) + "\n".join(batch.column(0).to_pylist()).encode())
        digest.update(self.groups.tobytes())
        return digest.hexdigest()[:16]

    @property
    def in_one_piece(self) -> SampleIndex:
        """The same index with columns of one chunk, from which Arrow takes rows without a look at all others.

        Strings of more than 2 GiB then need large offsets; Arrow can't take from chunks of them at all.
        """
        schema = self.references.schema
        for place, column in enumerate(self.references.columns):
            if column.type == pa.string() and column.nbytes > _MOST_BYTES:
                schema = schema.set(place, schema.field(place).with_type(pa.large_string()))
        return replace(self, references=self.references.cast(schema).combine_chunks())

    def take(self, rows: npt.NDArray[np.int64]) -> SampleIndex:
        """The index of some samples."""
        return replace(self, references=self.references.take(pa.array(rows)), groups=self.groups[rows])

    def thinned(self, most: int) -> SampleIndex:
        """At most so many samples, from first to last at even distances."""
        if len(self) <= most:
            return self
        return self.take(np.unique(np.linspace(0, len(self) - 1, most).astype(np.int64)))


class Format(Protocol):
    """A module that reads one format: the functions below, typed by its source."""

    @staticmethod
    def read_index(source: AnySource) -> SampleIndex:
        """Lists the samples of a source."""

    @staticmethod
    def read_vocabulary(source: AnySource) -> Vocabulary | None:
        """What the source's ids stand for; None where it does not say."""

    @staticmethod
    def read_samples(source: AnySource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
        """Reads samples, in the order of their references; what can't be read comes back as a Failure."""


@dataclass(frozen=True)
class Written:
    """A part of a data set that is on storage.

    Attributes:
        rows: one a sample: what `finish` needs of it.
        lost: samples of which the format could not hold everything, and what it was.
    """

    rows: pa.Table
    lost: tuple[Failure, ...] = ()


class Writer(Protocol):
    """A module that writes one format, part by part; a file called MANIFEST, written last, declares it finished."""

    MANIFEST: str

    @staticmethod
    def write_part(
        uri: str,
        number: int,
        samples: Sequence[Sample],
        classes: ClassMap,
        *,
        rows_per_group: int,
        names: Sequence[str] | None = None,
    ) -> Written:
        """Writes some samples.

        Args:
            uri: folder of the data set.
            number: of the part.
            samples: with the class list's ids.
            classes: the class list.
            rows_per_group: samples that are read at once later, at most; of shards.
            names: of the images, which stay where they are; None: the samples' images are written, too. Shards hold
                what images the samples have.

        Raises:
            InputError: the format has no place for what a sample holds.
        """

    @staticmethod
    def finish(uri: str, parts: Iterable[pa.Table], classes: ClassMap) -> None:
        """Writes what stands once: the index or the annotations, and the classes; `parts`, the rows of what is
        written, are gone through more than once."""


def write_failures(run_uri: str, failures: dict[str, list[Failure]]) -> None:
    """Lists skipped samples beside a run, as skipped.json by split; nothing where there are none."""
    if any(failures.values()):
        content = {split: [asdict(failure) for failure in entries] for split, entries in failures.items()}
        storage.write_text(storage.join(run_uri, "skipped.json"), json.dumps(content, indent=2))


def update_failures(run_uri: str, split: str, failures: list[Failure]) -> None:
    """Lists the skipped samples of one split in skipped.json, and leaves the others as they are."""
    if failures:
        write_failures(run_uri, read_failures(run_uri) | {split: failures})


def read_failures(run_uri: str) -> dict[str, list[Failure]]:
    """The skipped samples of a run by split; none where there is no list."""
    uri = storage.join(run_uri, "skipped.json")
    known = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    return {split: [Failure(**entry) for entry in entries] for split, entries in known.items()}
