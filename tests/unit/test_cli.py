"""Bad input as a user meets it: exit code 2, and one message that says what, where and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.s3_server import s3_server as running_s3_server
from raysseg import cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of six images, two classes, and a train job for it."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
                tmp_path / split / f"images/{i}.jpg"
            )
            Image.fromarray(rng.integers(0, 2, (40, 48), dtype=np.uint8)).save(tmp_path / split / f"masks/{i}.png")
    splits = {
        s: {"format": "masks", **{k: str(tmp_path / s / k) for k in ("images", "masks")}} for s in ("train", "val")
    }
    job = {
        "kind": "train",
        "name": "bad",
        "task": "semantic",
        "classes": ["background", "crack"],
        "data": {**splits, "crop": [32, 32]},
        "model": {"name": "segformer-tiny", "weights": None},
        "schedule": {"epochs": 1},
        "batch": {"global_size": 4, "per_worker": 4},
        "scaling": {"workers": 0},
        "storage": str(tmp_path / "runs"),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    """Runs the job, which must end with exit code 2 and leave stdout alone; returns the message."""
    status = cli.main(["train", str(folder / "job.yaml"), *overrides])
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    return err[err.index("raysseg: ") :]


def test_mask_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train/masks/3.png").unlink()
    message = refused(capsys, folder)
    assert "3.jpg has no mask" in message
    assert "on_error: skip" in message


def test_image_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "val/images/3.jpg").unlink()
    assert "3.png has no image" in refused(capsys, folder)


def test_sizes_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(folder / "train/masks/0.png")
    message = refused(capsys, folder)
    assert "the image is 48x40, its mask 24x20" in message
    assert "resize the mask" in message


def test_binary_masks_of_0_and_255_are_ignored_foreground(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "train/masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * 255).save(path)
    message = refused(capsys, folder)
    assert "no mask holds the class 'crack'" in message
    assert '"id": 255' in message  # the mend


def test_binary_masks_of_0_and_255_with_another_ignore_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = {"classes": [{"id": 0, "name": "background"}, {"id": 1, "name": "crack"}], "ignore_index": 7}
    (folder / "classes.json").write_text(json.dumps(classes))
    Image.fromarray(np.eye(40, 48, dtype=np.uint8) * 255).save(folder / "train/masks/0.png")
    message = refused(capsys, folder, f"classes={folder}/classes.json")
    assert "ids that the class list lacks: 255; allowed: 0 to 1, ignored: 7" in message
    assert "stored as 0 and 255" in message


def test_class_id_out_of_range(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(folder / "train/masks/5.png")
    message = refused(capsys, folder)
    assert "data.train: 5: the mask holds ids that the class list lacks: 9; allowed: 0 to 1" in message


def test_truncated_jpeg(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "train/images/2.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    message = refused(capsys, folder)
    assert "data.train: 2: the image can't be decoded" in message
    assert "truncated" in message


def test_skipping_lists_what_it_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "train/images/2.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    (folder / "train/masks/3.png").unlink()
    assert cli.main(["train", str(folder / "job.yaml"), "data.on_error=skip", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    skipped = json.loads(Path(result["run"], "skipped.json").read_text())
    assert {entry["sample_id"] for entry in skipped["train"]} == {"2", "3"}
    assert "truncated" in next(entry["reason"] for entry in skipped["train"] if entry["sample_id"] == "2")


def test_empty_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "nothing").mkdir()
    assert "the folder holds no file ending in" in refused(capsys, folder, f"data.train.masks={folder}/nothing")


def test_unknown_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, "optimizer.learning_rate=1")
    assert "optimizer.learning_rate: there is no such key" in message
    assert "allowed: name, lr" in message


def test_wrong_type(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, "schedule.epochs=many")
    assert "schedule.epochs" in message
    assert '"many"' in message


def test_class_weights_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, "loss.class_weights=[1, 2, 3]")
    assert "received 3 weights for 2 classes" in message


def test_class_list_that_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, "classes=[crack]")
    assert "ids that the class list lacks: 1; allowed: 0 to 0" in message


def test_weights_that_are_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, f"model.weights={folder}/nowhere")
    assert "model.weights" in message
    assert "nowhere" in message


def test_run_with_other_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(folder / "job.yaml")]) == 0
    capsys.readouterr()
    message = refused(capsys, folder, "optimizer.lr=0.5")
    assert "optimizer.lr was 0.0006, now 0.5" in message


def test_bucket_that_does_not_exist(folder: Path, s3_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, "storage=s3://no-such-bucket/runs")
    assert "s3://no-such-bucket" in message
    assert "Create it" in message


def test_wrong_credentials(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with running_s3_server({"INITIAL_NO_AUTH_ACTION_COUNT": "0"}) as endpoint:  # this one checks signatures
        for name, value in (("AWS_ACCESS_KEY_ID", "wrong"), ("AWS_SECRET_ACCESS_KEY", "wrong")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        message = refused(capsys, folder, "data.train.images=s3://bucket/images")
    assert "AWS_ACCESS_KEY_ID" in message


def test_endpoint_that_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    message = refused(capsys, folder, "data.train.images=s3://bucket/images")
    assert "127.0.0.1:1" in message
    assert "AWS_ENDPOINT_URL_S3" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_storage_that_fills_up(folder: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, folder, f"storage={small_disk}")
    assert str(small_disk) in message
    assert "Free some space" in message
    assert not list(small_disk.rglob("checkpoint.json"))  # half a checkpoint is none


def test_kind_of_another_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(folder / "job.yaml")]) == 2
    assert "run it as `raysseg train" in capsys.readouterr().err


def test_help_and_schema_load_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'transformers'} & set(sys.modules)"
    script = f"import sys, raysseg.cli as cli; cli.main(['schema']); assert not {heavy}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["title"] == "raysseg job"
