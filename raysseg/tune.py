"""A search, whole: Optuna's study decides, Ray Tune runs the trials, the winner is published.

The study is the search's only memory. What Ray Tune keeps of a search is thrown away: a search that goes on begins a
new one, with the trials that were under way and those that are still to come.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from raysseg import place, search, standing
from raysseg.conductor import release_former
from raysseg.config import TrainJob, TuneJob
from raysseg.desk import Desk, values_of
from raysseg.inputs import Inputs, known_metrics, read_inputs
from raysseg.link import Beside, Signals, signals_noted
from raysseg.outcome import STATES, TuneResult, conclude
from raysseg.runtime import connect, log_to_stderr
from raysseg.schema import InputError, RunStopped
from raysseg.section import seconds_of
from raysseg.space import CLASS_WEIGHTS, LATENCY, overlap
from raysseg.storage import StorageError
from raysseg.study import close_study, open_study
from raysseg.trackers import check_trackers
from raysseg.train import MOVABLE as TRAIN_MOVABLE
from raysseg.trial import Shared, TrialProcess

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
        InputError: the data can't be used or have changed, the search exists with other settings, a trial has no place
            in the cluster, too many trials failed, or none has come to its end.
        StorageError: a source or the storage can't be reached.
        RunStopped: SIGTERM or Ctrl-C ended it; what it has found is kept.
    """
    base = job.train_job({})
    check_trackers(base)
    balancing = (CLASS_WEIGHTS, "data.oversample")
    is_balanced = any(overlap(path, key) for path in job.search.space for key in balancing)
    inputs = read_inputs(base, is_balanced=is_balanced)
    _check_objectives(job, known_metrics(base, inputs.classes))
    standing.open_run(job, MOVABLE)
    study = open_study(job)
    try:
        _check_data(job, study, inputs)
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


def _check_data(job: TuneJob, study: optuna.Study, inputs: Inputs) -> None:
    """Scores over other data would not be comparable."""
    now = {split: index.fingerprint for split, index in inputs.splits.items()}
    before = study.user_attrs.get("data", now)
    changed = [f"data.{split}" for split in now if before[split] != now[split]]
    if changed:
        raise InputError(
            f"{job.run_uri}: {' and '.join(changed)} changed since this search began; give the job another name, or "
            "bring the data back"
        )
    if "data" not in study.user_attrs:
        study.set_user_attr("data", now)


# --- Ray Tune's side ----------------------------------------------------------------------------------------------


