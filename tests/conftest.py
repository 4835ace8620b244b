from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import boto3
import pytest

from jobs.s3_server import s3_server as running_s3_server
from raysseg import config, runtime, storage
from raysseg.data import read_class_map, read_index
from raysseg.data.example import draw_example
from raysseg.worker import Plan


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server, which the environment of the whole session points to; yields its endpoint."""
    with running_s3_server() as endpoint, pytest.MonkeyPatch.context() as environment:
        for name in (*storage.S3_ENVIRONMENT, "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        environment.setenv("AWS_REGION", "us-east-1")
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield endpoint


@pytest.fixture(scope="session")
def new_bucket(s3_server: str) -> Callable[[], str]:
    """Makes an empty bucket: s3://name."""

    def make() -> str:
        name = f"test-{uuid4().hex[:12]}"
        boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=name)
        return f"s3://{name}"

    return make


@pytest.fixture
def s3_bucket(new_bucket: Callable[[], str]) -> str:
    """A new, empty bucket: s3://name."""
    return new_bucket()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[None]:
    """One local Ray for the session, which knows the S3 server; starting it takes long."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    runtime.connect()
    yield
    ray.shutdown()


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """pytest's own, which hears the package's log although the command line keeps that to itself."""
    monkeypatch.setattr(logging.getLogger("raysseg"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small example data set: 22 training scenes, 21 for validation."""
    folder = tmp_path_factory.mktemp("example")
    draw_example(folder, num_train=22, num_val=21, size=(96, 128))
    return folder


def example_job(data: str, runs: str, *overrides: str) -> config.TrainJob:
    """A short train job on an example data set."""
    base = [
        f"classes={data}/classes.json",
        *(f"data.{split}.{kind}={data}/{split}/{kind}" for split in ("train", "val") for kind in ("images", "masks")),
        f"storage={runs}",
        "data.crop=[64, 64]",
        "schedule.epochs=2",
        "batch={global_size: 8, per_worker: 2}",
    ]
    job = config.load("jobs/example-segformer-semantic.yaml", [*base, *overrides])
    assert isinstance(job, config.TrainJob)
    return job


def plan_of(job: config.TrainJob) -> Plan:
    """What a worker of this job is told."""
    assert isinstance(job.classes, str)
    return Plan(job, read_class_map(job.classes), read_index(job.data.train), read_index(job.data.val), None, {})


def rows(run: str) -> list[dict[str, float]]:
    """The lines of its metrics.jsonl."""
    return [json.loads(line) for line in storage.read_text(f"{run}/metrics.jsonl").splitlines()]


def shown_in_chromium(page: str, folder: Path) -> str:
    """The elements of a page as a browser makes them of its HTML; the browser has nothing to complain of."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    (folder / "page.html").write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    flags += " --disable-sync --no-first-run --enable-logging=stderr --dump-dom"
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={folder}/profile", f"file://{folder}/page.html"],
        capture_output=True,
        text=True,
        timeout=300,  # its first start reads hundreds of megabytes
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    return done.stdout
