"""A search, whole: Optuna's study decides, Ray Tune runs the trials, the winner is published.

The study is the search's only memory. What Ray Tune keeps of a search is thrown away: a search that goes on begins a
new one, with the trials that were under way and those that are still to come.
"""

from __future__ import annotations

import io
import json
import logging
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import ray
import ray.tune
import yaml
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raysseg import bundle as bundles
from raysseg import search, standing, storage, tuning_page
from raysseg.config import Scaling, TuneJob
from raysseg.importance import importances
from raysseg.inputs import Inputs, build_plan, known_metrics, read_inputs
from raysseg.link import Signals, signals_noted
from raysseg.runtime import connect, gpus_per_worker, log_to_stderr
from raysseg.schema import InputError, RunStopped
from raysseg.section import seconds_of
from raysseg.space import CLASS_WEIGHTS, LATENCY
from raysseg.standing import History
from raysseg.trackers import check_trackers
from raysseg.train import MOVABLE as TRAIN_MOVABLE
from raysseg.train import publish
from raysseg.trial import Account, Shared, TrialProcess, trains_here
from raysseg.tuning_page import State, TrialRow

MOVABLE = (
    *(f"search.{key}" for key in ("trials", "concurrent", "time_limit", "sampler", "pruning", "max_failures")),
    *("s3", *(f"train.{key}" for key in TRAIN_MOVABLE)),
)
"""Dotted paths that may change when a search goes on."""

_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
_SHOWN = 12  # trials of the live table, besides those under way

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneResult:
    """What `raysseg tune` prints.

    Attributes:
        metrics: of the winner.
        trial: the winner's number.
        overrides: the winner's values by dotted path of the train job.
        front: numbers of the trials that no other one beats in every objective.
        trials: how many ended in which way.
        best: a job file that trains the winner.
        table: of all trials, as Parquet; beside it the same as .csv.
    """

    name: str
    metrics: dict[str, float]
    trial: int
    overrides: dict[str, Any]
    front: list[int]
    trials: dict[str, int]
    run: str
    bundle: str
    report: str
    best: str
    table: str


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
    study = search.open_study(job)
    try:
        desk = Desk(job, study, inputs)
        if desk.num_left:
            _run_trials(job, desk, inputs)
        return _finish(job, study, inputs)
    finally:
        search.close_study(study)


def _check_objectives(job: TuneJob, known: Sequence[str]) -> None:
    for objective in job.objectives:
        if objective.metric not in (*known, LATENCY):
            allowed = ", ".join((*known, LATENCY))
            raise InputError(f"search.metric: received {objective.metric!r}; allowed: {allowed}")


# --- the study's side ---------------------------------------------------------------------------------------------


