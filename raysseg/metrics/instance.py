"""Average precision and recall of instances by COCO's rules (Lin et al. 2014): of masks, of boxes and of boundaries.

The rules are those of pycocotools' COCOeval as it is set by default: ten IoU thresholds, four ranges of area, at most
1, 10 or 100 detections of a class in an image; crowds, and what lies outside of a range, are neither right nor wrong.
Detections of equal score stand in the order of the records, as COCO's stand in that of the images' ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from raysseg import rle
from raysseg.masks import MaskSet
from raysseg.metrics.boundary import boundary_width, inner_boundary
from raysseg.schema import ClassMap

_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
_LOWEST, _HIGHEST = np.array(list(_RANGES.values())).T[..., None]  # (4, 1) pixels each; both belong to the range
_MOST = (1, 10, 100)  # detections of a class in an image

_DETECTION = np.dtype([("class", "<u2"), ("score", "<f8"), ("hit", "u1", (4, 2)), ("miss", "u1", (4, 2))])
"""By range of area, a bit an IoU threshold; a detection that is neither hit nor miss does not count there."""
_TRUTH = np.dtype([("class", "<u2"), ("number", "<u4", (4,))])
"""By range of area, the instances of a class that count."""

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.void]
"""Of _DETECTION or _TRUTH."""


class _AveragePrecision:
    """What the measures have in common.

    Args:
        classes: of both sides.
        what: the names begin with it.
        to_ious: (D, G) IoU of detections and instances of one class. Below 0.5 it need not be exact. With a crowd it is
            the share of the detection that is covered.
    """

    def __init__(self, classes: ClassMap, what: str, to_ious: Callable[[MaskSet, MaskSet], Floats]) -> None:
        self._names = classes.names
        self._what = what
        self._to_ious = to_ious

    def count(self, prediction: MaskSet, truth: MaskSet) -> bytes:
        """One image's detections, by class from the highest score to the lowest, and numbers of instances.

        26 bytes a detection, at most 100 of each class; 18 bytes a class of the truth; 4 bytes for their number.
        """
        found = _take(prediction, _ranked(prediction))
        truth = _take(truth, truth.class_ids.argsort(kind="stable"))
        areas = _areas(truth)
        is_apart = truth.is_crowd | (areas < _LOWEST) | (areas > _HIGHEST)  # (4, G)
        hits, misses = _match(self._ious(found, truth), is_apart, truth.is_crowd)
        areas = _areas(found)
        misses &= ((areas >= _LOWEST) & (areas <= _HIGHEST))[:, None]
        detections = np.zeros(len(found), _DETECTION)
        detections["class"], detections["score"] = found.class_ids, found.scores
        for name, flags in (("hit", hits), ("miss", misses)):
            detections[name] = np.packbits(flags, axis=1).transpose(2, 0, 1)
        present, place = np.unique(truth.class_ids, return_inverse=True)
        truths = np.zeros(len(present), _TRUTH)
        truths["class"] = present
        np.add.at(truths["number"], place, ~is_apart.T)
        return np.uint32(len(found)).tobytes() + detections.tobytes() + truths.tobytes()

    def score(self, record: bytes) -> float:
        """Its AP over all areas, of the classes that its truth holds."""
        detections, _, numbers = self._gather([record])
        by_class = self._by_class(detections, numbers)
        return _mean(np.array([_precision(rows, numbers[i, :1]) for i, rows in by_class]))

    def compute(self, records: Sequence[bytes]) -> dict[str, float]:
        """All numbers by name; NaN where the truth holds nothing to find."""
        detections, rank, numbers = self._gather(records)
        order = np.lexsort((-detections["score"], detections["class"]))  # stable
        precision = np.full((len(self._names), len(_RANGES), len(_IOUS)), np.nan)
        recall = np.full((len(self._names), len(_RANGES), len(_MOST), len(_IOUS)), np.nan)
        for i, rows in self._by_class(detections[order], numbers):
            precision[i] = _precision(rows, numbers[i])
        for m, most in enumerate(_MOST):
            hits = np.zeros((len(self._names), len(_RANGES), len(_IOUS)))
            np.add.at(hits, detections["class"][rank < most], _flags(detections["hit"][rank < most]))
            with np.errstate(invalid="ignore"):
                recall[:, :, m] = np.where(numbers[..., None] > 0, hits / numbers[..., None], np.nan)
        sizes = list(enumerate(_RANGES))[1:]
        values = {
            "ap": _mean(precision[:, 0]),
            "ap50": _mean(precision[:, 0, 0]),
            "ap75": _mean(precision[:, 0, 5]),
            **{f"ap_{name}": _mean(precision[:, j]) for j, name in sizes},
            **{f"ar{most}": _mean(recall[:, 0, m]) for m, most in enumerate(_MOST)},
            **{f"ar_{name}": _mean(recall[:, j, -1]) for j, name in sizes},
            **{f"ap/{name}": float(precision[i, 0].mean()) for i, name in enumerate(self._names)},
            **{f"ap50/{name}": float(precision[i, 0, 0]) for i, name in enumerate(self._names)},
        }
        return {f"{self._what}_{name}": value for name, value in values.items()}

    def absent(self, records: Sequence[bytes]) -> list[str]:
        """Classes of which the truth has none but crowds, if any; they are left out of the means."""
        return [name for name, number in zip(self._names, self._gather(records)[2][:, 0], strict=True) if not number]

    def _ious(self, found: MaskSet, truth: MaskSet) -> Floats:
        """(D, G) IoU of all pairs of one class, else 0; both sides are sorted by class."""
        ious = np.zeros((len(found), len(truth)))
        for class_id in np.intersect1d(found.class_ids, truth.class_ids):
            ours, theirs = (slice(*np.searchsorted(s.class_ids, [class_id, class_id + 1])) for s in (found, truth))
            ious[ours, theirs] = self._to_ious(_take(found, ours), _take(truth, theirs))
        return ious

    def _gather(self, records: Sequence[bytes]) -> tuple[Rows, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All detections; how many of its class and image stand before each, (N,); and instances that count, (C, 4)."""
        parts = [_unpack(record) for record in records]
        detections = np.concatenate([np.zeros(0, _DETECTION), *(found for found, _ in parts)])
        truths = np.concatenate([np.zeros(0, _TRUTH), *(truth for _, truth in parts)])
        numbers = np.zeros((len(self._names), len(_RANGES)), np.int64)
        np.add.at(numbers, truths["class"], truths["number"])
        is_first = np.zeros(len(detections) + 1, np.bool_)
        is_first[np.cumsum([0, *(len(found) for found, _ in parts)])] = True
        is_first[1:-1] |= detections["class"][1:] != detections["class"][:-1]
        first = np.flatnonzero(is_first)
        rank = np.arange(len(detections)) - first[:-1].repeat(np.diff(first))
        return detections, rank, numbers

    def _by_class(self, detections: Rows, numbers: npt.NDArray[np.int64]) -> list[tuple[int, Rows]]:
        """The detections of each class that the truth holds; they are sorted by class."""
        present = np.flatnonzero(numbers[:, 0])
        starts, stops = (np.searchsorted(detections["class"], present, side) for side in ("left", "right"))
        return [(int(i), detections[a:b]) for i, a, b in zip(present, starts, stops, strict=True)]


