"""What one rank does in training: epochs from the newest checkpoint on, validated, saved and reported. No Ray."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from raysseg import bundle as bundles
from raysseg import checkpoint, standing, storage
from raysseg.bundle import Bundle, Preprocessing
from raysseg.config import AUTO, Scaling, TrainJob
from raysseg.data.batches import Batch, Feed, build_feed, iter_batches, iter_pairs, read_ids
from raysseg.data.index import Failure, SampleIndex, read_failures, write_failures
from raysseg.data.sampling import Factors, order_hash
from raysseg.ledger import num_steps
from raysseg.link import Link, Wish
from raysseg.loop import (
    EpochResult,
    NonFinite,
    Step,
    TrainState,
    build_state,
    fit,
    scored_model,
    synchronise_batch_norm,
    wrap,
)
from raysseg.metrics import Metrics
from raysseg.models import SegModel, build_model
from raysseg.models.base import resolve_precision
from raysseg.predictor import predict, predict_pairs
from raysseg.saver import Saved, Saver
from raysseg.schema import ClassMap, InputError
from raysseg.trackers import Status, Trackers, open_trackers

logger = logging.getLogger(__name__)

OpenStream = Callable[[Feed], Iterator[Batch]]
"""Delivers the chunks of a feed in turn."""

Event = Step | NonFinite | EpochResult

_FIRST_STEPS = 20  # of a start; later, memory runs out for other reasons than the batch
_MOST_LEFT_OUT = 10  # steps in a row whose gradient is not finite
_LOOK_S = 5.0  # between two questions whether a node is going away


@dataclass(frozen=True)
class Plan:
    """All that a worker needs.

    Attributes:
        job: the resolved job.
        classes: its class list.
        train: the training split.
        val: the validation split.
        class_weights: (C,), if the loss takes any.
        fingerprint: of the data, for the bundle.
        factors: how often an epoch shows each training sample; None: once.
        validates_beside: validation is left to tasks beside training, which take each epoch's bundle.
    """

    job: TrainJob
    classes: ClassMap
    train: SampleIndex
    val: SampleIndex
    class_weights: tuple[float, ...] | None
    fingerprint: dict[str, Any]
    factors: Factors | None = None
    validates_beside: bool = False


def train_epochs(plan: Plan, open_stream: OpenStream, device: torch.device, link: Link) -> Iterator[Saved]:
    """Trains this rank from the newest checkpoint on; every rank runs it, the first one writes.

    Args:
        plan: see Plan.
        open_stream: delivers the chunks of a feed.
        device: this rank's.
        link: to whoever started the run.

    Yields:
        Once an epoch is on storage. There may be fewer epochs than planned: where the link wished so, and where more
        would not help.

    Raises:
        InputError: the data or the gradient can't be used, or memory does not suffice.
        StorageError: an epoch can't be saved.
        torch.OutOfMemoryError: run it again, which takes half as many images a forward pass.
    """
    rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    asked = plan.job.batch.per_worker
    dtype = resolve_precision(plan.job.precision, device)
    plan, was_halved = _with_room(plan, num_workers, device, dtype)
    job = plan.job
    torch.manual_seed(job.seed)
    state = build_state(_build_on(plan, device, num_workers), job.optimizer, dtype, job.ema)
    hash_now = order_hash(plan.train, open_groups=job.data.open_shards, seed=job.seed, factors=plan.factors)
    _resume(state, plan, hash_now, rank)
    feed = build_feed(
        job, plan.train, plan.classes, state.ledger, rank=rank, num_workers=num_workers, factors=plan.factors
    )
    model = wrap(
        state.model,
        is_compiled=job.compile,
        channels_last=job.channels_last,
        recomputes=job.model.checkpoint_activations,
    )
    scored = scored_model(state, job.ema)
    agree = _Agreement(num_workers, job.scaling.collective_timeout_s)
    if agree(Wish.FINISH if standing.has_stalled(job, state.history) else Wish.NOTHING):
        return
    steps = _marked(iter_batches(feed, open_stream(feed)), state, link)
    fitting = partial(fit, num_samples=feed.num_positions, order_hash=hash_now, job=job, dtype=dtype)
    events = _naming_memory(
        fitting(model, state, steps), job, asked=asked, first_step=state.step, may_halve=not was_halved
    )
    validate = None if plan.validates_beside else partial(_validate, scored, plan, rank, num_workers, dtype, link)
    with open_trackers(job, state.step) if rank == 0 else Trackers(()) as trackers:
        keeper = _Keeper(plan, state, rank, feed.num_positions, trackers)
        progress = _Progress(job, feed.num_positions, state.step, trackers) if rank == 0 else None
        yield from _follow(events, state, link, agree, keeper, progress, _Incidents(job, feed, rank), validate)


def _follow(
    events: Iterator[Event],
    state: TrainState,
    link: Link,
    agree: _Agreement,
    keeper: _Keeper,
    progress: _Progress | None,
    incidents: _Incidents,
    validate: Callable[[], tuple[dict[str, float], list[Failure]]] | None,
) -> Iterator[Saved]:
    """Goes through a rank's training event by event; after each one, all ranks agree on what to do."""
    for event in events:
        if isinstance(event, NonFinite):
            incidents.note(event)
            continue
        if isinstance(event, Step):
            if progress is not None:
                progress.show(event)
        else:
            link.mark("save", state.step)
            if keeper.owes:
                yield keeper.report()
            link.mark("validate", state.step)
            scores, failures = validate() if validate is not None else ({}, [])
            state.history.append({"epoch": event.epoch, "step": event.step, **event.metrics, **scores})
            link.mark("save", state.step)
            keeper.save_epoch(event.failures, failures)
        link.mark("agree", state.step)
        wish = agree(link.wishes() | keeper.wishes())
        if wish & Wish.LOOK:
            keeper.is_preempted = link.is_preempted()
        if keeper.owes and wish & (Wish.REPORT | Wish.SAVE | Wish.STOP | Wish.FINISH):
            link.mark("save", state.step)
            yield keeper.report()
        if wish & Wish.FINISH:
            break
        if wish & (Wish.SAVE | Wish.STOP) and isinstance(event, Step):
            link.mark("save", state.step)
            keeper.save()
        if wish & Wish.STOP:
            keeper.end("killed")
            return
        link.mark("step", state.step)
    link.mark("save", state.step)
    if keeper.owes:
        yield keeper.report()
    keeper.end("finished")