class Desk:
    """Where trials begin and end: what they tell goes to the study, and what it decides goes back.

    Attributes:
        is_closing: no more trials begin, and those under way are left as they stand.
    """

    def __init__(self, job: TuneJob, study: optuna.Study, inputs: Inputs) -> None:
        self._job, self._study, self._inputs = job, study, inputs
        self._total = search.num_trials(job)
        self._interrupted = [trial.number for trial in self._trials(TrialState.RUNNING)]
        self._open: dict[int, optuna.Trial] = {}
        self._accounts: dict[int, Account] = {}
        self.is_closing = False

    @property
    def num_left(self) -> int:
        """Trials that still have to begin, those included that were interrupted."""
        begun = sum(trial.state != TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))
        return max(0, self._total - begun) + len(self._interrupted)

    @property
    def num_failed(self) -> int:
        """Trials that failed so far."""
        return len(self._trials(TrialState.FAIL))

    @property
    def last_reason(self) -> str:
        """Why the last one did."""
        return str(self._trials(TrialState.FAIL)[-1].user_attrs["reason"])

    def next_trial(self) -> dict[str, Any] | None:
        """The number and overrides of a trial to begin with, or to go on with; None: there is none left."""
        if not self.num_left or self.is_closing:
            return None
        if self._interrupted:
            number = self._interrupted.pop(0)
            trial = search.resume(self._study, number)
            logger.info("trial %d goes on", number)
        else:
            trial = search.ask(self._study, self._job)
        counts = self._inputs.counts["train"]
        overrides = search.draw(trial, self._job, self._inputs.classes.names, counts.pixels)
        trial.set_user_attr("overrides", overrides)
        self._open[trial.number] = trial
        self._accounts[trial.number] = Account(trial.number)
        return {"number": trial.number, "overrides": overrides}

    def note(self, account: Account) -> bool:
        """Takes what a trial tells; returns whether it ends with that."""
        trial = self._open.get(account.number)
        if trial is None:
            return True
        self._accounts[account.number] = account
        if account.reason:
            self._fail(trial, account)
        elif account.is_over:
            self._complete(trial, account)
        elif self._is_pruned(trial, account.history):
            self._end(trial, account, TrialState.PRUNED)
        return account.number not in self._open

    def fail(self, number: int, reason: str) -> None:
        """A trial's process has failed, and no restart mended it."""
        if number in self._open:
            account = self._accounts[number]
            self._fail(self._open[number], Account(number, account.history, True, account.seconds, reason=reason))

    def rows(self) -> list[tuple[FrozenTrial, Account]]:
        """The trials of this sitting, and what they told last."""
        trials = self._study.get_trials(deepcopy=False)
        return [(trials[number], account) for number, account in sorted(self._accounts.items())]

    def _complete(self, trial: optuna.Trial, account: Account) -> None:
        values = values_of(self._job, account.history, account.latency_ms)
        if values is None:
            names = ", ".join(objective.metric for objective in self._job.objectives)
            reason = f"{names}: no epoch gave a number"
            self._fail(trial, Account(account.number, account.history, True, account.seconds, reason=reason))
        else:
            self._end(trial, account, TrialState.COMPLETE, values)

    def _fail(self, trial: optuna.Trial, account: Account) -> None:
        self._accounts[account.number] = account
        trial.set_user_attr("reason", account.reason)
        logger.warning("trial %d failed: %s", trial.number, account.reason)
        self._end(trial, account, TrialState.FAIL)
        if self.num_failed > self._job.search.max_failures:
            self.is_closing = True

    def _is_pruned(self, trial: optuna.Trial, history: History) -> bool:
        """Tells the study of the epochs that are new; whether the trial should end."""
        objective = self._job.objectives[0]
        if len(self._job.objectives) > 1 or objective.metric == LATENCY:
            return False
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        new = [row for row in history if objective.metric in row and int(row["epoch"]) + 1 not in known]
        for row in new:
            trial.report(row[objective.metric], int(row["epoch"]) + 1)
        return bool(new) and trial.should_prune()

    def _end(
        self, trial: optuna.Trial, account: Account, state: TrialState, values: tuple[float, ...] | None = None
    ) -> None:
        trial.set_user_attr("seconds", account.seconds)
        self._study.tell(trial, values, state)
        del self._open[trial.number]
        if state != TrialState.FAIL:
            shown = ", ".join(f"{value:.4g}" for value in values or ())
            what = {TrialState.PRUNED: f"pruned after epoch {len(account.history)}"}.get(state, f"complete: {shown}")
            logger.info("trial %d %s; %d left", trial.number, what, self.num_left)

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))


def values_of(job: TuneJob, history: History, latency_ms: float | None = None) -> tuple[float, ...] | None:
    """A trial's objectives, at its best epoch; None where one of them is no number."""
    checkpoint = job.trial_job(0, {}).checkpoint
    scored = [row for row in history if math.isfinite(row.get(checkpoint.metric, math.nan))]
    if not scored:
        return None
    best = (max if checkpoint.mode == "max" else min)(scored, key=lambda row: row[checkpoint.metric])
    found = {**best, LATENCY: math.nan if latency_ms is None else latency_ms}
    values = tuple(found.get(objective.metric, math.nan) for objective in job.objectives)
    return values if all(map(math.isfinite, values)) else None


# --- Ray Tune's side ----------------------------------------------------------------------------------------------


def _run_trials(job: TuneJob, desk: Desk, inputs: Inputs) -> None:
    """All trials that are left; RunStopped where a signal or the time limit ended them."""
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
    if desk.num_failed > job.search.max_failures:
        raise InputError(
            f"search.max_failures: {desk.num_failed} trials failed, and {job.search.max_failures} may; "
            f"the last one: {desk.last_reason}. Mend what it names, or allow more: the same command goes on"
        )
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


# --- after --------------------------------------------------------------------------------------------------------


def _finish(job: TuneJob, study: optuna.Study, inputs: Inputs) -> TuneResult:
    """Publishes the winner, the table of all trials and the page."""
    front = search.best_numbers(study)
    trials = study.get_trials(deepcopy=False)
    if not front:
        reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
        why = f"; the last one failed: {reasons[-1]}" if reasons else ""
        raise InputError(f"{job.run_uri}: no trial has come to its end, so there is no winner{why}")
    winner = trials[front[0]]
    overrides = winner.user_attrs["overrides"]
    trained = publish(build_plan(job.trial_job(winner.number, overrides), inputs), inputs)
    bundle_uri = storage.join(job.run_uri, "bundle")
    bundles.copy(trained.bundle, bundle_uri, bundles.read(trained.bundle).metrics)
    best_uri = storage.join(job.run_uri, "best.yaml")
    storage.write_text(best_uri, _best_yaml(job, winner, overrides))
    rows = tuning_rows(job, study)
    table_uri = _write_table(job, rows)
    report_uri = storage.join(job.run_uri, "report.html")
    storage.write_text(report_uri, tuning_page.render(_page(job, study, inputs, rows, front)))
    counts = Counter(row.state for row in rows)
    return TuneResult(
        name=job.name,
        metrics=trained.metrics,
        trial=winner.number,
        overrides=overrides,
        front=sorted(front),
        trials={str(state): count for state, count in counts.items()},
        run=job.run_uri,
        bundle=bundle_uri,
        report=report_uri,
        best=best_uri,
        table=table_uri,
    )


