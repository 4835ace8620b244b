"""Distances between contours in pixels: HD95 and surface Dice (Nikolov et al. 2018, arXiv:1809.04430).

A contour is what marching squares draws between pixels that are in a mask and pixels that are not: around each corner
where four pixels meet a line between the middles of their edges, 1 long along the grid and the root of a half across a
corner. That is the weight of the corner, from which distances are taken. The image's edge ends a mask. All numbers of
two masks equal those of google-deepmind/surface-distance at a spacing of 1 pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

from raysseg.masks import IdMap, LabelMap
from raysseg.metrics.boundary import Mask
from raysseg.metrics.semantic import mean_of_known
from raysseg.schema import ClassMap

Floats = npt.NDArray[np.float64]

Scalar = TypeVar("Scalar", np.uint8 | np.uint16, np.bool_)


class Contours(NamedTuple):
    """The corners of a label map at which labels meet.

    Attributes:
        places: (K, 2) row and column of the lower right one of the four pixels.
        labels: (K, 4) of the four: upper left, upper right, lower left, lower right.
    """

    places: npt.NDArray[np.intp]
    labels: IdMap


class Surface(NamedTuple):
    """The contour of one mask.

    Attributes:
        places: (N, 2) as of Contours.
        lengths: (N,) of the contour around each.
    """

    places: npt.NDArray[np.intp]
    lengths: Floats


class Distances(NamedTuple):
    """From one contour to another.

    Attributes:
        values: (N,) from each corner to the nearest one of the other, ascending; infinite where that has none.
        lengths: (N,) of the contour around each.
    """

    values: Floats
    lengths: Floats


def find_contours(labels: IdMap, outside: int, is_unknown: Mask | None = None) -> Contours:
    """Where labels meet, (H, W) of them.

    Args:
        labels: any values.
        outside: the label of what lies beyond the image.
        is_unknown: (H, W) pixels of which nothing is known; corners that touch them are left out.
    """
    padded = cv2.copyMakeBorder(labels, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=outside)
    corners = _corners(padded)
    is_met = corners[0] != corners[1]
    is_met |= corners[0] != corners[2]
    is_met |= corners[0] != corners[3]
    for unknown in _corners(np.pad(is_unknown, 1)) if is_unknown is not None else ():
        is_met &= ~unknown
    return Contours(np.argwhere(is_met), np.stack([corner[is_met] for corner in corners], axis=1))


def _corners(padded: npt.NDArray[Scalar]) -> tuple[npt.NDArray[Scalar], ...]:
    """The four pixels around each corner, (H + 1, W + 1) each, of (H + 2, W + 2)."""
    return padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]


def find_surface(contours: Contours, label: int) -> Surface:
    """The contour of one label."""
    codes = (contours.labels == label) @ np.array([8, 4, 2, 1])
    lengths = _LENGTHS[codes]
    is_part = lengths > 0
    return Surface(contours.places[is_part], lengths[is_part])


def _length(upper_left: bool, upper_right: bool, lower_left: bool, lower_right: bool) -> float:
    """Of the contour among four pixels, each of which is in the mask or not."""
    above, below = upper_left != upper_right, lower_left != lower_right
    left, right = upper_left != lower_left, upper_right != lower_right
    crossings = above + below + left + right  # 0, 2 or 4: every line crosses two edges
    is_straight = crossings == 2 and above == below
    return 1.0 if is_straight else crossings / 2 * math.sqrt(0.5)


_LENGTHS = np.array([_length(*corners) for corners in itertools.product((False, True), repeat=4)])
"""By code of four pixels, the upper left one's bit the highest."""


def measure_distances(start: Surface, goal: Surface) -> Distances:
    """From the elements of one contour to the nearest ones of another."""
    if not len(goal.places):
        return Distances(np.full(len(start.places), np.inf), start.lengths)
    # exact, as a distance transform in float64 is, and for contours much faster
    values, _ = KDTree(goal.places, balanced_tree=False, compact_nodes=False).query(start.places)
    order = values.argsort(kind="stable")
    return Distances(values[order], start.lengths[order])


def hausdorff(one: Distances, other: Distances, share: float) -> float:
    """The distance that so large a share of either contour's length keeps to; 1: the Hausdorff distance.

    Infinite where a side has no contour.
    """
    return max(_quantile(one, share), _quantile(other, share))


def _quantile(distances: Distances, share: float) -> float:
    if not len(distances.values):
        return math.inf
    covered = distances.lengths.cumsum()
    return float(distances.values[np.searchsorted(covered / covered[-1], share)])


