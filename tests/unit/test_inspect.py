"""Faults planted into the example set, a few of each kind, and what `raysseg inspect` makes of them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.bench_inspect import COCO_FAULTS, MASK_FAULTS, Copy, Fault, flags_of, plant, score
from raysseg import cli, config
from raysseg.config import InspectJob
from raysseg.data.example import EXAMPLE_CLASSES, draw_example
from raysseg.findings.advice import START, advise, to_train_job, to_tree
from raysseg.findings.facts import SampleFacts, perceptual_hash, to_facts
from raysseg.findings.fingerprint import Fingerprint, read_fingerprint
from raysseg.findings.kinds import KINDS, Flag, to_findings
from raysseg.findings.reading import Task, iter_share, open_index
from raysseg.findings.rules import flag_duplicates, flag_leaks, flag_missing_classes
from raysseg.findings.shapes import REGION, measure_region, measure_shift
from raysseg.findings.store import FactStore
from raysseg.findings.summary import summarise, verdict
from raysseg.fingerprint import inspect
from raysseg.masks import encode_id_map
from raysseg.schema import ClassMap, Sample

HARD = {"merged_instances", "scattered_instance"}  # which few scenes have room for
CLASSES = ClassMap((0, 1), ("ground", "thing"), ((0, 0, 0), (255, 0, 0)), (False, True))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "example"
    draw_example(root, num_train=90, num_val=12, size=(128, 160))
    return root


def spoilt(example: Path, root: Path, faults: Mapping[str, Fault], *, is_coco: bool) -> Copy:
    shutil.copytree(example, root)
    splits = ("train", "val") if is_coco else ()
    annotations = {split: json.loads((root / split / "instances.json").read_text()) for split in splits}
    copy = Copy(root, json.loads((root / "classes.json").read_text()), annotations)
    assert plant(copy, faults, 3, np.random.default_rng(1)) == []
    return copy


@pytest.mark.parametrize("is_coco", [False, True], ids=["masks", "coco"])
def test_planted_faults_are_found(example: Path, tmp_path: Path, is_coco: bool) -> None:
    faults = {kind: fault for kind, fault in (COCO_FAULTS if is_coco else MASK_FAULTS).items() if kind not in HARD}
    copy = spoilt(example, tmp_path / "spoilt", faults, is_coco=is_coco)
    flags = flags_of(copy)
    for kind, planted in copy.planted.items():
        assert len(planted) == 3, kind
        row = score("example", kind, planted, flags.get(kind, set()), set())
        assert row["recall"] == 1.0, (kind, planted, flags.get(kind))
        assert row["precision"] >= 0.7, (kind, planted, flags.get(kind))


def test_clean_example_has_no_grave_finding(example: Path, tmp_path: Path) -> None:
    findings = run(example, tmp_path)["findings"]
    assert [f for f in findings if f["severity"] == "error"] == []


def test_shares_of_the_work_make_one_whole(example: Path) -> None:
    source = config.MasksSource(images=f"{example}/train/images", masks=f"{example}/train/masks")
    tasks = [Task({"data": open_index(source)}, EXAMPLE_CLASSES, number) for number in (1, 3)]
    whole, parts = (
        FactStore([block for share in reversed(range(task.num_shares)) for block in iter_share(task, share)])
        for task in tasks
    )
    summaries = [summarise("data", facts, EXAMPLE_CLASSES) for facts in (whole, parts)]
    assert summaries[0] == summaries[1]
    assert [sample.digest for sample in whole] == [sample.digest for sample in parts]


def test_page_and_train_job(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [str(example / "train/images"), str(example / "train/masks")]
    overrides = ["scaling.workers=0", f"storage={tmp_path / 'runs'}"]
    target = tmp_path / "train.yaml"
    assert cli.main(["inspect", *plain, *overrides, "--json", "--write-job", str(target)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "inspect"
    assert [c["name"] for c in result["splits"][0]["classes"]] == list(EXAMPLE_CLASSES.names)
    assert all({"kind", "severity", "sample_ids", "message", "mend"} <= set(f) for f in result["findings"])
    page = Path(result["report"]).read_text()
    assert "What to do" in page
    assert "://" not in page
    job = config.load(target)
    assert job.kind == "train"
    assert job.data.crop == (128, 160)
    assert target.read_text().count("#") >= 6


def test_fingerprint_is_read_as_it_was_written(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["scaling.workers=0", f"storage={tmp_path}"]
    job = config.plain_folder(str(example), overrides)
    assert isinstance(job, InspectJob)
    assert list(job.splits) == ["train", "val"]
    assert job.classes == str(example / "classes.json")
    assert cli.main(["inspect", str(example), *overrides, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = read_fingerprint(f"{shown['run']}/fingerprint.json")
    assert json.loads(json.dumps(asdict(found))) == json.loads(Path(shown["run"], "fingerprint.json").read_text())
    assert found.data["val"]["masks"] == str(example / "val/masks")
    assert found.listed == str(example / "classes.json")


def test_two_folders_without_a_class_list(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "x/y" / folder).mkdir(parents=True)
    ids = np.eye(64, 80, dtype=np.uint8) * 7
    for i in range(4):
        write_pair(tmp_path / "x/y", str(i), rng.integers(0, 255, (64, 80, 3), np.uint8), ids)
    folders = [str(tmp_path / "x/y" / name) for name in ("images", "masks")]
    job = config.plain_inspect(*folders, [f"storage={tmp_path}", "scaling.workers=0"])
    assert isinstance(job, InspectJob)
    result = inspect(job)
    assert [c["id"] for c in result.fingerprint.classes] == [0, 7]
    train = config.parse(yaml.safe_load(result.train_job))
    assert isinstance(train, config.TrainJob)
    assert str(train.classes).endswith("classes.json")


def test_rare_and_tiny_classes_are_drawn_more_often() -> None:
    speck = np.zeros((64, 64), np.uint8)
    speck[:4, :4] = 1
    facts = [facts_of(speck if row == 0 else np.zeros((64, 64), np.uint8), "train", row) for row in range(40)]
    split = summarise("train", facts, CLASSES)
    data = {"data": to_tree(config.MasksSource(images="/d/images", masks="/d/masks"))}
    found = Fingerprint("x", "semantic", [], 255, data, list(CLASSES.names), [split], [], advise(split, []))
    text = to_train_job(found, START, storage="/d/runs")
    train = config.parse(yaml.safe_load(text))
    assert isinstance(train, config.TrainJob)
    assert train.data.oversample == 0.1
    assert train.data.augment is not None
    assert train.data.augment.class_crop == 0.5
    assert "# In fewer than 10% of the images: thing (2.5%); the rarest come 2 times an epoch." in text


def test_classes_that_train_lacks() -> None:
    train = [facts_of(np.zeros((64, 64), np.uint8), "train", 0)]
    val = [facts_of(np.eye(64, dtype=np.uint8), "val", 0)]
    assert [flag.detail for flag in flag_missing_classes(train, val, CLASSES)] == ["holds thing"]


def test_leaks_are_found_among_others() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8, 8, 3)).astype(np.uint8).repeat(12, 0).repeat(12, 1) for _ in range(30)]
    train = [facts_of(np.zeros((96, 96), np.uint8), "train", i, image) for i, image in enumerate(images[:20])]
    brighter = (images[3] * 0.9 + 20).astype(np.uint8)
    val = [facts_of(np.zeros((96, 96), np.uint8), "val", i, image) for i, image in enumerate([*images[20:], brighter])]
    assert [flag.sample_id for flag in flag_leaks(train, val)] == ["10"]
    again = facts_of(np.zeros((96, 96), np.uint8), "train", 20, images[5])
    within = list(flag_duplicates([*train, replace(val[-1], sample_id="21"), again]))
    assert [(flag.kind, flag.sample_id) for flag in within] == [("duplicate_image", "20"), ("near_duplicate", "21")]


def test_hash_outlives_scaling() -> None:
    scene = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    small, large = scene.repeat(10, 0).repeat(10, 1), scene.repeat(13, 0).repeat(13, 1)
    first, second = (np.frombuffer(perceptual_hash(image), np.uint8) for image in (small, large))
    assert np.unpackbits(first ^ second).sum() < 16


def test_width_of_strokes() -> None:
    mask = np.zeros((80, 200), np.uint8)
    mask[30:38, 10:190] = 1
    assert measured(mask)["width"] == pytest.approx(8, abs=2)
    assert measured(mask)["box"].tolist() == [10, 30, 190, 38]


def test_two_discs_part_at_their_neck_and_one_does_not() -> None:
    mask = np.zeros((60, 100), np.uint8)
    cv2.circle(mask, (30, 30), 18, 1, -1)
    assert measured(mask)["lobes"] == 0
    cv2.circle(mask, (64, 30), 18, 1, -1)
    region = measured(mask)
    assert region["neck"] < 0.7
    assert region["lobes"] - region["solidity"] > 0.06


def test_pieces_behind_another_thing_are_not_scattered() -> None:
    mask = np.zeros((60, 100), np.uint8)
    mask[20:40, [*range(10), *range(40, 50), *range(80, 90)]] = 1
    assert measured(mask)["clusters"] == 3
    assert measured(mask, np.where(mask, 1, 2).astype(np.uint8))["clusters"] == 1


def test_shift_is_measured() -> None:
    ids = np.zeros((160, 200), np.uint8)
    ids[40:100, 60:140] = 1
    image = np.repeat((ids * 200)[..., None], 3, axis=2)
    moved = np.roll(ids, (6, -4), axis=(0, 1))
    down, across, gain = measure_shift(image, moved, 255)
    assert (down, across) == (-6, 4)
    assert gain > 2
    assert measure_shift(image, ids, 255)[:2] == (0, 0)


def test_every_kind_has_a_mend() -> None:
    flags = [Flag(kind, "train", "a", "so") for kind in KINDS]
    for finding in to_findings(flags, {"train": 2}):
        assert finding.message.startswith("1 of 2 samples of train ")
        assert finding.mend


@pytest.mark.parametrize(("number", "word"), [(100, "fewer"), (900, "enough"), (3000, "good"), (20000, "excellent")])
def test_verdict(number: int, word: str) -> None:
    assert word in verdict(number)


def run(example: Path, storage: Path, *overrides: str) -> dict[str, list[dict[str, object]]]:
    folders = {
        split: {"format": "masks", **{kind: f"{example}/{split}/{kind}" for kind in ("images", "masks")}}
        for split in ("train", "val")
    }
    raw = {"kind": "inspect", "name": "example", "classes": f"{example}/classes.json", "data": folders}
    job = config.compose({**raw, "storage": str(storage), "scaling": {"workers": 0}}, overrides)
    assert isinstance(job, InspectJob)
    inspect(job)
    found: dict[str, list[dict[str, object]]] = json.loads((storage / "example/fingerprint.json").read_text())
    return found


def measured(mask: np.ndarray, numbers: np.ndarray | None = None) -> np.void:
    found: np.void = np.array([measure_region(mask, 1, 1, False, mask if numbers is None else numbers)], REGION)[0]
    return found


def write_pair(folder: Path, stem: str, image: np.ndarray, ids: np.ndarray) -> None:
    Image.fromarray(image).save(folder / "images" / f"{stem}.png")
    (folder / "masks" / f"{stem}.png").write_bytes(encode_id_map(ids))


def facts_of(ids: np.ndarray, split: str, row: int, image: np.ndarray | None = None) -> SampleFacts:
    data = io.BytesIO()
    Image.fromarray(np.zeros((*ids.shape, 3), np.uint8) if image is None else image).save(data, "PNG")
    return to_facts(Sample(str(row), data.getvalue(), 0, 0, encode_id_map(ids)), split, row, CLASSES)
