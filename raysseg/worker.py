"""What one rank does in training: epochs from the newest checkpoint on, validated, saved and reported. No Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from raysseg import bundle as bundles
from raysseg import checkpoint, standing
from raysseg.bundle import Bundle, Preprocessing
from raysseg.config import TrainJob
from raysseg.data.batches import Batch, Feed, build_feed, iter_batches, iter_pairs
from raysseg.data.index import Failure, SampleIndex, write_failures
from raysseg.data.sampling import Factors, order_hash
from raysseg.ledger import num_steps
from raysseg.loop import (
    CheckpointDue,
    EpochResult,
    Step,
    TrainState,
    build_state,
    fit,
    resolve_precision,
    synchronise_batch_norm,
    wrap,
)
from raysseg.metrics import Metrics
from raysseg.models import SegModel, build_model
from raysseg.predictor import predict, predict_pairs
from raysseg.schema import ClassMap, InputError

logger = logging.getLogger(__name__)

OpenStream = Callable[[Feed], Iterator[Batch]]
"""Delivers the chunks of a feed in turn."""


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


@dataclass(frozen=True)
class Saved:
    """An epoch is trained and on storage; the first rank alone knows where."""

    step: int
    row: dict[str, float]
    checkpoint_uri: str


def train_epochs(plan: Plan, open_stream: OpenStream, device: torch.device) -> Iterator[Saved]:
    """Trains this rank from the newest checkpoint on; every rank runs it, the first one writes.

    Args:
        plan: see Plan.
        open_stream: delivers the chunks of a feed.
        device: this rank's.

    Yields:
        After each epoch, once it is on storage.
    """
    job = plan.job
    rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(job.seed)
    dtype = resolve_precision(job.precision, device)
    state = build_state(_build_on(plan, device, num_workers), job.optimizer, dtype)
    hash_now = order_hash(plan.train, open_groups=job.data.open_shards, seed=job.seed, factors=plan.factors)
    _resume(state, plan, hash_now, rank)
    feed = build_feed(
        job, plan.train, plan.classes, state.ledger, rank=rank, num_workers=num_workers, factors=plan.factors
    )
    model = wrap(state.model, is_compiled=job.compile, channels_last=job.channels_last)
    progress = _Progress(job, feed.num_positions, state.step) if rank == 0 else None
    skipped = _Skipped(plan, rank)
    events = fit(
        model,
        state,
        iter_batches(feed, open_stream(feed)),
        num_samples=feed.num_positions,
        order_hash=hash_now,
        job=job,
        dtype=dtype,
    )
    for event in events:
        match event:
            case Step():
                if progress is not None:
                    progress.show(event)
            case EpochResult():
                scores: dict[str, float] = {}
                failures: list[Failure] = []
                if not plan.validates_beside:
                    scores, failures = _validate(state.model, plan, rank, num_workers, dtype)
                skipped.add(event.failures, failures)
                state.history.append({"epoch": event.epoch, "step": event.step, **event.metrics, **scores})
            case CheckpointDue():
                uri = _save(state, plan) if rank == 0 else ""
                yield Saved(state.step, state.history[-1], uri)


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


def _validate(
    model: SegModel, plan: Plan, rank: int, num_workers: int, dtype: torch.dtype
) -> tuple[dict[str, float], list[Failure]]:
    """Metrics over the validation split, shared out over the ranks; every rank must call it."""
    if num_workers > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    job = plan.job
    metrics = Metrics(job.task, plan.classes, job.metrics)
    failures: list[Failure] = []
    model.eval()
    batches = iter_pairs(
        plan.val, plan.classes, job.task, rows=job.batch.per_worker, share=rank, num_shares=num_workers
    )
    forward = partial(predict, model, size=job.data.size, dtype=dtype, inference=job.inference)
    for item in chain.from_iterable(predict_pairs(forward, batches)):
        if isinstance(item, Failure):
            failures.append(item)
        else:
            metrics.update(item.pair.sample_id, item.prediction, item.pair.truth)
    model.train()
    if num_workers > 1:
        states: list[Any] = [None] * num_workers
        dist.all_gather_object(states, metrics.state())
        for state in states:
            metrics.merge(state)
    return {f"val/{name}": value for name, value in metrics.compute(plan.val.ranking).items()}, failures


class _Skipped:
    """Samples that any rank has skipped, listed beside the run."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._is_used = plan.train.source.is_skipping or plan.val.source.is_skipping
        self._run_uri = plan.job.run_uri if rank == 0 else None
        self._seen = {"train": dict.fromkeys(plan.train.failures), "val": dict.fromkeys(plan.val.failures)}

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

    def __init__(self, job: TrainJob, num_samples: int, step: int) -> None:
        self._job = job
        self._per_epoch = num_steps(num_samples, job.batch.global_size)
        self._total = self._per_epoch * job.schedule.epochs
        self._since_step, self._since = step, time.monotonic()
        self._shown = 0.0

    def show(self, event: Step) -> None:
        now = time.monotonic()
        if now - self._shown < self._EVERY_S and event.step % self._per_epoch:
            return
        self._shown = now
        pace = (event.step - self._since_step) / max(now - self._since, 1e-9)
        left = int((self._total - event.step) / max(pace, 1e-9))
        logger.info(
            "epoch %d/%d  step %d/%d  loss %.4f  lr %.2e  %.1f images/s  %d:%02d left",
            event.epoch + 1,
            self._job.schedule.epochs,
            (event.step - 1) % self._per_epoch + 1,
            self._per_epoch,
            float(event.loss),
            event.lr,
            pace * self._job.batch.global_size,
            left // 60,
            left % 60,
        )


# --- saving -------------------------------------------------------------------------------------------------------


def _save(state: TrainState, plan: Plan) -> str:
    """Puts an epoch on storage: checkpoint, metrics, a bundle if it may be among the best; the checkpoint's URI."""
    job = plan.job
    if plan.validates_beside:
        state.history = standing.with_validations(job, state.history)
    uri = checkpoint.write(job.run_uri, state)
    if standing.is_among_best(job, state.history) or plan.validates_beside:
        _write_bundle(state, plan)
    standing.settle(job, state.history)
    row, metric = state.history[-1], job.checkpoint.metric
    score = f"{metric} {row[metric]:.4f}" if metric in row else f"{metric} is to come"
    logger.info("epoch %d: train loss %.4f, %s; saved %s", int(row["epoch"]) + 1, row["train/loss"], score, uri)
    return uri


def _write_bundle(state: TrainState, plan: Plan) -> None:
    job = plan.job
    bundle = Bundle(
        uri=standing.bundle_uri(job, state.step),
        task=job.task,
        classes=plan.classes,
        model=job.model.name,
        preprocessing=Preprocessing(job.data.size),
        metrics=state.history[-1],
        job=job.model_dump(mode="json"),
        fingerprint=plan.fingerprint,
        inference=job.inference,
        versions=bundles.installed_versions(),
    )
    bundles.write(bundle, state.model)
