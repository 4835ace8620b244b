"""PQ, Boundary PQ and Boundary IoU, ours and as their authors' code has them, from the same labels."""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.results import compare
from raysseg.config import CocoPanopticSource
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.coco_panoptic import number_segments
from raysseg.data.index import Failure
from raysseg.masks import IdMap, LabelMap, SegmentMap, to_segment_map
from raysseg.metrics import Measure, Metrics
from raysseg.metrics.boundary import BoundaryIou
from raysseg.metrics.panoptic import BoundaryPanopticQuality, PanopticQuality
from raysseg.schema import ClassMap

Pairs = Sequence[tuple[IdMap, IdMap]]
"""Prediction and truth, (H, W) each."""


# --- boundaries of label maps -------------------------------------------------------------------------------------


def our_boundary_iou(pairs: Pairs, classes: ClassMap) -> float:
    measure = BoundaryIou(classes)
    views = [[LabelMap(ids, classes.ignore) for ids in pair] for pair in pairs]
    return measure.compute([measure.count(*view) for view in views])["boundary_iou"]


def boundary_iou_mask_by_mask(mask_to_boundary: Callable[[IdMap], IdMap], pairs: Pairs, classes: ClassMap) -> float:
    """With the function of boundary-iou-api, for each class that an image has; no mask ends at ignored pixels."""
    common, union, labelled = np.zeros((3, len(classes)))
    for pair in pairs:
        is_ignored = pair[1] == classes.ignore
        for class_id in np.union1d(*pair):
            if class_id == classes.ignore:
                continue
            masks = [((ids == class_id) | is_ignored).view(np.uint8) for ids in pair]
            predicted, true = (mask_to_boundary(mask).view(np.bool_) & ~is_ignored for mask in masks)
            common[class_id] += np.count_nonzero(predicted & true)
            union[class_id] += np.count_nonzero(predicted | true)
            labelled[class_id] += np.count_nonzero(true)
    return float((common[labelled > 0] / union[labelled > 0]).mean())


def boundary_row(peer: str, pairs: Pairs, classes: ClassMap, rounds: int) -> dict[str, str | float]:
    functions = _import_from(peer, "boundary_iou.utils.boundary_utils")
    sides = (our_boundary_iou, partial(boundary_iou_mask_by_mask, functions.mask_to_boundary))
    return _alternate(
        "Boundary IoU, masks/CPU s", [partial(side, pairs, classes) for side in sides], len(pairs), rounds
    )


# --- panoptic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panoptic:
    """Truth and predictions of COCO panoptic, (truth, prediction) throughout.

    Attributes:
        sources: the files.
        annotations: of each image, as the JSON files hold them.
        pictures: decoded PNG files by path, (H, W, 3) uint8.
        folders: of the PNG files.
        categories: as the JSON files hold them.
    """

    sources: tuple[CocoPanopticSource, CocoPanopticSource]
    annotations: list[tuple[dict[str, Any], dict[str, Any]]]
    pictures: dict[str, npt.NDArray[np.uint8]]
    folders: tuple[str, str]
    categories: list[dict[str, Any]]


def read_panoptic(data: str) -> Panoptic:
    files = (f"{data}/coco_panoptic/annotations_val.json", f"{data}/reference/panoptic_val/pred.json")
    folders = (f"{data}/coco_panoptic/val/panoptic", f"{data}/reference/panoptic_val/pred")
    contents = [json.loads(Path(file).read_text()) for file in files]
    truth, predictions = ({a["image_id"]: a for a in content["annotations"]} for content in contents)
    pictures = {}
    for folder, content in zip(folders, contents, strict=True):
        for annotation in content["annotations"]:
            path = f"{folder}/{annotation['file_name']}"
            pictures[path] = np.array(Image.open(path).convert("RGB"))
    sources = [
        CocoPanopticSource(format="coco_panoptic", annotations=file, masks=folder)
        for file, folder in zip(files, folders, strict=True)
    ]
    pairs = [(truth[i], predictions[i]) for i in truth]
    return Panoptic((sources[0], sources[1]), pairs, pictures, folders, contents[0]["categories"])


def our_pq_of_files(panoptic: Panoptic, classes: ClassMap) -> float:
    """Reads the files and the JSON, several files at a time; everything that `raysseg evaluate` does on one core."""
    views = []
    for source in panoptic.sources:
        samples = read_samples(read_index(source), with_images=False)
        views.append({s.sample_id: to_segment_map(s, classes) for s in samples if not isinstance(s, Failure)})
    metric = Metrics("panoptic", classes)
    for sample_id, truth in views[0].items():
        metric.update(sample_id, views[1][sample_id], truth)
    return metric.compute()["pq"]


