from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from raysseg import config, storage, trackers
from raysseg.config import TrainJob
from raysseg.schema import InputError
from raysseg.trackers import check_trackers, open_trackers

TENSORBOARD = "trackers.tensorboard=true"


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged; the environment of trackers is empty, and what a test sets in it is forgotten."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", *trackers.MLFLOW_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    caplog.set_level(logging.INFO, "raysseg")
    return caplog


def make_job(runs: Path | str, *overrides: str) -> TrainJob:
    source = {"format": "masks", "images": "images", "masks": "masks"}
    raw = {
        "kind": "train",
        "name": "street",
        "task": "semantic",
        "classes": ["road", "person (sitting)"],
        "data": {"train": source, "val": source, "crop": [64, 64]},
        "model": {"name": "segformer-b0", "weights": None},
        "storage": str(runs),
    }
    job = config.compose(raw, overrides)
    assert isinstance(job, TrainJob)
    return job


def warnings(heard: pytest.LogCaptureFixture) -> list[str]:
    """What we say; urllib3 warns of each attempt."""
    ours = [record for record in heard.records if record.name == "raysseg.trackers"]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def start(job: TrainJob, step: int, losses: dict[int, float]) -> None:
    """A start of the run: a loss by step, and a row of metrics at the end."""
    with open_trackers(job, step) as told:
        for at, loss in losses.items():
            told.log(at, {"train/loss": loss, "lr": 0.1})
        told.log(max(losses), {"val/miou": 0.25 + max(losses), "val/iou/person (sitting)": math.nan})
        told.flush()


