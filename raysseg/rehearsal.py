"""`raysseg plan --measure`: a worker's first steps, where the job would run, for their time and memory.

Nothing is kept. One worker trains on its share of each global batch, which it decodes by itself; no gradients are
exchanged.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from raysseg.advice.costs import saved_bytes
from raysseg.advice.plan import choose_per_worker
from raysseg.config import AUTO, TrainJob
from raysseg.data.batches import Feed, build_feed, iter_batches, iter_chunks
from raysseg.inputs import build_plan, read_inputs
from raysseg.ledger import Ledger
from raysseg.loop import Step, TrainState, build_state, fit, wrap
from raysseg.models import build_model
from raysseg.models.base import resolve_precision
from raysseg.runtime import spread
from raysseg.worker import Plan, free_memory

WARMUP, STEPS = 3, 10


@dataclass(frozen=True)
class Trial:
    """What a worker's steps came to.

    Attributes:
        device: its GPU, or `cpu`.
        per_worker: images of a micro-batch.
        steps: that were measured.
        images_per_s: of all workers, if they are all as fast and wait for nothing.
        wait_share: of the time, in which the worker waited for data.
        memory: bytes.
        memory_is: `allocated at most` on GPUs, and `saved by forward passes` on CPUs, where nobody counts more.
        input_images_per_s: that one worker reads and decodes where nothing is trained.
    """

    device: str
    per_worker: int
    steps: int
    images_per_s: float
    wait_share: float
    memory: int
    memory_is: str
    input_images_per_s: float


def rehearse(job: TrainJob) -> Trial:
    """Trains for some steps on the cluster, or in this process with 0 workers; writes nothing.

    Raises:
        InputError: the data can't be used.
        torch.OutOfMemoryError: memory does not suffice.
    """
    plan = build_plan(job, read_inputs(job))
    (trial,) = spread(_rehearse, plan, [0], job.scaling)
    return trial


def _rehearse(plan: Plan, share: int) -> Iterator[Trial]:
    """The steps of one worker, as that share of the global batch."""
    job, num_workers = plan.job, max(1, plan.job.scaling.max_workers)
    has_gpu = torch.cuda.is_available() and job.scaling.gpus_per_worker != 0
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = resolve_precision(job.precision, device)
    images = job.batch.per_worker
    if images == AUTO:
        images = choose_per_worker(job, plan.classes, dtype, free_memory(device, job.scaling), num_workers)
    batch = job.batch.model_copy(update={"per_worker": images})
    schedule = job.schedule.model_copy(update={"epochs": 10**6})  # data that are few come again
    plan = replace(plan, job=job.model_copy(update={"batch": batch, "schedule": schedule}))
    feed = build_feed(
        plan.job, plan.train, plan.classes, Ledger(), rank=share, num_workers=num_workers, factors=plan.factors
    )
    alone = _input_rate(feed)
    seconds, waited, memory = _train(plan, feed, device, dtype)
    yield Trial(
        device=torch.cuda.get_device_name(device) if has_gpu else f"{platform.machine()} CPUs",
        per_worker=images,
        steps=STEPS,
        images_per_s=STEPS * job.batch.global_size / seconds,
        wait_share=waited / seconds,
        memory=memory,
        memory_is="allocated at most" if has_gpu else "saved by forward passes",
        input_images_per_s=alone,
    )


def _train(plan: Plan, feed: Feed, device: torch.device, dtype: torch.dtype) -> tuple[float, float, int]:
    """Seconds of the measured steps, seconds of waiting for data, and bytes."""
    job = plan.job
    torch.manual_seed(job.seed)
    built = build_model(job.model, plan.classes, job.task, job.loss, plan.class_weights).to(device)
    state = build_state(built, job.optimizer, dtype, job.ema)
    model = wrap(
        built, is_compiled=job.compile, channels_last=job.channels_last, recomputes=job.model.checkpoint_activations
    )
    batches = iter_batches(feed, iter_chunks(feed))
    events = fit(model, state, batches, num_samples=feed.num_positions, order_hash="", job=job, dtype=dtype)
    steps = (event for event in events if isinstance(event, Step))
    memory = _saved_by_a_step(steps, state) if device.type == "cpu" else 0
    for step in islice(steps, WARMUP):
        float(step.loss)  # which waits for the device
    before, waited = time.perf_counter(), 0.0
    for step in islice(steps, STEPS):
        waited += step.wait_s
        float(step.loss)
    seconds = time.perf_counter() - before
    return seconds, waited, memory or torch.cuda.max_memory_allocated(device)


def _saved_by_a_step(steps: Iterator[Step], state: TrainState) -> int:
    """Bytes that the forward passes of the next step leave for the backward passes, at most at once."""
    found: list[int] = []
    with saved_bytes([*state.model.parameters(), *state.model.buffers()]) as saved:
        hook = state.model.register_forward_hook(lambda *_: found.append(saved()))
        next(steps)
        hook.remove()
    return found[0]


def _input_rate(feed: Feed) -> float:
    """Images a second that a worker's threads read and decode."""
    chunks = iter_chunks(feed)
    next(chunks)
    before, images = time.perf_counter(), 0
    for batch in islice(chunks, 8):
        images += len(batch)
    return images / (time.perf_counter() - before)
