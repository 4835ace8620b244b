"""Metrics against others' code, from the same masks, which find the same numbers.

miou: over CamVid's validation masks, against the algorithm of evaluate's `mean_iou`. mask_ap: from dense masks to AP,
encoding included, against pycocotools. boundary_ap: from RLE, against boundary-iou-api. boundary_iou: of label maps,
against its functions. pq: from files, decoded files and maps, against panopticapi, and Boundary PQ against
boundary-iou-api. The parts whose peer is a repository run where a checkout of it is named.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np

from benchmarks import instance_sides, panoptic_sides
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
Rows = list[dict[str, str | float]]
Settings = dict[str, object]


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


def miou_rows(options: argparse.Namespace) -> tuple[Rows, Settings]:
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
        "peer": "the algorithm of evaluate's mean_iou, written from its description",
        "miou": {"ours": values[0], "peer": values[1]},
    }
    return [compare("mIoU, masks/s", ours, peer, ">= 5")], settings


def ap_rows(
    what: str, sides: Sequence[instance_sides.Side], peer: str, options: argparse.Namespace
) -> tuple[Rows, Settings]:
    """Images a second of both sides, in turns, of each reference."""
    rows, settings = [], {"peer": peer}
    for name in instance_sides.FILES:
        images, classes = instance_sides.read_images(f"{options.data}/reference", name)
        rates = []
        for _ in range(options.rounds):
            clocks = [instance_sides.Clock() for _ in sides]
            values = [side(images, classes, clock) for side, clock in zip(sides, clocks, strict=True)]
            assert np.allclose(*values, rtol=0, atol=1e-9, equal_nan=True), values
            rates.append([len(images) / clock.seconds for clock in clocks])
        ours, theirs = zip(*rates, strict=True)
        rows.append(compare(f"{what} of {name}, images/s", ours, theirs, ">= 5"))
        counts = [sum(len(getattr(image, side)) for image in images) for side in ("prediction", "truth")]
        settings[name] = {"images": len(images), "detections": counts[0], "instances": counts[1], "ap": values[0][0]}
    return rows, settings


def mask_ap_rows(options: argparse.Namespace) -> tuple[Rows, Settings]:
    sides = (instance_sides.our_mask_ap, instance_sides.their_mask_ap)
    return ap_rows("mask AP", sides, "pycocotools, masks encoded one by one", options)


def boundary_ap_rows(options: argparse.Namespace) -> tuple[Rows, Settings]:
    sides = (instance_sides.our_boundary_ap, partial(instance_sides.their_boundary_ap, options.boundary_iou_api))
    return ap_rows("Boundary AP", sides, f"boundary-iou-api, in {os.cpu_count()} processes; ours in one", options)


def boundary_iou_rows(options: argparse.Namespace) -> tuple[Rows, Settings]:
    pairs, classes = read_pairs(f"{options.data}/camvid", options.masks)
    row = panoptic_sides.boundary_row(options.boundary_iou_api, pairs, classes, options.rounds)
    return [row], {"peer": "boundary-iou-api's mask_to_boundary, class by class", "masks": len(pairs)}


def pq_rows(options: argparse.Namespace) -> tuple[Rows, Settings]:
    peers = (options.panopticapi, options.boundary_iou_api)
    return panoptic_sides.panoptic_rows(peers, options.data, options.rounds), {"peer": "panopticapi, boundary-iou-api"}


PARTS = {
    "miou": miou_rows,
    "mask_ap": mask_ap_rows,
    "boundary_ap": boundary_ap_rows,
    "boundary_iou": boundary_iou_rows,
    "pq": pq_rows,
}
NEEDS = {
    "boundary_ap": ["boundary_iou_api"],
    "boundary_iou": ["boundary_iou_api"],
    "pq": ["panopticapi", "boundary_iou_api"],
}
"""The checkouts that a part compares with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("RAYSSEG_DATA", "../shared/data"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--masks", type=int, help="as many only, of mIoU (default: all)")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all whose peer is at hand")
    parser.add_argument("--panopticapi", help="folder of a checkout of cocodataset/panopticapi")
    parser.add_argument("--boundary-iou-api", help="folder of a checkout of bowenc0221/boundary-iou-api")
    options = parser.parse_args()
    missing = {part: [need for need in NEEDS.get(part, []) if not getattr(options, need)] for part in PARTS}
    parts = options.part or [part for part in PARTS if not missing[part]]
    for part in parts:
        if missing[part]:
            parser.error(f"{part} needs --{missing[part][0].replace('_', '-')}")
    cv2.setNumThreads(1)
    rows: Rows = []
    settings: Settings = {"rounds": options.rounds}
    for part in parts:
        found, settings[part] = PARTS[part](options)
        rows += found
    write_result("metrics" if parts == list(PARTS) else f"metrics-{'-'.join(parts)}", device_name(), rows, settings)


if __name__ == "__main__":
    main()
