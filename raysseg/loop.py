"""The training loop in plain torch: no Ray, no storage, no callbacks. `fit` is a generator; its caller saves."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
class NonFinite:
    """The gradient was not finite: the step changed nothing but the place in the data; its Step follows.

    Attributes:
        positions: of this rank's micro-batches whose loss is not finite; all of this rank's where every loss of every
            rank is; none where it is another rank's that is not.
        losses: of all of this rank's micro-batches.
    """

    epoch: int
    step: int
    positions: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class EpochResult:
    """An epoch is over.

    Attributes:
        epoch: from 0.
        step: steps done so far in the run.
        metrics: `train/loss` (mean over the epoch's steps, over all ranks), `train/<term>`, `train/lr`,
            `train/images_per_s`, `train/wait_share` (of the time, waiting for data; the slowest rank's),
            `train/stall_s` (seconds that training stood still since the epoch before, to validate and to save).
        failures: samples that this rank skipped since the last checkpoint.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    failures: tuple[Failure, ...]


class Tally:
    """What an epoch has come to so far.

    Attributes:
        shared: sums over all ranks, as far as they have been shared: they go into checkpoints.
        failures: samples that this rank skipped and has not told of yet.
    """

    def __init__(self, shared: dict[str, float] | None = None) -> None:
        self.shared = dict(shared or {})
        self.failures: list[Failure] = []
        self._begin()

    def _begin(self) -> None:
        self._losses: dict[str, Tensor] = {}  # on the device, so that no step waits for them
        self._counts = dict.fromkeys(("steps", "images", "stall_s"), 0.0)
        self._wait_s = 0.0
        self._started = time.perf_counter()

    def add(self, losses: dict[str, Tensor], num_images: int, *, is_counted: bool) -> None:
        """Adds a step; `losses` are this rank's, scaled to the whole, and left out of the means unless they count."""
        for name, value in losses.items():
            counted = value.double() if is_counted else value.new_zeros((), dtype=torch.float64)
            self._losses[name] = self._losses.get(name, 0.0) + counted
        self._counts["steps"] += is_counted
        self._counts["images"] += num_images

    def add_time(self, *, wait_s: float = 0.0, stall_s: float = 0.0) -> None:
        """Counts seconds of waiting for data, and of standing still."""
        self._wait_s += wait_s
        self._counts["stall_s"] += stall_s

    def share(self, device: torch.device) -> None:
        """Adds up what the ranks have counted since the last time; every rank must call it."""
        names = sorted(self._losses)
        losses = torch.stack([self._losses[name] for name in names]) if names else torch.zeros(1, device=device)
        slowest = torch.tensor(self._wait_s, device=device)
        num_ranks = 1
        if dist.is_initialized():
            num_ranks = dist.get_world_size()
            dist.all_reduce(losses)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        sums = dict(zip((f"loss/{name}" for name in names), (losses / num_ranks).tolist(), strict=False))
        sums |= self._counts | {"wait_s": float(slowest), "elapsed_s": time.perf_counter() - self._started}
        for name, value in sums.items():
            self.shared[name] = self.shared.get(name, 0.0) + value
        self._begin()

    def summarise(self) -> dict[str, float]:
        """The epoch's means; what has been shared counts."""
        sums = self.shared
        terms = {name[5:]: value / max(sums["steps"], 1) for name, value in sums.items() if name.startswith("loss/")}
        elapsed = max(sums["elapsed_s"], 1e-9)
        return {
            "train/loss": sum(terms.values()),
            **{f"train/{name}": value for name, value in terms.items()},
            "train/images_per_s": sums["images"] / elapsed,
            "train/wait_share": sums["wait_s"] / elapsed,
            "train/stall_s": sums["stall_s"],
        }


@dataclass
class TrainState:
    """What training changes. A checkpoint holds all of it; dropout and augmentation follow from the step and the seed.

    Attributes:
        model: without DDP or compile around it.
        optimizer: with its groups' `base_lr`.
        scaler: for fp16; disabled otherwise.
        ema: a second model with the average of the weights, if there is one.
        step: optimiser steps done.
        ledger: how far the data have been used.
        tally: what the epoch has come to.
        history: a row of metrics an epoch.
    """

    model: SegModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: SegModel | None = None
    step: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    tally: Tally = field(default_factory=Tally)
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that reading it back runs no code."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        if self.ema is not None:
            parts["ema"] = self.ema
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of state_dict."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def scored_model(state: TrainState, ema: config.Ema | None) -> SegModel:
    """What validation scores and bundles hold: the average where the job wants that, else the model."""
    return state.ema if ema is not None and ema.is_used and state.ema is not None else state.model


# --- building -----------------------------------------------------------------------------------------------------


def build_state(
    model: SegModel, optimizer: config.Optimizer, dtype: torch.dtype, ema: config.Ema | None = None
) -> TrainState:
    """A fresh state for a model that is on its device already."""
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = copy.deepcopy(model).requires_grad_(False).eval() if ema is not None else None
    return TrainState(model, build_optimizer(model, optimizer), scaler, average)


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


def wrap(model: SegModel, *, is_compiled: bool, channels_last: bool, recomputes: bool = False) -> nn.Module:
    """The model as it is trained: in its memory format, distributed where a process group is up, compiled if asked.

    Args:
        model: see SegModel.
        is_compiled: by torch.compile.
        channels_last: its memory format.
        recomputes: backward passes compute some layers once more.
    """
    if recomputes:
        model.recompute_layers()
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
) -> Iterator[Step | NonFinite | EpochResult]:
    """Trains from the state's ledger to the schedule's last epoch.

    Args:
        model: `state.model` as `wrap` gave it.
        state: changed in place; whole whenever a value is yielded, so that it may be saved then.
        batches: this rank's micro-batches of each global batch, from the ledger's position on.
        num_samples: positions of an epoch, over all ranks.
        order_hash: fingerprint of the data and their order, for the ledger.
        job: its batch, schedule, optimizer, ema, seed and channels_last are used.
        dtype: of the forward passes.

    Yields:
        A Step after each optimiser step, a NonFinite before it where the step was left out, an EpochResult after each
        epoch.
    """
    total = num_steps(num_samples, job.batch.global_size) * job.schedule.epochs
    device = next(state.model.parameters()).device
    statistics = _Statistics(state.model)
    while state.ledger.epoch < job.schedule.epochs:
        epoch = state.ledger.epoch
        starts = range(state.ledger.position, num_samples, job.batch.global_size)
        ahead = _fetch(batches, job, epoch, device) if starts else None
        for start in starts:
            stop = min(start + job.batch.global_size, num_samples)
            assert ahead is not None
            micro_batches, pairs, wait_s = ahead
            lr = _prepare(state, job, total)
            statistics.keep()
            parts = backward(model, state, pairs, dtype)
            ahead = _fetch(batches, job, epoch, device) if stop < num_samples else None  # while the device computes
            is_finite = update(state, job)
            state.step += 1
            state.ledger = Ledger(epoch, stop, order_hash)
            incident = None
            if not is_finite:
                statistics.restore()
                incident = _name_non_finite(state, epoch, micro_batches, parts)
            losses = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
            state.tally.failures += [failure for batch in micro_batches for failure in batch.failures]
            state.tally.add(losses, stop - start, is_counted=incident is None)
            state.tally.add_time(wait_s=wait_s)
            before = time.perf_counter()
            if incident is not None:
                yield incident
            loss = torch.stack(list(losses.values())).sum()
            yield Step(epoch, state.step, loss, lr, wait_s)
            state.tally.add_time(stall_s=time.perf_counter() - before)
        state.tally.share(device)
        factor = learning_rate_factor(job.schedule, state.step - 1, total)
        metrics = state.tally.summarise() | {"train/lr": job.optimizer.lr * factor}
        failures = tuple(state.tally.failures)
        state.ledger, state.tally = Ledger(epoch + 1, 0, order_hash), Tally()
        before = time.perf_counter()
        yield EpochResult(epoch, state.step, metrics, failures)
        state.tally = Tally()  # its clock starts now
        state.tally.add_time(stall_s=time.perf_counter() - before)


def _prepare(state: TrainState, job: config.TrainJob, total: int) -> float:
    """What follows from the step alone: the learning rate, which it returns, dropout, and the model's own schedule."""
    factor = learning_rate_factor(job.schedule, state.step, total)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    _seed_dropout(job.seed, state.step)
    for model in (state.model, state.ema):
        if model is not None:
            model.set_progress(state.step / total)
    return job.optimizer.lr * factor


class _Fetched(NamedTuple):
    """A rank's part of a global batch: as it came, and on the device."""

    micro_batches: list[Batch]
    pairs: list[tuple[Tensor, Targets]]
    wait_s: float


def _fetch(batches: Iterator[list[Batch]], job: config.TrainJob, epoch: int, device: torch.device) -> _Fetched:
    before = time.perf_counter()
    micro_batches = next(batches)
    wait_s = time.perf_counter() - before
    move = partial(to_device, device=device, channels_last=job.channels_last, seed=job.seed, epoch=epoch)
    return _Fetched(micro_batches, [move(batch) for batch in micro_batches], wait_s)


def backward(
    model: nn.Module, state: TrainState, pairs: list[tuple[Tensor, Targets]], dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """The gradient of a global batch; returns this rank's losses by micro-batch, scaled to the whole.

    DDP averages gradients over ranks, while each rank's loss is its part of one sum: hence the factor `num_ranks`.
    """
    device = next(state.model.parameters()).device
    normalisers = _sum_normalisers([state.model.normalisers(targets) for _, targets in pairs])
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    parts: list[dict[str, Tensor]] = []
    state.optimizer.zero_grad(set_to_none=True)
    for i, (images, targets) in enumerate(pairs):
        is_last = i == len(pairs) - 1
        quiet = model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()
        with quiet:
            with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                outputs: Outputs = model(images, targets, normalisers)
            loss = sum(outputs.losses.values(), torch.zeros((), device=device)) * num_ranks
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        parts.append({name: value.detach() * num_ranks for name, value in outputs.losses.items()})
    return parts


def update(state: TrainState, job: config.TrainJob) -> bool:
    """Applies the gradient, unless it is not finite; every rank has the same one, and decides alike."""
    state.scaler.unscale_(state.optimizer)
    parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
    if job.optimizer.clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(parameters, job.optimizer.clip_norm)
    else:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    is_finite = bool(torch.isfinite(norm))
    if is_finite or state.scaler.is_enabled():  # fp16's scaler leaves such a step out by itself, and learns from it
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if is_finite and job.ema is not None and state.ema is not None:
        _average(state.ema, state.model, min(job.ema.decay, (1 + state.step) / (10 + state.step)))
    return is_finite


@torch.no_grad()
def _average(ema: SegModel, model: SegModel, decay: float) -> None:
    """Moves the average towards the model; what is no weight, such as BatchNorm's statistics, is taken as it is."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


class _Statistics:
    """The running statistics of BatchNorm, which a forward pass changes: what they were before a step."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)


def _name_non_finite(
    state: TrainState, epoch: int, micro_batches: list[Batch], parts: list[dict[str, Tensor]]
) -> NonFinite | None:
    """Whose fault a gradient is that is not finite; every rank must call it.

    Returns:
        None where fp16 has no room for the gradient of finite losses, which its scaler mends.
    """
    losses = [float(torch.stack(list(part.values())).sum()) for part in parts]
    blamed = [batch for batch, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
    num_blamed = torch.tensor(len(blamed), device=next(state.model.parameters()).device)
    if dist.is_initialized():
        dist.all_reduce(num_blamed)
    if not num_blamed and state.scaler.is_enabled():
        return None
    batches = blamed if num_blamed else micro_batches
    positions = [int(p) for batch in batches for p in batch.positions if p >= 0]
    return NonFinite(epoch, state.step, tuple(positions), tuple(losses))


def _sum_normalisers(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Normalisers of the global batch: over this rank's micro-batches and over all ranks."""
    names = sorted(parts[0])
    total = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in names])
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(names, total, strict=True))


def _seed_dropout(seed: int, step: int) -> None:
    """Dropout follows from (seed, step, rank), so that a resumed run draws what an unbroken one would have."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))
