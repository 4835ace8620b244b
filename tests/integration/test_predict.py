"""Predictions over data sets: every task in every format, taken up again, on S3, by tiles, on a real Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from raysseg import bundle as bundles
from raysseg import cli, config, labelling, masks, storage
from raysseg.catalogue import HEADLINES
from raysseg.config import AnySource, EvaluateJob, Inference, PredictJob
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.decode import decode_image
from raysseg.evaluate import evaluate
from raysseg.masks import LabelMap
from raysseg.predict import PredictResult, predict
from raysseg.predictor import Predictor
from raysseg.schema import InputError, Sample, Task
from tests.tiny_bundles import MODELS, source, write_bundle

Raw = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def bundle_uris(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, str]:
    folder = tmp_path_factory.mktemp("bundles")
    for task in MODELS:
        write_bundle(task, example, str(folder / task))
    return {task: str(folder / task) for task in MODELS}


def job_of(bundle: str, data: Raw, to: str, out: str, **more: Any) -> Raw:
    return {
        "kind": "predict",
        "name": "label-the-rest",
        "bundle": bundle,
        "data": data,
        "output": {"format": to, "uri": out, "rows_per_file": 8},
        "scaling": {"workers": 0},
        **more,
    }


def run(*arguments: Any, **more: Any) -> PredictResult:
    return predict(config.parse_as(PredictJob, job_of(*arguments, **more)))


def scored(task: Task, data: Raw, example: Path, **side: Any) -> dict[str, float]:
    classes = str(example / "classes.json") if task == "semantic" else None
    raw = {"kind": "evaluate", "name": "check", "task": task, "data": data, "scaling": {"workers": 0}, **side}
    return evaluate(config.parse_as(EvaluateJob, {**raw, "classes": classes})).metrics


def written_in(to: str, out: str) -> dict[str, Raw]:
    """What our readers take for stored predictions."""
    coco = {"format": "coco", "annotations": f"{out}/annotations.json"}
    return {
        "masks": {"masks": {"format": "masks", "masks": f"{out}/masks"}},
        "coco": {"data set": coco, "results": {**coco, "annotations": f"{out}/results.json"}},
        "coco_panoptic": {"panoptic": {**coco, "format": "coco_panoptic", "masks": f"{out}/panoptic"}},
        "shards": {"shards": {"format": "shards", "uri": out}},
    }[to]


def read_all(raw: Raw) -> list[Sample]:
    samples = read_samples(read_index(TypeAdapter[AnySource](AnySource).validate_python(raw)))
    assert all(isinstance(sample, Sample) for sample in samples)
    return [sample for sample in samples if isinstance(sample, Sample)]


@pytest.fixture(scope="module")
def truths(bundle_uris: dict[Task, str], example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Raw]:
    """Labels that a model that knows nothing is not all wrong by: what it predicts at another threshold."""
    found = {"semantic": source("semantic", str(example))}
    for task, to in (("instance", "coco"), ("panoptic", "coco_panoptic")):
        data, out = source(task, str(example)), str(tmp_path_factory.mktemp("truth"))
        run(bundle_uris[task], data, to, out, inference={"mask_threshold": 0.4})
        (labels, *_) = written_in(to, out).values()
        found[task] = {**labels, "images": data["images"]}
    return found


CASES: list[tuple[Task, str]] = [
    ("semantic", "masks"),
    ("semantic", "coco"),
    ("semantic", "shards"),
    ("instance", "coco"),
    ("instance", "shards"),
    ("panoptic", "coco_panoptic"),
    ("panoptic", "shards"),
]


@pytest.mark.parametrize(("task", "to"), CASES)
def test_what_is_written_scores_as_the_bundle_does(
    task: Task, to: str, bundle_uris: dict[Task, str], truths: dict[Task, Raw], example: Path, tmp_path: Path
) -> None:
    data, out = truths[task], str(tmp_path / "out")
    result = run(bundle_uris[task], data, to, out, metrics=True)
    assert (result.num_samples, result.skipped) == (21, 0)
    expected = scored(task, data, example, bundle=bundle_uris[task])
    assert result.metrics == pytest.approx(expected, nan_ok=True, abs=0)
    assert 0 < expected[HEADLINES[task]] < 1
    for name, predictions in written_in(to, out).items():
        if name != "results" or task == "instance":  # results name images by ids, which masks lack
            found = scored(task, data, example, predictions=predictions)
            if name == "results":  # which hold no boxes of the model's own: with them, areas would be the boxes'
                found |= {name: value for name, value in expected.items() if name.startswith("box_")}
            assert found == pytest.approx(expected, nan_ok=True, abs=0)
    assert not (tmp_path / "out/parts").exists()


def test_panoptic_as_masks(bundle_uris: dict[Task, str], example: Path, tmp_path: Path) -> None:
    data = source("panoptic", str(example))
    for to in ("masks", "coco_panoptic"):
        run(bundle_uris["panoptic"], data, to, str(tmp_path / to), inference={"overlap_threshold": 0.0})
    classes = bundles.read(bundle_uris["panoptic"]).classes
    ((labels,), (segments,)) = (written_in(to, str(tmp_path / to)).values() for to in ("masks", "coco_panoptic"))
    shown: set[int] = set()
    for one, other in zip(read_all(labels), read_all(segments), strict=True):
        dense = [masks.to_dense(sample, classes).labels for sample in (one, other)]
        assert np.array_equal(*dense)
        shown |= set(dense[0].flat)
    assert len(shown) > 2


def test_predictions_are_the_predictors_and_train_again(
    bundle_uris: dict[Task, str], example: Path, tmp_path: Path
) -> None:
    data = {"format": "masks", "images": str(example / "val/images")}  # no labels
    run(bundle_uris["semantic"], data, "masks", str(tmp_path / "masks"), inference={"flip": True})
    run(bundle_uris["semantic"], data, "shards", str(tmp_path / "shards"), inference={"flip": True})
    predictor = Predictor(bundle_uris["semantic"], inference=Inference(flip=True))
    classes = read_class_map(str(tmp_path / "masks/classes.json"))
    assert classes.ids == predictor.bundle.classes.ids
    again = [
        {"format": "masks", "images": data["images"], "masks": str(tmp_path / "masks/masks")},
        {"format": "shards", "uri": str(tmp_path / "shards")},
    ]
    for raw in again:
        for sample in read_all(raw):
            assert sample.image is not None
            (expected,) = predictor.predict([decode_image(sample.image)])
            assert isinstance(expected, LabelMap)
            assert np.array_equal(masks.to_dense(sample, classes).labels, expected.labels)


def test_coco_keeps_the_data_sets_ids_and_names(bundle_uris: dict[Task, str], example: Path, tmp_path: Path) -> None:
    data = source("instance", str(example))
    content = json.loads(Path(data["annotations"]).read_text())
    for image in content["images"]:
        image["id"] += 1000
    content["annotations"] = []
    (tmp_path / "images.json").write_text(json.dumps(content))
    listed = {**data, "annotations": str(tmp_path / "images.json")}
    run(bundle_uris["instance"], listed, "coco", str(tmp_path / "out"))
    written = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [(i["id"], i["file_name"]) for i in written["images"]] == [
        (i["id"], i["file_name"]) for i in content["images"]
    ]
    assert {c["id"] for c in written["categories"]} == {c["id"] for c in content["categories"]}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results) == len(written["annotations"]) > 20
    assert results[0].keys() == {"image_id", "category_id", "segmentation", "score"}
    assert written["annotations"][0].keys() >= {"id", "area", "bbox", "iscrowd", *results[0]}
    assert {r["image_id"] for r in results} <= {i["id"] for i in content["images"]}


def test_a_second_run_does_what_is_missing(
    bundle_uris: dict[Task, str], example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(example / "val/images", images)
    last = sorted(images.iterdir())[20]
    whole = last.read_bytes()
    last.write_bytes(whole[:200])
    data, out = {"format": "masks", "images": str(images)}, str(tmp_path / "out")
    with pytest.raises(InputError, match=rf"^{last.stem}: the image can't be decoded"):
        run(bundle_uris["semantic"], data, "coco", out)
    assert not (tmp_path / "out/annotations.json").exists()
    last.write_bytes(whole)
    done: list[int] = []
    load = labelling._load
    monkeypatch.setattr(labelling, "_load", lambda plan, piece: done.extend(piece[1]) or load(plan, piece))
    result = run(bundle_uris["semantic"], data, "coco", out)
    assert result.num_samples == 21
    assert done == list(range(16, 21)) or done == list(range(8, 21))  # as far as it had come
    done.clear()
    assert run(bundle_uris["semantic"], data, "coco", out) == result
    assert not done
    run(bundle_uris["semantic"], data, "coco", str(tmp_path / "whole"))
    for name in ("annotations.json", "results.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_of_something_else_is_refused(bundle_uris: dict[Task, str], example: Path, tmp_path: Path) -> None:
    data, out = source("semantic", str(example)), str(tmp_path / "out")
    run(bundle_uris["semantic"], data, "masks", out)
    write_bundle("semantic", example, str(tmp_path / "other"), seed=1)
    with pytest.raises(
        InputError, match=r"out holds predictions of the job 'label-the-rest' with another bundle \(its"
    ):
        run(str(tmp_path / "other"), data, "masks", out)
    with pytest.raises(InputError, match="with another data and another inference and another metrics"):
        run(bundle_uris["semantic"], data, "masks", out, inference={"flip": True}, metrics=True)
    shutil.copytree(bundle_uris["semantic"], tmp_path / "moved")
    assert run(str(tmp_path / "moved"), data, "masks", out).num_samples == 21
    with pytest.raises(InputError, match="holds files that are no predictions of ours"):
        run(bundle_uris["semantic"], data, "masks", str(example / "val"))


def test_bad_images_are_skipped_and_listed(
    bundle_uris: dict[Task, str], example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(example / "val/images", images)
    bad = sorted(images.iterdir())[8]  # the first one of the second part
    bad.write_bytes(b"none")
    job = job_of(bundle_uris["instance"], {"format": "masks", "images": str(images)}, "coco", str(tmp_path / "out"))
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert cli.main(["predict", str(tmp_path / "job.yaml")]) == 2
    assert f"raysseg: {bad.stem}: the image can't be decoded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("out/parts/*/*")] == [labelling.part_name(0)]  # is not lost
    assert cli.main(["predict", str(tmp_path / "job.yaml"), "data.on_error=skip", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["num_samples"], result["skipped"]) == ("predict", 20, 1)
    (entry,) = json.loads((tmp_path / "out/skipped.json").read_text())["data"]
    assert entry["sample_id"] == bad.stem
    names = [image["file_name"] for image in json.loads((tmp_path / "out/annotations.json").read_text())["images"]]
    assert names == sorted(path.name for path in images.iterdir() if path != bad)


def test_output_that_does_not_suit_the_bundle(bundle_uris: dict[Task, str], example: Path, tmp_path: Path) -> None:
    for task, to, allowed in (
        ("instance", "masks", "coco, shards"),
        ("semantic", "coco_panoptic", "masks, coco, shards"),
    ):
        with pytest.raises(InputError, match=rf"output.format: received '{to}'; allowed .*'{task}': {allowed}$"):
            run(bundle_uris[task], source("semantic", str(example)), to, str(tmp_path))
    with pytest.raises(
        InputError, match="metrics: boundary_ap is none of semantic segmentation; allowed: boundary_iou"
    ):
        run(bundle_uris["semantic"], source("semantic", str(example)), "masks", str(tmp_path), metrics=["boundary_ap"])


def test_s3_in_and_out(
    bundle_uris: dict[Task, str], example: Path, tmp_path: Path, new_bucket: Callable[[], str]
) -> None:
    bucket = new_bucket()
    for path in [*(example / "val/images").iterdir(), *Path(bundle_uris["panoptic"]).iterdir()]:
        folder = "images" if path.suffix == ".jpg" else "bundle"
        storage.write_bytes(f"{bucket}/{folder}/{path.name}", path.read_bytes())
    data = {"format": "masks", "images": f"{bucket}/images"}
    result = run(f"{bucket}/bundle", data, "coco_panoptic", f"{bucket}/out")
    assert result.num_samples == 21
    run(bundle_uris["panoptic"], {**data, "images": str(example / "val/images")}, "coco_panoptic", str(tmp_path))
    local = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    there = {entry.path for entry in storage.list_files(f"{bucket}/out")}
    assert there == local.keys()
    assert all(storage.read_bytes(f"{bucket}/out/{name}") == local[name] for name in there - {"predict.json"})


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_do_what_this_process_does(bundle_uris: dict[Task, str], example: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(example / "val/images", images)
    rng = np.random.default_rng(0)
    for number in range(2):  # of several blocks, which both workers share
        small = rng.integers(0, 256, (30, 35, 3), dtype=np.uint8)
        large = np.kron(small, np.ones((20, 20, 1), np.uint8))
        masks.Image.fromarray(large).save(images / f"large-{number}.{('png', 'jpg')[number]}", quality=95)
    data = {"format": "masks", "images": str(images)}
    for workers in (0, 2):
        run(
            bundle_uris["semantic"],
            data,
            "masks",
            str(tmp_path / f"{workers}"),
            inference={"tile": [64, 64]},
            scaling={"workers": workers, "cpus_per_worker": 0.5},
        )
    names = {path.name for path in (tmp_path / "0/masks").iterdir()}
    assert {"large-0.png", "large-1.png"} < names
    assert len(names) == 23
    for name in names:
        assert (tmp_path / "0/masks" / name).read_bytes() == (tmp_path / "2/masks" / name).read_bytes()
    predictor = Predictor(bundle_uris["semantic"], inference=Inference(tile=(64, 64)))
    classes = predictor.bundle.classes
    for path in images.glob("large-*"):
        (expected,) = predictor.predict([decode_image(path.read_bytes())])
        assert isinstance(expected, LabelMap)
        found = masks.decode_id_map((tmp_path / f"2/masks/{path.stem}.png").read_bytes())
        assert np.array_equal(masks.to_indices(found, classes), expected.labels)