def _run_trials(job: TuneJob, desk: Desk, inputs: Inputs) -> None:
    """All trials that are left, or as many as the time allows; RunStopped where a signal ended them."""
    connect()
    scaling = job.train_job({}).scaling
    place.check_room(scaling, job.search.concurrent)
    room = partial(place.room, scaling, job.search.concurrent)
    threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // room())
    objectives = frozenset(objective.metric for objective in (*job.objectives, job.epoch_objective))
    process = ray.tune.with_parameters(TrialProcess, shared=Shared(inputs, objectives, threads))
    logger.info("%d trials are left; %d at a time", desk.num_left, room())
    signals = Signals(answer="the search ends; trials under way go on from their checkpoints with the same command")
    with tempfile.TemporaryDirectory(prefix="raysseg-tune-") as scratch, signals_noted(signals):
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(process, place.resources(scaling)),
            tune_config=ray.tune.TuneConfig(
                search_alg=_Asker(desk, room),
                num_samples=desk.num_left,
                reuse_actors=place.trains_here(scaling),
                trial_dirname_creator=_name,
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
    if not place.trains_here(scaling):  # Ray Tune kills what does not end within seconds
        for run_uri in desk.run_uris:
            _give_back(run_uri)
    if desk.error is not None:
        raise desk.error
    if signals.received is not None:
        raise RunStopped(f"{job.run_uri} keeps what was found; the same command goes on from there", signals.received)


def _name(trial: ray.tune.experiment.Trial) -> str:
    return str(trial.trial_id)


class _Unkept:
    """Ray Tune keeps copies of what it calls, for a search that it would restore; ours is restored by its study."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Asker(_Unkept, Searcher):  # type: ignore[misc]
    """Begins trials as there is room for them."""

    def __init__(self, desk: Desk, room: Callable[[], int]) -> None:
        super().__init__()
        self._desk, self._room = desk, room
        self._running: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None: not now."""
        if self._running and len(self._running) >= self._room():
            return None
        job = self._desk.next_trial()
        if job is None:
            return str(Searcher.FINISHED)
        self._running.add(trial_id)
        return {"job": job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Its place is free."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Stopper(_Unkept, ray.tune.Stopper):  # type: ignore[misc]
    """Passes on what trials tell, and ends those that the study is through with."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._desk.note(result["account"])

    def stop_all(self) -> bool:
        """Whether the search ends here."""
        return self._desk.is_closing


class _Watcher(_Unkept, ray.tune.Callback):  # type: ignore[misc]
    """Hears of trials whose process has failed for good."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Records it, and gives back what its workers held, which other trials wait for."""
        file = Path(trial.error_file) if trial.error_file else None
        lines = file.read_text().strip().splitlines() if file is not None and file.exists() else []
        job: TrainJob = trial.config["job"]
        self._desk.fail(int(job.name), lines[-1].strip() if lines else "its process died")
        if not place.trains_here(job.scaling):
            _give_back(job.run_uri)


def _give_back(run_uri: str) -> None:
    """Gives back what a run of several workers held, if its process did not come to that."""
    try:
        release_former(run_uri)
    except StorageError as error:  # Ray itself does so once the search has ended
        logger.warning("%s: what its workers held is not given back: %s", run_uri, error)


def _look_on(fit: Callable[[], object], job: TuneJob, desk: Desk, signals: Signals) -> None:
    """Waits for Ray Tune in a way that signals come through, and shows how the trials stand."""
    limit_s = seconds_of(job.search.time_limit) if job.search.time_limit is not None else None
    began = time.monotonic()
    running = Beside(fit, "raysseg-search")
    with _shown_live(lambda: _table(job, desk)):
        while not running.is_over():
            is_late = limit_s is not None and time.monotonic() - began > limit_s
            if is_late and not desk.is_closing:
                logger.info("search.time_limit (%s): the trials under way are ended", job.search.time_limit)
            if is_late or signals.received is not None:
                desk.is_closing = True


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
    """The trials under way, the newest ones and the best, of this sitting; above them how the search stands."""
    columns = (f"best {objective.metric}" for objective in job.objectives)
    table = Table("trial", "state", "epoch", *columns, "settings", title=f"{job.name}: {desk.standing()}")
    rows, best = desk.rows(), desk.best()
    for i, (trial, account) in enumerate(rows):
        is_best = trial.number in best
        if trial.state == TrialState.RUNNING or is_best or i >= len(rows) - _SHOWN:
            values = values_of(job, account.history, account.latency_ms) or ()
            shown = [f"{value:#.4g}" for value in values] or [""] * len(job.objectives)
            epochs = f"{len(account.history)}/{job.epochs}"
            cells = (str(trial.number), STATES[trial.state], epochs, *shown, _settings(trial))
            table.add_row(*map(escape, cells), style="bold" if is_best else None)
    return table


def _settings(trial: FrozenTrial) -> str:
    """A trial's values in few lines: of weights of single classes, the least and the largest."""
    params = search.params_of(trial)
    names = [name for name in params if name.startswith(f"{CLASS_WEIGHTS}.")]
    weights = [weight for weight in search.weights_of(trial) if weight]
    if len(names) > 1 and weights:
        spread = f"{_short(min(weights))} to {_short(max(weights))}"
        params = {name: value for name, value in params.items() if name not in names} | {CLASS_WEIGHTS: spread}
    return ", ".join(f"{name}={_short(value)}" for name, value in params.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "null" if value is None else str(value)
