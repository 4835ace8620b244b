"""Training against plain torch: `fit` against a hand-written loop, and two Ray Train workers against plain DDP."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.segformer.modeling_segformer import SegformerForSemanticSegmentation

from benchmarks.commands import MAX_STOLEN, Line, alternate_quiet, is_quiet, run
from benchmarks.results import compare, device_name, write_result
from raysseg import config
from raysseg.data import read_class_map
from raysseg.data.batches import Batch
from raysseg.data.example import draw_example
from raysseg.loop import EpochResult, build_state, fit, learning_rate_factor, wrap
from raysseg.models import SegModel, Targets, build_model
from raysseg.models.base import resolve_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_CLASSES = 19
EXAMPLE_JOB = "jobs/example-segformer-semantic.yaml"

Round = Callable[[], float]
"""Trains for one round; returns its images/s."""


# --- the loop alone -----------------------------------------------------------------------------------------------


def synthetic_job(
    *, crop: int, batch: int, epochs: int, is_compiled: bool = False, channels_last: bool = False
) -> config.TrainJob:
    """A job for SegFormer-B0 that names no data of its own."""
    nowhere = {"format": "masks", "images": "-", "masks": "-"}
    raw = {
        "kind": "train",
        "name": "loop",
        "task": "semantic",
        "classes": [f"class {i}" for i in range(NUM_CLASSES)],
        "data": {"train": nowhere, "val": nowhere, "crop": [crop, crop]},
        "model": {"name": "segformer-b0", "weights": None},
        "schedule": {"epochs": epochs},
        "batch": {"global_size": batch, "per_worker": batch},
        "compile": is_compiled,
        "channels_last": channels_last,
        "storage": "-",
    }
    return config.parse_as(config.TrainJob, raw)


def random_batches(job: config.TrainJob, number: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    shape = (job.batch.global_size, *job.data.crop)
    rows = np.ones(shape[0], np.float32), np.arange(shape[0])
    return [
        Batch(rng.integers(0, 256, (*shape, 3), np.uint8), rng.integers(0, NUM_CLASSES, shape, np.uint8), *rows)
        for _ in range(number)
    ]


def build(job: config.TrainJob) -> SegModel:
    torch.manual_seed(job.seed)
    return build_model(job.model, read_class_map(job.classes), loss=job.loss).to(DEVICE)


def our_round(job: config.TrainJob, batches: list[Batch], steps: int) -> Round:
    """`fit`, an epoch a round."""
    dtype = resolve_precision(job.precision, DEVICE)
    state = build_state(build(job), job.optimizer, dtype)
    model = wrap(state.model, is_compiled=job.compile, channels_last=job.channels_last)
    num_samples = steps * job.batch.global_size
    feed = cycle([[batch] for batch in batches])
    events = fit(model, state, feed, num_samples=num_samples, order_hash="", job=job, dtype=dtype)

    def train() -> float:
        started = time.perf_counter()
        for event in events:
            if isinstance(event, EpochResult):
                break
        synchronise()
        return num_samples / (time.perf_counter() - started)

    return train


def plain_round(job: config.TrainJob, batches: list[Batch], steps: int) -> Round:
    """The loop that one writes by hand around transformers' model and its own loss."""
    dtype = resolve_precision(job.precision, DEVICE)
    built = build(job)
    net: SegformerForSemanticSegmentation = built.net
    tensors = cycle([to_tensors(batch) for batch in batches])
    optimizer = torch.optim.AdamW(
        net.parameters(), job.optimizer.lr, weight_decay=job.optimizer.weight_decay, fused=DEVICE.type == "cuda"
    )
    factor = partial(learning_rate_factor, job.schedule, total=steps * job.schedule.epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    net.train()

    def train() -> float:
        started = time.perf_counter()
        total = torch.zeros((), device=DEVICE)
        for _ in range(steps):
            images, labels = (tensor.to(DEVICE, non_blocking=True) for tensor in next(tensors))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = net(pixel_values=(images.float() - built.mean) / built.std, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), job.optimizer.clip_norm)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        total.item()
        synchronise()
        return steps * job.batch.global_size / (time.perf_counter() - started)

    return train


