"""AP and AR of instances: equal to the official tools, from files, from masks, and through `raysseg evaluate`."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raysseg import rle
from raysseg.config import CocoSource
from raysseg.data import read_class_map, read_index, read_predictions, read_samples
from raysseg.data.index import Failure, SampleIndex
from raysseg.masks import MaskSet, to_instances
from raysseg.metrics import Metrics
from raysseg.metrics.boundary import boundary_width, inner_boundary
from raysseg.metrics.instance import BoundaryAp, BoxAp, MaskAp
from raysseg.schema import ClassMap, InputError

DATA = Path(os.environ.get("RAYSSEG_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
MEASURES = {"segm": MaskAp, "bbox": BoxAp, "boundary": BoundaryAp}
PREFIXES = {"segm": "mask", "bbox": "box", "boundary": "boundary"}
SUMMARY = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "AR1": "ar1",
    "AR10": "ar10",
    "AR100": "ar100",
    "ARs": "ar_small",
    "ARm": "ar_medium",
    "ARl": "ar_large",
}
REFERENCES = {
    "coco_val2014_100": ("instances_val2014_100.json", "instances_val2014_fakesegm100_results.json"),
    "coco_instances_val": ("gt.json", "pred.json"),
    "nuclei_val": ("gt.json", "pred.json"),
    "coco_boundary_small": ("gt_dataset.json", "dt_rle_results.json"),
}
BOXES = "instances_val2014_fakebbox100_results.json"


def coco(path: Path) -> CocoSource:
    return CocoSource(format="coco", annotations=str(path))


def views(index: SampleIndex, classes: ClassMap) -> dict[str, MaskSet]:
    found = read_samples(index, with_images=False)
    assert not [sample for sample in found if isinstance(sample, Failure)]
    return {s.sample_id: to_instances(s, classes) for s in found if not isinstance(s, Failure)}


def measured(truth: Path, predictions: Path, kind: str) -> tuple[dict[str, float], ClassMap]:
    """All numbers of two COCO files, without `raysseg evaluate`."""
    classes = read_class_map(None, coco(truth))
    index = read_index(coco(truth))
    sides = views(read_predictions(coco(predictions), index, classes), classes), views(index, classes)
    measure = MEASURES[kind](classes)
    return measure.compute([measure.count(*(side[i] for side in sides)) for i in index.ranking]), classes


def known(value: float | None) -> float:
    """COCO's -1 and null as NaN."""
    return math.nan if value is None or value == -1 else value


def folder_of(name: str) -> Path:
    folder = DATA / "reference" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand; RAYSSEG_DATA names the folder that holds reference/")
    return folder


@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize("name", REFERENCES)
def test_numbers_are_the_official_tools(name: str, kind: str) -> None:
    folder = folder_of(name)
    expected = json.loads((folder / "expected.json").read_text())
    if kind not in expected:
        pytest.skip(f"{name} has no expected numbers of {kind}")
    truth, predictions = REFERENCES[name]
    if kind == "bbox" and (folder / BOXES).exists():
        predictions = BOXES
    found, classes = measured(folder / truth, folder / predictions, kind)
    names = dict(zip(map(str, classes.ids), classes.names, strict=True))
    wanted = {ours: known(expected[kind]["summary"][theirs]) for theirs, ours in SUMMARY.items()}
    for category, values in expected[kind]["per_category"].items():
        wanted |= {f"{k.lower()}/{names[category]}": known(values[k]) for k in ("AP", "AP50")}
    wanted = {f"{PREFIXES[kind]}_{key}": value for key, value in wanted.items()}
    assert found == pytest.approx(wanted, abs=1e-9, rel=0, nan_ok=True)


# ---- random cases against pycocotools


def official(truth: Path, predictions: Path, kind: str) -> list[float]:
    """The twelve numbers of pycocotools, NaN for -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        tool = COCOeval(gt, gt.loadRes(str(predictions)), kind)
        tool.evaluate()
        tool.accumulate()
        tool.summarize()
    return [known(value) for value in tool.stats]


SIZE = (60, 80)


def blob(rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """An ellipse, in one of ten an empty mask; all sizes in sight of COCO's ranges are too large for this image."""
    mask = np.zeros(SIZE, np.uint8)
    if rng.random() > 0.1:
        x, y, a, b = rng.integers([0, 0, 1, 1], [SIZE[1], SIZE[0], 30, 30]).tolist()
        cv2.ellipse(mask, (x, y), (a, b), int(rng.integers(180)), 0, 360, 1, -1)
    return mask.view(np.bool_)


