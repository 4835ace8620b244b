"""Boundary IoU (Cheng et al. 2021): IoU of the pixels within a mask that lie near its contour."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from raysseg.masks import IdMap, LabelMap
from raysseg.metrics.overlaps import count_overlaps
from raysseg.metrics.semantic import mean_of_known
from raysseg.schema import ClassMap

Mask = npt.NDArray[np.bool_]
"""(H, W)."""


def boundary_width(size: tuple[int, int], ratio: float = 0.02) -> int:
    """How many pixels from the contour still belong to the boundary, of an image of this (height, width)."""
    return max(1, round(ratio * math.hypot(*size)))


def inner_boundary(mask: Mask, width: int) -> Mask:
    """The pixels of a mask at most so far from what does not belong to it, in the larger of both axes.

    The image's edge counts as a contour, as in the authors' code.
    """
    inside = cv2.erode(mask.view(np.uint8), _square(width), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    found: Mask = mask & (inside == 0)
    return found


def inner_boundaries(labels: IdMap, width: int, is_unknown: Mask | None = None) -> Mask:
    """The inner boundaries of all labels of a map at once: every pixel near one of another label, or the image's edge.

    Args:
        labels: (H, W); each value is a mask of its own.
        width: as of inner_boundary.
        is_unknown: (H, W) pixels that may belong to any label: they end none, and are in no boundary.
    """
    lower, upper = labels, labels
    if is_unknown is not None:
        lower, upper = mark(labels, is_unknown), labels * ~is_unknown
    # pixels of one label alone have it as their least and as their largest; beyond the image lies nothing to OpenCV
    found: Mask = cv2.erode(lower, _square(width)) != labels
    found |= cv2.dilate(upper, _square(width)) != labels
    for edge in (found[:width], found[-width:], found[:, :width], found[:, -width:]):
        edge[:] = True
    if is_unknown is not None:
        found &= ~is_unknown
    return found


def mark(labels: IdMap, is_marked: Mask) -> IdMap:
    """Some pixels become the largest value of the type."""
    marks: IdMap = np.negative(is_marked.view(np.uint8).astype(labels.dtype, copy=False))  # 1 becomes the largest
    return labels | marks


def _square(width: int) -> npt.NDArray[np.uint8]:
    """All pixels at most so far away."""
    return np.ones((2 * width + 1, 2 * width + 1), np.uint8)


_COUNTS = np.dtype([("class_id", "<u2"), ("common", "<u4"), ("truth", "<u4"), ("prediction", "<u4")])
"""One class in one image: pixels of its boundaries on both sides, in the truth, in the prediction."""


class BoundaryIou:
    """Boundary IoU of semantic segmentation, pooled over a data set; the width is 2 % of each image's diagonal.

    The authors' code knows no ignored pixels. Here they are unknown: left out on both sides, and no mask ends at them,
    neither in the truth nor in the prediction; else both would have the same contour around them, which nobody
    predicted. In terms of the authors' code: the boundary of a mask together with the ignored pixels, without these.
    Where a prediction has no class is known: masks end there.
    """

    def __init__(self, classes: ClassMap) -> None:
        self._names = classes.names

    def count(self, prediction: LabelMap, truth: LabelMap) -> bytes:
        """14 bytes for each class with a boundary.

        Raises:
            ValueError: the sizes differ.
        """
        predicted, labelled = prediction.labels, truth.labels
        if predicted.shape != labelled.shape:
            raise ValueError(f"the prediction is {predicted.shape}, the truth {labelled.shape} (height, width)")
        is_ignored = labelled == truth.ignore_index
        is_unknown = is_ignored if is_ignored.any() else None
        width = boundary_width((labelled.shape[0], labelled.shape[1]))
        of_truth = inner_boundaries(labelled, width, is_unknown)
        of_prediction = inner_boundaries(predicted, width, is_unknown)
        # the largest value is no class
        overlaps = count_overlaps(mark(labelled, ~of_truth), mark(predicted, ~of_prediction))
        truth_pixels, prediction_pixels = overlaps.areas(len(self._names), len(self._names))
        present = np.flatnonzero(truth_pixels + prediction_pixels)
        record = np.zeros(len(present), _COUNTS)
        record["class_id"] = present
        record["common"] = overlaps.of(present << 16 | present)
        record["truth"] = truth_pixels[present]
        record["prediction"] = prediction_pixels[present]
        return record.tobytes()

    def _scores(self, records: Sequence[bytes]) -> npt.NDArray[np.float64]:
        """Boundary IoU of each class, (C,); NaN where the truth has no boundary of it."""
        rows = np.frombuffer(b"".join(records), _COUNTS)
        common, truth, prediction = (
            np.bincount(rows["class_id"], rows[name], len(self._names)) for name in ("common", "truth", "prediction")
        )
        with np.errstate(invalid="ignore"):
            return np.where(truth > 0, common / (truth + prediction - common), np.nan)

    def score(self, record: bytes) -> float:
        """Its mean over the classes that the truth holds."""
        return mean_of_known(self._scores([record]))

    def absent(self, records: Sequence[bytes]) -> list[str]:
        """Classes without a boundary in the truth; they are left out of the mean."""
        return [name for name, score in zip(self._names, self._scores(records), strict=True) if np.isnan(score)]

    def compute(self, records: Sequence[bytes]) -> dict[str, float]:
        """`boundary_iou`, the mean over classes, and `boundary_iou/<class>`; NaN for a class that the truth lacks."""
        scores = self._scores(records)
        per_class = {f"boundary_iou/{name}": float(score) for name, score in zip(self._names, scores, strict=True)}
        return {"boundary_iou": mean_of_known(scores), **per_class}
