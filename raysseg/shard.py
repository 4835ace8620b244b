"""Any source into canonical Parquet shards: written once, read many times, spread over the cluster."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysseg import masks, storage
from raysseg.config import ShardJob
from raysseg.data import read_class_map, read_index, read_samples, shards
from raysseg.data.batches import decode_pair
from raysseg.data.index import Failure, SampleIndex, write_failures
from raysseg.runtime import spread
from raysseg.schema import ClassMap, InputError, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardResult:
    """What `raysseg shard` prints."""

    name: str
    uri: str
    num_samples: int
    num_files: int
    skipped: int


@dataclass(frozen=True)
class _Written:
    """One file's part of the index."""

    number: int
    index: pa.Table
    failures: list[Failure]


def shard(job: ShardJob) -> ShardResult:
    """Writes the samples of a source as shards; the manifest comes last, so that half a set is none.

    Raises:
        InputError: a sample can't be used and the source does not skip, or shards stand there already.
        StorageError: the source or the output can't be reached.
    """
    if storage.exists(storage.join(job.output.uri, shards.MANIFEST)):
        raise InputError(
            f"output.uri: {job.output.uri} holds finished shards; name another folder, or delete them first"
        )
    classes, index = read_class_map(job.classes), read_index(job.data)
    files = range(-(-len(index) // job.output.rows_per_file))
    parts: dict[int, _Written] = {}
    for part in spread(_write_file, (job, classes, index), files, job.scaling):
        parts[part.number] = part
        logger.info("shard: %d of %d files", len(parts), len(files))
    written = [parts[number] for number in files]
    failures = [*index.failures, *(failure for part in written for failure in part.failures)]
    if not any(len(part.index) for part in written):
        raise InputError(f"data: none of the {len(failures)} samples can be used, such as {failures[0].reason}")
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([part.index for part in written]), sink)
    storage.write_bytes(storage.join(job.output.uri, shards.INDEX), sink.getvalue())
    write_failures(job.output.uri, {"data": failures})
    num_samples = sum(len(part.index) for part in written)
    shards.write_manifest(job.output.uri, classes, num_samples, len(files))
    return ShardResult(job.name, job.output.uri, num_samples, len(files), len(failures))


def _write_file(shared: tuple[ShardJob, ClassMap, SampleIndex], number: int) -> Iterator[_Written]:
    job, classes, index = shared
    first = number * job.output.rows_per_file
    rows = np.arange(first, min(first + job.output.rows_per_file, len(index)))
    samples: list[Sample] = []
    failures: list[Failure] = []
    for sample in read_samples(index.take(rows)):
        try:
            samples.append(_canonical(sample, classes))
        except InputError as error:
            if not index.source.is_skipping:
                raise
            failures.append(Failure(sample.sample_id, str(error)))
    table = shards.write_file(job.output.uri, number, samples, job.output.rows_per_group)
    yield _Written(number, table, failures)


def _canonical(sample: Sample | Failure, classes: ClassMap) -> Sample:
    """A sample that is known to decode: its image file as it is, its mask as a grey PNG of data-set ids."""
    if isinstance(sample, Failure):
        raise InputError(sample.reason)
    _, truth = decode_pair(sample, classes)
    height, width = truth.labels.shape
    ids = masks.encode_id_map(masks.to_ids(truth.labels, classes))
    return replace(sample, height=height, width=width, id_map=ids)