def entry(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {"size": list(SIZE), "counts": rle.from_mask(mask).decode()}


def draw_case(folder: Path, seed: int, *, more: int = 0) -> tuple[Path, Path]:
    """Files of truth and results: crowds, own areas and boxes, ties within and between images, images without either.

    The order of the images' ids is neither that of the file nor that of the names.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(12) + 1
    images = [
        {"id": int(i), "file_name": f"{rng.integers(10**6)}_{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in ids
    ]
    annotations, results = [], []
    for image in images:
        masks = [blob(rng) for _ in range(int(rng.integers(0, 8)))]
        for mask in masks if image["id"] % 5 else []:
            area = float(mask.sum()) if rng.random() < 0.5 else float(rng.choice([1024.0, 9216.0, 800.5, 12000.0]))
            x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([7, 3, 90])),
                    "segmentation": entry(mask),
                    "area": area,
                    "bbox": [x + 0.25, y, width, height + 0.5],
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
        near = [np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in masks for _ in range(int(rng.integers(3)))]
        others = [blob(rng) for _ in range(more if image["id"] == 1 else int(rng.integers(3)))]
        for mask in [*near, *others] if image["id"] % 7 else []:
            found = {
                "image_id": image["id"],
                "category_id": int(rng.choice([7, 3, 55, 3])),
                "segmentation": entry(mask),
            }
            results.append(found | {"score": round(float(rng.random()), 1)})
    categories = [{"id": i, "name": f"c{i}"} for i in (90, 3, 55, 7)]
    paths = folder / f"truth{seed}.json", folder / f"results{seed}.json"
    paths[0].write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    paths[1].write_text(json.dumps(results))
    return paths


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_are_pycocotools(seed: int, tmp_path: Path) -> None:
    truth, results = draw_case(tmp_path, seed, more=130 if seed % 3 == 0 else 0)
    for kind in ("segm", "bbox"):
        found, _ = measured(truth, results, kind)
        ours = [found[f"{PREFIXES[kind]}_{name}"] for name in SUMMARY.values()]
        assert ours == pytest.approx(official(truth, results, kind), abs=1e-12, rel=0, nan_ok=True)


def test_results_of_boxes_alone_are_pycocotools(tmp_path: Path) -> None:
    truth, results = draw_case(tmp_path, 1)
    entries = json.loads(results.read_text())
    for place, found in enumerate(entries):
        del found["segmentation"]
        found["bbox"] = [5.5 + place % 9, 3.25, 20.0 + place, 30.75]
    results.write_text(json.dumps(entries))
    for kind in ("segm", "bbox"):
        found, _ = measured(truth, results, kind)
        ours = [found[f"{PREFIXES[kind]}_{name}"] for name in SUMMARY.values()]
        assert ours == pytest.approx(official(truth, results, kind), abs=1e-12, rel=0, nan_ok=True)


def test_ties_between_images_go_by_image_id(tmp_path: Path) -> None:
    differ = False
    for seed in range(4):
        truth, results = draw_case(tmp_path, seed)
        classes, index = read_class_map(None, coco(truth)), read_index(coco(truth))
        sides = views(read_predictions(coco(results), index, classes), classes), views(index, classes)
        measure = MaskAp(classes)
        records = {i: measure.count(*(side[i] for side in sides)) for i in index.sample_ids}
        values = [measure.compute([records[i] for i in order])["mask_ap"] for order in (index.ranking, sorted(records))]
        assert values[0] == pytest.approx(official(truth, results, "segm")[0], abs=1e-12)
        differ |= values[0] != values[1]
    assert differ, "no case tells the orders apart"


# ---- boundaries


def boundary_of_authors(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """From the paper's description: what d erosions by a 3 x 3 square take away, with background around the image."""
    inside = np.pad(mask, 1)
    for _ in range(boundary_width((mask.shape[0], mask.shape[1]))):
        padded = np.pad(inside, 1)
        views = [padded[y : y + inside.shape[0], x : x + inside.shape[1]] for y in range(3) for x in range(3)]
        inside = np.logical_and.reduce(views)
        inside[[0, -1]] = inside[:, [0, -1]] = False
    return mask & ~inside[1:-1, 1:-1]


@pytest.mark.parametrize("size", [(60, 80), (300, 200), (1, 1), (3, 250)])
def test_boundary_is_that_of_repeated_erosion(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.7, 0.999, 1.0):
        mask = rng.random(size) < share
        mask[: size[0] // 2, : size[1] // 2] = True  # touches the image's edge
        assert np.array_equal(inner_boundary(mask, boundary_width(size)), boundary_of_authors(mask))


def test_crop_is_the_mask_in_its_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = blob(rng)
        if mask.any():
            crop, (left, top) = rle.to_crop(rle.to_runs(rle.from_mask(mask), SIZE), SIZE)
            x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
            # a run from foot to head of the next column makes the box as high as the image
            assert (left, crop.shape[0]) == (x, width)
            assert (top, crop.shape[1]) in ((y, height), (0, SIZE[0]))
            assert np.array_equal(crop.T, mask[top : top + crop.shape[1], left : left + crop.shape[0]])


# ---- by hand, and merging

CLASSES = read_class_map(["a", "b"])


def instances(*boxes: tuple[int, int, int, int, int], scores: Sequence[float] | None = None) -> MaskSet:
    """Rectangles of (class, top, left, bottom, right)."""
    masks = np.zeros((len(boxes), *SIZE), np.bool_)
    for mask, (_, top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return MaskSet(
        SIZE,
        tuple(rle.from_masks(masks)),
        np.array([box[0] for box in boxes], np.int64),
        np.zeros(len(boxes), np.bool_),
        None if scores is None else np.array(scores, np.float64),
    )


def test_numbers_by_hand() -> None:
    metrics = Metrics("instance", CLASSES, ("boundary_ap",))
    truth = instances((0, 0, 0, 10, 10), (0, 20, 20, 30, 30))
    # the first is found whole; of the second 7 of 10 columns are, IoU 0.7 or 5 of 10 thresholds
    score = metrics.update("x", instances((0, 0, 0, 10, 10), (0, 20, 20, 30, 27), scores=[0.9, 0.8]), truth)
    found = metrics.compute()
    # 51 of the 101 recalls are at most a half, which one detection reaches
    assert found["mask_ap"] == score == pytest.approx((5 * 1 + 5 * 51 / 101) / 10)
    assert found["mask_ap/a"] == found["mask_ap"]
    assert found["mask_ap50"] == found["mask_ap50/a"] == found["box_ap50"] == pytest.approx(1)
    assert found["mask_ap75"] == pytest.approx(51 / 101)
    assert found["mask_ar1"] == 0.5
    assert found["mask_ar100"] == found["mask_ar_small"] == pytest.approx(0.75)
    assert math.isnan(found["mask_ap_large"])
    assert math.isnan(found["mask_ap/b"])
    assert metrics.absent() == ["b"]
    assert {name.split("_")[0] for name in found} == {"mask", "box", "boundary"}
    assert found.keys() == Metrics("instance", CLASSES, ("boundary_ap",)).compute().keys()


def test_image_without_truth_has_no_score_but_counts() -> None:
    metrics = Metrics("instance", CLASSES)
    metrics.update("a", instances((0, 0, 0, 10, 10), scores=[0.5]), instances((0, 0, 0, 10, 10)))
    assert metrics.compute()["mask_ap"] == pytest.approx(1)
    assert math.isnan(metrics.update("b", instances((0, 0, 0, 9, 9), scores=[0.7]), instances()))
    assert metrics.compute()["mask_ap"] == pytest.approx(0.5)
    assert math.isnan(metrics.update("c", instances(scores=[]), instances()))
    assert metrics.compute()["mask_ap"] == pytest.approx(0.5)
    assert metrics.update("d", instances(scores=[]), instances((0, 0, 0, 9, 9))) == 0


def test_record_is_as_small_as_it_says() -> None:
    record = MaskAp(CLASSES).count(
        instances(*[(0, 0, 0, 9, 9)] * 120, (1, 0, 0, 9, 9), scores=[0.5] * 121), instances((0, 0, 0, 9, 9))
    )
    assert len(record) == 26 * 101 + 18 + 4


def test_merged_in_any_order_is_counted_in_one(tmp_path: Path) -> None:
    truth, results = draw_case(tmp_path, 5)
    classes, index = read_class_map(None, coco(truth)), read_index(coco(truth))
    sides = views(read_predictions(coco(results), index, classes), classes), views(index, classes)
    whole = Metrics("instance", classes)
    parts = [Metrics("instance", classes) for _ in range(3)]
    for number, i in enumerate(index.sample_ids):
        for metrics in (whole, parts[number % 3], parts[0]):  # some are seen twice
            metrics.update(i, *(side[i] for side in sides))
    for order in itertools.permutations(parts):
        merged = Metrics("instance", classes)
        for part in order:
            merged.merge(part.state())
        for ranking in (None, index.ranking):
            assert list(map(float.hex, merged.compute(ranking).values())) == list(
                map(float.hex, whole.compute(ranking).values())
            )


# ---- raysseg evaluate


def evaluated(
    folder: Path, capsys: pytest.CaptureFixture[str], truth: Path, predictions: Path, **keys: Any
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `raysseg evaluate` on two COCO files."""
    from raysseg import cli

    job = {
        "kind": "evaluate",
        "name": "check",
        "task": "instance",
        "data": {"format": "coco", "annotations": str(truth)},
        "predictions": {"format": "coco", "annotations": str(predictions)},
        "batch": {"per_worker": 5},
        "scaling": {"workers": 0},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | keys))
    code = cli.main(["evaluate", str(path), "--json"])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("predictions", "name", "published"), [(None, "mask_ap", 0.320), (BOXES, "box_ap", 0.505)])
def test_evaluate_tells_cocos_published_numbers(
    predictions: str | None, name: str, published: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("coco_val2014_100")
    files = REFERENCES["coco_val2014_100"]
    more = {"metrics": ["boundary_ap"]} if predictions is None else {}
    code, out, err = evaluated(tmp_path, capsys, folder / files[0], folder / (predictions or files[1]), **more)
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert round(metrics[name], 3) == published
    if more:
        expected = json.loads((folder / "expected.json").read_text())
        assert metrics["boundary_ap"] == pytest.approx(expected["boundary"]["summary"]["AP"], abs=1e-9)


def test_evaluate_of_results_and_of_a_data_set_with_scores_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, results = draw_case(tmp_path, 2)
    content, found = json.loads(truth.read_text()), json.loads(results.read_text())
    assert {image["id"] for image in content["images"]} > {result["image_id"] for result in found}
    code, out, err = evaluated(tmp_path, capsys, truth, results, storage=str(tmp_path / "runs"))
    assert code == 0, err
    first = json.loads(out)
    assert (first["num_samples"], first["skipped"], first["absent"]) == (12, 0, ["c55"])
    assert first["metrics"]["mask_ap"] == pytest.approx(official(truth, results, "segm")[0], abs=1e-12)
    assert "<html" in Path(first["report"]).read_text()
    scored = tmp_path / "scored.json"
    scored.write_text(json.dumps(content | {"annotations": found}))
    code, out, err = evaluated(tmp_path, capsys, truth, scored)
    assert code == 0, err
    assert json.loads(out)["metrics"] == first["metrics"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 99}, "result 1 has image_id 99, which is none of the ground truth's `images`"),
        ({"category_id": 99}, "result 1 has category_id 99, which is none of the ground truth's"),
        ({"segmentation": None}, "result 1 has neither a segmentation nor a bbox"),
        ({"bbox": [1, 2, 3]}, "result 1 has a bbox of 3 numbers; allowed: x, y, width, height"),
        ({"score": None}, r"not the COCO file that it should be: .*`\$\[0\]\.score`"),
    ],
)
def test_bad_result_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    truth, results = draw_case(tmp_path, 1)
    entries = json.loads(results.read_text())
    entries[0] |= change
    entries[0] = {key: value for key, value in entries[0].items() if value is not None or key == "score"}
    results.write_text(json.dumps(entries))
    index, classes = read_index(coco(truth)), read_class_map(None, coco(truth))
    with pytest.raises(InputError, match=words):
        read_predictions(coco(results), index, classes)


def test_data_set_without_scores_is_no_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, _ = draw_case(tmp_path, 1)
    code, out, err = evaluated(tmp_path, capsys, truth, truth)
    assert (code, out) == (2, "")
    assert "predictions: " in err
    assert "its annotations lack a `score`" in err
