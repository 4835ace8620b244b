"""Trials begin, go on and end as the study says, whatever they tell; no Ray, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from raysseg import config, storage
from raysseg.config import TuneJob
from raysseg.desk import Account, Desk
from raysseg.inputs import Inputs
from raysseg.losses import ClassPixels
from raysseg.schema import ClassMap, InputError
from raysseg.storage import StorageError
from raysseg.study import open_study

PIXELS = np.array([100, 1])
CLASSES = ClassMap(ids=(0, 1), names=("road", "crack"), colours=((0, 0, 0), (9, 9, 9)), things=(False, False))
COUNTS = ClassPixels(PIXELS, PIXELS, np.array([2, 1]), 0, 2)
INPUTS = Inputs(CLASSES, {}, {}, np.ones((2, 2), bool), COUNTS)
LR = {"optimizer.lr": {"log_uniform": [1e-5, 1e-1]}}


def tune_job(folder: Path, space: dict[str, Any] = LR, **search: Any) -> TuneJob:
    train = {
        "task": "semantic",
        "classes": ["road", "crack"],
        "data": {split: {"format": "masks", "images": "/d/images", "masks": "/d/masks"} for split in ("train", "val")},
        "model": {"name": "segformer-b0", "weights": None},
        "loss": {"cross_entropy": 1.0, "dice": 1.0},
        "schedule": {"epochs": 3},
    }
    search = {"space": space, "sampler": "random", "trials": 3, **search}
    raw = {"kind": "tune", "name": "hunt", "storage": str(folder), "train": train, "search": search}
    job = config.compose(raw, [])
    assert isinstance(job, TuneJob)
    return job


def open_desk(job: TuneJob) -> Desk:
    return Desk(job, open_study(job), INPUTS)


def begin(desk: Desk) -> int:
    job = desk.next_trial()
    assert job is not None
    return int(job.name)


def rows(*values: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, "val/miou": value} for epoch, value in enumerate(values)]


def states(job: TuneJob) -> list[TrialState]:
    return [trial.state for trial in open_study(job).trials]


def test_trials_end_where_they_are_over_or_pruned_and_no_more_begin_than_are_asked_for(tmp_path: Path) -> None:
    job = tune_job(tmp_path, pruning={"rule": "median", "first_trials": 1})
    desk = open_desk(job)
    assert desk.standing() == "0 of 3 trials have ended"
    assert [begin(desk), begin(desk), begin(desk)] == [0, 1, 2]
    assert desk.next_trial() is None
    assert not desk.note(Account(0, rows(0.2, 0.5)))
    assert desk.note(Account(0, rows(0.2, 0.5, 0.4), is_over=True))
    assert desk.note(Account(1, rows(0.1, 0.1))), "worse than the median of one"
    assert not desk.note(Account(2, rows(0.3)))
    assert desk.standing() == "2 of 3 trials have ended; best: 0, val/miou 0.5"
    assert desk.best() == [0]
    assert desk.note(Account(1, rows(0.1, 0.1, 0.9), is_over=True)), "it has ended"
    assert states(job) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING]
    assert [trial.number for trial, _ in desk.rows()] == [0, 1, 2]


def test_what_was_under_way_comes_first_and_its_seconds_add_up(tmp_path: Path) -> None:
    job = tune_job(tmp_path)
    desk = open_desk(job)
    begin(desk)
    desk.note(Account(0, rows(0.1, 0.2, 0.3), is_over=True, seconds=9.0))
    before = desk.next_trial()
    assert before is not None
    desk.note(Account(1, rows(0.1), seconds=5.0))
    desk.note(Account(1, rows(0.1, 0.2), seconds=2.0))  # from another process, after the first one died
    storage.write_text(f"{before.run_uri}/checkpoints/kept", "")

    again = open_desk(job)
    assert again.num_left == 2
    assert again.next_trial() == before, "with the values that it had"
    assert storage.exists(f"{before.run_uri}/checkpoints/kept")
    assert begin(again) == 2
    assert again.next_trial() is None
    again.note(Account(1, rows(0.1, 0.2, 0.3), is_over=True, seconds=4.0))
    trials = open_study(job).trials
    assert [trials[i].user_attrs["seconds"] for i in range(2)] == [9.0, 11.0]
    assert trials[1].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}


def test_seconds_of_a_trial_under_way_are_kept_with_several_objectives_too(tmp_path: Path) -> None:
    job = tune_job(tmp_path, objectives=[{"metric": "val/miou"}, {"metric": "latency_ms"}])
    desk = open_desk(job)
    begin(desk)
    desk.note(Account(0, rows(0.1), seconds=5.0))
    again = open_desk(job)
    begin(again)
    assert again.note(Account(0, rows(0.1, 0.2, 0.3), is_over=True, seconds=4.0, latency_ms=7.0))
    (trial,) = open_study(job).trials
    assert (trial.values, trial.user_attrs["seconds"]) == ([0.3, 7.0], 9.0)


def test_what_lies_where_a_new_trial_goes_is_deleted(tmp_path: Path) -> None:
    """A study that a kill has cut off knows less than its runs."""
    job = tune_job(tmp_path)
    storage.write_text(f"{job.trial_uri(0)}/metrics.jsonl", "{}")
    begin(open_desk(job))
    assert not storage.exists(f"{job.trial_uri(0)}/metrics.jsonl")


def test_values_that_do_not_go_together_fail_their_trial(tmp_path: Path) -> None:
    space = {"loss.cross_entropy": {"choice": [0.0]}, "loss.class_weights": {"exponent": [0.5, 1.0]}}
    job = tune_job(tmp_path, space, max_failures=2)
    desk = open_desk(job)
    assert begin(desk) == 0, "the train job's own values do"
    assert desk.next_trial() is None
    assert desk.error is None, "two failures are allowed"
    trials = open_study(job).trials
    assert [trial.state for trial in trials] == [TrialState.RUNNING, TrialState.FAIL, TrialState.FAIL]
    assert "no term in use takes them" in trials[1].user_attrs["reason"]


def test_too_many_failures_end_the_search_and_each_has_its_reason(tmp_path: Path) -> None:
    job = tune_job(tmp_path, trials=5, max_failures=1)
    desk = open_desk(job)
    for _ in range(4):
        begin(desk)
    assert desk.note(Account(0, rows(0.1), reason="the loss is not finite"))
    assert desk.error is None
    assert desk.note(Account(3, [{"epoch": 0, "val/miou": float("nan")}], is_over=True))
    assert isinstance(desk.error, InputError)
    assert desk.is_closing
    assert "search.max_failures: 2 trials failed, and 1 may" in str(desk.error)
    assert desk.next_trial() is None
    assert desk.note(Account(1, rows(0.1))), "those under way end where they stand"
    desk.fail(2, "its process died")
    trials = open_study(job).trials
    assert [trial.state for trial in trials[:2]] == [TrialState.FAIL, TrialState.RUNNING]
    assert trials[0].user_attrs["reason"] == "the loss is not finite"
    assert trials[3].user_attrs["reason"] == "val/miou: no epoch gave a number"
    assert open_desk(job).num_left == 2, "the same command goes on"


def test_a_study_that_cannot_be_written_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = open_desk(tune_job(tmp_path))
    begin(desk)

    def refused(uri: str) -> None:
        raise StorageError(uri, "no space is left", "Make some.")

    monkeypatch.setattr(storage, "translated", refused)
    desk.note(Account(0, rows(0.1)))
    assert isinstance(desk.error, StorageError)
    assert desk.is_closing
    assert desk.note(Account(0, rows(0.1, 0.2)))
    assert desk.next_trial() is None