def average_distance(distances: Distances) -> float:
    """The mean over the contour's length; NaN where it has none."""
    if not len(distances.values):
        return math.nan
    return float((distances.values * distances.lengths).sum() / distances.lengths.sum())


def surface_dice(one: Distances, other: Distances, tolerance: float) -> float:
    """The share of both contours' lengths that lies at most so far from the other; NaN where neither has any."""
    total = one.lengths.sum() + other.lengths.sum()
    close = sum(float(side.lengths[side.values <= tolerance].sum()) for side in (one, other))
    return float(close / total) if total else math.nan


_TOLERANCES = {"surface_dice": 1, "surface_dice_3px": 3}
"""Pixels by which a contour may be off."""

_KINDS = ("hd95", *_TOLERANCES)

_COUNTS = np.dtype([("class_id", "<u2"), ("is_true", "?"), *((kind, "<f8") for kind in _KINDS)])
"""One class in one image, and whether the truth has a contour of it."""


class SurfaceDistance:
    """HD95 and surface Dice, within 1 pixel and within 3; each is the mean over images, and then over classes.

    An image counts for the classes that have a contour in it. Where only one side has one, the numbers are the worst
    there are: a surface Dice of 0, and as HD95 the image's diagonal, as in BraTS (Isensee et al. 2020,
    arXiv:2011.00848). A class without a contour in any truth is left out of the means over classes.

    Ignored pixels are unknown, and what touches one is no contour, on either side; else both sides would have the same
    contour around them, which nobody predicted. Where a prediction has no class is known.
    """

    def __init__(self, classes: ClassMap) -> None:
        self._names = classes.names
        self._outside = classes.nothing

    def count(self, prediction: LabelMap, truth: LabelMap) -> bytes:
        """27 bytes for each class that has a contour on either side.

        Raises:
            ValueError: the sizes differ.
        """
        predicted, labelled = prediction.labels, truth.labels
        if predicted.shape != labelled.shape:
            raise ValueError(f"the prediction is {predicted.shape}, the truth {labelled.shape} (height, width)")
        is_ignored = labelled == truth.ignore_index
        in_truth = find_contours(labelled, self._outside, is_ignored)
        in_prediction = find_contours(predicted, self._outside, is_ignored)
        rows = []
        for class_id in range(len(self._names)):
            of_truth, of_prediction = find_surface(in_truth, class_id), find_surface(in_prediction, class_id)
            if len(of_truth.places) + len(of_prediction.places):
                numbers = _compare(of_truth, of_prediction, math.hypot(*labelled.shape))
                rows.append((class_id, len(of_truth.places) > 0, *(numbers[kind] for kind in _KINDS)))
        return np.array(rows, _COUNTS).tobytes()

    def score(self, record: bytes) -> float:
        """Its surface Dice within 1 pixel, the mean over its classes."""
        return mean_of_known(np.frombuffer(record, _COUNTS)["surface_dice"])

    def absent(self, records: Sequence[bytes]) -> list[str]:
        """Classes without a contour in the truth; they are left out of the means."""
        is_true = self._is_true(np.frombuffer(b"".join(records), _COUNTS))
        return [name for name, is_known in zip(self._names, is_true, strict=True) if not is_known]

    def compute(self, records: Sequence[bytes]) -> dict[str, float]:
        """All numbers by name; NaN for a class that the truth lacks."""
        rows = np.frombuffer(b"".join(records), _COUNTS)
        images = np.bincount(rows["class_id"], minlength=len(self._names))
        is_true = self._is_true(rows)
        found = {}
        for kind in _KINDS:
            # added up in the order of the records, which is that of the sample ids
            totals = np.bincount(rows["class_id"], rows[kind], len(self._names))
            means = np.where(is_true, totals / np.maximum(images, 1), np.nan)
            found[kind] = mean_of_known(means)
            found |= {f"{kind}/{name}": float(value) for name, value in zip(self._names, means, strict=True)}
        return found

    def _is_true(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Whether the truth has a contour of each class, (C,)."""
        return np.bincount(rows["class_id"], rows["is_true"], len(self._names)) > 0


def _compare(of_truth: Surface, of_prediction: Surface, worst: float) -> dict[str, float]:
    """The numbers of one class in one image, not all of whose contours are missing."""
    there, back = measure_distances(of_truth, of_prediction), measure_distances(of_prediction, of_truth)
    hd95 = hausdorff(there, back, 0.95)
    return {
        "hd95": hd95 if math.isfinite(hd95) else worst,
        **{kind: surface_dice(there, back, tolerance) for kind, tolerance in _TOLERANCES.items()},
    }
