"""What a tune job may say, and what it answers where it can't be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raysseg import config
from raysseg.config import JobError, TuneJob
from raysseg.storage import StorageError

TRAIN: dict[str, Any] = {
    "task": "semantic",
    "classes": ["road", "sky"],
    "data": {split: {"format": "masks", "images": "/d/images", "masks": "/d/masks"} for split in ("train", "val")},
    "model": {"name": "segformer-b0", "weights": None},
}
LR = {"optimizer.lr": {"log_uniform": [1e-5, 1e-2]}}


def tune_job(train: dict[str, Any] = TRAIN, overrides: tuple[str, ...] = (), **search: Any) -> TuneJob:
    raw = {"kind": "tune", "name": "hunt", "storage": "/runs", "train": train, "search": {"space": LR, **search}}
    job = config.compose(raw, overrides)
    assert isinstance(job, TuneJob)
    return job


def test_defaults_come_from_the_train_job() -> None:
    job = tune_job({**TRAIN, "schedule": {"epochs": 7}, "checkpoint": {"metric": "train/loss"}})
    assert job.epochs == 7
    assert [(objective.metric, objective.mode) for objective in job.objectives] == [("train/loss", "min")]
    assert [objective.mode for objective in tune_job(metric="val/mean_dice").objectives] == ["max"]


def test_a_trial_is_the_train_job_with_its_values() -> None:
    job = tune_job(epochs=3, metric="val/mean_dice")
    trial = job.trial_job(12, {"optimizer.lr": 0.5, "data.augment": None})
    assert (trial.run_uri, trial.schedule.epochs, trial.optimizer.lr) == ("/runs/hunt/trials/0012", 3, 0.5)
    assert trial.data.augment is None
    assert trial.checkpoint.metric == "val/mean_dice"
    best = config.parse(job.winner_keys({"optimizer.lr": 0.5}))
    assert isinstance(best, config.TrainJob)
    assert (best.name, best.schedule.epochs, best.optimizer.lr) == ("hunt-best", 50, 0.5)


def test_a_models_own_defaults_come_with_the_model() -> None:
    trial = tune_job(space={"model.name": {"choice": ["segformer-b0", "unet"]}}).trial_job(0, {"model.name": "unet"})
    alone = config.parse(
        {**TRAIN, "kind": "train", "name": "x", "storage": "/s", "model": {"name": "unet", "weights": None}}
    )
    assert isinstance(alone, config.TrainJob)
    assert trial.optimizer == alone.optimizer


def test_a_job_at_rest_is_the_same_job() -> None:
    space = {"batch.global_size": {"int": [4, 16], "log": True}, "loss.class_weights": {"simplex": True}, **LR}
    job = tune_job(space=space, pruning={"rule": "median"}, time_limit="2 hours")
    assert config.compose(job.model_dump(mode="json"), []) == job


def test_overrides_reach_the_space_and_the_train_job() -> None:
    overrides = (
        "search.space.optimizer.lr.log_uniform=[1, 2]",
        "search.space.seed.int=[0, 3]",
        "train.schedule.epochs=2",
    )
    job = tune_job(overrides=overrides)
    assert {path: dimension.bounds for path, dimension in job.search.space.items()} == {
        "optimizer.lr": (1, 2),
        "seed": (0, 3),
    }
    assert job.epochs == 2


def test_the_train_job_may_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.yaml").write_text(
        yaml.safe_dump({**TRAIN, "kind": "train", "name": "alone", "storage": "${PLACE}"})
    )
    monkeypatch.setenv("PLACE", "/elsewhere")
    monkeypatch.setenv("WHICH", "train")
    given: list[tuple[object, int]] = [
        ("train.yaml", 4),
        ("${WHICH}.yaml", 4),
        ({"file": "train.yaml", "batch": {"per_worker": 2}}, 2),
        (str(tmp_path / "jobs" / "train.yaml"), 4),
    ]
    for train, per_worker in given:
        file = tmp_path / "jobs" / "tune.yaml"
        file.write_text(yaml.safe_dump({"kind": "tune", "name": "hunt", "train": train, "search": {"space": LR}}))
        job = config.load(file)
        assert isinstance(job, TuneJob)
        assert job.run_uri == "/elsewhere/hunt"
        assert job.trial_job(0, {}).batch.per_worker == per_worker
    file.write_text(yaml.safe_dump({"kind": "tune", "name": "hunt", "train": "no.yaml", "search": {"space": LR}}))
    with pytest.raises(StorageError, match=r"jobs/no\.yaml"):
        config.load(file)


NEEDS = "allowed: a mapping with one of uniform, log_uniform, int, choice, exponent, factors, simplex"


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ({"space": {}}, "search.space: received {}; allowed: 1 or more of them"),
        ({"space": {"optimizer.lr": 3}}, f"search.space.optimizer.lr: received 3; {NEEDS}"),
        (
            {"space": {"optimizer.lr": {"unifrm": [0, 1]}}},
            f"search.space.optimizer.lr: {NEEDS}",
        ),
        (
            {"space": {"optimizer.lr": {"uniform": [1, 0.5]}}},
            "search.space.optimizer.lr.uniform: received [1.0, 0.5]; allowed: [smal",
        ),
        (
            {"space": {"optimizer.lr": {"uniform": [0, 1]}}},
            "search.space.optimizer.lr: holds a value that the train job refuses: opt",
        ),
        (
            {"space": {"optimizer.lr": {"log_uniform": [0, 1]}}},
            "search.space.optimizer.lr.log_uniform.0: received 0; allowed: numbers above 0",
        ),
        (
            {"space": {"optimizer.rl": {"uniform": [0, 1]}}},
            "search.space.optimizer.rl: holds a value that the train job refuses: optimizer.rl: there is no such key",
        ),
        (
            {"space": {"optimizer.lr": {"exponent": [0, 1]}}},
            "search.space.optimizer.lr: `exponent` is a shape of class weights; it belongs at loss.class_weights",
        ),
        (
            {"space": {"scaling.workers": {"int": [1, 2]}}},
            "search.space.scaling.workers: is the same for all trials; leave it out of the space",
        ),
        (
            {"space": {"schedule.epochs": {"int": [1, 2]}}},
            "search.space.schedule.epochs: is the same for all trials; set search.epochs",
        ),
        (
            {"space": {"optimizer.lr": {"choice": []}}},
            "search.space.optimizer.lr.choice: received []; allowed: 1 or more of them",
        ),
        (
            {"space": {**LR, "seed": {"int": [0, 1], "when": {"optimizer": 1}}}},
            "search.space.seed.when: names `optimizer`, which the space does not hold",
        ),
        (
            {"space": {"seed": {"int": [0, 1], "when": {"seed": 1}}}},
            "search.space.seed.when: depends on itself: seed -> seed",
        ),
        (
            {"space": {"batch.global_size": {"int": [0, 4], "log": True}}},
            "search.space.batch.global_size: `log` takes no `step`, and whole numbers from 1 on",
        ),
        (
            {"sampler": "grid"},
            "search.space.optimizer.lr: a grid needs values that can be counted: `choice`, `int`",
        ),
        ({"objectives": [{"metric": "val/miou"}]}, "search.objectives: received"),
        (
            {"objectives": [{"metric": "a"}, {"metric": "b"}], "metric": "a"},
            "search.metric: stand beside `objectives`; keep one",
        ),
        (
            {"objectives": [{"metric": "a"}, {"metric": "b"}], "pruning": {}},
            "search.pruning: ends trials by one objective",
        ),
        (
            {"objectives": [{"metric": "a"}, {"metric": "b"}], "sampler": "cma_es"},
            "search.sampler: cma_es takes one objective; take tpe",
        ),
        (
            {"space": {"optimizer.name": {"choice": ["adamw", "sgd"]}}, "sampler": "cma_es"},
            "search.sampler: cma_es goes by numbers that every trial has, and the space holds none; take tpe",
        ),
        (
            {"pruning": {"rule": "median", "reduction": 4}},
            "search.pruning.reduction: has no effect where the rule is median; leave it out",
        ),
        (
            {"pruning": {"first_trials": 2}},
            "search.pruning.first_trials: has no effect where the rule is asha; leave it out",
        ),
        (
            {"time_limit": "3 epochs"},
            'search.time_limit: received "3 epochs"; allowed: a number and its unit, such as `90 seconds`',
        ),
        ({"trails": 3}, "search.trails: there is no such key; allowed: "),
    ],
)
def test_mistake_in_a_search_is_one_line(search: dict[str, Any], line: str) -> None:
    with pytest.raises(JobError) as caught:
        tune_job(**search)
    (message,) = str(caught.value).splitlines()
    assert message.startswith(f"job: {line}")


@pytest.mark.parametrize(
    ("train", "line"),
    [
        ({**TRAIN, "optimizer": {"lr": -1}}, "train.optimizer.lr: received -1; allowed: numbers above 0"),
        ({**TRAIN, "modle": 1}, "train.modle: there is no such key; allowed: "),
        ({"task": "semantic"}, "train.data: missing; it has no default"),
        ("nowhere", 'train: received "nowhere"; allowed: a mapping of keys to values'),
    ],
)
def test_mistake_in_the_train_job_has_its_path(train: Any, line: str) -> None:
    with pytest.raises(JobError) as caught:
        tune_job(train)
    assert str(caught.value).splitlines()[0].startswith(f"job: {line}")


def test_class_weights_need_a_loss_that_takes_them() -> None:
    train = {**TRAIN, "loss": {"cross_entropy": 0, "dice": 1}}
    with pytest.raises(JobError, match=r"search\.space\.loss\.class_weights: .* no term in use takes them"):
        tune_job(train, space={"loss.class_weights": {"exponent": [0, 1]}})
