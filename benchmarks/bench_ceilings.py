"""What IoU is left to a model that never errs, where it draws at a part of the resolution, or masks are a little off.

Labels are scaled down, class by class, to the share of each class in each cell, and back by bilinear interpolation, as
models scale up their scores; or they are moved to the right, as drawn masks are off. No model is trained.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

from benchmarks.results import device_name, write_result
from raysseg import config
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.masks import IdMap, LabelMap, to_dense
from raysseg.metrics.boundary import BoundaryIou
from raysseg.metrics.semantic import Confusion
from raysseg.schema import ClassMap, Sample

DATA = os.environ.get("RAYSSEG_DATA", "../shared/data")
SETS = {"camvid": "val", "crackforest": "test"}


def at_part(labels: IdMap, part: int, num_classes: int) -> IdMap:
    """Labels as they come back from a part of the resolution."""
    height, width = labels.shape
    small = (-(-width // part), -(-height // part))
    layers = (np.asarray(labels == i, np.float32) for i in range(num_classes))
    scores = [cv2.resize(cv2.resize(layer, small, interpolation=cv2.INTER_AREA), (width, height)) for layer in layers]
    best: IdMap = np.argmax(scores, axis=0).astype(labels.dtype)
    return best


def moved(labels: IdMap, pixels: int) -> IdMap:
    """Labels moved to the right; the left edge stays."""
    found = labels.copy()
    found[:, pixels:] = labels[:, :-pixels]
    return found


def measure(labels: list[LabelMap], classes: ClassMap, change: Callable[[IdMap], IdMap]) -> dict[str, float]:
    """mIoU, Boundary IoU, and IoU by class, of changed labels."""
    found: dict[str, float] = {}
    for metric in (Confusion(classes), BoundaryIou(classes)):
        records = [metric.count(LabelMap(change(one.labels), one.ignore_index), one) for one in labels]
        found |= metric.compute(records)
    return {key: value for key, value in found.items() if key in ("miou", "boundary_iou") or key.startswith("iou/")}


def rows_of(name: str) -> list[dict[str, str | float]]:
    folder = f"{DATA}/{name}/{SETS[name]}"
    source = config.MasksSource(images=f"{folder}/images", masks=f"{folder}/masks")
    classes = read_class_map(f"{DATA}/{name}/classes.json", source)
    samples = [sample for sample in read_samples(read_index(source)) if isinstance(sample, Sample)]
    labels = [to_dense(sample, classes) for sample in samples]
    changes: dict[str, Callable[[IdMap], IdMap]] = {
        **{f"drawn at 1/{part}": partial(at_part, part=part, num_classes=len(classes)) for part in (2, 4, 8)},
        **{f"moved by {pixels}": partial(moved, pixels=pixels) for pixels in (1, 2, 4)},
    }
    return [{"set": name, "what": what, **measure(labels, classes, change)} for what, change in changes.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    options = parser.parse_args()
    for name in options.sets:
        write_result(f"ceilings-{name}", device_name(), rows_of(name), vars(options))


if __name__ == "__main__":
    main()
