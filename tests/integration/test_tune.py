"""Searches for real: studies on an S3 server or a disk, trials on a local Ray, drivers and trials that are killed."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import optuna
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray
import ray.util
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raysseg import config, storage
from raysseg.config import TuneJob
from raysseg.outcome import TuneResult
from raysseg.schema import InputError, RunStopped
from raysseg.train import train
from raysseg.tune import tune
from tests.conftest import example_job, rows

LR = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}}


def tune_job(data: Path, runs: str, space: dict[str, Any], *overrides: str, **search: Any) -> TuneJob:
    """A search over a short train job whose trials train in their own process."""
    base = example_job(str(data), runs, "scaling={workers: 1, max_failures: 1}", *overrides)
    keys = base.model_dump(mode="json", exclude={"name", "storage", "kind"})
    raw = {"kind": "tune", "name": "hunt", "storage": runs, "train": keys, "search": {"space": space, **search}}
    job = config.compose(raw, [])
    assert isinstance(job, TuneJob)
    return job


def study_of(job: TuneJob, folder: Path) -> list[FrozenTrial]:
    """The trials as plain Optuna reads them."""
    log = folder / "study.log"
    log.write_bytes(storage.read_bytes(f"{job.run_uri}/study.log"))
    return optuna.load_study(study_name=job.name, storage=JournalStorage(JournalFileBackend(str(log)))).trials


def wait_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_epochs(job: TuneJob, number: int) -> int:
    run = f"{job.run_uri}/trials/{number:04d}"
    return len(rows(run)) if storage.exists(f"{run}/metrics.jsonl") else 0


# --- a search -----------------------------------------------------------------------------------------------------


SPACE = {**LR, "loss.class_weights": {"exponent": [0.0, 1.0]}, "schedule.decay": {"choice": ["cosine", "polynomial"]}}


@pytest.fixture(scope="module")
def searched(example: Path, new_bucket: Callable[[], str], ray_cluster: None) -> tuple[TuneJob, TuneResult]:
    """Five trials of three epochs on S3, two at a time, pruned by ASHA."""
    job = tune_job(example, new_bucket(), SPACE, trials=5, epochs=3, pruning={"rule": "asha", "min_epochs": 1})
    return job, tune(job)


def test_search_has_what_it_promises(searched: tuple[TuneJob, TuneResult], tmp_path: Path) -> None:
    job, result = searched
    trials = study_of(job, tmp_path)
    assert len(trials) == sum(result.trials.values()) == 5
    assert trials[0].user_attrs["overrides"] == {}, "the first trial has the job's own values"
    assert trials[0].params["loss.class_weights.exponent"] == 0
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = max(complete, key=lambda trial: trial.value or 0)
    assert result.trial == best.number
    assert result.metrics["val/miou"] == pytest.approx(best.value, abs=1e-9)
    assert storage.exists(f"{result.bundle}/bundle.json")
    for trial in trials:
        epochs = num_epochs(job, trial.number)
        assert epochs == (3 if trial.state == TrialState.COMPLETE else trial.last_step)
        assert not storage.list_files(f"{job.run_uri}/trials/{trial.number:04d}/checkpoints")


def test_winner_is_a_job_that_trains_it(searched: tuple[TuneJob, TuneResult], tmp_path: Path) -> None:
    job, result = searched
    best = config.parse(yaml.safe_load(storage.read_text(result.best)))
    assert isinstance(best, config.TrainJob)
    trial = job.trial_job(result.trial, result.overrides)
    assert (best.optimizer, best.loss) == (trial.optimizer, trial.loss)
    assert best.schedule.epochs == 2, "as long as the train job says"


def test_tables_hold_every_trial(searched: tuple[TuneJob, TuneResult]) -> None:
    _, result = searched
    with storage.open_input(result.table) as file:
        table = pq.read_table(file)
    with storage.open_input(result.table.replace(".parquet", ".csv")) as file:
        lines = pacsv.read_csv(file)
    assert table["trial"].to_pylist() == lines["trial"].to_pylist() == [0, 1, 2, 3, 4]
    assert table.column_names == [
        *("trial", "state", "val/miou", "epochs", "seconds"),
        *("loss.class_weights.exponent", "optimizer.lr", "schedule.decay", "reason"),
    ]
    page = storage.read_text(result.report)
    assert all(f">{trial}<" in page for trial in range(5))


def test_a_trial_is_a_train_run(searched: tuple[TuneJob, TuneResult], example: Path, tmp_path: Path) -> None:
    job, _ = searched
    alone = train(
        job.trial_job(0, {}).model_copy(update={"storage": str(tmp_path), "scaling": config.Scaling(workers=0)})
    )
    for ours, theirs in zip(rows(f"{job.run_uri}/trials/0000"), rows(alone.run), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
        assert ours["val/miou"] == pytest.approx(theirs["val/miou"], abs=1e-3)


def test_the_same_search_again_trains_nothing(
    searched: tuple[TuneJob, TuneResult], caplog: pytest.LogCaptureFixture
) -> None:
    job, result = searched
    before = [storage.read_text(f"{job.run_uri}/trials/{i:04d}/metrics.jsonl") for i in range(5)]
    assert tune(job) == result
    assert "trials are left" not in caplog.text
    assert [storage.read_text(f"{job.run_uri}/trials/{i:04d}/metrics.jsonl") for i in range(5)] == before


def test_a_search_with_another_space_is_refused(searched: tuple[TuneJob, TuneResult], example: Path) -> None:
    with pytest.raises(InputError, match=r"exists with other settings: .*search\.space\.optimizer\.lr"):
        tune(tune_job(example, searched[0].storage, {"optimizer.lr": {"uniform": [0.1, 0.2]}}, trials=5, epochs=3))


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_trial_without_a_place_and_data_that_change_are_errors(
    example: Path, tmp_path: Path, ray_cluster: None
) -> None:
    data = copytree(example, tmp_path / "data")
    job = tune_job(data, str(tmp_path / "runs"), LR, "scaling={workers: 1, cpus_per_worker: 64}")
    with pytest.raises(InputError, match=r"scaling: a trial of 1 workers, 64 CPUs each, has no place in the cluster's"):
        tune(job)
    for kind in ("images", "masks"):
        sorted((data / "val" / kind).iterdir())[0].unlink()
    with pytest.raises(InputError, match=r"data\.val changed since this search began"):
        tune(job)


def test_an_unknown_metric_is_refused(example: Path, tmp_path: Path) -> None:
    job = tune_job(example, str(tmp_path / "runs"), LR, metric="val/iou_of_all")
    with pytest.raises(InputError, match=r"search\.metric: received 'val/iou_of_all'; allowed: train/loss, val/miou"):
        tune(job)


def test_failed_trials_are_recorded_and_counted(example: Path, tmp_path: Path, ray_cluster: None) -> None:
    space = {"optimizer.lr": {"choice": [1e-3, 1e30, 2e30]}}
    runs = str(tmp_path / "runs")
    train_keys = ("optimizer.clip_norm=null", "optimizer.lr=0.001", "schedule.warmup=0")
    job = tune_job(example, runs, space, *train_keys, sampler="grid", epochs=1, concurrent=1, max_failures=0)
    with pytest.raises(InputError, match=r"search\.max_failures: 1 trials failed, and 0 may\. .*not finite"):
        tune(job)
    trials = study_of(job, tmp_path)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL]
    assert "the gradient is not finite" in trials[1].user_attrs["reason"]
    more = tune_job(example, runs, space, *train_keys, sampler="grid", epochs=1, concurrent=1, max_failures=1)
    result = tune(more)
    assert (result.trial, result.trials) == (0, {"complete": 1, "failed": 2})


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_trials() -> int:
    """Kills the processes that this session's trials run in; returns how many there were."""
    files = [file for file in Path("/proc").glob("[0-9]*/cmdline") if b"ray::ResourceTrainable" in file.read_bytes()]
    processes = [int(file.parent.name) for file in files]
    ours = [process for process in processes if parent(parent(process)) == os.getpid()]  # children of our raylet
    for process in ours:
        os.kill(process, signal.SIGKILL)
    return len(ours)


