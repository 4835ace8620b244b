"""mIoU over CamVid's validation masks: raysseg's confusion matrix against the algorithm of evaluate's `mean_iou`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.results import compare, device_name, write_result
from raysseg.config import MasksSource
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.index import Failure
from raysseg.masks import IdMap, LabelMap, to_dense
from raysseg.metrics import Metrics
from raysseg.schema import ClassMap

SHIFT = (6, 9)  # pixels down and across by which the predictions are off

Pairs = Sequence[tuple[IdMap, IdMap]]
"""Prediction and truth, (H, W) each."""


def our_mean_iou(pairs: Pairs, classes: ClassMap) -> float:
    metric = Metrics("semantic", classes)
    for i, (prediction, truth) in enumerate(pairs):
        metric.update(str(i), LabelMap(prediction, classes.ignore), LabelMap(truth, classes.ignore))
    return metric.compute()["miou"]


def published_mean_iou(pairs: Pairs, classes: ClassMap) -> float:
    """As its documentation has it: three histograms an image, added up; intersection over union; the mean."""
    num_classes = len(classes)
    count = partial(np.histogram, bins=num_classes, range=(0, num_classes - 1))
    totals = np.zeros((3, num_classes))
    for prediction, truth in pairs:
        is_valid = truth != classes.ignore
        predicted, labelled = prediction[is_valid], truth[is_valid]
        hits = predicted[predicted == labelled]
        totals += [count(part)[0] for part in (hits, predicted, labelled)]
    intersection, of_prediction, of_truth = totals
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(intersection / (of_prediction + of_truth - intersection)))


def read_pairs(folder: str, limit: int | None) -> tuple[Pairs, ClassMap]:
    """The truth, and as its prediction the same, shifted; what had no label is predicted as the first class."""
    classes = read_class_map(f"{folder}/classes.json")
    index = read_index(MasksSource(masks=f"{folder}/val/masks"))
    samples = read_samples(index.take(np.arange(len(index))[:limit]), with_images=False)
    truths = [to_dense(sample, classes).labels for sample in samples if not isinstance(sample, Failure)]
    rolled = [np.roll(truth, SHIFT, axis=(0, 1)) for truth in truths]
    predictions = [np.where(ids == classes.ignore, 0, ids).astype(ids.dtype) for ids in rolled]
    return list(zip(predictions, truths, strict=True)), classes


def masks_per_s(mean_iou: Callable[[Pairs, ClassMap], float], pairs: Pairs, classes: ClassMap) -> float:
    started = time.perf_counter()
    mean_iou(pairs, classes)
    return len(pairs) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("RAYSSEG_DATA", "../shared/data"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--masks", type=int, help="as many only (default: all)")
    options = parser.parse_args()
    pairs, classes = read_pairs(f"{options.data}/camvid", options.masks)
    sides = (our_mean_iou, published_mean_iou)
    values = [mean_iou(pairs, classes) for mean_iou in sides]
    assert abs(values[0] - values[1]) < 1e-9, values
    rates = [[masks_per_s(mean_iou, pairs, classes) for mean_iou in sides] for _ in range(options.rounds)]
    ours, peer = zip(*rates, strict=True)
    settings = {
        "masks": len(pairs),
        "size": pairs[0][0].shape,
        "classes": len(classes),
        "rounds": options.rounds,
        "peer": "the algorithm of evaluate's mean_iou, written from its description",
        "miou": {"ours": values[0], "peer": values[1]},
    }
    write_result("metrics", device_name(), [compare("mIoU, masks/s", ours, peer, ">= 5")], settings)


if __name__ == "__main__":
    main()
