"""Any source into canonical Parquet shards, or into folders that other programs read; spread over the cluster."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysseg import masks, storage
from raysseg.config import ShardJob
from raysseg.data import WRITERS, read_class_map, read_index, read_samples
from raysseg.data.decode import decode_pair
from raysseg.data.files import READERS
from raysseg.data.index import Failure, SampleIndex, write_failures
from raysseg.runtime import spread
from raysseg.schema import ClassMap, InputError, Sample

logger = logging.getLogger(__name__)

_PARTS = "parts"  # folder of what is written so far; gone in the end


@dataclass(frozen=True)
class ShardResult:
    """What `raysseg shard` prints.

    Attributes:
        name: of the job.
        uri: folder of the data set.
        format: its format.
        num_samples: samples in it.
        skipped: samples that are not; skipped.json lists them.
        lost: samples of which the format could not hold everything; lost.json says what.
    """

    name: str
    uri: str
    format: str
    num_samples: int
    skipped: int
    lost: int


@dataclass(frozen=True)
class _Part:
    """A piece of the output that is on storage."""

    number: int
    rows: pa.Table
    failures: list[Failure]
    lost: list[Failure]


@dataclass(frozen=True)
class _Plan:
    """What every task needs; `digest` tells this job's parts from those of another."""

    job: ShardJob
    classes: ClassMap
    index: SampleIndex
    digest: str


def shard(job: ShardJob) -> ShardResult:
    """Writes the samples of a source in another format; the manifest comes last, so that half a data set is none.

    A job that was broken off goes on where it stopped.

    Raises:
        InputError: a sample can't be used and the source does not skip, or a finished data set stands there already.
        StorageError: the source or the output can't be reached.
    """
    uri, writer = job.output.uri, WRITERS[job.output.format]
    if storage.exists(storage.join(uri, writer.MANIFEST)):
        raise InputError(f"output.uri: {uri} holds a finished data set; name another folder, or delete it first")
    index = read_index(job.data)
    plan = _Plan(job, read_class_map(job.classes, job.data), index, _digest(job, index))
    numbers = range(-(-len(index) // job.output.rows_per_file))
    parts = {part.number: part for part in _read_parts(plan)}
    if parts:
        logger.info("shard: %d of %d parts are there already", len(parts), len(numbers))
    missing = [number for number in numbers if number not in parts]
    for part in spread(_write_part, plan, missing, job.scaling):
        parts[part.number] = part
        logger.info("shard: %d of %d parts", len(parts), len(numbers))
    written = [parts[number] for number in numbers]
    failures = [*index.failures, *(failure for part in written for failure in part.failures)]
    rows = [part.rows for part in written if len(part.rows)]
    if not rows:
        raise InputError(f"data: none of the {len(failures)} samples can be used, such as {failures[0].reason}")
    lost = [loss for part in written for loss in part.lost]
    write_failures(uri, {"data": failures})
    if lost:
        storage.write_text(storage.join(uri, "lost.json"), json.dumps([asdict(loss) for loss in lost], indent=2))
        logger.warning("%s can't hold all of %d samples; lost.json says what", job.output.format, len(lost))
    writer.finish(uri, rows, plan.classes.at_rest)
    storage.delete_folder(storage.join(uri, _PARTS))
    return ShardResult(job.name, uri, job.output.format, sum(map(len, rows)), len(failures), len(lost))


def _write_part(plan: _Plan, number: int) -> Iterator[_Part]:
    output = plan.job.output
    first = number * output.rows_per_file
    rows = np.arange(first, min(first + output.rows_per_file, len(plan.index)))
    samples: list[Sample] = []
    failures: list[Failure] = []
    for sample in read_samples(plan.index.take(rows)):
        try:
            samples.append(_to_canonical(sample, plan.classes))
        except InputError as error:
            if not plan.index.source.is_skipping:
                raise
            failures.append(Failure(sample.sample_id, str(error)))
    write = WRITERS[output.format].write_part
    written = write(output.uri, number, samples, plan.classes.at_rest, rows_per_group=output.rows_per_group)
    part = _Part(number, written.rows, failures, list(written.lost))
    _save_part(plan, part)
    yield part


def _to_canonical(sample: Sample | Failure, classes: ClassMap) -> Sample:
    """A sample that is known to decode, with the ids of the class list and a compressed id map."""
    if isinstance(sample, Failure):
        raise InputError(sample.reason)
    _, truth = decode_pair(sample, classes)
    assert isinstance(truth, masks.LabelMap)
    height, width = truth.labels.shape
    sample = replace(sample, height=height, width=width)
    if sample.segments is None:
        return replace(sample, id_map=masks.compress_id_map(masks.to_ids(truth.labels, classes)))
    return masks.with_classes(sample, classes)


# --- parts, so that a job can go on -------------------------------------------------------------------------------


def _digest(job: ShardJob, index: SampleIndex) -> str:
    what = [job.model_dump_json(exclude={"scaling", "name"}), index.fingerprint]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()


def _part_uri(plan: _Plan, number: int) -> str:
    return storage.join(plan.job.output.uri, _PARTS, f"{number:05d}.parquet")


def _save_part(plan: _Plan, part: _Part) -> None:
    notes = {"failures": part.failures, "lost": part.lost}
    metadata = {key: json.dumps([asdict(failure) for failure in value]) for key, value in notes.items()}
    sink = io.BytesIO()
    pq.write_table(part.rows.replace_schema_metadata({"digest": plan.digest, **metadata}), sink)
    storage.write_bytes(_part_uri(plan, part.number), sink.getvalue())


def _read_parts(plan: _Plan) -> list[_Part]:
    """The parts that an earlier run of this job has written."""
    folder = storage.join(plan.job.output.uri, _PARTS)
    numbers = [int(Path(entry.path).stem) for entry in storage.list_files(folder)] if storage.exists(folder) else []
    with ThreadPoolExecutor(READERS) as pool:
        return [part for part in pool.map(partial(_read_part, plan), numbers) if part is not None]


def _read_part(plan: _Plan, number: int) -> _Part | None:
    """A part that is there; None where it is another job's."""
    rows = pq.read_table(io.BytesIO(storage.read_bytes(_part_uri(plan, number))))
    metadata = {key.decode(): value.decode() for key, value in rows.schema.metadata.items()}
    if metadata.get("digest") != plan.digest:
        return None
    failures, lost = ([Failure(**entry) for entry in json.loads(metadata[key])] for key in ("failures", "lost"))
    return _Part(number, rows.replace_schema_metadata(), failures, lost)