def killed_when(job: TuneJob, num_rows: int) -> tuple[threading.Thread, list[int]]:
    """A thread that kills the first trial's process after so many epochs, and what it has killed."""
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: num_epochs(job, 0) >= num_rows)
        killed.append(kill_trials())

    thread = threading.Thread(target=kill)
    thread.start()
    return thread, killed


def test_a_killed_trial_goes_on_from_its_checkpoint(example: Path, tmp_path: Path, ray_cluster: None) -> None:
    job = tune_job(example, str(tmp_path / "runs"), LR, trials=1, epochs=30)
    killer, killed = killed_when(job, 2)
    result = tune(job)
    killer.join()
    assert killed == [1]
    assert result.trials == {"complete": 1}
    assert [row["epoch"] for row in rows(f"{job.run_uri}/trials/0000")] == list(range(30))


def test_a_trial_whose_process_dies_too_often_has_failed(example: Path, tmp_path: Path, ray_cluster: None) -> None:
    job = tune_job(example, str(tmp_path / "runs"), LR, "scaling={workers: 1, max_failures: 0}", trials=1, epochs=30)
    killer, killed = killed_when(job, 1)
    with pytest.raises(InputError, match="no trial has come to its end"):
        tune(job)
    killer.join()
    assert killed == [1]
    (trial,) = study_of(job, tmp_path)
    assert trial.state == TrialState.FAIL
    assert "died" in trial.user_attrs["reason"]