class MaskAp(_AveragePrecision):
    """AP and AR of masks, COCO's `segm`."""

    def __init__(self, classes: ClassMap) -> None:
        super().__init__(classes, "mask", _mask_ious)


class BoxAp(_AveragePrecision):
    """AP and AR of boxes, COCO's `bbox`: the data set's own, or those around the masks."""

    def __init__(self, classes: ClassMap) -> None:
        super().__init__(classes, "box", _box_ious)


class BoundaryAp(_AveragePrecision):
    """Boundary AP and AR (Cheng et al. 2021), by the lower of mask IoU and boundary IoU."""

    def __init__(self, classes: ClassMap) -> None:
        super().__init__(classes, "boundary", _boundary_ious)


# --- one image ----------------------------------------------------------------------------------------------------


def _ranked(prediction: MaskSet) -> npt.NDArray[np.int64]:
    """The places of detections, sorted by class and falling score, without those after the 100th of a class."""
    assert prediction.scores is not None or not len(prediction), "predictions carry scores"
    order = np.lexsort((np.zeros(0) if prediction.scores is None else -prediction.scores, prediction.class_ids))
    classes = prediction.class_ids[order]
    rank = np.arange(len(order)) - np.searchsorted(classes, classes)
    return order[rank < _MOST[-1]]


