"""Panoptic quality (Kirillov et al. 2019) and its boundary form (Cheng et al. 2021), as their authors compute them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysseg.masks import IdMap, SegmentMap
from raysseg.metrics.boundary import boundary_width, inner_boundaries, mark
from raysseg.metrics.overlaps import Overlaps, Pixels, count_overlaps
from raysseg.metrics.semantic import mean_of_known
from raysseg.schema import ClassMap

Floats = npt.NDArray[np.float64]

_COUNTS = np.dtype([("class_id", "<u2"), ("hits", "<u2"), ("surplus", "<u2"), ("missed", "<u2"), ("iou", "<f8")])
"""One class in one image: true positives, false positives, false negatives, and the sum of the first ones' IoU."""


class PanopticQuality:
    """PQ, SQ and RQ over a data set; equal to panopticapi's.

    Segments of one class match where their IoU is above 0.5, the truth's void left out of the union. Crowds match
    nothing; a prediction without a match is left alone where void and the crowd of its class (the last one, if there
    are several) cover more than half of it. The means leave out a class that neither side counts; one that is predicted
    where the truth has none counts as 0. Segments without a pixel are none, on either side.
    """

    _names: tuple[str, ...] = ("pq", "sq", "rq")

    def __init__(self, classes: ClassMap) -> None:
        self._classes = classes.names
        self._is_thing = np.array(classes.things, np.bool_)

    def count(self, prediction: SegmentMap, truth: SegmentMap) -> bytes:
        """16 bytes for each class that the image counts for.

        Raises:
            ValueError: the sizes differ.
        """
        overlaps = _count_segments(prediction, truth)
        pairs = _find_candidates(prediction, truth, overlaps)
        return _to_record(prediction, truth, overlaps, pairs, _iou(prediction, truth, overlaps, pairs))

    def score(self, record: bytes) -> float:
        """Its PQ, the mean over its classes."""
        return mean_of_known(self._qualities([record])[0])

    def absent(self, records: Sequence[bytes]) -> list[str]:
        """Classes that neither side counts; they are left out of the means."""
        quality = self._qualities(records)[0]
        return [name for name, value in zip(self._classes, quality, strict=True) if np.isnan(value)]

    def compute(self, records: Sequence[bytes]) -> dict[str, float]:
        """All numbers by name; NaN for a class that neither side counts."""
        found = {}
        for name, values in zip(self._names, self._qualities(records), strict=False):
            found[name] = mean_of_known(values)
            found[f"{name}_things"] = mean_of_known(values[self._is_thing])
            found[f"{name}_stuff"] = mean_of_known(values[~self._is_thing])
            found |= {f"{name}/{c}": float(value) for c, value in zip(self._classes, values, strict=True)}
        return found

    def _qualities(self, records: Sequence[bytes]) -> tuple[Floats, Floats, Floats]:
        """PQ, SQ and RQ of each class, (C,) each."""
        rows = np.frombuffer(b"".join(records), _COUNTS)
        # IoU is added up in the order of the records, which is that of the sample ids
        hits, surplus, missed, iou = (
            np.bincount(rows["class_id"], rows[name], len(self._classes))
            for name in ("hits", "surplus", "missed", "iou")
        )
        segments = hits + 0.5 * surplus + 0.5 * missed
        with np.errstate(invalid="ignore", divide="ignore"):
            sq = np.where(hits > 0, iou / hits, np.where(segments > 0, 0.0, np.nan))
            return iou / segments, sq, hits / segments


class BoundaryPanopticQuality(PanopticQuality):
    """Boundary PQ over a data set; equal to boundary-iou-api's.

    PQ in which the IoU of a pair is that of the segments or that of their inner boundaries, whichever is smaller. The
    boundaries are as wide as 2 % of the image's diagonal, and lie along void too.
    """

    _names = ("boundary_pq",)

    def count(self, prediction: SegmentMap, truth: SegmentMap) -> bytes:
        """16 bytes for each class that the image counts for.

        Raises:
            ValueError: the sizes differ.
        """
        overlaps = _count_segments(prediction, truth)
        pairs = _find_candidates(prediction, truth, overlaps)
        boundaries = count_overlaps(_keep_boundaries(truth), _keep_boundaries(prediction))
        iou = np.minimum(*(_iou(prediction, truth, counted, pairs) for counted in (overlaps, boundaries)))
        return _to_record(prediction, truth, overlaps, pairs, iou)