def on_terminal(command: list[str]) -> tuple[subprocess.Popen[bytes], bytearray]:
    """Starts a command whose stderr is a terminal; what it has written there, so far."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "COLUMNS": "140", "TERM": "xterm"})
    os.close(theirs)
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # with which a terminal ends
            while True:
                written.extend(os.read(ours, 4096))

    threading.Thread(target=read, daemon=True).start()
    return process, written


def seen(written: bytearray) -> str:
    """The text on a terminal, without colours and moves."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode(errors="replace"))


def test_a_stopped_and_a_killed_search_go_on(example: Path, tmp_path: Path, ray_cluster: None) -> None:
    """SIGTERM in its first trial, SIGKILL of the driver in its third: no trial runs twice, and none starts anew."""
    job = tune_job(example, str(tmp_path / "runs"), LR, trials=3, epochs=6, concurrent=1)

    def stop() -> None:
        wait_for(lambda: num_epochs(job, 0) >= 1)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(RunStopped, match="goes on from there"):
        tune(job)
    stopper.join()
    assert [trial.state for trial in study_of(job, tmp_path)] == [TrialState.RUNNING]
    assert num_epochs(job, 0) < 6

    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    driver, shown = on_terminal([sys.executable, "-m", "raysseg.cli", "tune", str(file)])
    wait_for(lambda: num_epochs(job, 2) >= 2, 240)
    wait_for(lambda: "hunt: 2 of 3 trials have ended; best: " in seen(shown), 20)
    assert re.search(r"│ 2 +│ running +│ [1-6]/6 +│", seen(shown))
    assert re.search(r"│ 1 +│ complete +│ 6/6 +│ 0\.\d{2,} ", seen(shown))
    driver.kill()
    driver.wait()
    first, second = (storage.read_text(f"{job.run_uri}/trials/{i:04d}/metrics.jsonl") for i in range(2))
    drawn = [trial.params for trial in study_of(job, tmp_path)]

    result = tune(job)
    assert result.trials == {"complete": 3}
    assert [storage.read_text(f"{job.run_uri}/trials/{i:04d}/metrics.jsonl") for i in range(2)] == [first, second]
    assert [row["epoch"] for row in rows(f"{job.run_uri}/trials/0002")] == list(range(6))
    trials = study_of(job, tmp_path)
    assert [trial.params for trial in trials] == drawn
    assert all(sorted(trial.intermediate_values) == list(range(1, 7)) for trial in trials)


