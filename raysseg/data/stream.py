"""Ray Data over a feed: one worker's training rows, read by tasks all over the cluster.

The same tasks decode and augment them, or the worker's own threads do (`data.decode`).
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from itertools import chain, islice, pairwise
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from raysseg.config import AnySource, Decode
from raysseg.data.batches import (
    Batch,
    Chunk,
    Feed,
    Numbered,
    Request,
    decode_ahead,
    decode_chunk,
    iter_parts,
    read_chunk,
    request_chunk,
    stand_in,
)
from raysseg.data.index import Failure, SampleIndex
from raysseg.data.shards import SAMPLE_SCHEMA, to_sample, to_table
from raysseg.schema import InputError, Sample

Block = dict[str, npt.NDArray[Any]]
Delivered = TypeVar("Delivered", Batch, Chunk)

_SPAN = 512  # chunks of an execution at most: Ray Data takes all of its input at the start, a millisecond each
_OVERLAP = 1 / 4  # of an execution's rows are still to come when the next one begins
_AHEAD_CHUNKS = (3, 6)  # a worker's chunks that may wait in the object store: at least, and at most
_AHEAD_BYTES = 2**30  # that they take between the two
_ENCODED_BYTES = 2**27  # of a chunk as it is stored: 16 row groups of 8 MiB
_UNRESERVED = 2  # tasks of a worker at a time that hold no CPU
_PAUSE_S = 0.1  # short beside the time that those last


class _Pace(ExecutionCallback):  # type: ignore[misc]
    """Lets Ray Data's scheduling pause in every step.

    While training is the slower side it has nothing to wait for and spins, in a thread of the training process, from
    which it would take the interpreter half of the time.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_PAUSE_S)


def iter_chunks(
    feed: Feed, report: Callable[[str], None], *, decode: Decode, threads: int, reserves: bool = True
) -> Iterator[Batch]:
    """The rows of a feed in turn, delivered by Ray Data.

    A chunk is one task, and short enough to be one block or a few, so that no task waits for room while it holds a CPU.
    The task gets the references of its samples and nothing of the index. One execution spans some hundred chunks, over
    the ends of epochs; the next one starts before it is through, so that nothing waits for that.

    Args:
        feed: what to deliver.
        report: receives Ray Data's per-operator statistics at the end.
        decode: by its tasks, or by threads of this process.
        threads: so many, then.
        reserves: a task holds a CPU; False where workers may come to hold them all, and tasks would wait for ever.

    Raises:
        InputError: a sample can't be used, and the source does not skip.
    """
    if feed.num_chunks == 0:
        return
    _limit(_chunk_bytes(feed) if decode == "cluster" else _ENCODED_BYTES)
    bare = [ray.put(feed.bare)]
    resources = {"num_cpus": 1} if reserves else {"num_cpus": 0, "concurrency": _UNRESERVED}

    def begin(
        load: Callable[..., Any], to: Callable[[Any], Delivered], format_: str, numbers: range
    ) -> _Span[Delivered]:
        tables = [_to_table(request_chunk(feed, number)) for number in numbers]
        loaded = ray.data.from_blocks(tables).map_batches(
            partial(load, bare), batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **resources
        )
        stream = loaded.iterator()
        items = map(to, stream.iter_batches(batch_size=None, prefetch_batches=1, batch_format=format_))
        return _Span(sum(map(len, tables)), chain(list(islice(items, 1)), items), stream.stats)

    if decode == "cluster":
        yield from _chained(partial(begin, _decode_blocks, _to_batch, "numpy"), feed.num_chunks, report)
    else:
        chunks = _chained(partial(begin, _read_block, _to_chunk, "pyarrow"), feed.num_chunks, report)
        yield from decode_ahead(feed, chunks, threads)


@dataclass(frozen=True)
class _Span(Generic[Delivered]):
    """An execution of Ray Data that has begun: how many rows it brings, what it brings in turn, and its statistics."""

    num_rows: int
    items: Iterator[Delivered]
    stats: Callable[[], str]


