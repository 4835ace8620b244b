"""Jobs sent to a Ray of its own, as to a cluster: by the address of its dashboard alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from benchmarks.commands import free_port
from benchmarks.nodes import LOOPBACK, TOKEN, Cluster, running
from raysseg import storage
from tests.conftest import rows


@pytest.fixture(scope="module")
def head(s3_server: str) -> Iterator[str]:
    """A head node that wants a token, with the S3 server's address and keys in its environment; its dashboard's URL."""
    with (
        TemporaryDirectory(prefix="rs-") as folder,  # short: the paths of sockets have a limit
        running(Cluster(LOOPBACK, Path(folder), os.environ), num_cpus=2) as cluster,
    ):
        yield cluster.url


def submitted(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`raysseg submit ARGUMENTS`, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "raysseg.cli", "submit", *arguments],
        env={**os.environ, "RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"], **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def job(example: Path, new_bucket: Callable[[], str], tmp_path: Path) -> tuple[Path, str]:
    """A train job whose data stand in a bucket that it knows by ${DATA}; and the bucket."""
    bucket = new_bucket()
    for path in (path for path in example.rglob("*") if path.is_file()):
        storage.write_bytes(f"{bucket}/{path.relative_to(example)}", path.read_bytes())
    splits = {
        split: {"format": "masks", "images": f"${{DATA}}/{split}/images", "masks": f"${{DATA}}/{split}/masks"}
        for split in ("train", "val")
    }
    keys = {
        "kind": "train",
        "name": "sent",
        "task": "semantic",
        "classes": "${DATA}/classes.json",
        "data": {**splits, "crop": [32, 32]},
        "model": {"name": "segformer-tiny", "weights": None},
        "schedule": {"epochs": 2},
        "batch": {"global_size": 8, "per_worker": 8},
        "scaling": {"workers": 1},
        "storage": "${RUNS}",
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "job.yaml", bucket


def test_a_job_is_sent_followed_and_ends_with_its_own_result(head: str, job: tuple[Path, str]) -> None:
    path, bucket = job
    where = {"DATA": bucket, "RUNS": f"{bucket}/runs"}
    done = submitted(str(path), "schedule.epochs=1", "--address", head, "--json", **where)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bundle"] == f"{bucket}/runs/sent/bundle"
    assert 0 <= result["metrics"]["val/miou"] <= 1
    assert "epoch 1" in done.stderr
    assert '"metrics"' not in done.stderr  # the log, less the result
    assert len(rows(f"{bucket}/runs/sent")) == 1

    listed = json.loads(submitted("--list", "--address", head, "--json").stdout)["jobs"]
    (row,) = (row for row in listed if row["id"] == result["id"])
    assert (row["job"], row["status"]) == ("train sent", "SUCCEEDED")


def test_a_stopped_job_goes_on_when_it_is_sent_again_by_rays_own_command(head: str, job: tuple[Path, str]) -> None:
    path, bucket = job
    where = {"DATA": bucket, "RUNS": f"{bucket}/runs"}
    sent = submitted(str(path), "schedule.epochs=20", "--address", head, "--no-wait", "--json", **where)
    job_id = json.loads(sent.stdout)["id"]
    deadline = time.monotonic() + 200
    while not storage.exists(f"{bucket}/runs/sent/metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(1)
    stopped = submitted("--stop", job_id, "--address", head, "--json")
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(stopped.stdout)["status"].startswith(f"{job_id} was stopped")
    epochs = len(rows(f"{bucket}/runs/sent"))
    assert 1 <= epochs < 20

    variables = json.dumps({"env_vars": where})
    rays = ["job", "submit", "--address", head, "--working-dir", str(path.parent), "--runtime-env-json", variables]
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *rays, "--", "raysseg", "train", path.name, "schedule.epochs=20"],
        env={**os.environ, **TOKEN},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["epoch"] for row in rows(f"{bucket}/runs/sent")] == list(range(20))
    assert storage.exists(f"{bucket}/runs/sent/bundle/bundle.json")


def test_a_jobs_failure_is_the_commands(head: str, job: tuple[Path, str]) -> None:
    path, bucket = job
    gone = submitted(str(path), "--address", head, DATA=f"{bucket}/nowhere", RUNS=f"{bucket}/runs")
    assert gone.returncode == 2
    assert f"{bucket}/nowhere/classes.json" in gone.stderr

    secret = submitted(str(path), "--secret", "WANDB_API_KEY", "--address", head, DATA=bucket, RUNS=bucket)
    assert secret.returncode == 2
    assert "WANDB_API_KEY: is a secret of the cluster, and not set where the driver runs" in secret.stderr


def test_what_is_not_there_and_who_is_not_let_in(head: str) -> None:
    nobody = submitted("--stop", "nobody-123", "--address", head)
    assert nobody.returncode == 2
    assert "nobody-123: the cluster knows no such job; `raysseg submit --list` names them" in nobody.stderr

    stranger = submitted("--list", "--address", head, RAY_AUTH_TOKEN="another-one-of-32-characters-or-more")
    assert stranger.returncode == 2
    assert "the cluster wants its token" in stranger.stderr

    nowhere = submitted("--list", "--address", f"http://127.0.0.1:{free_port()}")
    assert nowhere.returncode == 2
    assert "--address: no Ray dashboard answers at http://127.0.0.1:" in nowhere.stderr
