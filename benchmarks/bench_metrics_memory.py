"""What metrics hold in memory as images are counted: the records, and the process beside them.

Real truth and predictions, over and over under new sample ids: CamVid (mIoU), COCO panoptic (PQ), COCO instances (AP).
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice

from benchmarks import instance_sides, panoptic_sides
from benchmarks.bench_metrics import read_pairs
from benchmarks.memory import MIB, held
from benchmarks.results import Row, device_name, write_result
from raysseg.data import read_class_map
from raysseg.masks import LabelMap, View
from raysseg.metrics import Metrics
from raysseg.schema import ClassMap, Task

Views = Sequence[tuple[View, View]]
"""Prediction and truth."""


def semantic(data: str) -> tuple[Views, ClassMap]:
    pairs, classes = read_pairs(f"{data}/camvid", None)
    return [(LabelMap(one, classes.ignore), LabelMap(other, classes.ignore)) for one, other in pairs], classes


def instance(data: str) -> tuple[Views, ClassMap]:
    images, classes = instance_sides.read_images(f"{data}/reference", "coco_instances_val")
    return [(image.prediction, image.truth) for image in images], classes


def panoptic(data: str) -> tuple[Views, ClassMap]:
    found = panoptic_sides.read_panoptic(data)
    classes = read_class_map(None, found.sources[0])
    return list(panoptic_sides.iter_segments(found, classes)), classes


TASKS: dict[Task, Callable[[str], tuple[Views, ClassMap]]] = {
    "semantic": semantic,
    "panoptic": panoptic,
    "instance": instance,
}


def iter_rows(task: Task, data: str, counts: Sequence[int]) -> Iterator[Row]:
    """After so many images each, of one set of metrics that goes on counting."""
    views, classes = TASKS[task](data)
    metrics = Metrics(task, classes)
    for i, (prediction, truth) in enumerate(views):  # what is loaded and cached at first is no part of it
        metrics.update(str(i), prediction, truth)
    metrics = Metrics(task, classes)
    gc.collect()
    before = held([os.getpid()])
    for i, (prediction, truth) in enumerate(islice(cycle(views), max(counts)), 1):
        metrics.update(str(i), prediction, truth)
        if i in counts:
            gc.collect()
            records = sum(len(record) for row in metrics.state().values() for record in row)
            grown = held([os.getpid()]) - before
            started = time.perf_counter()
            metrics.compute()
            yield {
                "task": task,
                "images": i,
                "records, KiB": records / 1024,
                "bytes an image": records / i,
                "process, MiB more": grown / MIB,
                "s to compute": time.perf_counter() - started,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("RAYSSEG_DATA", "../shared/data"))
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 5000])
    options = parser.parse_args()
    rows = [row for task in TASKS for row in iter_rows(task, options.data, options.images)]
    write_result("metrics-memory", device_name(), rows, {"images": options.images})


if __name__ == "__main__":
    main()
