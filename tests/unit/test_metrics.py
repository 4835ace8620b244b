from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from PIL import Image

from raysseg import masks
from raysseg.data import read_class_map
from raysseg.masks import LabelMap
from raysseg.metrics import Metrics
from raysseg.metrics.semantic import Counts, class_scores, count_confusion, mean_iou
from raysseg.schema import ClassMap

DATA = Path(os.environ.get("RAYSSEG_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
SETS = {"camvid_val": "camvid", "crackforest_test": "crackforest"}


def reference(name: str) -> tuple[dict[str, Any], ClassMap, list[Path], list[Path]]:
    """What sklearn found, the class list, the truth and the predictions; skips where the data are not at hand."""
    folder = DATA / "reference" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand; RAYSSEG_DATA names the folder that holds reference/")
    expected = json.loads((folder / "expected.json").read_text())
    truth = [DATA / expected["ground_truth"] / file for file in expected["files"]]
    predictions = [folder / "pred" / file for file in expected["files"]]
    return expected, read_class_map(str(DATA / SETS[name] / "classes.json")), truth, predictions


def labels_of(path: Path, classes: ClassMap) -> LabelMap:
    return LabelMap(masks.to_indices(masks.decode_id_map(path.read_bytes(), classes), classes), classes.ignore)


def check(metrics: dict[str, float], expected: dict[str, Any], classes: ClassMap) -> None:
    """The numbers are the reference's."""
    totals = {
        "miou": expected["mean_iou"],
        "mean_dice": float(np.mean(expected["dice_per_class"])),
        "pixel_accuracy": expected["pixel_accuracy"],
        "frequency_weighted_iou": expected["freq_weighted_iou"],
    }
    per_class = {
        f"{kind}/{class_name}": value
        for kind in ("iou", "dice")
        for class_name, value in zip(classes.names, expected[f"{kind}_per_class"], strict=True)
    }
    assert metrics == pytest.approx(totals | per_class, abs=1e-9, rel=0)


@pytest.mark.parametrize("name", SETS)
def test_numbers_are_the_reference_tools(name: str) -> None:
    expected, classes, truth, predictions = reference(name)
    metric = Metrics("semantic", classes)
    for target, prediction in zip(truth, predictions, strict=True):
        metric.update(target.stem, labels_of(prediction, classes), labels_of(target, classes))
    assert confusion_of(metric)[:, :-1].tolist() == expected["confusion_matrix_rows_gt_cols_pred"]
    assert confusion_of(metric)[:, -1].sum() == 0
    assert metric.absent() == []
    check(metric.compute(), expected, classes)


# ---- counting


def label_map(*rows: tuple[int, ...]) -> LabelMap:
    return LabelMap(np.array(rows, np.uint8), 255)


def random_pair(num_classes: int, seed: int, size: tuple[int, int] = (31, 17)) -> tuple[LabelMap, LabelMap]:
    """Prediction and truth; a tenth of either is ignored."""
    rng = np.random.default_rng(seed)
    dtype: type[np.uint8] | type[np.uint16] = np.uint8 if num_classes < 255 else np.uint16
    ignore = int(np.iinfo(dtype).max)
    both = rng.integers(0, num_classes, (2, *size)).astype(dtype)
    both[rng.random(both.shape) < 0.1] = ignore
    return LabelMap(both[0], ignore), LabelMap(both[1], ignore)


def counted_one_by_one(
    prediction: npt.NDArray[np.integer], truth: npt.NDArray[np.integer], num_classes: int
) -> npt.NDArray[np.int64]:
    counts = np.zeros((num_classes, num_classes + 1), np.int64)
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t < num_classes:
            counts[t, min(p, num_classes)] += 1
    return counts


@pytest.mark.parametrize("num_classes", [1, 2, 3, 15, 16, 200, 254, 255, 256, 300])
def test_confusion_is_a_count_of_pixels(num_classes: int) -> None:
    prediction, truth = random_pair(num_classes, seed=num_classes, size=(67, 41))
    found = count_confusion(prediction.labels, truth.labels, num_classes)
    assert found.dtype == np.int64
    assert np.array_equal(found, counted_one_by_one(prediction.labels, truth.labels, num_classes))


def test_confusion_of_mixed_types() -> None:
    prediction, truth = random_pair(3, seed=0)
    wide = np.where(prediction.labels == 255, 65535, prediction.labels).astype(np.uint16)
    expected = count_confusion(prediction.labels, truth.labels, 3)
    assert np.array_equal(count_confusion(wide, truth.labels, 3), expected)
    assert np.array_equal(count_confusion(prediction.labels, truth.labels.astype(np.uint16), 3), expected)


def test_counting_leaves_its_input_alone() -> None:
    prediction, truth = random_pair(3, seed=0)
    before = prediction.labels.copy(), truth.labels.copy()
    count_confusion(prediction.labels, truth.labels, 3)
    assert np.array_equal(prediction.labels, before[0])
    assert np.array_equal(truth.labels, before[1])


def test_sizes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"the prediction is \(2, 3\), the truth \(3, 2\)"):
        count_confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


# ---- scores


def scored(prediction: LabelMap, truth: LabelMap, names: tuple[str, ...] = ("a", "b", "c")) -> Metrics:
    metric = Metrics("semantic", read_class_map(names))
    metric.update("x", prediction, truth)
    return metric


def confusion_of(metric: Metrics) -> Counts:
    found = metric.confusion()
    assert found is not None
    return found


def test_numbers_by_hand() -> None:
    metric = scored(label_map((0, 0, 1, 1), (1, 0, 1, 0)), label_map((0, 0, 0, 1), (1, 1, 255, 255)), ("a", "b"))
    # a: hits 2, truth 3, predicted 3; b: hits 2, truth 3, predicted 3
    assert confusion_of(metric).tolist() == [[2, 1, 0], [1, 2, 0]]
    assert metric.compute() == pytest.approx(
        {
            "miou": 0.5,
            "mean_dice": 2 / 3,
            "pixel_accuracy": 4 / 6,
            "frequency_weighted_iou": 0.5,
            "iou/a": 0.5,
            "iou/b": 0.5,
            "dice/a": 2 / 3,
            "dice/b": 2 / 3,
        }
    )


def test_class_without_truth_is_left_out_of_the_means_and_named() -> None:
    metric = scored(label_map((0, 0, 1, 2)), label_map((0, 0, 1, 1)))
    assert metric.absent() == ["c"]
    numbers = metric.compute()
    assert math.isnan(numbers["iou/c"])
    assert math.isnan(numbers["dice/c"])
    assert (numbers["iou/a"], numbers["iou/b"]) == (1.0, 0.5)
    assert numbers["miou"] == 0.75
    assert numbers["mean_dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert numbers["frequency_weighted_iou"] == 0.75


def test_prediction_of_no_class_is_a_miss() -> None:
    metric = scored(label_map((0, 255, 1, 255)), label_map((0, 0, 1, 255)), ("a", "b"))
    assert confusion_of(metric).tolist() == [[1, 0, 1], [0, 1, 0]]
    numbers = metric.compute()
    assert (numbers["iou/a"], numbers["iou/b"], numbers["miou"]) == (0.5, 1.0, 0.75)
    assert numbers["pixel_accuracy"] == pytest.approx(2 / 3)
    assert numbers["dice/a"] == pytest.approx(2 / 3)


def test_truth_without_labels_has_no_numbers() -> None:
    metric = scored(label_map((0, 1)), label_map((255, 255)))
    assert metric.absent() == ["a", "b", "c"]
    assert math.isnan(metric.compute()["miou"])
    assert math.isnan(mean_iou(confusion_of(metric)))
    assert metric.compute()["pixel_accuracy"] == 0


def test_update_returns_the_samples_own_score() -> None:
    metric = Metrics("semantic", read_class_map(["a", "b", "c"]))
    scores = [metric.update(str(seed), *random_pair(3, seed)) for seed in range(3)]
    parts = [count_confusion(*(part.labels for part in random_pair(3, seed)), 3) for seed in range(3)]
    assert np.array_equal(confusion_of(metric), np.sum(parts, axis=0))
    assert scores == pytest.approx([np.nanmean(class_scores(part)[0]) for part in parts])
    assert metric.scores() == dict(zip("012", scores, strict=True))


@pytest.mark.parametrize("num_classes", [3, 200, 300])
def test_merged_in_any_order_is_counted_in_one(num_classes: int) -> None:
    classes = read_class_map([str(i) for i in range(num_classes)])
    whole = Metrics("semantic", classes)
    parts = []
    for seed in range(4):
        pair = random_pair(num_classes, seed)
        whole.update(str(seed), *pair)
        part = Metrics("semantic", classes)
        part.update(str(seed), *pair)
        parts.append(part.state())
    for order in itertools.permutations(range(4), 4):
        merged = Metrics("semantic", classes)
        for i in (*order, order[0]):  # what is seen twice counts once
            merged.merge(parts[i])
        assert np.array_equal(confusion_of(merged), confusion_of(whole))
        assert merged.compute() == pytest.approx(whole.compute(), abs=0, rel=0, nan_ok=True)
        assert merged.absent() == whole.absent()


# ---- raysseg evaluate


def evaluated(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **keys: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `raysseg evaluate` on folder/truth and folder/pred."""
    from raysseg import cli

    job = {
        "kind": "evaluate",
        "name": "check",
        "task": "semantic",
        "classes": ["a", "b"],
        "data": {"format": "masks", "masks": str(folder / "truth")},
        "predictions": {"format": "masks", "masks": str(folder / "pred")},
        "batch": {"per_worker": 3},
        "scaling": {"workers": 0},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | keys))
    code = cli.main(["evaluate", str(path), *overrides, "--json"])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Five masks and their predictions, all right but for one pixel."""
    for kind in ("truth", "pred"):
        (tmp_path / kind).mkdir()
        for i in range(5):
            ids = np.array([[0, 1, 1], [0, 0, 255]], np.uint8)
            ids[0, 0] = int(kind == "pred" and i == 3)
            Image.fromarray(ids).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def test_evaluate_tells_the_reference_tools_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, classes, truth, predictions = reference("camvid_val")
    for kind, paths in (("truth", truth), ("pred", predictions)):
        (tmp_path / kind).mkdir()
        for path in paths:
            (tmp_path / kind / path.name).symlink_to(path)
    code, out, _ = evaluated(tmp_path, capsys, classes=str(DATA / "camvid" / "classes.json"))
    assert code == 0
    result = json.loads(out)
    assert (result["kind"], result["name"], result["num_samples"], result["skipped"]) == ("evaluate", "check", 20, 0)
    assert (result["absent"], result["bundle"], result["report"]) == ([], None, None)
    check(result["metrics"], expected, classes)


def test_evaluate_writes_its_report_where_there_is_a_storage(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = evaluated(small, capsys, f"storage={small}/runs")
    assert code == 0
    result = json.loads(out)
    assert result["run"] == f"{small}/runs/check"
    assert result["report"] == f"{small}/runs/check/report.html"
    assert "<html" in Path(result["report"]).read_text()
    written = json.loads((small / "runs" / "check" / "metrics.json").read_text())
    assert written["metrics"] == result["metrics"]
    assert result["metrics"]["pixel_accuracy"] == pytest.approx(24 / 25)


def test_absent_class_is_null_in_json(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = evaluated(small, capsys, classes=["a", "b", "c"])
    assert code == 0
    assert "NaN" not in out
    result = json.loads(out)
    assert result["absent"] == ["c"]
    assert result["metrics"]["iou/c"] is None
    assert result["metrics"]["iou/b"] == pytest.approx(10 / 11)


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit 2, nothing on stdout, and one message with these words."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    message = err[err.index("raysseg: ") :]
    assert [word for word in words if word not in message] == []


def test_missing_prediction_is_named_with_its_mend(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "pred" / "2.png").unlink()
    refused(
        evaluated(small, capsys), "predictions: 1 of 5 samples", "'2'", "predict them too, or set data.on_error=skip"
    )
    code, out, _ = evaluated(small, capsys, "data.on_error=skip", f"storage={small}/runs")
    assert code == 0
    result = json.loads(out)
    assert (result["num_samples"], result["skipped"]) == (4, 1)
    assert result["metrics"]["pixel_accuracy"] == pytest.approx(19 / 20)
    (failure,) = json.loads((small / "runs" / "check" / "skipped.json").read_text())["data"]
    assert failure["sample_id"] == "2"


def test_surplus_prediction_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "pred" / "9.png").write_bytes((small / "pred" / "2.png").read_bytes())
    refused(evaluated(small, capsys), "predictions: 1 of 6 have no ground truth", "'9'", "remove them")


def test_prediction_of_another_size_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(small / "pred" / "1.png")
    refused(evaluated(small, capsys), "predictions: 1: the prediction is 6x4, the truth 3x2", "scale it to the truth's")
    code, out, _ = evaluated(small, capsys, "data.on_error=skip")
    assert (code, json.loads(out)["skipped"]) == (0, 1)


def test_prediction_that_can_not_be_read_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(small / "pred" / "1.png")
    refused(evaluated(small, capsys), "predictions: 1: the mask holds ids that the class list lacks: 7")
    (small / "pred" / "1.png").write_bytes(b"")
    refused(evaluated(small, capsys), "predictions: 1: the mask can't be decoded")


def test_bad_truth_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "truth" / "1.png").write_bytes(b"<html>")
    refused(evaluated(small, capsys), "1: the mask can't be decoded")


def test_mistake_in_the_job_is_told_before_anything_runs(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(evaluated(small, capsys, "bach.per_worker=1"), "bach: there is no such key", "did you mean `batch`?")
    refused(evaluated(small, capsys, kind="shard", output={"uri": "/x"}), "job.yaml")
    refused(
        evaluated(small, capsys, metrics=["boundary_ap"]), "metrics: boundary_ap is none of", "boundary_iou, surface"
    )