def _with_room(plan: Plan, num_workers: int, device: torch.device, dtype: torch.dtype) -> tuple[Plan, bool]:
    """The plan with as many images a forward pass as were found to fit, and whether memory has run out with more."""
    job = plan.job
    memory = _least_memory(device, job.scaling, num_workers) if job.batch.per_worker == AUTO else math.inf
    found: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [standing.read_room(job)]
        if found[0].per_worker == AUTO:
            from raysseg.advice.plan import choose_per_worker  # brings triton along

            images = choose_per_worker(job, plan.classes, dtype, memory, num_workers)
            logger.info("batch.per_worker: auto is %d here", images)
            standing.write_per_worker(job, AUTO, images, "as many as memory should hold")
            found = [standing.Room(images, was_halved=False)]
    if num_workers > 1:
        dist.broadcast_object_list(found)
    images, was_halved = found[0]
    if images == job.batch.per_worker:
        return plan, was_halved
    batch = job.batch.model_copy(update={"per_worker": images})
    return replace(plan, job=job.model_copy(update={"batch": batch})), was_halved


def _least_memory(device: torch.device, scaling: Scaling, num_workers: int) -> float:
    """Bytes that every worker can have; all of them must call it."""
    own = free_memory(device, scaling)
    if num_workers == 1:
        return own
    gathered: list[Any] = [None] * num_workers
    dist.all_gather_object(gathered, own)
    return float(min(gathered))


