from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt

from raysseg.data import read_class_map
from raysseg.masks import LabelMap
from raysseg.metrics import Metrics
from raysseg.metrics.surface import (
    Distances,
    SurfaceDistance,
    average_distance,
    find_contours,
    find_surface,
    hausdorff,
    measure_distances,
    surface_dice,
)

DATA = Path(os.environ.get("RAYSSEG_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
IGNORED, OUTSIDE = 255, 254
HALF = math.sqrt(0.5)

Labels = npt.NDArray[np.uint8]


def distances(truth: npt.ArrayLike, prediction: npt.ArrayLike) -> tuple[Distances, Distances]:
    """From the truth's contour of label 1 to the prediction's, and back."""
    sides = [find_surface(find_contours(np.array(side, np.uint8), OUTSIDE), 1) for side in (truth, prediction)]
    return measure_distances(*sides), measure_distances(*sides[::-1])


# ---- two masks


def test_numbers_are_the_reference_tools() -> None:
    folder = DATA / "reference" / "crackforest_test"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand; RAYSSEG_DATA names the folder that holds reference/")
    expected = json.loads((folder / "expected.json").read_text())
    for wanted in expected["surface"]["per_file"]:
        name = wanted.pop("file")
        files = (DATA / expected["ground_truth"] / name, folder / "pred" / name)
        there, back = distances(*(np.array(Image.open(file)) for file in files))
        found = {
            "hd95": hausdorff(there, back, 0.95),
            "hd100": hausdorff(there, back, 1),
            "asd_gt_to_pred": average_distance(there),
            "asd_pred_to_gt": average_distance(back),
            "surface_dice_tol1": surface_dice(there, back, 1),
            "surface_dice_tol3": surface_dice(there, back, 3),
        }
        assert found == pytest.approx(wanted, abs=1e-12, rel=0)


@pytest.mark.parametrize(
    ("mask", "length"),
    [
        ([[1]], 4 * HALF),
        ([[1, 1, 1]], 4 + 4 * HALF),
        ([[1, 1], [1, 1]], 4 + 4 * HALF),
        ([[1, 0], [0, 1]], 6 * HALF + 2 * HALF),  # where they touch, either has a corner of its own
        ([[1, 1], [1, 0]], 2 + 5 * HALF + HALF),  # five corners stand out, one goes in
        ([[0, 0], [0, 0]], 0),
    ],
)
def test_contours_are_as_long_as_marching_squares_draws_them(mask: list[list[int]], length: float) -> None:
    surface = find_surface(find_contours(np.array(mask, np.uint8), OUTSIDE), 1)
    assert surface.lengths.sum() == pytest.approx(length)


def test_distances_are_those_of_a_distance_transform() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (2, 9, 12)).repeat(5, 1).repeat(4, 2).astype(np.uint8)
    surfaces = [find_surface(find_contours(mask, OUTSIDE), 1) for mask in masks]
    is_goal = np.zeros((46, 49), bool)
    is_goal[tuple(surfaces[1].places.T)] = True
    expected = distance_transform_edt(~is_goal)[tuple(surfaces[0].places.T)]
    assert measure_distances(*surfaces).values.tolist() == sorted(expected.tolist())


def test_shifted_square_by_hand() -> None:
    square = np.zeros((30, 30), np.uint8)
    square[5:15, 5:15] = 1
    there, back = distances(square, np.roll(square, 4, axis=1))
    # The left side is 4 away. Above and below 4, 3, 2, 1, and then 6 straight pieces and a corner 0. The right side
    # is 1, 2, 3, 4, 4, 4, 3, 2, 1 away, its ends from what lies above and below.
    total = 4 * 9 + 4 * HALF
    within = {0: 2 * (6 + HALF), 1: 2 * (7 + HALF) + 2, 2: 2 * (8 + HALF) + 4, 3: 2 * (9 + HALF) + 6}
    for tolerance, length in within.items():
        assert surface_dice(there, back, tolerance) == pytest.approx(length / total)
        assert hausdorff(there, back, length / total - 0.01) == tolerance
        assert hausdorff(there, back, length / total + 0.01) == tolerance + 1
    assert hausdorff(there, back, 1) == 4.0
    assert surface_dice(there, back, 4) == 1.0


def test_a_side_without_a_contour() -> None:
    there, back = distances([[0, 1]], [[0, 0]])
    assert hausdorff(there, back, 0.95) == math.inf
    assert average_distance(there) == math.inf
    assert math.isnan(average_distance(back))
    assert surface_dice(there, back, 3) == 0.0
    assert math.isnan(surface_dice(back, back, 1))


# ---- the measure


def measured(*pairs: tuple[Labels, Labels]) -> dict[str, float]:
    metric = Metrics("semantic", read_class_map(["a", "b", "c"]), more=("surface",))
    for i, (prediction, truth) in enumerate(pairs):
        metric.update(str(i), LabelMap(prediction, IGNORED), LabelMap(truth, IGNORED))
    return {name: value for name, value in metric.compute().items() if "hd95" in name or "surface" in name}


def square(top: int, left: int) -> Labels:
    """Ten by ten of class b in class a."""
    labels = np.zeros((30, 40), np.uint8)
    labels[top : top + 10, left : left + 10] = 1
    return labels


def test_means_over_images_and_classes() -> None:
    found = measured((square(5, 5), square(5, 5)), (square(5, 7), square(5, 5)))
    there, back = distances(square(5, 7), square(5, 5))
    assert found["hd95/b"] == pytest.approx((0 + 2) / 2)
    assert found["surface_dice/b"] == pytest.approx((1 + surface_dice(there, back, 1)) / 2)
    assert found["surface_dice_3px/b"] == 1.0
    assert math.isnan(found["hd95/c"])
    for kind in ("hd95", "surface_dice", "surface_dice_3px"):
        assert found[kind] == pytest.approx((found[f"{kind}/a"] + found[f"{kind}/b"]) / 2)


def test_class_on_one_side_alone_has_the_worst_numbers() -> None:
    without = np.zeros((30, 40), np.uint8)
    missed = measured((without, square(5, 5)), (square(5, 5), square(5, 5)))
    assert missed["hd95/b"] == pytest.approx((50 + 0) / 2)  # the diagonal
    assert missed["surface_dice/b"] == 0.5
    invented = measured((square(5, 5), without), (square(5, 5), square(5, 5)))
    assert (invented["hd95/b"], invented["surface_dice/b"]) == (missed["hd95/b"], missed["surface_dice/b"])
    never_true = measured((square(5, 5), without))
    assert math.isnan(never_true["hd95/b"])
    assert never_true["hd95"] == never_true["hd95/a"]
    neither = measured((without, without), (square(5, 7), square(5, 5)))
    assert neither["hd95/b"] == 2.0


def test_nothing_is_a_contour_along_ignored_pixels() -> None:
    truth, prediction = square(5, 5), square(5, 5)
    truth[:, 20:] = IGNORED
    prediction[:, 20:] = 1  # never seen
    assert repr(measured((prediction, truth))) == repr(measured((square(5, 5), truth)))
    assert measured((prediction, truth))["surface_dice"] == 1.0
    # a square that is known in its upper half alone, and predicted 2 pixels too high
    truth = square(5, 5)
    truth[10:] = IGNORED
    found = measured((square(3, 5), truth))
    assert found["hd95/b"] == 2.0
    everything = np.full_like(truth, IGNORED)
    assert all(math.isnan(value) for value in measured((square(5, 5), everything)).values())


def test_own_score_is_surface_dice() -> None:
    measure = SurfaceDistance(read_class_map(["a", "b", "c"]))
    record = measure.count(LabelMap(square(5, 5), IGNORED), LabelMap(np.zeros((30, 40), np.uint8), IGNORED))
    there, back = (measured((square(5, 5), np.zeros((30, 40), np.uint8)))["surface_dice/a"], 0.0)
    assert measure.score(record) == pytest.approx((there + back) / 2)
    assert measure.absent([record]) == ["b", "c"]
    assert len(record) == 2 * 27
    assert math.isnan(measure.score(b""))
    with pytest.raises(ValueError, match=r"the prediction is \(30, 40\), the truth \(40, 30\)"):
        measure.count(LabelMap(square(5, 5), IGNORED), LabelMap(square(5, 5).T, IGNORED))


def test_merged_in_any_order_is_the_same_to_the_bit() -> None:
    rng = np.random.default_rng(4)
    classes = read_class_map(["a", "b", "c"])
    whole = Metrics("semantic", classes, more=("surface", "boundary_iou"))
    parts = []
    for i in range(4):
        truth, prediction = rng.integers(0, 3, (2, 5, 6)).repeat(7, 1).repeat(6, 2).astype(np.uint8)
        part = Metrics("semantic", classes, more=("surface", "boundary_iou"))
        for metric in (whole, part):
            metric.update(str(i), LabelMap(prediction, IGNORED), LabelMap(truth, IGNORED))
        parts.append(part.state())
    for order in itertools.permutations(range(4)):
        merged = Metrics("semantic", classes, more=("surface", "boundary_iou"))
        for i in (*order, order[0]):  # what is seen twice counts once
            merged.merge(parts[i])
        assert repr(merged.compute()) == repr(whole.compute())
