"""What goes along with a submitted job, and what its log comes to; no Ray."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from raysseg import config, storage
from raysseg.schema import InputError
from raysseg.submit import Log, Submission, pack, to_entrypoint

JOB_FILES = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
SPLIT = {"format": "masks", "images": "${DATA}/images", "masks": "${DATA}/masks"}
TRAIN = {
    "kind": "train",
    "name": "sent",
    "task": "semantic",
    "classes": ["road", "sky"],
    "data": {"train": SPLIT, "val": SPLIT, "crop": [32, 32]},
    "model": {"name": "segformer-tiny", "weights": None},
    "scaling": {"workers": 2},
    "storage": "${RUNS:-runs}",
}


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a train job, and beside it one with a tune job that names it; DATA and RUNS are set."""
    monkeypatch.setenv("DATA", "s3://bucket/data")
    monkeypatch.setenv("RUNS", "s3://bucket/runs")
    (tmp_path / "search").mkdir()
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (tmp_path / "secrets.env").write_text("not to be sent")
    tune = {
        "kind": "tune",
        "name": "search",
        "train": "../train.yaml",
        "search": {"space": {"optimizer.lr": {"log_uniform": [1e-5, 1e-2]}}, "trials": 2},
    }
    (tmp_path / "search/tune.yaml").write_text(yaml.safe_dump(tune))
    return tmp_path


def test_a_jobs_files_go_along_where_they_find_each_other(jobs: Path) -> None:
    with pack(Submission(str(jobs / "search/tune.yaml"))) as packed:
        files = sorted(str(path.relative_to(packed.folder)) for path in packed.folder.rglob("*") if path.is_file())
        assert files == ["search/tune.yaml", "train.yaml"]
        assert (packed.entry, packed.job.kind) == ("search/tune.yaml", "tune")


def test_a_job_in_a_bucket_stays_there(jobs: Path, s3_bucket: str) -> None:
    storage.write_text(f"{s3_bucket}/train.yaml", (jobs / "train.yaml").read_text())
    with pack(Submission(f"{s3_bucket}/train.yaml")) as packed:
        assert packed.entry == f"{s3_bucket}/train.yaml"
        assert not list(packed.folder.iterdir())
        assert packed.variables["DATA"] == "s3://bucket/data"


def test_variables_go_along_by_what_the_files_and_the_user_name(jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    monkeypatch.setenv("WANDB_API_KEY", "123456")
    with pack(Submission(str(jobs / "train.yaml"), variables=["HF_HOME"], secrets=["WANDB_API_KEY"])) as packed:
        assert packed.variables["DATA"] == "s3://bucket/data"
        assert packed.variables["HF_HOME"] == "/shared/hub"
        assert "123456" not in json.dumps(packed.variables)
    with (
        pytest.raises(InputError, match="--env MISSING: not set here; set it, or take --secret"),
        pack(Submission(str(jobs / "train.yaml"), variables=["MISSING"])),
    ):
        pass
    with (
        pytest.raises(InputError, match="allowed: the name of an environment variable"),
        pack(Submission(str(jobs / "train.yaml"), secrets=["KEY=1"])),
    ):
        pass


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("storage=runs", "storage: runs is a path of this machine; the cluster reads s3://"),
        ("data.val.images=val/images", "data.val.images: val/images is a path of this machine"),
        ("scaling.workers=0", "scaling.workers: received 0, which runs the job within its driver; give 1 or more"),
        ("optimizer.lr=fast", "optimizer.lr: received"),
    ],
)
def test_what_a_cluster_cannot_run_is_refused_before_it_is_sent(jobs: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message), pack(Submission(str(jobs / "train.yaml"), [override])):
        pass


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_every_job_file_can_be_sent_where_its_variables_name_buckets(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in config.files(str(path)):
        for name in config.variables(Path(file).read_text()):
            monkeypatch.setenv(name, f"s3://bucket/{name.lower()}/")
    override = "search.concurrent=1" if config.load(path).kind == "tune" else "scaling.workers=1"
    with pack(Submission(str(path), [] if config.load(path).kind == "serve" else [override])) as packed:
        assert packed.job.name in path.read_text()


def test_a_search_is_looked_at_with_what_it_trains(jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "data")
    with (
        pytest.raises(InputError, match=r"train\.data\.train\.images: data/images is a path of this machine"),
        pack(Submission(str(jobs / "search/tune.yaml"))),
    ):
        pass


def test_shared_paths_are_the_clusters_affair(jobs: Path, tmp_path: Path) -> None:
    with pack(Submission(str(jobs / "train.yaml"), [f"storage={tmp_path}"])) as packed:
        assert packed.job.kind == "train"


def test_the_entry_points_line_is_the_shells(tmp_path: Path) -> None:
    line = to_entrypoint("train", "a job.yaml", ["model={name: unet-tiny}"], ["KEY"])
    (tmp_path / "python").write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$@"; exit 7')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(line, shell=True, env={**environment, "KEY": "1"}, capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stdout == " -m raysseg.cli train a job.yaml model={name: unet-tiny} --json\n"
    assert shlex.quote("model={name: unet-tiny}") in line

    without = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
    assert without.returncode == 2
    assert "KEY: is a secret of the cluster, and not set where the driver runs" in without.stderr
    assert not without.stdout


RESULT = json.dumps({"metrics": {"val/miou": 0.5}, "run": "s3://bucket/runs/sent"}, indent=2)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_log_is_handed_on_once_and_its_result_kept_back(size: int) -> None:
    text = f"one\n{{\n  a brace that is no result\n}}\ntwo\n{RESULT}\nRay says goodbye\n"
    shown: list[str] = []
    log = Log(shown.append)
    for whole in (text[: len(text) // 2], text):  # the connection breaks in the middle, and the log comes anew
        log.rewind()
        for begin in range(0, len(whole), size):
            log.take(whole[begin : begin + size])
    assert log.result() == json.loads(RESULT)
    assert sorted("".join(shown).splitlines()) == sorted(
        ["one", "{", "  a brace that is no result", "}", "two", "Ray says goodbye"]
    )


def test_a_log_without_a_result_is_shown_whole() -> None:
    shown: list[str] = []
    log = Log(shown.append)
    log.take("one\n{\n  cut off")
    assert log.result() is None
    assert "".join(shown) == "one\n{\n  cut off\n"
