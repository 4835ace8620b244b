"""Faults of object storage: what was asked is done, or it fails with a clear error; what is published stays whole."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from raysseg import bundle, checkpoint, storage
from raysseg.config import TrainJob
from raysseg.storage import StorageError
from raysseg.train import TrainResult, train
from tests.conftest import example_job
from tests.faults import KINDS, FaultyProxy, Kind, Plan, faulty_proxy

MIB = 1 << 20
LARGE = b"n" * (12 * MIB)  # an upload in parts
RATES = {"hang": 0.08, "short_answer": 0.3, "short_request": 0.5}  # the latter need a body to break


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Before the S3 server; the client waits less long than it does in earnest."""
    monkeypatch.setattr(storage, "_REQUEST_S", 1.0)
    monkeypatch.setattr(storage, "_PAUSES_S", (0.1, 0.3))
    with faulty_proxy(s3_server) as faulty:
        yield faulty


@pytest.fixture
def through(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan | None], None]:
    """Sends what follows through the proxy, by a plan, or to the healthy server."""

    def choose(plan: Plan | None) -> None:
        if plan is not None:
            proxy.follow(plan)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.upstream.geturl() if plan is None else proxy.endpoint)

    return choose


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    (local / "model.bin").write_bytes(os.urandom(7 * MIB))
    (local / "sub" / "config.json").write_text("{}")
    return local


def is_whole(uri: str, manifest_name: str, into: Path) -> bool:
    """Whether a folder is published, and then with every file verified; it raises if one differs."""
    if not storage.exists(storage.join(uri, manifest_name)):
        return False
    storage.fetch_folder(uri, manifest_name, into=into / uri.replace("/", "_"))
    return True


def fill(bucket: str, folder: Path) -> None:
    for name in ("old", "again", "gone"):
        storage.publish_folder(folder, f"{bucket}/{name}", "m.json", {"version": 1})
    storage.write_bytes(f"{bucket}/small", b"old")
    storage.write_bytes(f"{bucket}/large", LARGE)


def operations(bucket: str, folder: Path, into: Path) -> dict[str, tuple[Callable[[], object], object]]:
    """What storage does, and what comes of it."""
    return {
        "write": (lambda: storage.write_bytes(f"{bucket}/written", b"new"), None),
        "write in parts": (lambda: storage.write_bytes(f"{bucket}/written in parts", LARGE), None),
        "publish": (lambda: storage.publish_folder(folder, f"{bucket}/new", "m.json", {"version": 1}), None),
        "publish again": (lambda: storage.publish_folder(folder, f"{bucket}/again", "m.json", {"version": 2}), None),
        "read": (lambda: storage.read_bytes(f"{bucket}/small"), b"old"),
        "read at once": (lambda: storage.read_bytes(f"{bucket}/small", may_change=False), b"old"),
        "read 12 MiB": (lambda: storage.read_bytes(f"{bucket}/large") == LARGE, True),
        "manifest": (lambda: storage.read_manifest(f"{bucket}/old", "m.json")["version"], 1),
        "fetch": (
            lambda: (
                (storage.fetch_folder(f"{bucket}/old", "m.json", into=into) / "model.bin").read_bytes()
                == (folder / "model.bin").read_bytes()
            ),
            True,
        ),
        "list": (
            lambda: [entry.path for entry in storage.list_files(f"{bucket}/old")],
            ["m.json", "model.bin", "sub/config.json"],
        ),
        "exists": (
            lambda: [storage.exists(f"{bucket}/{name}") for name in ("small", "old", "no")],
            [True, True, False],
        ),
        "delete": (lambda: storage.delete_folder(f"{bucket}/gone", "m.json"), None),
    }