def iter_segments(panoptic: Panoptic, classes: ClassMap) -> Iterator[tuple[SegmentMap, SegmentMap]]:
    """(Prediction, truth) of decoded PNG files."""
    for pair in panoptic.annotations:
        truth, prediction = (
            _to_segments(panoptic.pictures[f"{folder}/{a['file_name']}"], a["segments_info"], classes)
            for folder, a in zip(panoptic.folders, pair, strict=True)
        )
        yield prediction, truth


def _to_segments(pixels: npt.NDArray[np.uint8], entries: list[dict[str, Any]], classes: ClassMap) -> SegmentMap:
    return SegmentMap(
        number_segments(pixels, [entry["id"] for entry in entries]),
        np.array([classes.index_of[entry["category_id"]] for entry in entries], np.int64),
        np.array([entry.get("iscrowd", 0) for entry in entries], np.bool_),
    )


def our_quality(measure: Measure, name: str, views: Callable[[], Iterable[tuple[SegmentMap, SegmentMap]]]) -> float:
    return measure.compute([measure.count(*pair) for pair in views()])[name]


def published_quality(
    peer: ModuleType, panoptic: Panoptic, pictures: Mapping[str, npt.NDArray[np.integer]] | None, *options: object
) -> float:
    """The peer's single core; with `pictures`, RGB or (H, W) segment ids, it opens these instead of files."""
    opened = nullcontext() if pictures is None else patch.object(peer, "Image", SimpleNamespace(open=pictures.get))
    has_ids = pictures is not None and next(iter(pictures.values())).ndim == 2
    numbered = patch.object(peer, "rgb2id", lambda ids: ids) if has_ids else nullcontext()
    categories = {category["id"]: category for category in panoptic.categories}
    with opened, numbered, redirect_stdout(io.StringIO()):
        counts = peer.pq_compute_single_core(0, panoptic.annotations, *panoptic.folders, categories, *options)
    return float(counts.pq_average(categories, isthing=None)[0]["pq"])


def panoptic_rows(peers: Sequence[str], data: str, rounds: int) -> list[dict[str, str | float]]:
    """PQ from files, from decoded files and from (H, W) maps of segments; Boundary PQ from decoded files and from maps.

    From files ours reads the JSON too, which the peer is given. From decoded files both turn colours into segments.
    """
    panoptic = read_panoptic(data)
    classes = read_class_map(None, panoptic.sources[0])
    official = _import_from(peers[0], "panopticapi.evaluation")
    boundary = _import_from(peers[1], "boundary_iou.coco_panoptic_api.evaluation")
    decode = partial(iter_segments, panoptic, classes)
    maps = list(decode())
    ids = {path: official.rgb2id(picture.astype(np.uint32)) for path, picture in panoptic.pictures.items()}
    pq = partial(our_quality, PanopticQuality(classes), "pq")
    boundary_pq = partial(our_quality, BoundaryPanopticQuality(classes), "boundary_pq")
    peer_pq = partial(published_quality, official, panoptic)
    contests = {
        "PQ from PNG files": (partial(our_pq_of_files, panoptic, classes), partial(peer_pq, None)),
        "PQ from decoded PNG": (partial(pq, decode), partial(peer_pq, panoptic.pictures)),
        "PQ from maps": (partial(pq, lambda: maps), partial(peer_pq, ids)),
        "Boundary PQ from decoded PNG": (
            partial(boundary_pq, decode),
            partial(published_quality, boundary, panoptic, panoptic.pictures, "boundary", 0.02),
        ),
        "Boundary PQ from maps": (
            partial(boundary_pq, lambda: maps),
            partial(published_quality, boundary, panoptic, ids, "boundary", 0.02),
        ),
    }
    return [_alternate(f"{what}, images/CPU s", sides, len(maps), rounds) for what, sides in contests.items()]


# --- all ----------------------------------------------------------------------------------------------------------


def _import_from(folder: str, module: str) -> ModuleType:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(module)


def _alternate(what: str, sides: Sequence[Callable[[], float]], num_items: int, rounds: int) -> dict[str, str | float]:
    """Items a second of CPU time, of both sides in turns; they find the same number."""
    values = [side() for side in sides]
    assert abs(values[0] - values[1]) < 1e-9, (what, values)
    rates = []
    for _ in range(rounds):
        seconds = []
        for side in sides:
            started = time.process_time()
            side()
            seconds.append(time.process_time() - started)
        rates.append([num_items / s for s in seconds])
    ours, peer = zip(*rates, strict=True)
    return compare(what, ours, peer, ">= 5" if "Boundary" in what else ">= 10")
