from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from raysseg.config import CocoPanopticSource
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.masks import SegmentMap, to_segment_map
from raysseg.metrics import Metrics
from raysseg.metrics.overlaps import count_overlaps
from raysseg.metrics.panoptic import PanopticQuality
from raysseg.schema import ClassMap, Sample

DATA = Path(os.environ.get("RAYSSEG_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()

CLASSES = ClassMap(ids=(0, 1, 2), names=("cat", "dog", "sky"), colours=((0, 0, 0),) * 3, things=(True, True, False))
CAT, DOG, SKY = 0, 1, 2


def segments(numbers: npt.ArrayLike, *class_ids: int, crowds: Sequence[int] = ()) -> SegmentMap:
    """Of numbers and the class of each; `crowds` are numbers too."""
    is_crowd = np.isin(np.arange(1, len(class_ids) + 1), crowds)
    return SegmentMap(np.array(numbers, np.uint16), np.array(class_ids, np.int64), is_crowd)


def measured(*pairs: tuple[SegmentMap, SegmentMap], classes: ClassMap = CLASSES) -> dict[str, float]:
    """The numbers of predictions and truths."""
    metric = Metrics("panoptic", classes, more=("boundary_pq",))
    for i, (prediction, truth) in enumerate(pairs):
        metric.update(str(i), prediction, truth)
    return metric.compute()


def bits(metrics: dict[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in metrics.items()}


# ---- the official tools


def test_numbers_are_the_official_tools() -> None:
    folder = DATA / "reference" / "panoptic_val"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand; RAYSSEG_DATA names the folder that holds reference/")
    expected = json.loads((folder / "expected.json").read_text())
    truth = CocoPanopticSource(
        format="coco_panoptic",
        annotations=f"{DATA}/coco_panoptic/annotations_val.json",
        masks=f"{DATA}/coco_panoptic/val/panoptic",
    )
    predictions = CocoPanopticSource(format="coco_panoptic", annotations=f"{folder}/pred.json", masks=f"{folder}/pred")
    classes = read_class_map(None, truth)
    metric = Metrics("panoptic", classes, more=("boundary_pq",))
    views = []
    for source in (truth, predictions):
        samples = read_samples(read_index(source), with_images=False)
        assert all(isinstance(sample, Sample) for sample in samples)
        views.append({s.sample_id: to_segment_map(s, classes) for s in samples if isinstance(s, Sample)})
    for sample_id, view in views[0].items():
        metric.update(sample_id, views[1][sample_id], view)
    found = metric.compute()
    groups = {"All": "", "Things": "_things", "Stuff": "_stuff"}
    kinds = [("pq", "pq"), ("pq", "sq"), ("pq", "rq"), ("boundary_pq", "pq")]
    for tool, kind in kinds:
        name = "boundary_pq" if tool == "boundary_pq" else kind
        wanted = {f"{name}{suffix}": expected[tool][group][kind] for group, suffix in groups.items()}
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-9, rel=0)
        per_class = {
            f"{name}/{class_name}": expected[tool]["per_class"][str(class_id)][kind]
            for class_id, class_name in zip(classes.ids, classes.names, strict=True)
        }
        # a class that neither side counts is 0 to the tool, and left out of its means
        ours = {key: 0.0 if math.isnan(found[key]) else found[key] for key in per_class}
        assert ours == pytest.approx(per_class, abs=1e-9, rel=0)
        assert sum(not math.isnan(found[key]) for key in per_class) == expected[tool]["All"]["n"]


def counted_one_by_one(pairs: Sequence[tuple[SegmentMap, SegmentMap]], num_classes: int) -> npt.NDArray[np.float64]:
    """Sum of IoU, hits, surplus and missed by class, (C, 4), as the paper has them, mask by mask."""
    found = np.zeros((num_classes, 4))
    for prediction, truth in pairs:
        void = truth.numbers == 0
        masks_of = [[side.numbers == i + 1 for i in range(len(side))] for side in (prediction, truth)]
        unmatched = {i for i, mask in enumerate(masks_of[0]) if mask.any()}
        for t, mask in enumerate(masks_of[1]):
            if truth.is_crowd[t] or not mask.any():
                continue
            c = truth.class_ids[t]
            ious = {
                p: (masks_of[0][p] & mask).sum() / ((masks_of[0][p] & ~void) | mask).sum()
                for p in unmatched
                if prediction.class_ids[p] == c
            }
            best = max(ious, key=lambda p: ious[p], default=None)
            if best is None or ious[best] <= 0.5:
                found[c, 3] += 1
            else:
                unmatched.remove(best)
                found[c, :2] += ious[best], 1
        for p in unmatched:
            c = prediction.class_ids[p]
            crowds = [m for t, m in enumerate(masks_of[1]) if truth.is_crowd[t] and truth.class_ids[t] == c and m.any()]
            free = np.logical_or.reduce([void, *crowds[-1:]])
            found[c, 2] += (masks_of[0][p] & free).sum() / masks_of[0][p].sum() <= 0.5
    return found


def random_map(rng: np.random.Generator, num_classes: int, num_segments: int, num_crowds: int) -> SegmentMap:
    """Blocks of random segments, one of which has no pixel."""
    numbers = rng.integers(0, num_segments, (6, 8)).repeat(4, 0).repeat(5, 1)
    return segments(numbers, *rng.integers(0, num_classes, num_segments).tolist(), crowds=range(1, 1 + num_crowds))


@pytest.mark.parametrize(("num_classes", "num_segments"), [(1, 8), (3, 12), (300, 20), (2, 400)])
def test_pq_is_that_of_masks_one_by_one(num_classes: int, num_segments: int) -> None:
    rng = np.random.default_rng(num_classes)
    pairs = []
    for _ in range(6):
        truth = random_map(rng, num_classes, num_segments, num_crowds=num_segments // 4)
        numbers = truth.numbers.copy()
        is_changed = rng.random(numbers.shape) < 0.2
        numbers[is_changed] = rng.integers(0, num_segments, is_changed.sum())
        pairs.append((segments(numbers, *truth.class_ids.tolist()), truth))
    iou, hits, surplus, missed = counted_one_by_one(pairs, num_classes).T
    assert hits.sum() > 0
    assert (surplus + missed).sum() > 0
    is_present = hits + surplus + missed > 0
    with np.errstate(invalid="ignore"):
        pq = iou / (hits + (surplus + missed) / 2)
    names = [str(i) for i in range(num_classes)]
    classes = ClassMap(tuple(range(num_classes)), tuple(names), ((0, 0, 0),) * num_classes, (True,) * num_classes)
    found = measured(*pairs, classes=classes)
    assert [found[f"pq/{name}"] for name in names] == pytest.approx(pq.tolist(), abs=1e-12, nan_ok=True)
    assert found["pq"] == pytest.approx(pq[is_present].mean(), abs=1e-12)
    assert math.isnan(found["pq_stuff"])


def test_overlaps_are_a_count_of_pixels() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 65536, (2, 40, 31)).astype(np.uint16)
    first[rng.random(first.shape) < 0.7] = 65535
    second[rng.random(second.shape) < 0.7] = 3
    found = count_overlaps(first, second)
    pairs, pixels = np.unique(first.astype(np.int64) * 65536 + second, return_counts=True)
    assert (found.pairs.tolist(), found.pixels.tolist()) == (pairs.tolist(), pixels.tolist())


# ---- by hand


def test_match_surplus_and_missed() -> None:
    truth = segments([[1, 1, 1, 1, 2, 2, 3, 3]], CAT, CAT, SKY)
    prediction = segments([[1, 1, 1, 2, 2, 2, 3, 3]], CAT, DOG, SKY)
    # cat: IoU 3/4 and one missed; dog: one surplus; sky: IoU 1
    found = measured((prediction, truth))
    wanted = {
        "pq/cat": 0.75 / 1.5, "sq/cat": 0.75, "rq/cat": 1 / 1.5,
        "pq/dog": 0.0, "sq/dog": 0.0, "rq/dog": 0.0,
        "pq/sky": 1.0, "sq/sky": 1.0, "rq/sky": 1.0,
        "pq": 0.5, "pq_things": 0.25, "pq_stuff": 1.0,
        "sq": 1.75 / 3, "sq_things": 0.375, "sq_stuff": 1.0,
        "rq": (1 / 1.5 + 1) / 3, "rq_things": 1 / 3, "rq_stuff": 1.0,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_half_is_no_match() -> None:
    found = measured((segments([[1, 1, 0]], CAT), segments([[1, 1, 1]], CAT)))
    assert found["pq/cat"] == pytest.approx(2 / 3)
    found = measured((segments([[1, 0]], CAT), segments([[1, 1]], CAT)))
    assert found["pq/cat"] == 0.0


def test_void_is_left_out_of_the_union_and_excuses_what_it_covers() -> None:
    truth = segments([[1, 1, 1, 0, 0, 0, 0, 0]], CAT)
    matched = segments([[1, 1, 1, 1, 1, 0, 0, 0]], CAT)
    assert measured((matched, truth))["pq/cat"] == 1.0
    mostly_void = segments([[1, 1, 1, 0, 0, 0, 0, 0]], CAT), segments([[1, 0, 0, 2, 2, 2, 2, 2]], DOG, SKY)
    prediction, truth = mostly_void
    found = measured((prediction, truth))
    assert math.isnan(found["pq/cat"])  # two of its three pixels
    assert (found["pq/dog"], found["pq/sky"], found["pq"]) == (0.0, 0.0, 0.0)
    half_void = segments([[1, 1, 0, 0]], CAT), segments([[1, 0, 2, 2]], DOG, SKY)
    assert measured(half_void)["pq/cat"] == 0.0


def test_crowd_is_no_target_and_excuses_its_class_alone() -> None:
    truth = segments([[1, 1, 1, 1, 2, 2]], CAT, SKY, crowds=[1])
    cats = segments([[1, 1, 2, 2, 3, 3]], CAT, CAT, SKY)
    found = measured((cats, truth))
    assert math.isnan(found["pq/cat"])
    assert found["pq"] == 1.0
    dog = segments([[1, 1, 1, 1, 2, 2]], DOG, SKY)
    found = measured((dog, truth))
    assert (found["pq/dog"], found["pq"]) == (0.0, 0.5)
    assert math.isnan(found["pq/cat"])
    # half crowd, a quarter void: together more than half
    both = segments([[1, 1, 1, 1]], CAT), segments([[1, 1, 0, 2]], CAT, DOG, crowds=[1])
    assert math.isnan(measured(both)["pq/cat"])


def test_stuff_in_two_pieces_is_one_segment() -> None:
    truth = segments([[1, 2, 1]], SKY, CAT)
    assert measured((segments([[1, 2, 1]], SKY, CAT), truth))["pq_stuff"] == 1.0
    two = segments([[1, 2, 3]], SKY, CAT, SKY)  # as two segments neither covers more than half
    assert measured((two, truth))["pq_stuff"] == 0.0


def test_images_without_segments() -> None:
    nothing = segments([[0, 0], [0, 0]])
    cat = segments([[1, 1], [0, 0]], CAT)
    assert all(math.isnan(value) for value in measured((nothing, nothing)).values())
    assert math.isnan(measured((cat, nothing))["pq/cat"])  # void covers it
    assert measured((nothing, cat))["pq/cat"] == 0.0
    assert measured((nothing, cat), (cat, cat))["pq/cat"] == pytest.approx(1 / 1.5)
    assert measured().keys() == measured((cat, cat)).keys()


def test_segments_without_a_pixel_are_none() -> None:
    cat = segments([[1, 1]], CAT, DOG)
    found = measured((cat, cat))
    assert found["pq/cat"] == 1.0
    assert math.isnan(found["pq/dog"])


def test_pixels_of_no_segment_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="the prediction has pixels of no segment"):
        measured((segments([[2]], CAT), segments([[1]], CAT)))
    with pytest.raises(ValueError, match=r"the prediction is \(1, 2\), the truth \(1, 1\)"):
        measured((segments([[1, 1]], CAT), segments([[1]], CAT)))


def test_absent_classes_are_those_that_the_means_leave_out() -> None:
    metric = PanopticQuality(CLASSES)
    record = metric.count(segments([[1, 2]], CAT, DOG), segments([[1, 1]], CAT))
    assert metric.absent([record]) == ["sky"]
    assert metric.score(record) == 0.0
    assert math.isnan(metric.score(b""))


# ---- boundaries


def test_boundary_pq_takes_the_smaller_iou() -> None:
    truth = np.zeros((60, 80), np.uint16)
    truth[10:50, 10:50] = 1
    predicted = np.zeros_like(truth)
    predicted[10:50, 10:46] = 1
    sky = np.where(truth, 1, 2), np.where(predicted, 1, 2)
    found = measured((segments(sky[1], CAT, SKY), segments(sky[0], CAT, SKY)))
    # the width is 2: frames of 40 x 40 and 40 x 36, in common their left side and most of the upper and lower one
    frames = (40 * 40 - 36 * 36, 40 * 36 - 36 * 32)
    common = 40 * 2 + 2 * 2 * 34
    assert found["pq/cat"] == pytest.approx(36 / 40)
    assert found["boundary_pq/cat"] == pytest.approx(common / (sum(frames) - common))
    assert found["boundary_pq_things"] == found["boundary_pq/cat"]


def test_boundary_pq_never_beats_pq() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        truth = random_map(rng, 3, 9, num_crowds=1)
        numbers = np.roll(truth.numbers, 1, axis=0)
        found = measured((segments(numbers, *truth.class_ids.tolist()), truth))
        for name in CLASSES.names:
            assert math.isnan(found[f"pq/{name}"]) or found[f"boundary_pq/{name}"] <= found[f"pq/{name}"]


# ---- merging


def test_merged_in_any_order_is_the_same_to_the_bit() -> None:
    rng = np.random.default_rng(2)
    whole = Metrics("panoptic", CLASSES, more=("boundary_pq",))
    parts = []
    for i in range(4):
        truth = random_map(rng, 3, 12, num_crowds=1)
        numbers = np.where(rng.random(truth.numbers.shape) < 0.1, 0, truth.numbers)
        part = Metrics("panoptic", CLASSES, more=("boundary_pq",))
        for metric in (whole, part):
            metric.update(str(i), segments(numbers, *truth.class_ids.tolist()), truth)
        parts.append(part.state())
    assert 0 < whole.compute()["pq"] < 1
    for order in itertools.permutations(range(4)):
        merged = Metrics("panoptic", CLASSES, more=("boundary_pq",))
        for i in (*order, order[0]):  # what is seen twice counts once
            merged.merge(parts[i])
        assert bits(merged.compute()) == bits(whole.compute())
        assert merged.scores() == whole.scores()
