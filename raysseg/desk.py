"""The study's side of a search: where its trials begin, go on and end. No Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysseg import search, storage
from raysseg.config import JobError, TrainJob, TuneJob
from raysseg.inputs import Inputs
from raysseg.schema import InputError
from raysseg.space import LATENCY
from raysseg.standing import History
from raysseg.study import together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """What a trial tells after each step.

    Attributes:
        number: the trial's.
        history: the rows of its epochs so far, of the metrics that decide.
        is_over: there is no epoch to come.
        seconds: that this process has spent on it.
        latency_ms: milliseconds a prediction, once it is over and if that is asked for.
        reason: why it failed, if it did.
    """

    number: int
    history: History = field(default_factory=list)
    is_over: bool = False
    seconds: float = 0.0
    latency_ms: float | None = None
    reason: str = ""


class Desk:
    """Where trials begin and end: what they tell goes to the study, and what it decides goes back.

    Attributes:
        is_closing: no more trials begin, and those under way are ended where they stand.
        error: why it closed by itself, if it did.
    """

    def __init__(self, job: TuneJob, study: optuna.Study, inputs: Inputs) -> None:
        self._job, self._study, self._inputs = job, study, inputs
        self._total = search.num_trials(job)
        self._interrupted = [trial.number for trial in self._trials(TrialState.RUNNING)]
        self._open: dict[int, optuna.Trial] = {}
        self._accounts: dict[int, Account] = {}
        self._seconds: dict[int, float] = {}  # that former processes have spent on the trials that are open
        self._num_failed = 0
        self.is_closing = False
        self.error: Exception | None = None

    @property
    def num_left(self) -> int:
        """Trials that still have to begin, those included that were interrupted."""
        begun = sum(trial.state != TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))
        return max(0, self._total - begun) + len(self._interrupted)

    @property
    def run_uris(self) -> list[str]:
        """The runs of this sitting's trials."""
        return [self._job.trial_uri(number) for number in self._accounts]

    def next_trial(self) -> TrainJob | None:
        """The job of a trial to begin with, or to go on with; None: there is none left."""
        with self._closing_on_error():
            while self.num_left and not self.is_closing:
                with together(self._study):
                    job = self._begin()
                if job is not None:
                    return job
        return None

    def note(self, account: Account) -> bool:
        """Takes what a trial tells; returns whether it ends with that."""
        trial = self._open.get(account.number)
        if trial is None or self.error is not None:
            return True
        with self._closing_on_error(), together(self._study):
            self._take(trial, account)
        return account.number not in self._open

    def fail(self, number: int, reason: str) -> None:
        """A trial's process has failed, and no restart mended it."""
        if number in self._open:
            with self._closing_on_error(), together(self._study):
                self._fail(self._open[number], replace(self._accounts[number], reason=reason))

    def rows(self) -> list[tuple[FrozenTrial, Account]]:
        """The trials of this sitting, and what they told last."""
        accounts = sorted(self._accounts.items())
        trials = self._study.get_trials(deepcopy=False)
        return [(trials[number], account) for number, account in accounts]

    def best(self) -> list[int]:
        """Numbers of the trials that lead, of all sittings: one, or a Pareto front."""
        return search.best_numbers(self._study)

    def standing(self) -> str:
        """How far the search is, for people."""
        trials = self._study.get_trials(deepcopy=False)
        text = f"{sum(trial.state.is_finished() for trial in trials)} of {self._total} trials have ended"
        best = self.best()
        if not best:
            return text
        pairs = zip(self._job.objectives, trials[best[0]].values, strict=True)
        return f"{text}; best: {best[0]}, " + ", ".join(f"{one.metric} {value:.4g}" for one, value in pairs)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Keeps an error from Ray Tune, which would wrap it, for whoever runs the search."""
        try:
            yield
        except Exception as error:
            self.error, self.is_closing = error, True

    def _begin(self) -> TrainJob | None:
        """Asks for a trial, or takes up one; None where its values don't fit the train job, which fails it."""
        is_new = not self._interrupted
        trial = search.ask(self._study, self._job) if is_new else search.resume(self._study, self._interrupted.pop(0))
        number = trial.number
        overrides = search.draw(trial, self._job, self._inputs.classes.names, self._inputs.balance.pixels)
        trial.set_user_attr("overrides", overrides)
        self._open[number], self._accounts[number] = trial, Account(number)
        self._seconds[number] = float(trial.user_attrs.get("seconds", 0.0))
        try:
            job = self._job.trial_job(number, overrides)
        except JobError as error:
            self._fail(trial, Account(number, reason=str(error).removeprefix(f"trial {number}: ")))
            return None
        if is_new:
            storage.delete_folder(job.run_uri)  # of a trial that the study was cut off from
        else:
            logger.info("trial %d goes on", number)
        return job

    def _take(self, trial: optuna.Trial, account: Account) -> None:
        before = self._accounts[account.number]
        if account.seconds < before.seconds:  # another process has gone on with it
            self._seconds[account.number] += before.seconds
        self._accounts[account.number] = account
        has_news = self._report(trial, account.history)
        if account.reason:
            self._fail(trial, account)
        elif account.is_over:
            self._complete(trial, account)
        elif has_news and trial.should_prune():
            self._end(trial, account, TrialState.PRUNED)
        elif len(account.history) > len(before.history):
            self._note_seconds(trial, account)

    def _complete(self, trial: optuna.Trial, account: Account) -> None:
        values = values_of(self._job, account.history, account.latency_ms)
        if values is None:
            names = ", ".join(objective.metric for objective in self._job.objectives)
            self._fail(trial, replace(account, reason=f"{names}: no epoch gave a number"))
        else:
            self._end(trial, account, TrialState.COMPLETE, values)

    def _fail(self, trial: optuna.Trial, account: Account) -> None:
        self._accounts[account.number] = account
        trial.set_user_attr("reason", account.reason)
        self._end(trial, account, TrialState.FAIL)
        logger.warning("trial %d failed: %s; %d left", trial.number, account.reason, self.num_left)
        self._num_failed += 1
        most = self._job.search.max_failures
        if self._num_failed > most and self.num_left:
            raise InputError(
                f"search.max_failures: {self._num_failed} trials failed, and {most} may. The last one, {trial.number}: "
                f"{account.reason}. Mend what it names, or allow more: the same command goes on"
            )

    def _report(self, trial: optuna.Trial, history: History) -> bool:
        """Tells the study of the epochs that are new; whether there are any. It takes them with one objective alone."""
        objective = self._job.objectives[0]
        if len(self._job.objectives) > 1 or objective.metric == LATENCY:
            return False
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        new = [row for row in history if objective.metric in row and int(row["epoch"]) + 1 not in known]
        for row in new:
            trial.report(row[objective.metric], int(row["epoch"]) + 1)
        return bool(new)

    def _end(
        self, trial: optuna.Trial, account: Account, state: TrialState, values: tuple[float, ...] | None = None
    ) -> None:
        self._note_seconds(trial, account)
        self._study.tell(trial, values, state)
        del self._open[trial.number]
        if state != TrialState.FAIL:
            shown = ", ".join(f"{value:.4g}" for value in values or ())
            what = {TrialState.PRUNED: f"pruned after epoch {len(account.history)}"}.get(state, f"complete: {shown}")
            logger.info("trial %d %s; %d left", trial.number, what, self.num_left)

    def _note_seconds(self, trial: optuna.Trial, account: Account) -> None:
        trial.set_user_attr("seconds", self._seconds[account.number] + account.seconds)

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))


def values_of(job: TuneJob, history: History, latency_ms: float | None = None) -> tuple[float, ...] | None:
    """A trial's objectives, at its best epoch; None where one of them is no number."""
    by = job.epoch_objective
    scored = [row for row in history if math.isfinite(row.get(by.metric, math.nan))]
    if not scored:
        return None
    best = (max if by.mode == "max" else min)(scored, key=lambda row: row[by.metric])
    found = {**best, LATENCY: math.nan if latency_ms is None else latency_ms}
    values = tuple(found.get(objective.metric, math.nan) for objective in job.objectives)
    return values if all(map(math.isfinite, values)) else None
