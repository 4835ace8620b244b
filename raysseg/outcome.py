"""What a search has come to: its winner published, the table of its trials, its page."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import yaml
from optuna.trial import FrozenTrial, TrialState

from raysseg import bundle as bundles
from raysseg import search, standing, storage, tuning_page
from raysseg.config import TuneJob
from raysseg.desk import values_of
from raysseg.importance import importances
from raysseg.inputs import Inputs, build_plan
from raysseg.schema import InputError
from raysseg.space import Scalar
from raysseg.standing import History
from raysseg.train import publish
from raysseg.tuning_page import State, TrialRow

STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


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


def conclude(job: TuneJob, study: optuna.Study, inputs: Inputs) -> TuneResult:
    """Publishes the winner, the table of all trials and the page.

    Raises:
        InputError: no trial has come to its end.
        StorageError: the storage can't be reached.
    """
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
    rows = _rows(job, study, inputs.classes.names)
    table_uri = _write_table(job, rows)
    report_uri = storage.join(job.run_uri, "report.html")
    storage.write_text(report_uri, tuning_page.render(_page(job, study, inputs, rows, front)))
    _discard_checkpoints(job, rows)
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


def _discard_checkpoints(job: TuneJob, rows: list[TrialRow]) -> None:
    """Training state of trials that have ended is of no more use; their bundles stay."""
    folders = [
        storage.join(job.trial_uri(row.number), "checkpoints") for row in rows if row.state in ("complete", "pruned")
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.delete_folder, folders))


def _best_yaml(job: TuneJob, winner: FrozenTrial, overrides: dict[str, Any]) -> str:
    values = ", ".join(
        f"{objective.metric} {value:.4f}" for objective, value in zip(job.objectives, winner.values, strict=True)
    )
    head = f"# Trial {winner.number} of the search {job.name}: {values} after {job.epochs} epochs at most.\n"
    return head + yaml.safe_dump(job.winner_keys(overrides), sort_keys=False, allow_unicode=True)


def _rows(job: TuneJob, study: optuna.Study, class_names: Sequence[str]) -> list[TrialRow]:
    """Every trial that has begun, with the epochs that it has trained."""
    begun = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    runs = [job.trial_job(trial.number, {}) for trial in begun]
    with ThreadPoolExecutor(8) as pool:
        histories = pool.map(standing.read_history_so_far, runs)
        shown = [search.settings_of(trial, class_names) for trial in begun]
        return [_row(job, *parts) for parts in zip(begun, shown, histories, strict=True)]


def _row(job: TuneJob, trial: FrozenTrial, settings: dict[str, Any], history: History) -> TrialRow:
    is_complete = trial.state == TrialState.COMPLETE
    return TrialRow(
        number=trial.number,
        state=STATES[trial.state],
        params={name: _shown(value) for name, value in settings.items()},
        values=tuple(trial.values) if is_complete else values_of(job, history),
        history=[{**row, "epoch": row["epoch"] + 1} for row in history],  # people count from 1
        seconds=float(trial.user_attrs.get("seconds", 0.0)),
        reason=trial.user_attrs.get("reason", ""),
    )


def _shown(value: Any) -> Scalar:
    """A setting as tables and figures take it: choices that are lists or mappings become JSON."""
    return value if isinstance(value, Scalar) else json.dumps(value)


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


def _column(values: list[Scalar]) -> list[Scalar]:
    """As they are where they are of one kind, else as text."""
    kinds = {type(value) for value in values if value is not None}
    is_plain = kinds <= {int, float} or len(kinds) <= 1
    return values if is_plain else [None if value is None else json.dumps(value) for value in values]


def _page(
    job: TuneJob, study: optuna.Study, inputs: Inputs, rows: list[TrialRow], front: list[int]
) -> tuning_page.TuningPage:
    winner = study.get_trials(deepcopy=False)[front[0]]
    weights = search.weights_of(winner)
    facts = {
        "trials": f"{len(rows)} of {search.num_trials(job)}",
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
        class_weights=dict(zip(inputs.classes.names, weights, strict=True)) if weights else None,
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
