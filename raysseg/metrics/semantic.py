"""IoU, Dice and accuracy of semantic segmentation from one confusion matrix a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysseg.masks import IdMap, LabelMap
from raysseg.schema import ClassMap

Counts = npt.NDArray[np.int64]
"""(C, C + 1), rows truth, columns prediction; the last column is what was predicted as no class at all."""


def count_confusion(prediction: IdMap, truth: IdMap, num_classes: int) -> Counts:
    """Counts pixels by (truth, prediction); pixels without a truth label are left out.

    Args:
        prediction: (H, W) class indices; any larger value stands for no class.
        truth: (H, W) likewise.
        num_classes: C.

    Raises:
        ValueError: the sizes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, the truth {truth.shape} (height, width)")
    side = num_classes + 1
    codes = np.minimum(truth, num_classes).astype(np.uint16 if side * side < 2**16 else np.uint32)
    np.multiply(codes, side, out=codes)
    np.add(codes, np.minimum(prediction, num_classes), out=codes)
    return np.bincount(codes.ravel(), minlength=side * side).reshape(side, side)[:-1].astype(np.int64)


def class_scores(confusion: Counts) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """IoU and Dice of each class, (C,) each; NaN where the truth lacks the class."""
    hits = np.diagonal(confusion).astype(np.float64)
    truth = confusion.sum(1)
    predicted = confusion[:, :-1].sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(truth > 0, hits / (truth + predicted - hits), np.nan)
        dice = np.where(truth > 0, 2 * hits / (truth + predicted), np.nan)
    return iou, dice


def mean_iou(confusion: Counts) -> float:
    """Mean IoU over the classes that the truth holds; NaN where there is none."""
    iou, _ = class_scores(confusion)
    return mean_of_known(iou)


class Confusion:
    """mIoU, mean Dice, pixel accuracy and frequency-weighted IoU (Long et al. 2015), pooled over a data set."""

    def __init__(self, classes: ClassMap) -> None:
        self._names = classes.names
        self._shape = (len(classes), len(classes) + 1)

    def count(self, prediction: LabelMap, truth: LabelMap) -> bytes:
        """The places and values of one sample's confusion matrix, where it is not 0: 8 bytes each."""
        counts = count_confusion(prediction.labels, truth.labels, len(self._names)).ravel()
        places = np.flatnonzero(counts)
        return np.stack([places, counts[places]]).astype(np.uint32).tobytes()

    def total(self, records: Sequence[bytes]) -> Counts:
        """The confusion matrix of all samples, (C, C + 1)."""
        total = np.zeros(self._shape[0] * self._shape[1], np.int64)
        for record in records:
            places, counts = np.frombuffer(record, np.uint32).reshape(2, -1)
            total[places] += counts
        return total.reshape(self._shape)

    def score(self, record: bytes) -> float:
        """Its mIoU."""
        return mean_iou(self.total([record]))

    def absent(self, records: Sequence[bytes]) -> list[str]:
        """Classes without a pixel of truth; they are left out of the means."""
        return [name for name, pixels in zip(self._names, self.total(records).sum(1), strict=True) if pixels == 0]

    def compute(self, records: Sequence[bytes]) -> dict[str, float]:
        """All numbers by name; NaN for a class that the truth lacks."""
        confusion = self.total(records)
        iou, dice = class_scores(confusion)
        truth = confusion.sum(1)
        total = max(int(truth.sum()), 1)
        scores = {
            "miou": mean_of_known(iou),
            "mean_dice": mean_of_known(dice),
            "pixel_accuracy": float(np.diagonal(confusion).sum() / total),
            "frequency_weighted_iou": float(np.nansum(truth / total * iou)),
        }
        per_class = [
            (f"{kind}/{name}", float(score))
            for kind, values in (("iou", iou), ("dice", dice))
            for name, score in zip(self._names, values, strict=True)
        ]
        return scores | dict(per_class)


def mean_of_known(values: npt.NDArray[np.float64]) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