def test_a_time_limit_ends_a_sitting_with_what_was_found(example: Path, tmp_path: Path, ray_cluster: None) -> None:
    runs = str(tmp_path / "runs")
    first = tune(tune_job(example, runs, LR, trials=1, epochs=1))
    job = tune_job(example, runs, LR, trials=99, epochs=1, time_limit="12 seconds")
    began = time.monotonic()
    result = tune(job)
    assert time.monotonic() - began < 60
    trials = study_of(job, tmp_path)
    assert first.trials == {"complete": 1}
    assert len(trials) == sum(result.trials.values()) < 99
    assert {trial.state for trial in trials[1:]} <= {TrialState.COMPLETE, TrialState.RUNNING}
    rest = tune(tune_job(example, runs, LR, trials=len(trials), epochs=1))
    assert rest.trials == {"complete": len(trials)}, "those that the limit ended have gone on"


# --- other searches -----------------------------------------------------------------------------------------------


def test_two_objectives_have_a_front(example: Path, tmp_path: Path, ray_cluster: None) -> None:
    objectives = [{"metric": "val/miou"}, {"metric": "latency_ms"}]
    space = {**LR, "data.size": {"choice": [None, [32, 32]]}}
    job = tune_job(example, str(tmp_path / "runs"), space, trials=3, epochs=1, objectives=objectives)
    result = tune(job)
    values = {trial.number: trial.values for trial in study_of(job, tmp_path)}
    assert all(latency > 0 for _, latency in values.values())
    beaten = {
        a
        for a in values
        for b in values
        if values[b] != values[a] and values[b][0] >= values[a][0] and values[b][1] <= values[a][1]
    }
    assert set(result.front) == set(values) - beaten
    assert result.trial == max(result.front, key=lambda number: values[number][0])


def placement_groups() -> list[dict[str, Any]]:
    """Those of this driver that hold, or wait for, resources."""
    mine = ray.get_runtime_context().get_job_id()
    table = ray.util.placement_group_table()
    return [group for key, group in table.items() if key.endswith(mine) and group["state"] != "REMOVED"]


@contextlib.contextmanager
def worker_groups_counted() -> Iterator[list[int]]:
    """How many placement groups of two workers there were, again and again, over the block."""
    counts: list[int] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.2):
            counts.append(sum(len(group["bundles"]) == 2 for group in placement_groups()))

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield counts
    finally:
        is_over.set()
        looker.join()


TWO_WORKERS = ("scaling={workers: 2, cpus_per_worker: 0.5, max_failures: 0}", "optimizer.lr=0.001")


@pytest.mark.slow
def test_a_trial_of_two_workers_that_dies_leaves_its_place_to_the_next(
    example: Path, tmp_path: Path, ray_cluster: None
) -> None:
    space = {"optimizer.lr": {"choice": [1e-3, 2e-3]}}
    job = tune_job(example, str(tmp_path / "runs"), space, *TWO_WORKERS, sampler="grid", epochs=3)
    with worker_groups_counted() as counts:
        killer, killed = killed_when(job, 1)
        result = tune(job)
        killer.join()
    assert killed == [1]
    assert result.trials == {"failed": 1, "complete": 1}
    assert max(counts) == 1, "the first one's is given back before the second one's"
    wait_for(lambda: not placement_groups(), 30)


def test_trials_of_two_workers_take_turns_and_leave_no_placement_group(
    example: Path, tmp_path: Path, ray_cluster: None
) -> None:
    """The first one's process is killed on the way, and it goes on; the second one is pruned."""
    space = {"optimizer.lr": {"choice": [1e-3, 1e-9]}}
    overrides = ("scaling={workers: 2, cpus_per_worker: 0.5}", "optimizer.lr=0.001")
    pruning = {"rule": "median", "min_epochs": 1, "first_trials": 1}
    job = tune_job(example, str(tmp_path / "runs"), space, *overrides, sampler="grid", epochs=20, pruning=pruning)
    with worker_groups_counted() as counts:
        killer, killed = killed_when(job, 2)
        result = tune(job)
        killer.join()
    assert killed == [1]
    assert result.trials == {"complete": 1, "pruned": 1}
    assert num_epochs(job, 1) < 20
    assert max(counts) == 1, "one group of workers at a time"
    wait_for(lambda: not placement_groups(), 30)