def _take(masks: MaskSet, places: npt.NDArray[np.int64] | slice) -> MaskSet:
    """Some instances of an image."""
    rles = masks.rles[places] if isinstance(places, slice) else tuple(masks.rles[place] for place in places)
    scores, areas, boxes = (None if a is None else a[places] for a in (masks.scores, masks.areas, masks.boxes))
    return MaskSet(masks.size, rles, masks.class_ids[places], masks.is_crowd[places], scores, areas, boxes)


def _match(ious: Floats, is_apart: Flags, is_crowd: Flags) -> tuple[Flags, Flags]:
    """Which detections hit an instance that counts, and which hit nothing at all, (4, 10, D) each.

    Each in turn takes the nearest instance that is left; one that counts before one that does not; crowds are never
    used up. Of equally near ones it takes the last, as COCO does.

    Args:
        ious: (D, G), detections from the highest score to the lowest.
        is_apart: (4, G), instances that don't count in a range of area.
        is_crowd: (G,).
    """
    floors = np.minimum(_IOUS, 1 - 1e-10)
    hits = np.zeros((len(_RANGES), len(_IOUS), len(ious)), np.bool_)
    misses = np.ones_like(hits)
    is_near = ious >= floors[0]
    num_near = is_near.sum(axis=1)
    is_free = (is_near.sum(axis=0) == 1) | is_crowd  # no two detections want it
    alone, only = np.nonzero(is_near & is_free & (num_near == 1)[:, None])
    is_open = ious[alone, only] >= floors[:, None]
    hits[..., alone] = is_open & ~is_apart[:, None, only]
    misses[..., alone] = ~is_open
    num_near[alone] = 0
    is_taken = np.zeros((len(_RANGES), len(_IOUS), ious.shape[1]), np.bool_)
    for i in np.flatnonzero(num_near):
        near = np.flatnonzero(is_near[i])
        near = near[ious[i, near].argsort(kind="stable")]
        is_open = (ious[i, near] >= floors[:, None]) & ~is_taken[..., near]  # (4, 10, n)
        preference = 1 + np.arange(len(near)) + len(near) * ~is_apart[:, None, near]
        preference = np.where(is_open, preference, 0)
        ranges, thresholds = np.nonzero(preference.max(axis=2))
        chosen = near[preference.argmax(axis=2)[ranges, thresholds]]
        is_taken[ranges, thresholds, chosen] = ~is_crowd[chosen]
        hits[ranges, thresholds, i] = ~is_apart[ranges, chosen]
        misses[ranges, thresholds, i] = False
    return hits, misses


def _coco(masks: MaskSet) -> list[dict[str, Any]]:
    """As pycocotools takes them."""
    return [{"size": masks.size, "counts": encoded} for encoded in masks.rles]


def _areas(masks: MaskSet) -> Floats:
    return masks.areas if masks.areas is not None else coco_mask.area(_coco(masks)).astype(np.float64)


def _boxes(masks: MaskSet) -> Floats:
    return masks.boxes if masks.boxes is not None else coco_mask.toBbox(_coco(masks)).reshape(-1, 4)


def _mask_ious(found: MaskSet, truth: MaskSet) -> Floats:
    ious: Floats = coco_mask.iou(_coco(found), _coco(truth), truth.is_crowd.tolist())
    return ious