def _best_yaml(job: TuneJob, winner: FrozenTrial, overrides: dict[str, Any]) -> str:
    values = ", ".join(
        f"{objective.metric} {value:.4f}" for objective, value in zip(job.objectives, winner.values, strict=True)
    )
    head = f"# Trial {winner.number} of the search {job.name}: {values} after {job.epochs} epochs at most.\n"
    return head + yaml.safe_dump(job.winner_keys(overrides), sort_keys=False, allow_unicode=True)


def tuning_rows(job: TuneJob, study: optuna.Study) -> list[TrialRow]:
    """Every trial that has begun, with the epochs that it has trained."""
    begun = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    with ThreadPoolExecutor(8) as pool:
        histories = pool.map(lambda trial: _history(job, trial), begun)
        return [_row(job, trial, history) for trial, history in zip(begun, histories, strict=True)]


def _history(job: TuneJob, trial: FrozenTrial) -> History:
    try:
        return standing.read_history(job.trial_job(trial.number, trial.user_attrs["overrides"]))
    except (KeyError, InputError, storage.StorageError):
        return []  # it never came so far


def _row(job: TuneJob, trial: FrozenTrial, history: History) -> TrialRow:
    is_complete = trial.state == TrialState.COMPLETE
    return TrialRow(
        number=trial.number,
        state=_STATES[trial.state],
        params=search.params_of(trial),
        values=tuple(trial.values) if is_complete else values_of(job, history),
        history=[{**row, "epoch": row["epoch"] + 1} for row in history],  # people count from 1
        seconds=float(trial.user_attrs.get("seconds", 0.0)),
        reason=trial.user_attrs.get("reason", ""),
    )


def _write_table(job: TuneJob, rows: list[TrialRow]) -> str:
    """trials.parquet and trials.csv: a row a trial; settings of which some trials are without are null there."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    columns: dict[str, list[Any]] = {
        "trial": [row.number for row in rows],
        "state": [row.state for row in rows],
        **{
            objective.metric: [row.values[i] if row.values is not None else None for row in rows]
            for i, objective in enumerate(job.objectives)
        },
        "epochs": [len(row.history) for row in rows],
        "seconds": [row.seconds for row in rows],
        **{name: _column([row.params.get(name) for row in rows]) for name in names},
        "reason": [row.reason for row in rows],
    }
    table = pa.table(columns)
    for name, write in {"trials.parquet": pq.write_table, "trials.csv": pacsv.write_csv}.items():
        sink = io.BytesIO()
        write(table, sink)
        storage.write_bytes(storage.join(job.run_uri, name), sink.getvalue())
    return storage.join(job.run_uri, "trials.parquet")


def _column(values: list[Any]) -> list[Any]:
    """As they are where they are of one kind, else as text."""
    kinds = {type(value) for value in values if value is not None}
    is_plain = kinds <= {int, float} or (len(kinds) <= 1 and not kinds & {list, dict, tuple})
    return values if is_plain else [None if value is None else json.dumps(value) for value in values]


def _page(
    job: TuneJob, study: optuna.Study, inputs: Inputs, rows: list[TrialRow], front: list[int]
) -> tuning_page.TuningPage:
    winner = study.get_trials(deepcopy=False)[front[0]]
    weights = winner.user_attrs["overrides"].get(CLASS_WEIGHTS)
    trained, planned = sum(len(row.history) for row in rows), len(rows) * job.epochs
    facts = {
        "trials": f"{len(rows)} of {search.num_trials(job)}",
        "epochs": f"{trained} of the {planned} that {len(rows)} whole trials have",
        "sampler": job.search.sampler,
        "pruning": job.search.pruning.rule if job.search.pruning is not None else "none",
    }
    return tuning_page.TuningPage(
        title=job.name,
        objectives=[tuning_page.Objective(objective.metric, objective.mode) for objective in job.objectives],
        trials=rows,
        log_scaled=_log_scaled(study),
        importances={
            objective.metric: importances(study, i, seed=job.search.seed) for i, objective in enumerate(job.objectives)
        },
        best=tuple(front),
        class_weights=dict(zip(inputs.classes.names, weights, strict=True)) if isinstance(weights, list) else None,
        facts=facts,
        job=job.model_dump(mode="json"),
    )


def _log_scaled(study: optuna.Study) -> frozenset[str]:
    """Settings of which every order of magnitude is as likely."""
    return frozenset(
        name
        for trial in study.get_trials(deepcopy=False)
        for name, distribution in trial.distributions.items()
        if getattr(distribution, "log", False)
    )
