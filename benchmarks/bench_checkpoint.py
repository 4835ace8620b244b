"""How long training stands still for a checkpoint: written beside it, against written in line.

Usage: python -m benchmarks.bench_checkpoint [--rounds 5] [--models segformer-b0 segformer-b2]

The same saver writes the same state (weights, AdamW, an average) to disk and to an S3 server on this machine; in line,
the loop waits until it is there. A round takes both, one after the other.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import boto3
import torch

from benchmarks.results import compare, device_name, write_result
from jobs.s3_server import s3_server
from raysseg import config, storage
from raysseg.bundle import Bundle, Preprocessing
from raysseg.loop import TrainState, build_state
from raysseg.models import build_model
from raysseg.saver import Saver
from raysseg.schema import ClassMap

CLASSES = ClassMap((0, 1, 2), ("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 99, 99)), (False,) * 3)


def build(name: str, runs: str) -> tuple[config.TrainJob, TrainState]:
    """A state after one step, so that the optimiser has all of its own."""
    folder = {"format": "masks", "images": "x", "masks": "x"}
    raw = {
        "kind": "train",
        "name": name,
        "task": "semantic",
        "classes": list(CLASSES.names),
        "data": {"train": folder, "val": folder, "crop": [64, 64]},
        "model": {"name": name, "weights": None},
        "storage": runs,
    }
    job = config.parse_as(config.TrainJob, raw)
    model = build_model(job.model, CLASSES, job.task, job.loss, None)
    state = build_state(model, job.optimizer, torch.float32, config.Ema())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return job, state


def measure(saver: Saver, state: TrainState, *, is_beside: bool) -> float:
    """Seconds for which the loop stands still."""
    state.step += 1
    started = time.perf_counter()
    saver.save(state, is_epoch=False)
    if not is_beside:
        saver.finish()
    stood = time.perf_counter() - started
    saver.finish()
    return stood


@contextmanager
def runs_on_s3() -> Iterator[str]:
    with s3_server() as endpoint:
        storage.use_s3(endpoint=endpoint, region="us-east-1")
        os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
        yield "s3://runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["segformer-b0", "segformer-b2"])
    options = parser.parse_args()
    rows = []
    with TemporaryDirectory() as scratch, runs_on_s3() as s3:
        for name in options.models:
            for where, runs in (("disk", scratch), ("S3", s3)):
                job, state = build(name, runs)
                bundle = Bundle("", job.task, CLASSES, name, Preprocessing(None), {}, {}, {}, job.inference, {})
                saver = Saver(job, bundle, validates_beside=False)
                measure(saver, state, is_beside=True)  # takes the memory that the next ones use again
                pairs = [
                    (measure(saver, state, is_beside=True), measure(saver, state, is_beside=False))
                    for _ in range(options.rounds)
                ]
                beside, inline = zip(*pairs, strict=True)
                size = sum(p.numel() for p in state.model.parameters()) * 16 / 2**20
                rows.append(compare(f"{name}, {size:.0f} MiB, {where}: seconds", beside, inline, "<= 0.05"))
    write_result("checkpoint", device_name(), rows, vars(options))


if __name__ == "__main__":
    main()