def free_memory(device: torch.device, scaling: Scaling) -> float:
    """Bytes of a GPU that a worker can have; infinitely many of what is no GPU."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] * min(1.0, scaling.gpus_per_worker or 1.0)


def _build_on(plan: Plan, device: torch.device, num_workers: int) -> SegModel:
    model = build_model(plan.job.model, plan.classes, plan.job.task, plan.job.loss, plan.class_weights)
    if num_workers > 1 and device.type == "cuda":
        model = synchronise_batch_norm(model)
    elif num_workers > 1:
        logger.info("BatchNorm is not synchronised between CPU workers; the first one's statistics are kept")
    return model.to(device)


def _resume(state: TrainState, plan: Plan, hash_now: str, rank: int) -> None:
    uri = checkpoint.restore_newest(plan.job.run_uri, state)
    if uri is None:
        return
    if state.ledger.order_hash not in ("", hash_now):
        raise InputError(
            f"{uri}: the training data have changed since this checkpoint was written, so its place in the epoch means "
            "nothing; give the job another name, or bring the data back"
        )
    if rank == 0:
        epoch, position = state.ledger.epoch, state.ledger.position
        logger.info("resumed from %s: epoch %d, position %d, step %d", uri, epoch + 1, position, state.step)
        if state.history:
            standing.settle(plan.job, state.history)  # what came after this checkpoint does not count


def _validate(
    model: SegModel, plan: Plan, rank: int, num_workers: int, dtype: torch.dtype, link: Link
) -> tuple[dict[str, float], list[Failure]]:
    """Metrics over the validation split, shared out over the ranks; every rank must call it."""
    if num_workers > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    job = plan.job
    metrics = Metrics(job.task, plan.classes, job.metrics)
    failures: list[Failure] = []
    was_training = model.training
    model.eval()
    batches = iter_pairs(
        plan.val, plan.classes, job.task, rows=job.batch.per_worker, share=rank, num_shares=num_workers
    )
    forward = partial(predict, model, size=job.data.size, dtype=dtype, inference=job.inference)
    for batch in predict_pairs(forward, batches):
        link.beat()
        for item in batch:
            if isinstance(item, Failure):
                failures.append(item)
            else:
                metrics.update(item.pair.sample_id, item.prediction, item.pair.truth)
    model.train(was_training)
    scores = _compute_together(metrics, plan.val, rank, num_workers)
    return {f"val/{name}": value for name, value in scores.items()}, failures


def _compute_together(metrics: Metrics, val: SampleIndex, rank: int, num_workers: int) -> dict[str, float]:
    """The numbers of what all ranks have counted; the first one computes them, since all counts are large."""
    if num_workers == 1:
        return metrics.compute(val.ranking)
    states: list[Any] = [None] * num_workers
    dist.gather_object(metrics.state(), states if rank == 0 else None)
    found: list[Any] = [None]
    if rank == 0:
        for state in states:
            metrics.merge(state)
        found = [metrics.compute(val.ranking)]
    dist.broadcast_object_list(found)
    scores: dict[str, float] = found[0]
    return scores


# --- from step to step --------------------------------------------------------------------------------------------


def _marked(steps: Iterator[list[Batch]], state: TrainState, link: Link) -> Iterator[list[Batch]]:
    """The same steps; the link learns when the rank waits for data. The first step is part of the start."""
    first = state.step
    while True:
        link.mark("data" if state.step > first else "start", state.step)
        step = next(steps, None)
        if step is None:
            return
        link.mark("step" if state.step > first else "start", state.step)
        yield step


def _naming_memory(
    events: Iterator[Event], job: TrainJob, *, asked: int, first_step: int, may_halve: bool
) -> Iterator[Event]:
    """The same events; where the first steps don't fit into a GPU's memory, the run is set to smaller passes, once."""
    step = first_step
    try:
        for event in events:
            step = event.step
            yield event
    except torch.OutOfMemoryError as error:
        size = job.batch.per_worker
        if step - first_step < _FIRST_STEPS and may_halve and size > 1:
            standing.write_per_worker(job, asked, size // 2, standing.OUT_OF_MEMORY)
            logger.warning(
                "out of memory with batch.per_worker=%d; the run goes on with %d and twice the accumulation, "
                "which leaves the global batch as it is",
                size,
                size // 2,
            )
            raise
        raise InputError(
            f"batch.per_worker: {size} images of {list(job.data.crop)} do not fit into the GPU's memory ({error}); "
            "lower batch.per_worker or data.crop, take a smaller model, or set precision=bf16; `raysseg plan` tells "
            "what each comes to"
        ) from error


class _Agreement:
    """One wish of all ranks. It goes by the CPU, so that no GPU is waited for."""

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if num_workers > 1 else None

    def __call__(self, wish: Wish) -> Wish:
        """What any rank wants; every rank must call it."""
        if self._group is None:
            return wish
        bits = torch.tensor(int(wish))
        assert isinstance(self._group, dist.ProcessGroup)
        dist.all_reduce(bits, dist.ReduceOp.BOR, group=self._group)
        return Wish(int(bits))


class _Keeper:
    """When the run is saved. Every rank has one and asks alike; the first one's writes.

    Attributes:
        is_preempted: a node is going away: one checkpoint after the other is written.
        owes: an epoch was handed over, and not reported yet.
    """

    def __init__(self, plan: Plan, state: TrainState, rank: int, num_positions: int, trackers: Trackers) -> None:
        job = plan.job
        self._num_positions = num_positions
        self._trackers = trackers
        self._told: dict[float, dict[str, float]] = {row["step"]: row for row in state.history}
        self.is_preempted = False
        self.owes = False
        self._job, self._state = job, state
        self._saver = _build_saver(plan) if rank == 0 else None
        self._skipped = _Skipped(plan, rank)
        self._every_steps = job.checkpoint.every_steps(num_steps(num_positions, job.batch.global_size))
        self._every_s = job.checkpoint.every_s
        self._saved_step, self._saved_at = state.step, time.monotonic()
        self._looked_at = time.monotonic()

    def wishes(self) -> Wish:
        """What is due; does not wait."""
        if self._saver is None:
            return Wish.NOTHING
        wish = Wish.NOTHING
        now = time.monotonic()
        if self._saver.has_epoch:
            wish |= Wish.REPORT
        if now - self._looked_at > _LOOK_S:
            self._looked_at = now
            wish |= Wish.LOOK
        if standing.has_stalled(self._job, self._state.history):
            wish |= Wish.FINISH
        by_steps = self._every_steps is not None and self._state.step - self._saved_step >= self._every_steps
        by_time = self._every_s is not None and now - self._saved_at >= self._every_s
        is_last = self._state.ledger.position >= self._num_positions  # the epoch's end is saved in any case
        if (((by_steps or by_time) and not is_last) or self.is_preempted) and not self._saver.is_busy:
            wish |= Wish.SAVE
        return wish

    def save(self) -> None:
        """Begins to save a checkpoint; every rank must call it."""
        self._state.tally.share(next(self._state.model.parameters()).device)
        self._skipped.add(tuple(self._state.tally.failures), [])
        self._state.tally.failures.clear()
        self._hand_over(is_epoch=False)

    def save_epoch(self, train: tuple[Failure, ...], val: list[Failure]) -> None:
        """Begins to save an epoch and what it skipped; every rank must call it."""
        self._skipped.add(train, val)
        self._hand_over(is_epoch=True)
        self.owes = True

    def _hand_over(self, *, is_epoch: bool) -> None:
        if self._saver is not None:
            self._saver.save(self._state, is_epoch=is_epoch)
        self._saved_step, self._saved_at = self._state.step, time.monotonic()

    def report(self) -> Saved:
        """Waits for the epoch that is being saved."""
        self.owes = False
        if self._saver is None:
            row = self._state.history[-1]
            return Saved(self._state.step, row, "")
        saved = self._saver.take(self._state)
        row, metric = saved.row, self._job.checkpoint.metric
        score = f"{metric} {row[metric]:.4f}" if metric in row else f"{metric} is to come"
        what = f"epoch {int(row['epoch']) + 1}: train loss {row['train/loss']:.4f}, {score}"
        logger.info("%s; saved %s", what, saved.checkpoint_uri)
        for row in self._state.history:  # of validations beside training, the last ones come later
            if self._told.get(row["step"]) != row:
                self._told[row["step"]] = row
                self._trackers.log(int(row["step"]), row)
        self._trackers.flush()
        if standing.has_stalled(self._job, self._state.history):
            logger.info("%s has not become better for long enough: training ends (schedule.early_stopping)", metric)
        return saved

    def end(self, status: Status) -> None:
        """Waits for what is being saved."""
        if self._saver is not None:
            self._saver.finish(is_last=True)
        self._trackers.close(status)


def _build_saver(plan: Plan) -> Saver:
    job = plan.job
    bundle = Bundle(
        uri="",
        task=job.task,
        classes=plan.classes,
        model=job.model.name,
        preprocessing=Preprocessing(job.data.size),
        metrics={},
        job=job.model_dump(mode="json"),
        fingerprint=plan.fingerprint,
        inference=job.inference,
        versions=bundles.installed_versions(),
    )
    return Saver(job, bundle, validates_beside=plan.validates_beside)


class _Incidents:
    """Steps whose gradient was not finite: their samples are named and saved, as <run>/nonfinite/<step>-<rank>.json."""

    def __init__(self, job: TrainJob, feed: Feed, rank: int) -> None:
        self._job, self._feed, self._rank = job, feed, rank
        self._last_step = -1
        self._in_a_row = 0

    def note(self, event: NonFinite) -> None:
        """Raises InputError unless the job says that such steps are left out."""
        self._in_a_row = self._in_a_row + 1 if event.step == self._last_step + 1 else 1
        self._last_step = event.step
        if not event.positions:
            return  # another rank tells
        ids = read_ids(self._feed, event.epoch, event.positions)
        content = {"epoch": event.epoch, "step": event.step, "sample_ids": ids, "losses": list(map(str, event.losses))}
        uri = storage.join(self._job.run_uri, "nonfinite", f"{event.step:08d}-{self._rank}.json")
        storage.write_text(uri, json.dumps(content, indent=2))
        what = f"step {event.step}: the gradient is not finite, with the samples {', '.join(ids)}; {uri} lists them"
        if self._job.on_nonfinite == "skip" and self._in_a_row < _MOST_LEFT_OUT:
            logger.warning("%s; the step is left out", what)
            return
        why = f", {self._in_a_row} times in a row" if self._job.on_nonfinite == "skip" else ""
        raise InputError(
            f"{what}{why}. Look at these samples; lower optimizer.lr, set optimizer.clip_norm or precision=fp32, "
            "or set on_nonfinite=skip to leave such steps out"
        )


class _Skipped:
    """Samples that any rank has skipped, listed beside the run."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._is_used = plan.train.source.is_skipping or plan.val.source.is_skipping
        self._run_uri = plan.job.run_uri if rank == 0 else None
        known = read_failures(plan.job.run_uri) if self._is_used and rank == 0 else {}
        indexed = {"train": plan.train.failures, "val": plan.val.failures}
        self._seen = {split: dict.fromkeys([*known.get(split, []), *of_split]) for split, of_split in indexed.items()}

    def add(self, train: tuple[Failure, ...], val: list[Failure]) -> None:
        """Every rank must call it; the first one writes skipped.json."""
        if not self._is_used:
            return
        gathered: list[Any] = [(train, val)]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (train, val))
        for of_train, of_val in gathered:
            self._seen["train"] |= dict.fromkeys(of_train)
            self._seen["val"] |= dict.fromkeys(of_val)
        if self._run_uri is not None:
            write_failures(self._run_uri, {split: list(seen) for split, seen in self._seen.items()})


