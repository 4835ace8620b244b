"""The training loop in plain torch: no Ray, no storage, no callbacks. `fit` is a generator; its caller saves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysseg import config
from raysseg.data.augment import seeded_rng
from raysseg.data.batches import Batch, Numbered
from raysseg.data.index import Failure
from raysseg.ledger import Ledger, num_steps
from raysseg.models import Outputs, Regions, SegModel, Targets


@dataclass(frozen=True)
class Step:
    """One optimiser step is done.

    Attributes:
        step: steps done so far in the run, this one included.
        loss: this rank's part of the loss, scaled to the whole; a scalar on the device.
        lr: learning rate, where no factor changes it.
        wait_s: seconds that this rank waited for data.
    """

    epoch: int
    step: int
    loss: Tensor
    lr: float
    wait_s: float


@dataclass(frozen=True)
class EpochResult:
    """An epoch is over.

    Attributes:
        epoch: from 0.
        step: steps done so far in the run.
        metrics: `train/loss` (mean over the epoch's steps, over all ranks), `train/<term>`, `train/lr`,
            `train/images_per_s`, `train/wait_share` (of the time, waiting for data; the slowest rank's),
            `train/stall_s` (seconds that training stood still after the epoch before, to validate and to save).
        failures: samples that this rank skipped in this epoch.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class CheckpointDue:
    """The state is whole, and worth keeping."""

    ledger: Ledger
    step: int


@dataclass
class TrainState:
    """What training changes. A checkpoint holds all of it.

    Attributes:
        model: without DDP or compile around it.
        optimizer: with its groups' `base_lr`.
        scaler: for fp16; disabled otherwise.
        step: optimiser steps done.
        ledger: how far the data have been used.
        history: a row of metrics an epoch.
    """

    model: SegModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that reading it back runs no code."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of state_dict."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


# --- building -----------------------------------------------------------------------------------------------------


def build_state(model: SegModel, optimizer: config.Optimizer, dtype: torch.dtype) -> TrainState:
    """A fresh state for a model that is on its device already."""
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return TrainState(model, build_optimizer(model, optimizer), scaler)


def build_optimizer(model: SegModel, settings: config.Optimizer) -> torch.optim.Optimizer:
    """AdamW or SGD; norms, biases and other vectors carry no weight decay, head and backbone have their own rates."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(model.backbone_prefixes):
            factor = settings.backbone_lr_factor
        else:
            factor = settings.head_lr_factor if name.startswith(model.head_prefixes) else 1.0
        if parameter.requires_grad:
            groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    parts = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "lr": (rate := settings.lr * factor),
            "base_lr": rate,
        }
        for (factor, is_matrix), parameters in groups.items()
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(parts, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(parts, lr=settings.lr, betas=settings.betas, fused=True)


def wrap(model: SegModel, *, is_compiled: bool, channels_last: bool) -> nn.Module:
    """The model as it is trained: in its memory format, distributed where a process group is up, compiled if asked."""
    if channels_last:
        model.to(memory_format=torch.channels_last)
    device = next(model.parameters()).device
    wrapped: nn.Module = model
    if dist.is_initialized() and dist.get_world_size() > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if is_compiled:
        wrapped.compile()
    return wrapped


def synchronise_batch_norm(model: SegModel) -> SegModel:
    """BatchNorm over all ranks' images; for GPUs only, since torch's takes no CPU tensors."""
    converted: SegModel = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def resolve_precision(precision: config.Precision, device: torch.device) -> torch.dtype:
    """The type that forward passes run in; `auto` is bf16 on GPUs that have it, else fp32."""
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def learning_rate_factor(schedule: config.Schedule, step: int, total: int) -> float:
    """The learning rate of a step (from 0) over the base rate: linear warm-up, then the decay."""
    warmup = round(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule.decay == "polynomial":
        return float((1 - progress) ** schedule.power)
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1.0


def to_device(
    batch: Batch, device: torch.device, *, channels_last: bool, seed: int = 0, epoch: int = 0
) -> tuple[Tensor, Targets]:
    """A batch as tensors: images (B, 3, H, W) uint8, and what they should come out as."""
    is_cuda = device.type == "cuda"

    def move(array: np.ndarray[Any, Any]) -> Tensor:
        # arrays out of the object store are read-only; nothing here writes to them
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor.pin_memory().to(device, non_blocking=True) if is_cuda else tensor

    def to_regions(numbered: Numbered) -> Regions:
        found = [(layer, int(n)) for layer in numbered.numbers for n in np.unique(layer) if n]
        masks = [move((layer == n).view(np.uint8)) for layer, n in found]
        stacked = torch.stack(masks) if masks else move(np.zeros((0, *numbered.numbers.shape[1:]), np.uint8))
        return Regions(stacked.bool(), move(numbered.class_ids[[n - 1 for _, n in found]]))

    images = move(batch.images).permute(0, 3, 1, 2)
    if not channels_last:
        images = images.contiguous()
    seeds = np.array([seeded_rng(seed, epoch, int(p)).integers(2**62) if p >= 0 else 0 for p in batch.positions])
    regions = tuple(map(to_regions, batch.regions)) if batch.regions else None
    return images, Targets(move(batch.labels).long(), move(batch.weights), torch.from_numpy(seeds), regions)


# --- the loop -----------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    state: TrainState,
    batches: Iterator[list[Batch]],
    *,
    num_samples: int,
    order_hash: str,
    job: config.TrainJob,
    dtype: torch.dtype,
) -> Iterator[Step | EpochResult | CheckpointDue]:
    """Trains from the state's ledger to the schedule's last epoch.

    Args:
        model: `state.model` as `wrap` gave it.
        state: changed in place; whole whenever a value is yielded.
        batches: this rank's micro-batches of each global batch, from the ledger's position on.
        num_samples: positions of an epoch, over all ranks.
        order_hash: fingerprint of the data and their order, for the ledger.
        job: its batch, schedule, optimizer, seed and channels_last are used.
        dtype: of the forward passes.

    Yields:
        A Step after each optimiser step, an EpochResult and a CheckpointDue after each epoch.
    """
    steps_per_epoch = num_steps(num_samples, job.batch.global_size)
    total = steps_per_epoch * job.schedule.epochs
    stall_s = 0.0
    while state.ledger.epoch < job.schedule.epochs:
        epoch = state.ledger.epoch
        tally = _Tally(next(state.model.parameters()).device)
        for start in range(state.ledger.position, num_samples, job.batch.global_size):
            before = time.perf_counter()
            micro_batches = next(batches)
            wait_s = time.perf_counter() - before
            factor = learning_rate_factor(job.schedule, state.step, total)
            _set_rate(state.optimizer, factor)
            lr = job.optimizer.lr * factor
            _seed_dropout(job.seed, state.step)
            state.model.set_progress(state.step / total)
            losses = _optimise(model, state, micro_batches, job, dtype)
            stop = min(start + job.batch.global_size, num_samples)
            state.step += 1
            state.ledger = Ledger(epoch, start, order_hash).after(stop, num_samples)
            tally.add(losses, micro_batches, stop - start, wait_s)
            yield Step(epoch, state.step, sum(losses.values(), torch.zeros(())), lr, wait_s)
        metrics = tally.summarise() | {"train/lr": lr, "train/stall_s": stall_s}
        ended = time.perf_counter()
        yield EpochResult(epoch, state.step, metrics, tuple(tally.failures))
        yield CheckpointDue(state.ledger, state.step)
        stall_s = time.perf_counter() - ended


def _optimise(
    model: nn.Module, state: TrainState, micro_batches: list[Batch], job: config.TrainJob, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One optimiser step over a global batch; returns this rank's losses, scaled to the whole.

    DDP averages gradients over ranks, while each rank's loss is its part of one sum: hence the factor `num_ranks`.
    """
    device = next(state.model.parameters()).device
    move = partial(to_device, device=device, channels_last=job.channels_last, seed=job.seed, epoch=state.ledger.epoch)
    pairs = [move(batch) for batch in micro_batches]
    normalisers = _sum_normalisers([state.model.normalisers(targets) for _, targets in pairs])
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    totals: dict[str, Tensor] = {}
    state.optimizer.zero_grad(set_to_none=True)
    for i, (images, targets) in enumerate(pairs):
        is_last = i == len(pairs) - 1
        quiet = model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()
        with quiet:
            with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                outputs: Outputs = model(images, targets, normalisers)
            loss = sum(outputs.losses.values(), torch.zeros((), device=device)) * num_ranks
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for name, value in outputs.losses.items():
            totals[name] = totals.get(name, torch.zeros((), device=device)) + value.detach() * num_ranks
    if job.optimizer.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), job.optimizer.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return totals


def _sum_normalisers(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Normalisers of the global batch: over this rank's micro-batches and over all ranks."""
    names = sorted(parts[0])
    total = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in names])
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(names, total, strict=True))


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _seed_dropout(seed: int, step: int) -> None:
    """Dropout follows from (seed, step, rank), so that a resumed run draws what an unbroken one would have."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


class _Tally:
    """What an epoch has come to; on the device until the end, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._wait_s = 0.0
        self.failures: list[Failure] = []

    def add(self, losses: dict[str, Tensor], micro_batches: list[Batch], num_images: int, wait_s: float) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value
        self._steps += 1
        self._images += num_images
        self._wait_s += wait_s
        self.failures += [failure for batch in micro_batches for failure in batch.failures]

    def summarise(self) -> dict[str, float]:
        """The epoch's means over all ranks; every rank must call it."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] for name in names]).double() / self._steps
        wait = torch.tensor(self._wait_s)
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
            wait = wait.to(self._device)
            dist.all_reduce(wait, dist.ReduceOp.MAX)
        elapsed = time.perf_counter() - self._started
        terms = {f"train/{name}": value for name, value in zip(names, means.tolist(), strict=True)}
        return {
            "train/loss": float(means.sum()),
            **terms,
            "train/images_per_s": self._images / elapsed,
            "train/wait_share": float(wait) / elapsed,
        }
