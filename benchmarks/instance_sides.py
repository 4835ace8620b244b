"""AP of instances by raysseg and by its authors' code, from the same masks; see bench_metrics."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raysseg import rle
from raysseg.config import CocoSource
from raysseg.data import read_class_map, read_index, read_predictions, read_samples
from raysseg.data.index import Failure, SampleIndex
from raysseg.masks import MaskSet, to_instances
from raysseg.metrics import Measure
from raysseg.metrics.instance import BoundaryAp, MaskAp
from raysseg.schema import ClassMap

FILES = {
    "coco_val2014_100": ("instances_val2014_100.json", "instances_val2014_fakesegm100_results.json"),
    "coco_instances_val": ("gt.json", "pred.json"),
    "nuclei_val": ("gt.json", "pred.json"),
}
"""Truth and results of a reference."""

_NUMBERS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
_NUMBERS += ("ar_small", "ar_medium", "ar_large")

Dense = npt.NDArray[np.bool_]
"""(N, H, W)."""
Entries = list[dict[str, Any]]
"""RLE, annotations or results, as COCO has them."""


class Image(NamedTuple):
    """What was predicted for an image, and what is true."""

    prediction: MaskSet
    truth: MaskSet


def read_images(folder: str, name: str) -> tuple[list[Image], ClassMap]:
    """A reference's images, in the order of their ids."""
    truth_source, source = (CocoSource(format="coco", annotations=f"{folder}/{name}/{file}") for file in FILES[name])
    classes, truth = read_class_map(None, truth_source), read_index(truth_source)
    predictions = _views(read_predictions(source, truth, classes), classes)
    truths = _views(truth, classes)
    return [Image(predictions[i], truths[i]) for i in truth.ranking], classes


def _views(index: SampleIndex, classes: ClassMap) -> dict[str, MaskSet]:
    samples = read_samples(index, with_images=False)
    return {s.sample_id: to_instances(s, classes) for s in samples if not isinstance(s, Failure)}


class Clock:
    """Adds up the time of what is run on it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


Side = Callable[[Sequence[Image], ClassMap, Clock], list[float]]
"""From images to the twelve numbers of COCO."""


# --- from masks to AP ---------------------------------------------------------------------------------------------


def our_mask_ap(images: Sequence[Image], classes: ClassMap, clock: Clock) -> list[float]:
    """From dense masks, which are drawn beside the clock image by image, as if a model had just made them."""
    measure = MaskAp(classes)
    records = []
    for image in images:
        predicted, true = map(_drawn, image)
        with clock.running():
            prediction = replace(image.prediction, rles=tuple(rle.from_masks(predicted)))
            truth = replace(image.truth, rles=tuple(rle.from_masks(true)))
            records.append(measure.count(prediction, truth))
    with clock.running():
        return _twelve(measure, "mask", records)


def their_mask_ap(images: Sequence[Image], classes: ClassMap, clock: Clock) -> list[float]:
    """The same by pycocotools, as its users write it: mask by mask, turned to columns and encoded."""

    def encode(masks: Dense) -> Entries:
        return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]

    entries = []
    for image in images:
        predicted, true = map(_drawn, image)
        with clock.running():
            entries.append((encode(predicted), encode(true)))
    with clock.running():
        return _evaluated(COCO, COCOeval, "segm", *_to_coco(images, classes, entries))


def _drawn(masks: MaskSet) -> Dense:
    return np.ascontiguousarray(masks.masks)


# --- from RLE to Boundary AP --------------------------------------------------------------------------------------


def our_boundary_ap(images: Sequence[Image], classes: ClassMap, clock: Clock) -> list[float]:
    measure = BoundaryAp(classes)
    with clock.running():
        return _twelve(measure, "boundary", [measure.count(*image) for image in images])


def their_boundary_ap(folder: str, images: Sequence[Image], classes: ClassMap, clock: Clock) -> list[float]:
    """The same by boundary-iou-api, of which `folder` is a checkout; it draws boundaries in a process a core."""
    np.float = float  # type: ignore[attr-defined]  # which numpy had when it was written
    for name in ("pyplot", "collections", "patches"):  # which it imports, and draws with elsewhere
        sys.modules.setdefault(f"matplotlib.{name}", MagicMock())
    sys.modules.setdefault("matplotlib", MagicMock())
    api = _import_from(folder, "boundary_iou.coco_instance_api.coco")
    evaluation = _import_from(folder, "boundary_iou.coco_instance_api.cocoeval")
    entries = [
        tuple([{"size": list(side.size), "counts": counts} for counts in side.rles] for side in image)
        for image in images
    ]
    content, results = _to_coco(images, classes, entries)
    with clock.running():
        return _evaluated(api.COCO, evaluation.COCOeval, "boundary", content, results)


# --- what the sides share -----------------------------------------------------------------------------------------


def _twelve(measure: Measure, what: str, records: Sequence[bytes]) -> list[float]:
    found = measure.compute(records)
    return [found[f"{what}_{name}"] for name in _NUMBERS]


def _to_coco(
    images: Sequence[Image], classes: ClassMap, entries: Sequence[Sequence[Entries]]
) -> tuple[dict[str, Any], Entries]:
    """A data set and results as COCO's JSON has them, from the RLE of (predictions, truth) of each image."""
    listed, annotations, results = [], [], []
    for image_id, (image, (predicted, true)) in enumerate(zip(images, entries, strict=True), 1):
        prediction, truth = image.prediction, image.truth
        listed.append({"id": image_id, "height": truth.size[0], "width": truth.size[1]})
        for i, entry in enumerate(predicted):
            assert prediction.scores is not None
            found = {"image_id": image_id, "category_id": int(prediction.class_ids[i]), "segmentation": entry}
            results.append(found | {"score": float(prediction.scores[i])})
        for i, entry in enumerate(true):
            assert truth.areas is not None
            found = {"image_id": image_id, "category_id": int(truth.class_ids[i]), "segmentation": entry}
            own = {"id": len(annotations) + 1, "area": float(truth.areas[i]), "iscrowd": int(truth.is_crowd[i])}
            annotations.append(found | own)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes.names)]
    return {"images": listed, "annotations": annotations, "categories": categories}, results


def _evaluated(data_set: Any, evaluation: Any, kind: str, content: dict[str, Any], results: Entries) -> list[float]:
    """The twelve numbers of COCO's own classes, or of others that have their interface; NaN for -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = data_set()
        truth.dataset = content
        truth.createIndex()
        tool = evaluation(truth, truth.loadRes(results), kind)
        tool.evaluate()
        tool.accumulate()
        tool.summarize()
    return [float(value) if value != -1 else float("nan") for value in tool.stats]


def _import_from(folder: str, module: str) -> ModuleType:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)