def _chained(
    begin: Callable[[range], _Span[Delivered]], num_chunks: int, report: Callable[[str], None]
) -> Iterator[Delivered]:
    """What executions of about as many chunks each bring; the next one begins while the last rows of one come."""
    edges = np.linspace(0, num_chunks, -(-num_chunks // _SPAN) + 1).astype(np.int64).tolist()
    spans = [range(start, stop) for start, stop in pairwise(edges)]
    following: Future[_Span[Delivered]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="raysseg-span") as pool:
        for number, chunks in enumerate(spans, 1):
            span = (following or pool.submit(begin, chunks)).result()
            following, rows_left = None, span.num_rows
            try:
                for item in span.items:
                    rows_left -= len(item.positions)
                    if following is None and rows_left < _OVERLAP * span.num_rows and number < len(spans):
                        following = pool.submit(begin, spans[number])
                    yield item
            finally:
                report(span.stats())


def _limit(chunk_bytes: int) -> None:
    """Keeps this worker's execution to its share, in order and quiet."""
    least, most = _AHEAD_CHUNKS
    ahead = min(max(_AHEAD_BYTES // chunk_bytes, least), most)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [_Pace]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=max(2**28, ahead * chunk_bytes)
    )


def _chunk_bytes(feed: Feed) -> int:
    """Of a decoded chunk, roughly."""
    height, width = feed.recipe.crop
    return int(feed.num_positions / feed.chunks_per_epoch / feed.num_workers * height * width * 5)


def _to_table(request: Request) -> pa.Table:
    """What a task is given: the samples' references, with their places."""
    epochs = np.full(len(request.positions), request.epoch)
    places = pa.array(request.positions), pa.array(epochs)
    return request.index.references.append_column("position", places[0]).append_column("epoch", places[1])


def _to_request(table: pa.Table, source: AnySource) -> Request:
    positions = table["position"].to_numpy()
    index = SampleIndex(source, table.drop_columns(["position", "epoch"]), np.arange(len(table)))
    return Request(table["epoch"][0].as_py(), positions, index)


def _decode_blocks(feed_ref: list[ray.ObjectRef[Feed]], table: pa.Table) -> Iterator[Block]:
    """A task that decodes, part by part; what goes wrong travels in a block, so that it reaches the user as it is."""
    feed = _feed(feed_ref[0])
    try:
        for part in iter_parts(feed, read_chunk(_to_request(table, feed.index.source))):
            batch = decode_chunk(feed, part)
            failures = [astuple(failure) for failure in batch.failures]
            yield _to_block(batch, _note(failures=failures) if failures else "")
    except InputError as error:  # in a block of the same shapes, since Ray Data may join it with those before it
        yield _to_block(stand_in(feed.recipe), _note(error=str(error)))


def _to_block(batch: Batch, note: str) -> Block:
    return {
        "images": batch.images,
        "labels": batch.labels,
        "weights": batch.weights,
        "positions": batch.positions,
        "regions": _pack(batch),
        "notes": np.array([note] + [""] * (len(batch) - 1), dtype=object),
    }


def _pack(batch: Batch) -> npt.NDArray[np.object_]:
    """A row's regions as bytes, since the number of their layers varies."""
    packed = np.full(len(batch), b"", dtype=object)
    packed[: len(batch.regions)] = [
        pickle.dumps(tuple(numbered), pickle.HIGHEST_PROTOCOL) for numbered in batch.regions
    ]
    return packed


def _to_batch(block: Block) -> Batch:
    failures: tuple[Failure, ...] = ()
    for note in map(_read_note, filter(None, block["notes"])):
        failures += tuple(Failure(*failure) for failure in note["failures"])
    regions = tuple(Numbered(*pickle.loads(packed)) for packed in block["regions"] if packed)
    return Batch(block["images"], block["labels"], block["weights"], block["positions"], regions, failures)


def _read_block(feed_ref: list[ray.ObjectRef[Feed]], table: pa.Table) -> pa.Table:
    """A task that only reads: samples as they are stored, each with its place and what is wrong with it."""
    feed = _feed(feed_ref[0])
    try:
        chunk = read_chunk(_to_request(table, feed.index.source))
        notes = [_note(failure=astuple(s)) if isinstance(s, Failure) else "" for s in chunk.samples]
    except InputError as error:
        chunk, notes = Chunk(0, np.zeros(1, np.int64), [_NOTHING]), [_note(error=str(error))]
    read = to_table([_NOTHING if isinstance(sample, Failure) else sample for sample in chunk.samples])
    places = pa.array(chunk.positions), pa.array(np.full(len(read), chunk.epoch))
    return read.append_column("position", places[0]).append_column("epoch", places[1]).append_column("note", [notes])


def _to_chunk(block: pa.Table) -> Chunk:
    notes = [_read_note(text) if text else None for text in block["note"].to_pylist()]
    table = block.select(SAMPLE_SCHEMA.names)
    samples = [Failure(*note["failure"]) if note else to_sample(table, row) for row, note in enumerate(notes)]
    return Chunk(block["epoch"][0].as_py(), block["position"].to_numpy(), samples)


_NOTHING = Sample("", None, 0, 0, None)  # stands where there is but a note


def _note(**content: object) -> str:
    return json.dumps(content)


def _read_note(text: str) -> dict[str, Any]:
    """Raises what a task could not."""
    note: dict[str, Any] = json.loads(text)
    if "error" in note:
        raise InputError(note["error"])
    return note


@lru_cache(maxsize=64)
def _feed(feed_ref: ray.ObjectRef[Feed]) -> Feed:
    """The bare feed, once a process, of each rank that it reads for."""
    cv2.setNumThreads(1)  # a task has one CPU
    feed: Feed = ray.get(feed_ref)
    return feed
