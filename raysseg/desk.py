"""The study's side of a search: where its trials begin, go on and end. No Ray."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysseg import search
from raysseg.config import TuneJob
from raysseg.inputs import Inputs
from raysseg.schema import InputError
from raysseg.space import LATENCY
from raysseg.standing import History

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """What a trial tells after each step.

    Attributes:
        number: the trial's.
        history: the rows of its epochs so far.
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

    def check_failures(self) -> None:
        """Raises InputError once more trials have failed than may."""
        failed, most = self._trials(TrialState.FAIL), self._job.search.max_failures
        if len(failed) > most:
            raise InputError(
                f"search.max_failures: {len(failed)} trials failed, and {most} may. The last one, {failed[-1].number}: "
                f"{failed[-1].user_attrs['reason']}. Mend what it names, or allow more: the same command goes on"
            )

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
        overrides = search.draw(trial, self._job, self._inputs.classes.names, self._inputs.balance.pixels)
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
        has_news = self._report(trial, account.history)
        if account.reason:
            self._fail(trial, account)
        elif account.is_over:
            self._complete(trial, account)
        elif has_news and trial.should_prune():
            self._end(trial, account, TrialState.PRUNED)
        return account.number not in self._open

    def fail(self, number: int, reason: str) -> None:
        """A trial's process has failed, and no restart mended it."""
        if number in self._open:
            self._fail(self._open[number], replace(self._accounts[number], reason=reason))

    def rows(self) -> list[tuple[FrozenTrial, Account]]:
        """The trials of this sitting, and what they told last."""
        trials = self._study.get_trials(deepcopy=False)
        return [(trials[number], account) for number, account in sorted(self._accounts.items())]

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
        logger.warning("trial %d failed: %s", trial.number, account.reason)
        self._end(trial, account, TrialState.FAIL)
        self.is_closing |= len(self._trials(TrialState.FAIL)) > self._job.search.max_failures

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
