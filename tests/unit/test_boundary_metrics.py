from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest

from raysseg.data import read_class_map
from raysseg.masks import LabelMap
from raysseg.metrics import Metrics
from raysseg.metrics.boundary import BoundaryIou, boundary_width, inner_boundaries, inner_boundary

IGNORED = 255
Bools = npt.NDArray[np.bool_]


def eroded_step_by_step(mask: Bools, width: int) -> Bools:
    """The authors' way: so many erosions by 3 x 3, with nothing beyond the image."""
    inside = mask
    for _ in range(width):
        padded = np.pad(inside, 1)
        height, breadth = mask.shape
        shifts = itertools.product(range(3), repeat=2)
        inside = np.logical_and.reduce([padded[i : i + height, j : j + breadth] for i, j in shifts])
    return mask & ~inside


def blobs(rng: np.random.Generator, size: tuple[int, int], num_labels: int) -> npt.NDArray[np.uint8]:
    """Blocks of labels, which touch the image's edge."""
    coarse = rng.integers(0, num_labels, (-(-size[0] // 9), -(-size[1] // 11)))
    return coarse.repeat(9, 0).repeat(11, 1)[: size[0], : size[1]].astype(np.uint8)


@pytest.mark.parametrize(("size", "width"), [((31, 44), 1), ((31, 44), 4), ((7, 5), 3), ((1, 9), 2), ((40, 3), 9)])
def test_inner_boundary_is_what_erosions_take_away(size: tuple[int, int], width: int) -> None:
    rng = np.random.default_rng(width)
    for mask in (blobs(rng, size, 2) == 1, rng.random(size) < 0.9, np.ones(size, bool), np.zeros(size, bool)):
        assert np.array_equal(inner_boundary(mask, width), eroded_step_by_step(mask, width))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("width", [1, 3, 50])
def test_all_boundaries_at_once_are_those_of_each_mask(width: int, dtype: type[np.uint8] | type[np.uint16]) -> None:
    rng = np.random.default_rng(width)
    labels = blobs(rng, (40, 52), 5).astype(dtype)
    labels[labels == 4] = np.iinfo(dtype).max
    is_unknown = rng.random(labels.shape) < 0.02
    expected = np.logical_or.reduce([inner_boundary(labels == i, width) for i in np.unique(labels)])
    assert np.array_equal(inner_boundaries(labels, width), expected)
    of_known = [inner_boundary((labels == i) | is_unknown, width) & ~is_unknown for i in np.unique(labels)]
    assert np.array_equal(inner_boundaries(labels, width, is_unknown), np.logical_or.reduce(of_known))


def test_width_is_a_share_of_the_diagonal() -> None:
    assert [boundary_width(size) for size in ((480, 640), (30, 40), (3, 4), (1080, 1920))] == [16, 1, 1, 44]


# ---- Boundary IoU of label maps


def measured(*pairs: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> dict[str, float]:
    metric = Metrics("semantic", read_class_map(["a", "b", "c"]), more=("boundary_iou",))
    for i, (prediction, truth) in enumerate(pairs):
        metric.update(str(i), LabelMap(prediction, IGNORED), LabelMap(truth, IGNORED))
    return {name: value for name, value in metric.compute().items() if "boundary" in name}


def halves(split: int, size: tuple[int, int] = (60, 80)) -> npt.NDArray[np.uint8]:
    """Class a to the left, b to the right; the boundary is 2 pixels wide."""
    labels = np.zeros(size, np.uint8)
    labels[:, split:] = 1
    return labels


def test_boundary_iou_is_pooled_over_the_data_set() -> None:
    found = measured((halves(40), halves(40)), (halves(43), halves(40)))
    # a frame of 60 x 40 and, predicted, of 60 x 43: they share their left, and 38 pixels of 4 rows
    same, off = 60 * 40 - 56 * 36, 60 * 43 - 56 * 39
    common = 2 * 60 + 2 * 2 * 38
    assert found["boundary_iou/a"] == pytest.approx((same + common) / (same + same + off - common))
    assert math.isnan(found["boundary_iou/c"])
    assert found["boundary_iou"] == pytest.approx((found["boundary_iou/a"] + found["boundary_iou/b"]) / 2)


def test_class_without_truth_is_left_out_and_no_class_is_a_miss() -> None:
    predicted = halves(40)
    predicted[:30] = 2
    found = measured((predicted, halves(40)))
    assert math.isnan(found["boundary_iou/c"])
    assert 0 < found["boundary_iou"] < 1
    nothing = np.full((60, 80), IGNORED, np.uint8)
    assert measured((nothing, halves(40)))["boundary_iou"] == 0.0
    assert math.isnan(measured((halves(40), nothing))["boundary_iou"])


def test_no_mask_ends_at_ignored_pixels() -> None:
    truth = halves(40)
    truth[20:40, 10:30] = IGNORED  # within a, far from its contour
    around = truth.copy()
    around[truth == IGNORED] = 1  # what is predicted there does not matter
    assert repr(measured((around, truth))) == repr(measured((halves(40), halves(40))))
    # were the ignored pixels a contour to both, a prediction that misses all of a's would still share it
    truth[...] = IGNORED
    truth[25:35, 35:45] = 0
    prediction = np.zeros_like(truth)
    assert math.isnan(measured((prediction, truth))["boundary_iou/a"])


def test_contours_within_reach_behind_ignored_pixels_count() -> None:
    truth = halves(40)
    truth[:, 40] = IGNORED  # as the bands around objects in Pascal VOC
    record = BoundaryIou(read_class_map(["a", "b"])).count(LabelMap(halves(40), IGNORED), LabelMap(truth, IGNORED))
    found = np.frombuffer(record, np.dtype([("class_id", "<u2"), ("pixels", "<u4", 3)]))
    a = 60 * 40 - 56 * 37  # of its two rightmost columns only the last one is 2 pixels from b
    b = 60 * 39 - 56 * 36  # likewise from the left
    assert found["pixels"].tolist() == [[a] * 3, [b] * 3]


def test_sizes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"the prediction is \(60, 80\), the truth \(60, 81\)"):
        BoundaryIou(read_class_map(["a", "b"])).count(
            LabelMap(halves(40), IGNORED), LabelMap(halves(40, (60, 81)), IGNORED)
        )


def test_merged_in_any_order_is_the_same_to_the_bit() -> None:
    rng = np.random.default_rng(3)
    classes = read_class_map([str(i) for i in range(300)])
    ignored = classes.ignore
    whole = Metrics("semantic", classes, more=("boundary_iou",))
    parts = []
    for i in range(4):
        truth = blobs(rng, (50, 60), 200).astype(np.uint16) + 100
        truth[:5] = ignored
        pair = LabelMap(np.roll(truth, 1, axis=1), ignored), LabelMap(truth, ignored)
        part = Metrics("semantic", classes, more=("boundary_iou",))
        whole.update(str(i), *pair)
        part.update(str(i), *pair)
        parts.append(part.state())
    assert 0 < whole.compute()["boundary_iou"] < 1
    for order in itertools.permutations(range(4)):
        merged = Metrics("semantic", classes, more=("boundary_iou",))
        for i in (*order, order[0]):  # what is seen twice counts once
            merged.merge(parts[i])
        assert repr(merged.compute()) == repr(whole.compute())