def outcomes(actions: dict[str, tuple[Callable[[], object], object]]) -> dict[str, object]:
    """What each comes to, an error too; all at once, since most of the time is spent waiting."""

    def attempt(action: Callable[[], object]) -> object:
        try:
            return action()
        except StorageError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as pool:
        return dict(zip(actions, pool.map(lambda entry: attempt(entry[0]), actions.values()), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_faults_pass(
    kind: Kind,
    proxy: FaultyProxy,
    through: Callable[[Plan | None], None],
    s3_bucket: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    """A request in six breaks; everything is done all the same."""
    fill(s3_bucket, folder)
    actions = operations(s3_bucket, folder, tmp_path / "fetched")
    start = time.monotonic()
    through(Plan((kind,), rate=RATES.get(kind, 0.17), seed=2))
    found = outcomes(actions)
    seconds = time.monotonic() - start
    assert proxy.injected[kind] >= 4
    through(None)
    assert found == {name: expected for name, (_, expected) in actions.items()}
    assert storage.read_bytes(f"{s3_bucket}/written") == b"new"
    assert storage.read_bytes(f"{s3_bucket}/written in parts") == LARGE
    assert storage.read_manifest(f"{s3_bucket}/again", "m.json")["version"] == 2
    assert all(is_whole(f"{s3_bucket}/{name}", "m.json", tmp_path) for name in ("old", "again", "new"))
    assert not storage.exists(f"{s3_bucket}/gone")
    assert seconds < 60


@pytest.mark.parametrize("kind", ["error", "reset", "lost_answer", pytest.param("hang", marks=pytest.mark.slow)])
def test_faults_that_last(
    kind: Kind,
    proxy: FaultyProxy,
    through: Callable[[Plan | None], None],
    s3_bucket: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything fails in time and clearly, as what may pass; what was published is whole, or not published."""
    monkeypatch.setattr(storage, "_PAUSES_S", ())
    fill(s3_bucket, folder)
    start = time.monotonic()
    through(Plan((kind,)))
    found = outcomes(operations(s3_bucket, folder, tmp_path / "fetched"))
    seconds = time.monotonic() - start
    through(None)
    for name, error in found.items():
        assert isinstance(error, StorageError), name
        assert error.is_transient, name
        assert str(error).startswith(s3_bucket), name
        assert proxy.endpoint in error.reason, name
        assert error.mend, name
    assert is_whole(f"{s3_bucket}/old", "m.json", tmp_path)
    for name in ("again", "gone", "new"):
        is_whole(f"{s3_bucket}/{name}", "m.json", tmp_path)  # raises where it is damaged
    assert storage.read_bytes(f"{s3_bucket}/small") == b"old"
    assert seconds < (60 if kind == "hang" else 20)


def test_an_upload_that_is_not_known_is_begun_anew(
    proxy: FaultyProxy, through: Callable[[Plan | None], None], s3_bucket: str
) -> None:
    """So S3 answers where an upload was completed, and the answer was lost, and it is completed again."""
    through(Plan(("no_such_upload",), where="POST /large$", at={0}))
    storage.write_bytes(f"{s3_bucket}/large", LARGE)
    assert proxy.injected["no_such_upload"] == 1
    assert proxy.requests.count("POST /large?uploads=") == 2
    assert storage.read_bytes(f"{s3_bucket}/large") == LARGE


def test_damage_on_the_way_and_in_the_storage(
    proxy: FaultyProxy, through: Callable[[Plan | None], None], s3_bucket: str, folder: Path, tmp_path: Path
) -> None:
    """One wrong byte is fetched again; where it is wrong again, so is the storage's, and no later attempt helps."""
    storage.publish_folder(folder, f"{s3_bucket}/x", "m.json", {})
    through(Plan(("wrong_byte",), where="GET .*model.bin", at={0}))
    fetched = storage.fetch_folder(f"{s3_bucket}/x", "m.json", into=tmp_path / "once")
    assert (fetched / "model.bin").read_bytes() == (folder / "model.bin").read_bytes()
    assert proxy.injected["wrong_byte"] == 1
    through(Plan(("wrong_byte",), where="GET .*model.bin"))
    with pytest.raises(StorageError, match=r"model\.bin: damaged") as caught:
        storage.fetch_folder(f"{s3_bucket}/x", "m.json", into=tmp_path / "always")
    assert not caught.value.is_transient
    assert proxy.injected["wrong_byte"] == 2
    with pytest.raises(StorageError, match="no such file") as caught:
        storage.read_bytes(f"{s3_bucket}/no")
    assert not caught.value.is_transient


# ---- runs

EPOCHS = 2
SECOND = "00000006"  # the checkpoint after the second epoch: 22 images in batches of 8


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The model is tiny, and threads that wait for each other on a busy machine take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_job(example: Path, bucket: str) -> TrainJob:
    return example_job(str(example), f"{bucket}/runs", "scaling.workers=0", "name=faulty", f"schedule.epochs={EPOCHS}")


def assert_whole(run: str, into: Path) -> tuple[list[int], int]:
    """Every published checkpoint and bundle is verified; the steps of the checkpoints and the number of bundles."""
    steps = [
        step for step in checkpoint.steps(run) if is_whole(f"{run}/checkpoints/{step:08d}", checkpoint.MANIFEST, into)
    ]
    names = sorted({entry.path.split("/")[0] for entry in storage.list_files(f"{run}/bundles")})
    return steps, sum(is_whole(f"{run}/bundles/{name}", bundle.MANIFEST, into) for name in names)


def losses(result: TrainResult) -> list[float]:
    return [json.loads(line)["train/loss"] for line in storage.read_text(f"{result.run}/metrics.jsonl").splitlines()]


@pytest.mark.usefixtures("one_thread")
def test_a_run_under_faults_ends_well(
    proxy: FaultyProxy, through: Callable[[Plan | None], None], s3_bucket: str, example: Path, tmp_path: Path
) -> None:
    kinds: tuple[Kind, ...] = ("error", "slow_down", "reset", "lost_answer", "short_answer", "short_request")
    through(Plan(kinds, rate=0.25, seed=1))
    result = train(run_job(example, s3_bucket))
    assert sum(proxy.injected.values()) >= 8
    assert len(proxy.injected) >= 4
    through(None)
    steps, num_bundles = assert_whole(result.run, tmp_path)
    assert steps[-1] == 6
    assert num_bundles >= 1
    assert is_whole(result.bundle, bundle.MANIFEST, tmp_path)
    assert len(losses(result)) == EPOCHS


@pytest.mark.usefixtures("one_thread")
def test_a_run_whose_storage_goes_away_stops_and_goes_on(
    proxy: FaultyProxy,
    through: Callable[[Plan | None], None],
    s3_bucket: str,
    example: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the second checkpoint's upload; then it goes on from the first, as if nothing had been."""
    monkeypatch.setattr("raysseg.saver._PAUSES_S", (0.1,))
    job = run_job(example, s3_bucket)
    through(Plan(("reset",), where=rf"(PUT|POST) .*checkpoints/{SECOND}/state-\w+\.pt", is_lasting=True))
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"the connection to {proxy.endpoint} broke") as caught:
        train(job)
    assert caught.value.is_transient
    assert proxy.injected["reset"] > 0
    assert time.monotonic() - start < 60
    through(None)
    run = job.run_uri
    assert assert_whole(run, tmp_path) == ([3], 2)
    with caplog.at_level(logging.INFO, logger="raysseg"):
        result = train(job)
    assert f"resumed from {run}/checkpoints/00000003" in caplog.text
    assert assert_whole(run, tmp_path)[0] == [3, 6]
    assert losses(result) == losses(train(run_job(example, str(tmp_path))))


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_passed_over(
    proxy: FaultyProxy,
    through: Callable[[Plan | None], None],
    s3_bucket: str,
    example: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run stops rather than train again what is trained; on a healthy storage it goes on from the newest."""
    job = run_job(example, s3_bucket)
    monkeypatch.setattr("raysseg.saver._PAUSES_S", (0.1,))
    through(Plan(("reset",), where=r"PUT .*/metrics\.jsonl", at={1}, is_lasting=True))  # after the second checkpoint
    with pytest.raises(StorageError):
        train(job)
    through(None)
    assert checkpoint.steps(job.run_uri)[-1] == int(SECOND)
    through(Plan(("error",), where=rf"GET .*checkpoints/{SECOND}/state-\w+\.pt"))
    with pytest.raises(StorageError, match=rf"checkpoints/{SECOND}/state-[0-9a-f]+.pt: {proxy.endpoint} fails"):
        train(job)
