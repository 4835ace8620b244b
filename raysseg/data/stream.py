"""Ray Data over a feed: one worker's training rows, read, decoded and augmented by tasks all over the cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import ray
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from raysseg.data.batches import Batch, Feed, load_chunk
from raysseg.data.index import Failure
from raysseg.schema import InputError

Block = dict[str, npt.NDArray[Any]]

_AHEAD_CHUNKS = 6  # a worker's chunks that may wait in the object store
_PAUSE_S = 0.1  # short beside the time that those last


class _Pace(ExecutionCallback):  # type: ignore[misc]
    """Lets Ray Data's scheduling pause in every step.

    While training is the slower side it has nothing to wait for and spins, in a thread of the training process, from
    which it would take the interpreter half of the time.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_PAUSE_S)


def iter_chunks(feed: Feed, report: Callable[[str], None]) -> Iterator[Batch]:
    """The chunks of a feed in turn, delivered by Ray Data.

    One execution spans all epochs, so that no epoch's first batch waits. A chunk is one task and short enough to be one
    block or a few, so that no task waits for room while it holds a CPU.

    Args:
        feed: what to deliver.
        report: receives Ray Data's per-operator statistics at the end.

    Raises:
        InputError: a sample can't be used, and the source does not skip.
    """
    if feed.num_chunks == 0:
        return
    _limit(feed)
    load = partial(_load_block, [ray.put(feed)])
    chunks = ray.data.range(feed.num_chunks, override_num_blocks=feed.num_chunks)
    blocks = chunks.map_batches(load, batch_size=None, num_cpus=1).iterator()
    try:
        for block in blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            yield _to_batch(block)
    finally:
        report(blocks.stats())


def _limit(feed: Feed) -> None:
    """Keeps this worker's execution to its share, in order and quiet."""
    height, width = feed.recipe.crop
    rows = feed.num_positions / feed.chunks_per_epoch / feed.num_workers
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [_Pace]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=max(256 * 2**20, int(_AHEAD_CHUNKS * rows * height * width * 5))
    )


def _load_block(feed_ref: list[ray.ObjectRef[Feed]], chunks: Block) -> Block:
    """One task of Ray Data; what goes wrong travels in the block, so that it reaches the user as it is."""
    feed = _feed(feed_ref[0])
    try:
        batches = [load_chunk(feed, int(chunk)) for chunk in chunks["id"]]
    except InputError as error:
        empty = np.zeros(1, np.uint8)
        return {
            "images": empty,
            "labels": empty,
            "weights": empty,
            "positions": empty,
            "notes": _note(error=str(error)),
        }
    assert len(batches) == 1, "one chunk a block"
    batch = batches[0]
    notes = np.full(len(batch), "", dtype=object)
    if batch.failures:
        notes[:1] = _note(failures=[astuple(failure) for failure in batch.failures])
    return {
        "images": batch.images,
        "labels": batch.labels,
        "weights": batch.weights,
        "positions": batch.positions,
        "notes": notes,
    }


def _note(**content: object) -> npt.NDArray[Any]:
    return np.array([json.dumps(content)], dtype=object)


def _to_batch(block: Block) -> Batch:
    failures: tuple[Failure, ...] = ()
    for text in filter(None, block["notes"]):
        note = json.loads(text)
        if "error" in note:
            raise InputError(note["error"])
        failures += tuple(Failure(*failure) for failure in note["failures"])
    return Batch(block["images"], block["labels"], block["weights"], block["positions"], failures)


@lru_cache(maxsize=2)
def _feed(feed_ref: ray.ObjectRef[Feed]) -> Feed:
    """The feed, once a process: its index is not copied, its order of an epoch is computed once."""
    cv2.setNumThreads(1)  # a task has one CPU
    feed: Feed = ray.get(feed_ref)
    return feed