# --- the job ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trackers.mlflow.uri=http://me:hush@host:5000", "trackers.mlflow.uri: holds a password; leave this key out"),
        ("trackers.mlflow.uri=mlruns", 'trackers.mlflow.uri: received "mlruns"; allowed: a URI such as'),
        ("trackers.tensorbord=true", "trackers.tensorbord: there is no such key; allowed: tensorboard, mlflow, wandb"),
    ],
)
def test_mistakes_in_the_job(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        make_job("runs", override)
    assert message in str(error.value)
    assert "hush" not in str(error.value)


def test_a_data_base_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = make_job("runs", "trackers.mlflow.uri=sqlite:///mlflow.db").trackers.mlflow
    assert tracker is not None
    assert tracker.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_nothing_is_loaded_before_it_is_used() -> None:
    heavy = "{'torch', 'ray', 'tensorboard', 'mlflow', 'wandb'}"
    script = f"import sys, raysseg.trackers; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_trackers_nothing_happens(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    check_trackers(job)
    start(job, 0, {1: 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("runs", "trackers={tensorboard: true, mlflow: {uri: 'http://host'}, wandb: {}}")
    check_trackers(job)
    find = importlib.util.find_spec
    a_mere_folder = ModuleSpec(name, None, is_package=True)
    for found in (None, a_mere_folder):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda asked, found=found: found if asked == name else find(asked)
        )
        with pytest.raises(
            InputError, match=rf"trackers.{name}: .* pip install 'raysseg\[{name}\]', or remove the key"
        ):
            check_trackers(job)


def test_mlflow_needs_a_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("runs", "trackers.mlflow={}")
    with pytest.raises(InputError, match=r"trackers\.mlflow\.uri: missing"):
        check_trackers(job)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    check_trackers(job)


# --- TensorBoard --------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], str]:
    """The scalars by tag, and the text of the job, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("job")
    return scalars, text.tensor_proto.string_val[0].decode()


def test_tensorboard_hides_steps_that_a_kill_undid(tmp_path: Path) -> None:
    job = make_job(tmp_path, TENSORBOARD)
    start(job, 0, {1: 8.0, 2: 4.0, 3: 2.0})
    start(job, 2, {3: 1.0, 4: 0.5})
    scalars, text = read_events(tmp_path / "street/tensorboard")
    assert scalars == {
        "train/loss": [(1, 8.0), (2, 4.0), (3, 1.0), (4, 0.5)],
        "lr": [(step, pytest.approx(0.1)) for step in (1, 2, 3, 4)],
        "val/miou": [(4, 4.25)],
    }
    assert "    model.name: segformer-b0\n" in text


def test_tensorboard_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    job = make_job(s3_bucket, TENSORBOARD)
    start(job, 0, {1: 8.0})
    start(job, 1, {2: 4.0})
    files = storage.list_files(f"{s3_bucket}/street/tensorboard")
    assert len(files) == 2
    for file in files:
        storage.write_bytes(
            str(tmp_path / file.path), storage.read_bytes(f"{s3_bucket}/street/tensorboard/{file.path}")
        )
    assert read_events(tmp_path)[0]["train/loss"] == [(1, 8.0), (2, 4.0)]


def test_an_epoch_is_on_s3_before_the_run_ends(tmp_path: Path, s3_bucket: str) -> None:
    told = open_trackers(make_job(s3_bucket, TENSORBOARD), 0)
    told.log(1, {"train/loss": 8.0})
    told.flush()
    wait_until(lambda: len(storage.list_files(f"{s3_bucket}/street/tensorboard")) == 1)
    (file,) = storage.list_files(f"{s3_bucket}/street/tensorboard")
    storage.write_bytes(str(tmp_path / file.path), storage.read_bytes(f"{s3_bucket}/street/tensorboard/{file.path}"))
    assert read_events(tmp_path)[0] == {"train/loss": [(1, 8.0)]}
    told.close("finished")


# --- MLflow -------------------------------------------------------------------------------------------------------


def test_mlflow_goes_on_with_its_run(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    job = make_job(tmp_path, f"trackers.mlflow.uri={uri}", "trackers.mlflow.experiment=streets")
    told = open_trackers(job, 0)
    told.log(1, {"train/loss": 8.0, "val/iou/person (sitting)": 0.5, "grad": math.nan})
    told.close("failed")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("streets")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    start(job, 1, {2: 4.0, 3: 2.0})
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("street", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 8.0), (2, 4.0), (3, 2.0)]
    assert set(run.data.metrics) == {"train/loss", "lr", "val/miou", "val/iou/person _sitting_"}
    assert run.data.params["model.name"] == "segformer-b0"
    assert run.data.params["data.crop"] == "[64, 64]"
    assert json.loads((tmp_path / "street/trackers.json").read_text()) == {"mlflow": run.info.run_id}
    assert warnings(heard) == []

    client.delete_run(run.info.run_id)
    start(job, 3, {4: 1.0})
    (other,) = client.search_runs([experiment.experiment_id])
    assert other.info.run_id != run.info.run_id


def test_a_server_that_is_down(
    tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@127.0.0.1:9")
    job = make_job(tmp_path, "trackers={mlflow: {}, tensorboard: true}")
    begin = time.monotonic()
    told = open_trackers(job, 0)
    for step in range(1, 101):
        told.log(step, {"train/loss": 1.0})
    told.flush()
    assert time.monotonic() - begin < 2
    told.close("finished")
    assert time.monotonic() - begin < 45  # most of it for the import
    first, last = warnings(heard)
    assert first.startswith("trackers.mlflow: MlflowException: ")
    assert "127.0.0.1" in first
    assert "hush" not in heard.text
    assert last == "trackers.mlflow: 100 rows could not be delivered"
    assert len(read_events(tmp_path / "street/tensorboard")[0]["train/loss"]) == 100


# --- failures of any tracker --------------------------------------------------------------------------------------


class Moody:
    """A tracker that fails while it is told to."""

    fails = False
    taken: list[int]
    refused: list[int]
    started_from: list[int]

    def __init__(self, job: TrainJob, step: int) -> None:
        self.started_from.append(step)

    def log(self, rows: list[trackers.Row]) -> None:
        if self.fails:
            self.refused.append(len(rows))
            raise ConnectionError("postgresql://me:hush@host is down\nand more")
        self.taken += [row.step for row in rows]

    def flush(self) -> None:
        pass

    def close(self, status: trackers.Status) -> None:
        self.taken.append(-1)


@contextlib.contextmanager
def moody(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> Iterator[trackers.Trackers]:
    Moody.fails, Moody.taken, Moody.refused, Moody.started_from = False, [], [], []
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Moody)
    with open_trackers(job, 5) as told:
        yield told


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_an_outage_holds_up_comes_later(heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_PAUSE_S", 0.0)
    with moody(make_job("runs", TENSORBOARD), monkeypatch) as told:
        told.log(6, {"loss": 1.0})
        wait_until(lambda: Moody.taken == [6])
        Moody.fails = True
        told.log(7, {"loss": 1.0})
        wait_until(lambda: Moody.refused == [1])
        told.log(8, {"loss": 1.0})
        told.flush()
        wait_until(lambda: Moody.refused == [1, 2])
        Moody.fails = False
        told.log(9, {"loss": 1.0})
        time.sleep(0.05)
        assert Moody.taken == [6]  # it waits for the epoch's end
        told.flush()
    assert Moody.taken == [6, 7, 8, 9, -1]
    assert Moody.started_from == [5, 6, 6]  # opened anew behind what it has
    (warning,) = warnings(heard)
    assert warning == (
        "trackers.tensorboard: ConnectionError: postgresql://host is down; training goes on, and each epoch tries again"
    )
    assert "trackers.tensorboard: goes on" in heard.messages


def test_a_tracker_that_hangs_holds_up_the_end_for_a_bounded_time(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(trackers, "_KEPT", 10)
    answers = threading.Event()

    def hang(job: TrainJob, step: int) -> Moody:
        answers.wait()
        return Moody(job, step)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", hang)
    told = open_trackers(make_job("runs", TENSORBOARD), 0)
    begin = time.monotonic()
    for step in range(1000):
        told.log(step, {"loss": 1.0})
    told.close("killed")
    assert time.monotonic() - begin < 2
    (warning,) = warnings(heard)
    assert "not all is delivered" in warning
    answers.set()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (ValueError(), "failed"), (GeneratorExit(), "killed")]
)
def test_how_a_run_ends(error: BaseException | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []
    monkeypatch.setattr(Moody, "close", lambda self, status: ends.append(status))
    with contextlib.suppress(ValueError, GeneratorExit), moody(make_job("runs", TENSORBOARD), monkeypatch):
        if error is not None:
            raise error
    assert ends == [status]


# --- Weights & Biases ---------------------------------------------------------------------------------------------


def read_wandb(file: Path) -> tuple[str, list[dict[str, float]], dict[str, object]]:
    """The run's id, its rows and its config, from a file of W&B's: records in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, block, record = file.read_bytes(), 7, 32768, b""
    run_id, rows, settings = "", [], {}
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind not in (1, 4):  # neither whole nor a last part
            continue
        found, record = Record.FromString(record), b""
        if found.HasField("run"):
            run_id = found.run.run_id
            settings = {item.key: json.loads(item.value_json) for item in found.run.config.update}
        if found.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return run_id, rows, settings


def test_wandb_offline(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    job = make_job(tmp_path, "trackers.wandb={mode: offline, project: streets}")
    start(job, 0, {1: 8.0, 2: 4.0})
    start(job, 1, {2: 2.0})
    first, second = sorted(
        (tmp_path / "street/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    first_id, rows, settings = read_wandb(first)
    assert rows == [
        {"step": 1, "train/loss": 8.0, "lr": 0.1},
        {"step": 2, "train/loss": 4.0, "lr": 0.1},
        {"step": 2, "val/miou": 2.25},
    ]
    assert settings["model.name"] == "segformer-b0"
    second_id, rows, settings = read_wandb(second)
    assert rows == [{"step": 2, "train/loss": 2.0, "lr": 0.1}, {"step": 2, "val/miou": 2.25}]
    assert "model.name" not in settings
    assert first_id == second_id == json.loads((tmp_path / "street/trackers.json").read_text())["wandb"]
    assert warnings(heard) == []


def test_wandb_offline_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    start(make_job(s3_bucket, "trackers.wandb.mode=offline"), 0, {1: 8.0})
    files = [file.path for file in storage.list_files(f"{s3_bucket}/street/wandb") if file.path.endswith(".wandb")]
    (path,) = files
    storage.write_bytes(str(tmp_path / "run.wandb"), storage.read_bytes(f"{s3_bucket}/street/wandb/{path}"))
    assert read_wandb(tmp_path / "run.wandb")[1][0]["train/loss"] == 8.0


def test_wandb_without_a_key(tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start(make_job(tmp_path, "trackers.wandb={}"), 0, {1: 8.0})
    assert "no API key; set WANDB_API_KEY" in warnings(heard)[0]