def _count_segments(prediction: SegmentMap, truth: SegmentMap) -> Overlaps:
    """Pixels by number in the truth and in the prediction."""
    if prediction.numbers.shape != truth.numbers.shape:
        raise ValueError(
            f"the prediction is {prediction.numbers.shape}, the truth {truth.numbers.shape} (height, width)"
        )
    overlaps = count_overlaps(truth.numbers, prediction.numbers)
    assert overlaps.first.max() <= len(truth), "the truth has pixels of no segment"
    assert overlaps.second.max() <= len(prediction), "the prediction has pixels of no segment"
    return overlaps


def _keep_boundaries(segments: SegmentMap) -> IdMap:
    """Numbers near contours; in the middle of segments is one that none has, and void stays void."""
    numbers = segments.numbers
    assert len(segments) < 65535, "one number is left for what is no boundary"
    is_boundary = inner_boundaries(numbers, boundary_width((numbers.shape[0], numbers.shape[1])))
    return mark(numbers.astype(np.uint16, copy=False), ~is_boundary & (numbers > 0))


def _find_candidates(prediction: SegmentMap, truth: SegmentMap, overlaps: Overlaps) -> Pixels:
    """The pairs that may match: of one class, and no crowds."""
    class_of_truth = np.append(-1, np.where(truth.is_crowd, -1, truth.class_ids))
    class_of_prediction = np.append(-2, prediction.class_ids)
    is_candidate: npt.NDArray[np.bool_] = class_of_truth[overlaps.first] == class_of_prediction[overlaps.second]
    return overlaps.pairs[is_candidate]


def _iou(prediction: SegmentMap, truth: SegmentMap, overlaps: Overlaps, pairs: Pixels) -> Floats:
    """IoU of each pair, what the truth's void covers left out."""
    of_truth, of_prediction = overlaps.areas(len(truth) + 1, len(prediction) + 1)
    number = pairs & 0xFFFF
    common, void = overlaps.of(pairs), overlaps.of(number)  # 0, void's number, and the prediction's make a pair too
    found: Floats = common / (of_truth[pairs >> 16] + of_prediction[number] - common - void)
    return found


def _to_record(prediction: SegmentMap, truth: SegmentMap, overlaps: Overlaps, pairs: Pixels, iou: Floats) -> bytes:
    """What each class comes to, of pairs and their IoU."""
    of_truth, of_prediction = overlaps.areas(len(truth) + 1, len(prediction) + 1)
    is_hit = iou > 0.5  # hence no segment is in two
    hits, iou = pairs[is_hit], iou[is_hit]
    is_missed, is_surplus = of_truth > 0, of_prediction > 0
    is_missed[0] = is_surplus[0] = False
    is_missed[hits >> 16] = is_surplus[hits & 0xFFFF] = False
    surplus = np.flatnonzero(is_surplus)
    covered = overlaps.of(surplus)
    if truth.is_crowd.any():
        crowds = np.flatnonzero(is_missed[1:] & truth.is_crowd) + 1
        is_missed[crowds] = False
        crowd_of = {int(truth.class_ids[number - 1]): number for number in crowds}
        crowd = np.array([crowd_of.get(c, 0) for c in prediction.class_ids[surplus - 1].tolist()], np.int64)
        covered += np.where(crowd > 0, overlaps.of(crowd << 16 | surplus), 0)
    surplus = surplus[covered / of_prediction[surplus] <= 0.5]

    of_hits = truth.class_ids[(hits >> 16) - 1]
    num_classes = 1 + int(max(truth.class_ids.max(initial=-1), prediction.class_ids.max(initial=-1)))
    counts = np.zeros(num_classes, _COUNTS)
    counts["hits"] = np.bincount(of_hits, minlength=num_classes)
    counts["surplus"] = np.bincount(prediction.class_ids[surplus - 1], minlength=num_classes)
    counts["missed"] = np.bincount(truth.class_ids[np.flatnonzero(is_missed) - 1], minlength=num_classes)
    counts["iou"] = np.bincount(of_hits, iou, num_classes)
    present = np.flatnonzero(counts["hits"] + counts["surplus"] + counts["missed"])
    counts["class_id"][present] = present
    record: bytes = counts[present].tobytes()
    return record
