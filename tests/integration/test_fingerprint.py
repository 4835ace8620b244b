"""`raysseg inspect` over a real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysseg import cli, config
from raysseg.config import InspectJob
from raysseg.fingerprint import inspect
from raysseg.train import train


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("source_format", ["masks", "coco"])
def test_fingerprint_is_the_same_for_any_number_of_workers(example: Path, tmp_path: Path, source_format: str) -> None:
    is_coco = source_format == "coco"
    data = {
        split: {"format": source_format, "images": f"{example}/{split}/images"}
        | ({"annotations": f"{example}/{split}/instances.json"} if is_coco else {"masks": f"{example}/{split}/masks"})
        for split in ("train", "val")
    }
    raw = {"kind": "inspect", "name": "example", "data": data, "task": "instance" if is_coco else "semantic"}
    raw |= {} if is_coco else {"classes": f"{example}/classes.json"}
    files = []
    for workers in (0, 1, 2):
        storage = tmp_path / str(workers)
        inspect(InspectJob.model_validate({**raw, "storage": str(storage), "scaling": {"workers": workers}}))
        files.append((storage / "example/fingerprint.json").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("source_format", "task", "tiny"),
    [("masks", "semantic", "segformer-tiny"), ("coco", "instance", "maskrcnn-tiny")],
)
def test_a_recommended_job_trains(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source_format: str, task: str, tiny: str
) -> None:
    file, job = tmp_path / "inspect.yaml", tmp_path / "train.yaml"
    data = {
        split: {"format": source_format, "images": f"{example}/{split}/images"}
        | (
            {"annotations": f"{example}/{split}/instances.json"}
            if task == "instance"
            else {"masks": f"{example}/{split}/masks"}
        )
        for split in ("train", "val")
    }
    raw = {"kind": "inspect", "name": "example", "data": data, "task": task, "storage": str(tmp_path)}
    raw |= {} if task == "instance" else {"classes": f"{example}/classes.json"}
    file.write_text(json.dumps({**raw, "scaling": {"workers": 0}}))
    assert cli.main(["recommend", str(file), "--write-job", str(job)]) == 0
    assert f"for {task}, few-images (22 images)" in capsys.readouterr().out
    overrides = [f"model.name={tiny}", "model.weights=null", "scaling.workers=0", "schedule.epochs=1"]
    loaded = config.load(job, [*overrides, f"storage={tmp_path}"])
    assert isinstance(loaded, config.TrainJob)
    assert loaded.data.crop == (96, 128)
    metrics = train(loaded).metrics
    assert loaded.checkpoint.metric in metrics
