"""A search, whole: Optuna's study decides, Ray Tune runs the trials, the winner is published.

The study is the search's only memory. What Ray Tune keeps of a search is thrown away: a search that goes on begins a
new one, with the trials that were under way and those that are still to come.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.tune
from optuna.trial import TrialState
from ray.tune.search import Searcher
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raysseg import search, standing
from raysseg.config import Scaling, TuneJob
from raysseg.desk import Desk, values_of
from raysseg.inputs import Inputs, known_metrics, read_inputs
from raysseg.link import Signals, signals_noted
from raysseg.outcome import TuneResult, conclude
from raysseg.runtime import connect, gpus_per_worker, log_to_stderr
from raysseg.schema import InputError, RunStopped
from raysseg.section import seconds_of
from raysseg.space import CLASS_WEIGHTS, LATENCY
from raysseg.study import close_study, open_study
from raysseg.trackers import check_trackers
from raysseg.train import MOVABLE as TRAIN_MOVABLE
from raysseg.trial import Shared, TrialProcess, trains_here

MOVABLE = (
    *(f"search.{key}" for key in ("trials", "concurrent", "time_limit", "sampler", "pruning", "max_failures")),
    *("s3", *(f"train.{key}" for key in TRAIN_MOVABLE)),
)
"""Dotted paths that may change when a search goes on."""

_SHOWN = 12  # trials of the live table, besides those under way

logger = logging.getLogger(__name__)


def tune(job: TuneJob) -> TuneResult:
    """Runs a search; the same job again goes on where it stopped.

    Raises:
        InputError: the data can't be used, the search exists with other settings, or too many trials failed.
        StorageError: a source or the storage can't be reached.
        RunStopped: SIGTERM, Ctrl-C or the time limit ended it; what it has found is kept.
    """
    base = job.train_job({})
    check_trackers(base)
    balancing = {CLASS_WEIGHTS, "data.oversample"} & job.search.space.keys()
    inputs = read_inputs(base, is_balanced=bool(balancing))
    _check_objectives(job, known_metrics(base, inputs.classes))
    standing.open_run(job, MOVABLE)
    study = open_study(job)
    try:
        desk = Desk(job, study, inputs)
        if desk.num_left:
            _run_trials(job, desk, inputs)
        return conclude(job, study, inputs)
    finally:
        close_study(study)


def _check_objectives(job: TuneJob, known: Sequence[str]) -> None:
    for objective in job.objectives:
        if objective.metric not in (*known, LATENCY):
            allowed = ", ".join((*known, LATENCY))
            raise InputError(f"search.metric: received {objective.metric!r}; allowed: {allowed}")


def _run_trials(job: TuneJob, desk: Desk, inputs: Inputs) -> None:
    """All trials that are left; RunStopped where a signal or the time limit ended them."""
    desk.check_failures()
    connect()
    scaling = job.train_job({}).scaling
    is_here = trains_here(scaling)
    room = _room(job, scaling)
    threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // room)
    is_timed = any(objective.metric == LATENCY for objective in job.objectives)
    process = ray.tune.with_parameters(TrialProcess, shared=Shared(job, inputs, threads, is_timed))
    logger.info("%d trials are left; %d at a time", desk.num_left, room)
    with tempfile.TemporaryDirectory(prefix="raysseg-tune-") as scratch, signals_noted() as signals:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(process, _resources(scaling)),
            tune_config=ray.tune.TuneConfig(
                search_alg=_Asker(desk, lambda: _room(job, scaling)), num_samples=desk.num_left, reuse_actors=is_here
            ),
            run_config=ray.tune.RunConfig(
                name=job.name,
                storage_path=scratch,
                stop=_Stopper(desk),
                callbacks=[_Watcher(desk)],
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's run has its own
                failure_config=ray.tune.FailureConfig(max_failures=scaling.max_failures),
                verbose=0,
            ),
        )
        _look_on(tuner.fit, job, desk, signals)
    desk.check_failures()
    if signals.received is not None:
        raise RunStopped(f"{job.run_uri} keeps what was found; the same command goes on from there", signals.received)


def _room(job: TuneJob, scaling: Scaling) -> int:
    """How many trials may run at once. Those of several workers reserve their places themselves: they must fit."""
    there, gpus = ray.cluster_resources(), gpus_per_worker(scaling)
    workers = max(1, scaling.max_workers)
    cpus = there.get("CPU", 0.0)
    by_cpus = cpus / _num_cpus(scaling) if trains_here(scaling) else (cpus - 1) / (workers * scaling.cpus_per_worker)
    by_gpus = there.get("GPU", 0.0) / (workers * gpus) if gpus else math.inf
    fits = max(1, int(min(by_cpus, by_gpus)))
    wanted = job.search.concurrent or fits
    return wanted if trains_here(scaling) else min(wanted, fits)


def _num_cpus(scaling: Scaling) -> float:
    """That a trial in its own process holds."""
    return max(1.0, scaling.cpus_per_worker)


def _resources(scaling: Scaling) -> dict[str, float]:
    """What Ray Tune reserves for a trial; one of several workers only looks on, and would take a CPU from them."""
    if not trains_here(scaling):
        return {"memory": 1e6}
    gpus = gpus_per_worker(scaling)
    return {"CPU": _num_cpus(scaling)} | ({"GPU": gpus} if gpus else {})


class _Asker(Searcher):  # type: ignore[misc]
    """Begins trials as there is room for them."""

    def __init__(self, desk: Desk, room: Callable[[], int]) -> None:
        super().__init__()
        self._desk, self._room = desk, room
        self._running: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None: not now."""
        if len(self._running) >= self._room():
            return None
        trial = self._desk.next_trial()
        if trial is None:
            return str(Searcher.FINISHED)
        self._running.add(trial_id)
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Its place is free."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is kept elsewhere."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Stopper(ray.tune.Stopper):  # type: ignore[misc]
    """Passes on what trials tell, and ends those that the study is through with."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._desk.note(result["account"])

    def stop_all(self) -> bool:
        """Whether the search ends here."""
        return self._desk.is_closing

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Watcher(ray.tune.Callback):  # type: ignore[misc]
    """Hears of trials whose process has failed for good."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records it."""
        lines = str(trial.get_error() or "its process died").strip().splitlines()
        self._desk.fail(int(trial.config["number"]), lines[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _look_on(fit: Callable[[], object], job: TuneJob, desk: Desk, signals: Signals) -> None:
    """Waits for Ray Tune in a way that signals come through, and shows how the trials stand."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            errors.append(error)

    limit_s = seconds_of(job.search.time_limit) if job.search.time_limit is not None else None
    began = time.monotonic()
    thread = threading.Thread(target=run, name="raysseg-search", daemon=True)
    thread.start()
    with _shown_live(lambda: _table(job, desk)):
        while thread.is_alive():
            thread.join(1.0)
            is_late = limit_s is not None and time.monotonic() - began > limit_s
            if is_late and not desk.is_closing:
                logger.info(
                    "search.time_limit: %s are over; the trials under way are left as they stand", job.search.time_limit
                )
            desk.is_closing |= signals.received is not None or is_late
    if errors:
        raise errors[0]


@contextmanager
def _shown_live(render: Callable[[], Table]) -> Iterator[None]:
    """Keeps a table below the log, where that goes to a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Live(console=console, get_renderable=render, refresh_per_second=1):
        log_to_stderr()  # which is the table's now
        yield
    log_to_stderr()


def _table(job: TuneJob, desk: Desk) -> Table:
    """The trials under way, the best ones and the newest ones."""
    objective = job.objectives[0]
    table = Table("trial", "state", "epoch", f"best {objective.metric}", "settings", title=job.name)
    rows = desk.rows()
    is_open = {trial.number: trial.state == TrialState.RUNNING for trial, _ in rows}
    newest = {trial.number for trial, _ in rows[-_SHOWN:]}
    for trial, account in rows:
        if is_open[trial.number] or trial.number in newest:
            values = values_of(job, account.history, account.latency_ms)
            shown = "" if values is None else f"{values[0]:.4f}"
            settings = ", ".join(f"{name}={_short(value)}" for name, value in search.params_of(trial).items())
            state = trial.state.name.lower()
            table.add_row(str(trial.number), state, f"{len(account.history)}/{job.epochs}", shown, settings)
    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