class _Progress:
    """A line on the log every few seconds, and after each epoch's last step."""

    _EVERY_S = 5.0

    def __init__(self, job: TrainJob, num_samples: int, step: int, trackers: Trackers) -> None:
        self._job, self._trackers = job, trackers
        self._per_epoch = num_steps(num_samples, job.batch.global_size)
        self._total = self._per_epoch * job.schedule.epochs
        self._since_step, self._since = step, time.monotonic()
        self._shown_step, self._shown = step, time.monotonic() - self._EVERY_S
        self._wait_s = 0.0

    def show(self, event: Step) -> None:
        now = time.monotonic()
        self._wait_s += event.wait_s
        if now - self._shown < self._EVERY_S and event.step % self._per_epoch:
            return
        pace = (event.step - self._since_step) / max(now - self._since, 1e-9)
        left = int((self._total - event.step) / max(pace, 1e-9))
        values = {
            "progress/loss": float(event.loss),
            "progress/lr": event.lr,
            "progress/images_per_s": pace * self._job.batch.global_size,
            "progress/data_wait_ms": 1000 * self._wait_s / max(event.step - self._shown_step, 1),
            "progress/memory_gib": _memory() / 2**30,
        }
        logger.info(
            "epoch %d/%d  step %d/%d  loss %.4f  lr %.2e  %.1f images/s  data wait %.0f ms  %.1f GiB  %d:%02d left",
            event.epoch + 1,
            self._job.schedule.epochs,
            (event.step - 1) % self._per_epoch + 1,
            self._per_epoch,
            *values.values(),
            left // 60,
            left % 60,
        )
        self._trackers.log(event.step, values)
        self._shown_step, self._shown, self._wait_s = event.step, now, 0.0


def _memory() -> int:
    """The most bytes that were in use so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