def to_tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) uint8 and labels (B, H, W) int64, pinned where there is a GPU."""
    pair = torch.from_numpy(batch.images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(batch.labels).long()
    return (pair[0].pin_memory(), pair[1].pin_memory()) if DEVICE.type == "cuda" else pair


def check_same_loss(job: config.TrainJob, batch: Batch) -> None:
    """Both sides minimise one and the same loss."""
    model = build(job).eval()
    images, labels = (tensor.to(DEVICE) for tensor in to_tensors(batch))
    with torch.inference_mode():
        ours = model(
            images, Targets(labels, torch.ones(len(labels), device=DEVICE), torch.zeros(len(labels), dtype=torch.int64))
        ).losses["cross_entropy"]
        theirs = model.net(pixel_values=model.normalise(images), labels=labels).loss
    assert math.isclose(ours, theirs, rel_tol=1e-4), (ours, theirs)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def alternate(ours: Round, peer: Round, rounds: int) -> tuple[list[float], list[float]]:
    """Images/s of both, in turn; each has warmed up for a round."""
    ours(), peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def bench_loop(rounds: int, steps: int) -> tuple[dict[str, str | float], dict[str, object]]:
    crop, batch = (512, 16) if DEVICE.type == "cuda" else (128, 4)
    job = synthetic_job(crop=crop, batch=batch, epochs=rounds + 1)
    batches = random_batches(job, 4)
    check_same_loss(job, batches[0])
    ours, peer = alternate(our_round(job, batches, steps), plain_round(job, batches, steps), rounds)
    settings = {
        "model": job.model.name,
        "crop": crop,
        "batch": batch,
        "dtype": str(resolve_precision(job.precision, DEVICE)),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "steps a round": steps,
    }
    return compare("loop, images/s", ours, peer, ">= 0.98"), settings


# --- two workers --------------------------------------------------------------------------------------------------


def bench_ray(rounds: int, epochs: int, num_images: int) -> tuple[dict[str, str | float], dict[str, object]]:
    overrides = ["model.name=segformer-b0", "optimizer.lr=6.0e-4", f"schedule.epochs={epochs}"]
    overrides.append("loss.dice=0")  # what is left is the loss that transformers' model has built in
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        draw_example(data, num_train=num_images, num_val=16)
        row = compare(
            "2 workers, images/s",
            *alternate_quiet(partial(our_rate, data, overrides), partial(plain_rate, data, overrides), rounds),
            ">= 0.95",
        )
    settings = {
        "job": EXAMPLE_JOB,
        "overrides": overrides,
        "training images": num_images,
        "rounds": rounds,
        "images/s": "median of a run's epochs after the first, without validation; of those only in which the host "
        f"gave less than {MAX_STOLEN:.0%} of the CPU time to others",
        "peer": "DDP over gloo, 2 processes of 1 thread, a DataLoader worker each",
    }
    return row, settings


def our_rate(data: Path, overrides: list[str]) -> float | None:
    """Images/s of `raysseg train`; None if the machine was busy in all epochs."""
    with tempfile.TemporaryDirectory() as runs:
        lines = run(["-m", "raysseg.cli", "train", EXAMPLE_JOB, *overrides], {"EXAMPLE": str(data), "RUNS": runs})
        history = Path(runs, "example-segformer/metrics.jsonl").read_text().splitlines()
    ends = [line for line in lines if "train loss" in line.text]
    return quiet_median(ends, [json.loads(row)["train/images_per_s"] for row in history])


def plain_rate(data: Path, overrides: list[str]) -> float | None:
    """Images/s of the plain run; None if the machine was busy in all epochs."""
    lines = run(["-m", "benchmarks.plain_ddp", EXAMPLE_JOB, *overrides], {"EXAMPLE": str(data)})
    ends = [line for line in lines if line.text.startswith("images/s ")]
    return quiet_median(ends, [float(line.text.split()[1]) for line in ends])


def quiet_median(ends: list[Line], rates: list[float]) -> float | None:
    """The median over the epochs after the first in which the machine was left alone."""
    windows = zip(ends, ends[1:], rates[1:], strict=False)
    quiet = [rate for begin, end, rate in windows if is_quiet(begin, end)]
    return median(quiet) if quiet else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("loop", "ray"), help="default: both")
    parser.add_argument("--rounds", type=int, default=7, help="of the loop")
    parser.add_argument("--steps", type=int, default=8, help="of a round of the loop")
    parser.add_argument("--ray-rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6, help="of a run with two workers; the first is not counted")
    parser.add_argument("--images", type=int, default=160, help="for the runs with two workers")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs: the first is not counted, so give at least 2")
    rows: list[dict[str, str | float]] = []
    settings: dict[str, object] = {}
    if options.part != "ray":
        row, settings["loop"] = bench_loop(options.rounds, options.steps)
        rows.append(row)
    if options.part != "loop":
        row, settings["ray"] = bench_ray(options.ray_rounds, options.epochs, options.images)
        rows.append(row)
    write_result(f"train-{options.part}" if options.part else "train", device_name(), rows, settings)


if __name__ == "__main__":
    main()
