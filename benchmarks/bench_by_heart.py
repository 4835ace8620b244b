"""In how many steps a model learns a few images by heart, from scratch, by our data, losses, loop and metrics; no Ray.

A family whose parts fit together gets there; one with a wrong target, mask or box does not. The settings of the tiny
models are CASES; any other job is named with --job, and changed as on the command line of `raysseg train`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import device_name, write_result
from raysseg import config
from raysseg.catalogue import HEADLINES
from raysseg.config import TrainJob
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import build_feed, iter_batches, iter_chunks, iter_pairs
from raysseg.data.example import draw_example
from raysseg.data.index import SampleIndex
from raysseg.ledger import Ledger, num_steps
from raysseg.loop import Step, build_state, fit, wrap
from raysseg.metrics import Metrics
from raysseg.models import SegModel, build_model
from raysseg.models.base import resolve_precision
from raysseg.predictor import Predicted, predict, predict_pairs
from raysseg.schema import ClassMap

NUM_IMAGES = 8
SIZE = (96, 128)


@dataclass(frozen=True)
class Case:
    """How a tiny model is trained.

    Attributes:
        job: the example's, of its task.
        steps: of four images.
        metric: that should come to the bar.
        settings: what is changed in the job.
        bar: DETR's is lower: it learns slowly, and masks of a quarter of the image can't draw poles of one pixel.
    """

    job: str
    steps: int
    metric: str
    settings: tuple[str, ...]
    bar: float = 0.9


SEMANTIC, INSTANCE, PANOPTIC = (
    f"jobs/example-{model}.yaml" for model in ("segformer-semantic", "maskrcnn-instance", "mask2former-panoptic")
)
CASES = {
    "segformer-tiny": Case(SEMANTIC, 800, "miou", ("loss={dice: 1.0, lovasz: 1.0}", "optimizer.lr=6e-3")),
    "unet-tiny": Case(SEMANTIC, 300, "miou", ("loss={dice: 1.0, lovasz: 1.0}", "optimizer.lr=1e-2")),
    "maskrcnn-tiny": Case(INSTANCE, 500, "mask_ap50", ("optimizer={name: adamw, lr: 2e-3, clip_norm: 10}",)),
    "detr-tiny": Case(PANOPTIC, 1500, "pq", ("optimizer={lr: 1e-3}", "inference={score_threshold: 0.5}"), bar=0.7),
    "mask2former-tiny": Case(PANOPTIC, 800, "pq", ("optimizer={lr: 1e-3, clip_norm: 1.0}",)),
    "eomt-tiny": Case(PANOPTIC, 300, "pq", ("optimizer={lr: 2e-3, clip_norm: 1.0}",)),
    "rfdetr-tiny": Case(INSTANCE, 700, "mask_ap50", ("optimizer={lr: 2e-3, clip_norm: 1.0}",)),
}


def load_case(name: str, folder: Path, changes: Sequence[str] = ()) -> TrainJob:
    """Draws the images of a case, and reads its job."""
    case = CASES[name]
    draw_example(folder, num_train=NUM_IMAGES, num_val=1, size=SIZE)
    os.environ["EXAMPLE"] = str(folder)
    settings = (
        f"model.name={name}",
        f"schedule.epochs={case.steps * 4 // NUM_IMAGES}",
        f"data.crop={list(SIZE)}",
        "data.augment=null",
        "batch={global_size: 4, per_worker: 4}",
    )
    job = config.load(case.job, (*settings, *case.settings, *changes))
    assert isinstance(job, TrainJob)
    return job


def iter_scores(job: TrainJob, num_images: int, every: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains on the first so many images; the metrics of these very images after each so many steps, and at the end."""
    classes = read_class_map(job.classes, job.data.train)
    index = read_index(job.data.train).take(np.arange(num_images))
    feed = build_feed(job, index, classes, Ledger(), rank=0, num_workers=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_precision(job.precision, device)
    torch.manual_seed(job.seed)
    model = build_model(job.model, classes, job.task, job.loss).to(device).train()
    state = build_state(model, job.optimizer, dtype)
    wrapped = wrap(model, is_compiled=False, channels_last=job.channels_last)
    batches = iter_batches(feed, iter_chunks(feed))
    total = job.schedule.epochs * num_steps(feed.num_positions, job.batch.global_size)
    for event in fit(wrapped, state, batches, num_samples=feed.num_positions, order_hash="", job=job, dtype=dtype):
        if isinstance(event, Step) and (event.step % every == 0 or event.step == total):
            yield event.step, measure(model.eval(), index, classes, job, dtype)
            model.train()


def measure(
    model: SegModel, index: SampleIndex, classes: ClassMap, job: TrainJob, dtype: torch.dtype
) -> dict[str, float]:
    metrics = Metrics(job.task, classes)
    forward = partial(predict, model, size=job.data.size, dtype=dtype, inference=job.inference)
    for item in chain.from_iterable(predict_pairs(forward, iter_pairs(index, classes, job.task, rows=4))):
        assert isinstance(item, Predicted), item
        metrics.update(item.pair.sample_id, item.prediction, item.pair.truth)
    return metrics.compute()


def learn(job: TrainJob, metric: str, num_images: int, every: int) -> dict[str, str | float]:
    """A row of the table; the curve goes to stdout as it comes."""
    started = time.perf_counter()
    for step, metrics in iter_scores(job, num_images, every):
        elapsed = time.perf_counter() - started
        print(f"{job.model.name}: step {step}, {metric} {metrics[metric]:.3f}, {elapsed:.0f} s", flush=True)
    size = "x".join(map(str, job.data.crop))
    return {
        "model": job.model.name,
        "images": num_images,
        "size": size,
        "steps": step,
        "metric": metric,
        "value": metrics[metric],
        "s": elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--job", help="a train job, in place of the tiny models")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="of the job's")
    parser.add_argument("--every", type=int, default=50, help="steps between two scores")
    parser.add_argument("settings", nargs="*", help="dotted.key=value, of the job or the tiny models'")
    options = parser.parse_args()
    if options.job is not None:
        job = config.load(options.job, options.settings)
        assert isinstance(job, TrainJob)
        rows = [learn(job, HEADLINES[job.task], options.images, options.every)]
        write_result(f"by-heart-{job.name}", device_name(), rows, vars(options))
        return
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                learn(load_case(name, Path(folder), options.settings), CASES[name].metric, NUM_IMAGES, options.every)
            )
    what = "by-heart" if options.models == list(CASES) else f"by-heart-{'-'.join(options.models)}"
    write_result(what, device_name(), rows, vars(options))


if __name__ == "__main__":
    main()