def _box_ious(found: MaskSet, truth: MaskSet) -> Floats:
    ious: Floats = coco_mask.iou(_boxes(found), _boxes(truth), truth.is_crowd.tolist())
    return ious


def _boundary_ious(found: MaskSet, truth: MaskSet) -> Floats:
    """As the authors' code has it: crowds go by their mask alone. Boundaries are drawn where the masks' IoU is 0.5."""
    ious = _mask_ious(found, truth)
    pairs = np.argwhere((ious >= _IOUS[0]) & ~truth.is_crowd)
    width = boundary_width(found.size)
    ours, theirs = (
        {place: _boundary(masks.rles[place], masks.size, width) for place in set(pairs[:, side].tolist())}
        for side, masks in enumerate((found, truth))
    )
    for i, j in pairs.tolist():
        ious[i, j] = min(ious[i, j], _boundary_iou(ours[i], theirs[j]))
    return ious


@dataclass(frozen=True, slots=True)
class _Boundary:
    """A mask's boundary within its bounding box.

    Attributes:
        columns: (w, h), the axes turned as RLE has them.
        start: the first column and row, in the image.
        area: pixels.
    """

    columns: Flags
    start: tuple[int, int]
    area: int


def _boundary(encoded: bytes, size: tuple[int, int], width: int) -> _Boundary:
    columns, start = rle.to_crop(rle.to_runs(encoded, size), size)
    boundary = inner_boundary(columns, width)
    return _Boundary(boundary, start, int(np.count_nonzero(boundary)))


def _boundary_iou(one: _Boundary, other: _Boundary) -> float:
    low = np.maximum(one.start, other.start)
    high = np.minimum(*(np.add(side.start, side.columns.shape) for side in (one, other)))
    if (high <= low).any():
        return 0.0
    shown = []
    for side in (one, other):
        (x0, y0), (x1, y1) = low - side.start, high - side.start
        shown.append(side.columns[x0:x1, y0:y1])
    common = int(np.count_nonzero(shown[0] & shown[1]))
    return common / (one.area + other.area - common)


# --- all images ---------------------------------------------------------------------------------------------------


def _unpack(record: bytes) -> tuple[Rows, Rows]:
    """Detections and truth of a record."""
    number = int(np.frombuffer(record, np.uint32, 1)[0])
    end = 4 + number * _DETECTION.itemsize
    return np.frombuffer(record[4:end], _DETECTION), np.frombuffer(record[end:], _TRUTH)


def _flags(packed: npt.NDArray[np.uint8]) -> Flags:
    """(N, 4, 10)."""
    return np.unpackbits(packed, axis=-1, count=len(_IOUS)).view(np.bool_)


def _precision(detections: Rows, numbers: npt.NDArray[np.int64]) -> Floats:
    """AP of one class in the first R ranges of area, by IoU, (R, 10); NaN where there is nothing to find.

    It is the mean over 101 recalls of the highest precision at that recall or a higher one, 0 where it is not reached.

    Args:
        detections: (N,) from the highest score to the lowest.
        numbers: (R,) instances that count.
    """
    hits, misses = (_flags(detections[name][:, : len(numbers)]).transpose(1, 2, 0) for name in ("hit", "miss"))
    num_hits = hits.cumsum(axis=2)  # (R, 10, N)
    precision = num_hits / (num_hits + misses.cumsum(axis=2) + np.spacing(1))
    highest = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    by_hits = np.zeros((*hits.shape[:2], numbers.max() + 1))  # the precision once so many instances are found
    by_hits[..., :1] = highest[..., :1].sum(axis=2, keepdims=True)  # 0 without detections
    place = hits.nonzero()
    by_hits[(*place[:2], num_hits[place])] = highest[place]
    average = np.full(hits.shape[:2], np.nan)
    for j in np.flatnonzero(numbers):
        needed = np.searchsorted(np.arange(numbers[j] + 1) / numbers[j], _RECALLS)
        average[j] = by_hits[j][:, needed].mean(axis=1)
    return average


def _mean(values: Floats) -> float:
    """The mean of what is known; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
