from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raysseg import config, outcome, search, storage, tuning_page
from raysseg.config import TuneJob
from raysseg.schema import InputError
from raysseg.storage import StorageError
from raysseg.study import close_study, open_study

TRAIN: dict[str, Any] = {
    "task": "semantic",
    "classes": ["road", "sky", "car"],
    "data": {split: {"format": "masks", "images": "/d/images", "masks": "/d/masks"} for split in ("train", "val")},
    "model": {"name": "segformer-b0", "weights": None},
    "optimizer": {"lr": 0.001, "weight_decay": 0.3},
    "schedule": {"epochs": 9},
}
CLASSES = ("road", "sky", "car")
PIXELS = np.array([100, 10, 1])
LR = {"optimizer.lr": {"log_uniform": [1e-5, 1e-1]}}
NUMBERS = {**LR, "loss.focal_gamma": {"uniform": [0, 4]}, "optimizer.weight_decay": {"uniform": [0, 0.5], "step": 0.1}}
GRID = {
    "optimizer.name": {"choice": ["adamw", "sgd"]},
    "optimizer.weight_decay": {"uniform": [0, 0.5], "step": 0.1},
}


def tune_job(folder: object, space: dict[str, Any], train: dict[str, Any] = TRAIN, **keys: Any) -> TuneJob:
    raw = {"kind": "tune", "name": "hunt", "storage": str(folder), "train": train, "search": {"space": space, **keys}}
    job = config.compose(raw, [])
    assert isinstance(job, TuneJob)
    return job


def draw(study: optuna.Study, job: TuneJob) -> tuple[optuna.Trial, dict[str, Any]]:
    trial = search.ask(study, job)
    return trial, search.draw(trial, job, CLASSES, PIXELS)


def run(job: TuneJob, count: int) -> list[dict[str, Any]]:
    """Opens the study and runs so many trials, two at a time as far as they go; what they drew."""
    study = open_study(job)
    drawn = []
    for _ in range(count // 2):
        pair = [draw(study, job) for _ in range(2)]
        for trial, values in pair:
            drawn.append(values)
            study.tell(trial, -abs(math.log10(values.get("optimizer.lr", 1e-3)) + 2.5))
    close_study(study)
    return drawn


# --- draws


def test_draws_stay_within_bounds_steps_and_conditions(tmp_path: Path) -> None:
    space: dict[str, Any] = {
        **LR,
        "loss.focal_gamma": {"uniform": [0.1, 2.05], "step": 0.1, "when": {"loss.focal": [1.0, 2.0]}},
        "loss.focal": {"choice": [0.0, 1.0, 2.0], "when": {"optimizer.name": "adamw"}},
        "optimizer.name": {"choice": ["adamw", "sgd"]},
        "data.augment.tries": {"int": [3, 10], "step": 3},
        "batch.global_size": {"int": [1, 64], "log": True},
        "data.crop": {"choice": [[512, 512], [64, 128]]},
        "data.augment": {"choice": [None, {"flip": 0.0}], "when": {"optimizer.name": "sgd"}},
    }
    job = tune_job(tmp_path, space, sampler="random")
    study = open_study(job)
    drawn = [draw(study, job)[1] for _ in range(121)][1:]
    rates = np.log10([values["optimizer.lr"] for values in drawn])
    assert -5 <= rates.min() < -4.8 < -1.2 < rates.max() <= -1
    assert abs(np.median(rates) + 3) < 0.4, "as many below 1e-3 as above"
    assert {values["data.augment.tries"] for values in drawn} == {3, 6, 9}
    sizes = [values["batch.global_size"] for values in drawn]
    assert {type(size) for size in sizes} == {int}
    assert sum(size <= 8 for size in sizes) > 40
    assert {tuple(values["data.crop"]) for values in drawn} == {(512, 512), (64, 128)}
    gammas = {values["loss.focal_gamma"] for values in drawn if "loss.focal_gamma" in values}
    assert gammas <= {i / 10 for i in range(1, 21)}, "as they are written"
    assert len(gammas) > 10
    for values in drawn:
        assert ("loss.focal" in values) == (values["optimizer.name"] == "adamw")
        assert ("loss.focal_gamma" in values) == (values.get("loss.focal") in (1.0, 2.0))
        assert values.get("data.augment", {"flip": 0.0}) in (None, {"flip": 0.0})
        assert ("data.augment" in values) == (values["optimizer.name"] == "sgd")
        assert list(values) == sorted(values), "a section comes before its keys"
    last = study.trials[-1]
    assert search.params_of(last)["data.crop"] == drawn[-1]["data.crop"]
    assert last.params["data.crop"] == json.dumps(drawn[-1]["data.crop"])


def test_conditions_tell_booleans_from_numbers(tmp_path: Path) -> None:
    space = {"loss.dice": {"int": [0, 1], "when": {"loss.focal": True}}, "loss.focal": {"choice": [1.0, 2.0]}}
    job = tune_job(tmp_path, space, sampler="random")
    study = open_study(job)
    assert not any("loss.dice" in draw(study, job)[1] for _ in range(9))


def test_trials_fit_the_train_job(tmp_path: Path) -> None:
    job = tune_job(tmp_path, {**NUMBERS, "loss.class_weights": {"factors": [0.5, 2]}})
    study = open_study(job)
    for number in range(3):
        trial, values = draw(study, job)
        made = job.trial_job(trial.number, json.loads(json.dumps(values)))
        assert made.optimizer.lr == values.get("optimizer.lr", 0.001)
        assert trial.number == number


def test_exponents_from_none_to_inverse_frequency() -> None:
    pixels = np.array([100, 0, 10, 1])
    assert search.to_weights(pixels, 0).tolist() == [1, 0, 1, 1]
    inverse = search.to_weights(pixels, 1)
    assert inverse.sum() == pytest.approx(3)
    assert (inverse * pixels)[pixels > 0] == pytest.approx([inverse[3]] * 3)
    assert search.to_weights(pixels, 0.5)[2] / search.to_weights(pixels, 0.5)[0] == pytest.approx(10**0.5)


@pytest.mark.parametrize("shape", [{"exponent": [0, 1]}, {"factors": [0.1, 10]}, {"simplex": True}])
def test_class_weights_have_mean_1_over_the_classes_that_occur(shape: dict[str, Any], tmp_path: Path) -> None:
    job = tune_job(tmp_path, {"loss.class_weights": shape}, sampler="random")
    study = open_study(job)
    for _ in range(5):
        trial = search.ask(study, job)
        for weights in search.draw(trial, job, CLASSES, np.array([100, 0, 1])).values():
            assert weights[1] == 0
            assert sum(weights) == pytest.approx(2)
            assert weights[0] > 0
    names = {"exponent"} if "exponent" in shape else {"road", "car"}
    assert study.trials[-1].params.keys() == {f"loss.class_weights.{name}" for name in names}


@pytest.mark.parametrize("shape", [{"factors": [0.1, 10]}, {"simplex": True}])
def test_tables_show_the_weights_that_the_loss_was_given(shape: dict[str, Any], tmp_path: Path) -> None:
    """And a larger number of Optuna's is a larger weight."""
    job = tune_job(tmp_path, {"loss.class_weights": shape}, sampler="random")
    study = open_study(job)
    draw(study, job)
    trial, values = draw(study, job)
    trial.set_user_attr("overrides", values)
    own, drawn = study.trials
    settings = search.settings_of(drawn, CLASSES)
    assert list(settings.values()) == values["loss.class_weights"]
    assert sorted(settings, key=settings.__getitem__) == sorted(drawn.params, key=drawn.params.__getitem__)
    assert search.settings_of(own, CLASSES) == {}


def test_simplex_is_uniform() -> None:
    """Of three shares each has mean 1/3 and variance 1/18, and is above 1/2 in a quarter of the draws."""
    job = tune_job("/runs", {"loss.class_weights": {"simplex": True}}, sampler="random")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    dimension = job.search.space["loss.class_weights"]
    params = search._params("w", dimension, CLASSES)
    trials = [study.ask({**params}) for _ in range(2000)]
    shares = np.array([search._value(dimension, [*trial.params.values()], PIXELS) for trial in trials]) / 3
    assert shares.sum(1) == pytest.approx(1)
    assert shares.mean(0) == pytest.approx(1 / 3, abs=0.02)
    assert shares.var(0) == pytest.approx(1 / 18, abs=0.006)
    assert (shares > 0.5).mean(0) == pytest.approx(1 / 4, abs=0.035)


# --- the first trial


def test_first_trial_has_the_train_jobs_own_values(tmp_path: Path) -> None:
    space = {
        **NUMBERS,
        "loss.class_weights": {"exponent": [0, 1]},
        "data.crop": {"choice": [[64, 64], [512, 512]]},
        "optimizer.name": {"choice": ["sgd", "adamw"]},
        "data.augment.tries": {"int": [1, 9]},
        "model": {"choice": [{"name": "segformer-b1", "weights": None}, TRAIN["model"]]},
        "batch.per_worker": {"int": [1, 9], "when": {"optimizer.name": "sgd"}},
    }
    job = tune_job(tmp_path, space)
    study = open_study(job)
    trial, values = draw(study, job)
    assert values == {}
    assert trial.number == 0
    assert trial.user_attrs["own"] is True
    assert search.params_of(study.trials[0]) == {
        "optimizer.lr": 0.001,
        "loss.focal_gamma": 2.0,
        "optimizer.weight_decay": 0.3,
        "loss.class_weights.exponent": 0.0,
        "data.crop": [512, 512],
        "optimizer.name": "adamw",
        "model": {"name": "segformer-b0", "weights": None},
    }, "tries, 10, are out of range, and per_worker's condition does not hold"
    second, values = draw(study, job)
    assert "own" not in second.user_attrs
    assert "data.augment.tries" in values


@pytest.mark.parametrize(
    ("weights", "shape", "own"),
    [
        (None, {"exponent": [0, 1]}, 0.0),
        (None, {"exponent": [0.5, 1]}, None),
        ("inverse", {"exponent": [0, 1]}, 1.0),
        ("median_frequency", {"exponent": [0, 1]}, None),
        ([1, 2, 3], {"exponent": [0, 1]}, None),
        (None, {"simplex": True}, None),
    ],
)
def test_own_class_weights(weights: object, shape: dict[str, Any], own: float | None) -> None:
    job = tune_job("/runs", {"loss.class_weights": shape}, {**TRAIN, "loss": {"class_weights": weights}})
    assert search.own_params(job).get("loss.class_weights.exponent") == own


# --- samplers


@pytest.mark.parametrize("sampler", ["tpe", "cma_es", "random", "grid"])
@pytest.mark.parametrize("mid_way", [False, True])
def test_a_restart_changes_no_draw(sampler: str, mid_way: bool, tmp_path: Path) -> None:
    space = GRID if sampler == "grid" else NUMBERS | {"loss.class_weights": {"factors": [0.1, 10]}}
    keys: dict[str, Any] = {"sampler": sampler, "seed": 3, "trials": 30}
    unbroken = run(tune_job(tmp_path / "a", space, **keys), 24 if not mid_way else 8)
    broken = tune_job(tmp_path / "b", space, **keys)
    reordered = tune_job(tmp_path / "b", dict(reversed(space.items())), **keys)
    parts = [4, 4] if mid_way else [14, 10]
    assert run(broken, parts[0]) + run(reordered, parts[1]) == unbroken
    other = tune_job(tmp_path / "c", space, **keys | {"seed": 4})
    assert run(other, 8)[1:] != unbroken[1:8]


def test_a_trial_left_unfinished_is_drawn_as_before(tmp_path: Path) -> None:
    job = tune_job(tmp_path, NUMBERS)
    study = open_study(job)
    draw(study, job)
    trial, values = draw(study, job)
    trial.report(0.5, 1)
    again = search.resume(open_study(job), 1)
    assert search.draw(again, job, CLASSES, PIXELS) == values
    assert again.study.trials[1].intermediate_values == {1: 0.5}
    again.study.tell(again, 1.0)
    assert search.ask(again.study, job).number == 2


def test_a_kill_between_the_first_trials_making_and_its_start_leaves_one_first_trial(tmp_path: Path) -> None:
    job = tune_job(tmp_path, NUMBERS)
    open_study(job).enqueue_trial(search.own_params(job), {"own": True})
    study = open_study(job)
    assert [draw(study, job)[0].user_attrs.get("own") for _ in range(2)] == [True, None]


@pytest.mark.parametrize("sampler", ["tpe", "cma_es"])
def test_samplers_learn(sampler: str, tmp_path: Path) -> None:
    """Without the own trial's learning rate, which CMA-ES must do without."""
    train = {**TRAIN, "optimizer": {"lr": 1.0}}
    spread = {}
    for name in ("random", sampler):
        rates = [values["optimizer.lr"] for values in run(tune_job(tmp_path / name, LR, train, sampler=name), 40)[1:]]
        spread[name] = np.abs(np.log10(rates[-15:]) + 2.5).mean()
    assert spread[sampler] < spread["random"] / 2


def test_cma_es_takes_nan_as_worst(tmp_path: Path) -> None:
    drawn = []
    for sampler, worst in (("cma_es", -1e9), ("cma_es", math.nan), ("random", math.nan)):
        job = tune_job(tmp_path / f"{sampler}{worst}", NUMBERS, sampler=sampler, pruning={})
        study = open_study(job)
        values: dict[str, Any] = {}
        for number in range(24):
            trial, values = draw(study, job)
            trial.report(worst if number % 3 == 0 else values["loss.focal_gamma"], 1)
            study.tell(trial, state=TrialState.PRUNED)
        drawn.append(values)
    assert drawn[0] == drawn[1]
    assert drawn[1] != drawn[2], "it learns from pruned trials"


def test_grid_takes_each_point_once_and_the_own_values_first(tmp_path: Path) -> None:
    inside = tune_job(tmp_path / "inside", GRID, sampler="grid", trials=100)
    assert search.num_trials(inside) == 12
    drawn = run(inside, 12)
    assert drawn[0] == {}, "the train job's own are one of the points"
    points = {(values["optimizer.name"], values["optimizer.weight_decay"]) for values in drawn[1:]}
    assert points == {(name, i / 10) for name in ("adamw", "sgd") for i in range(6)} - {("adamw", 0.3)}

    outside = tune_job(tmp_path / "outside", GRID, {**TRAIN, "optimizer": {"weight_decay": 0.25}}, sampler="grid")
    assert search.num_trials(outside) == 13, "the train job's own come on top"
    assert len({json.dumps(values) for values in run(outside, 12)[1:]}) == 11
    assert search.num_trials(tune_job(tmp_path, GRID, sampler="grid", trials=5)) == 5
    assert search.num_trials(tune_job(tmp_path, LR, trials=7)) == 7
    draw(open_study(inside), inside)  # beyond the last one


def test_grid_leaves_out_what_another_sampler_took(tmp_path: Path) -> None:
    job = tune_job(tmp_path, GRID, sampler="grid")
    study = open_study(job)
    for name, i in [(name, i) for name in ("adamw", "sgd") for i in range(6)][:-1]:
        study.enqueue_trial({"optimizer.name": name, "optimizer.weight_decay": 0.1 * i})  # 0.30000000000000004
        trial = study.ask()
        search.draw(trial, job, CLASSES, PIXELS)
    assert draw(study, job)[1] == {"optimizer.name": "sgd", "optimizer.weight_decay": 0.5}


def test_a_kill_between_a_points_making_and_its_start_loses_none(tmp_path: Path) -> None:
    job = tune_job(tmp_path, GRID, sampler="grid")
    study = open_study(job)
    draw(study, job)
    study.enqueue_trial(search._next_point(study.trials, job.search))
    assert draw(study, job)[0].number == 1
    assert len(study.trials) == 2


def test_optuna_keeps_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    optuna.logging.set_verbosity(optuna.logging.INFO)
    for sampler in ("tpe", "cma_es", "random", "grid"):
        space = {**GRID, "data.augment.tries": {"int": [1, 8], "step": 3}}
        run(tune_job(tmp_path / sampler, space, sampler=sampler, pruning={"rule": "median"}), 6)
    assert capfd.readouterr().err == ""
    assert [str(warning.message) for warning in recwarn] == []
    assert optuna.logging.get_verbosity() == optuna.logging.INFO, "which is Optuna's own"


# --- pruning


def curve(values: dict[str, Any], epoch: int) -> float:
    best = 1 - 0.15 * (math.log10(values.get("optimizer.lr", 0.001)) + 2.5) ** 2
    return best * (1 - math.exp(-epoch / 4))


def train_all(job: TuneJob, concurrent: int) -> tuple[list[int], list[int]]:
    """Trials with learning curves, in turn; the best ones, and the epochs that each trained."""
    study = open_study(job)
    running: list[tuple[optuna.Trial, dict[str, Any]]] = []
    epochs: list[int] = []
    while len(epochs) < job.search.trials or running:
        while len(running) < concurrent and len(epochs) < job.search.trials:
            running.append(draw(study, job))
            epochs.append(0)
        for trial, values in [*running]:
            epochs[trial.number] += 1
            epoch = epochs[trial.number]
            trial.report(curve(values, epoch), epoch)
            is_pruned = trial.should_prune()
            if is_pruned:
                study.tell(trial, state=TrialState.PRUNED)
            elif epoch == job.epochs:
                study.tell(trial, curve(values, epoch))
            if is_pruned or epoch == job.epochs:
                running.remove((trial, values))
    return search.best_numbers(study), epochs


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("concurrent", [1, 4])
def test_asha_saves_epochs_and_finds_the_same_best(seed: int, concurrent: int, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"sampler": "random", "trials": 12, "seed": seed}
    best, epochs = train_all(tune_job(tmp_path / "all", LR, **keys), concurrent)
    assert epochs == [9] * 12
    pruned_best, pruned_epochs = train_all(tune_job(tmp_path / "pruned", LR, **keys, pruning={}), concurrent)
    assert pruned_best == best
    assert sum(pruned_epochs) <= 0.6 * sum(epochs)


def test_every_trial_trains_min_epochs(tmp_path: Path) -> None:
    for rule in ("median", "asha"):
        pruning = {"rule": rule, "min_epochs": 3} | ({"first_trials": 2} if rule == "median" else {})
        job = tune_job(tmp_path / rule, LR, sampler="random", trials=16, pruning=pruning)
        epochs = train_all(job, 1)[1]
        assert min(epochs) == 3
        assert rule == "asha" or epochs[:2] == [9, 9]
        assert set(epochs) == ({3, 9} if rule == "asha" else set(epochs))


def test_nobody_is_turned_away_at_the_last_epoch(tmp_path: Path) -> None:
    job = tune_job(tmp_path, LR, pruning={"min_epochs": 8}, epochs=9)
    study = open_study(job)
    for value, epoch, is_pruned in ((0.9, 8, False), (0.1, 9, False), (0.1, 8, True)):
        trial, _ = draw(study, job)
        trial.report(value, epoch)
        assert trial.should_prune() is is_pruned


def test_pruning_that_comes_after_the_last_epoch_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_study(tune_job(tmp_path, LR, pruning={"min_epochs": 8}))
    assert caplog.text == ""
    open_study(tune_job(tmp_path, LR, pruning={"min_epochs": 9}))
    assert "search.pruning has no effect: a trial has 9 epochs" in caplog.text


@pytest.mark.parametrize("rule", ["median", "asha"])
def test_nan_is_pruned(rule: str, tmp_path: Path) -> None:
    job = tune_job(tmp_path, LR, pruning={"rule": rule} | ({"first_trials": 1} if rule == "median" else {}))
    study = open_study(job)
    first, _ = draw(study, job)
    first.report(0.5, 1)
    assert not first.should_prune()
    study.tell(first, 0.5)
    second, _ = draw(study, job)
    second.report(math.nan, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert second.should_prune()


# --- the best


def completed(*values: float, state: TrialState = TrialState.COMPLETE) -> optuna.trial.FrozenTrial:
    return optuna.create_trial(state=state, values=values)


def test_best_of_one_objective() -> None:
    study = optuna.create_study(direction="maximize")
    assert search.best_numbers(study) == []
    study.add_trials([completed(math.inf), completed(0.9, state=TrialState.PRUNED)])
    with pytest.warns(UserWarning, match="nan is not acceptable"):
        study.tell(study.ask(), math.nan)
    assert study.trials[2].state == TrialState.FAIL
    assert search.best_numbers(study) == []
    study.add_trials([completed(0.3), completed(0.7), completed(0.7), completed(0.1)])
    assert search.best_numbers(study) == [4]
    least = optuna.create_study(direction="minimize")
    least.add_trials([completed(-math.inf), completed(0.3), completed(0.1)])
    assert search.best_numbers(least) == [2]


def test_best_of_two_objectives() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    pairs = [(0.5, 10), (0.9, 30), (0.9, 40), (0.7, 20), (0.6, 25), (math.inf, 50), (0.4, -math.inf)]
    study.add_trials([completed(*pair) for pair in pairs])
    assert search.best_numbers(study) == [1, 3, 0]


# --- the study on storage


def test_study_opens_with_plain_optuna(tmp_path: Path) -> None:
    objectives = [{"metric": "val/miou"}, {"metric": "latency_ms"}]
    job = tune_job(tmp_path, LR, objectives=objectives)
    ours = open_study(job)
    trial, _ = draw(ours, job)
    ours.tell(trial, [0.5, 3.0])
    log = str(tmp_path / "hunt" / "study.log")
    study = optuna.load_study(study_name="hunt", storage=JournalStorage(JournalFileBackend(log)))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["val/miou", "latency_ms"]
    assert study.trials[0].params == {"optimizer.lr": 0.001}
    assert study.trials[0].values == [0.5, 3.0]
    assert [path.name for path in (tmp_path / "hunt").iterdir()] == ["study.log"]


def test_a_line_cut_off_by_a_kill_does_not_count(tmp_path: Path) -> None:
    job = tune_job(tmp_path, LR)
    draw(open_study(job), job)
    log = tmp_path / "hunt" / "study.log"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"op_code":4,"worker')
    study = open_study(job)
    assert log.read_bytes() == whole
    draw(study, job)
    assert len(open_study(job).trials) == 2

    log.write_bytes(b"")
    assert open_study(job).trials == []
    log.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(InputError, match=r"study\.log: damaged"):
        open_study(job)


def test_a_lock_of_a_killed_process_does_not_hold_up(tmp_path: Path) -> None:
    (tmp_path / "hunt").mkdir()
    (tmp_path / "hunt" / "study.log.lock").symlink_to(tmp_path / "hunt" / "study.log")
    start = time.monotonic()
    job = tune_job(tmp_path, LR)
    draw(open_study(job), job)
    assert time.monotonic() - start < 5


def test_study_on_object_storage(s3_bucket: str, tmp_path: Path) -> None:
    job = tune_job(f"{s3_bucket}/runs", NUMBERS)
    on_storage = run(job, 4) + run(job, 4)
    assert on_storage == run(tune_job(tmp_path, NUMBERS), 8)
    content = storage.read_bytes(f"{s3_bucket}/runs/hunt/study.log")
    log = tmp_path / "copy.log"
    log.write_bytes(content)
    study = optuna.load_study(study_name="hunt", storage=JournalStorage(JournalFileBackend(str(log))))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 8

    storage.write_bytes(f"{s3_bucket}/runs/hunt/study.log", content + b'{"op_')
    torn = open_study(job)
    assert len(torn.trials) == 8
    draw(torn, job)
    assert len(open_study(job).trials) == 9
    storage.write_bytes(f"{s3_bucket}/runs/hunt/study.log", b"nonsense\n")
    with pytest.raises(InputError, match="damaged"):
        open_study(job)


def test_storage_that_goes_away_does_not_end_the_search(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"{s3_bucket}/hunt/study.log"
    job = tune_job(s3_bucket, NUMBERS)
    study = open_study(job)
    before = storage.read_bytes(uri)
    attempts = []

    def away(uri: str, data: bytes) -> None:
        attempts.append(len(data))
        raise StorageError(uri, "it does not answer", "Wait.", is_transient=True)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", away)
        close_study(study)
        draw(study, job)
        assert len(attempts) == 1, "each attempt takes long"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        with pytest.raises(StorageError):
            close_study(study)
    assert storage.read_bytes(uri) == before
    with monkeypatch.context() as patch:
        patch.setattr("raysseg.study._PAUSE_S", 0)
        patch.setattr(storage, "write_bytes", away)
        study.set_user_attr("note", 1)
    close_study(study)
    assert len(open_study(job).trials) == 1

    def refused(uri: str, data: bytes) -> None:
        raise StorageError(uri, "access is denied", "Allow it.")

    monkeypatch.setattr(storage, "write_bytes", refused)
    with pytest.raises(StorageError, match="denied"):
        draw(open_study(job), job)


def test_a_storage_that_is_back_gets_all_with_the_next_change(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysseg.study._PAUSE_S", 0)
    job = tune_job(s3_bucket, NUMBERS)
    study = open_study(job)

    def away(uri: str, data: bytes) -> None:
        raise StorageError(uri, "it does not answer", "Wait.", is_transient=True)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", away)
        trial, _ = draw(study, job)
    study.tell(trial, 0.5)
    assert open_study(job).trials[0].value == 0.5


def test_choices_of_lists_are_text_in_tables_and_figures(tmp_path: Path) -> None:
    job = tune_job(tmp_path, {"data.crop": {"choice": [[512, 512], [64, 64]]}}, sampler="grid")
    study = open_study(job)
    for value in (0.1, 0.2):
        study.tell(draw(study, job)[0], value)
    rows = outcome._rows(job, study, CLASSES)
    assert [row.params for row in rows] == [{"data.crop": "[512, 512]"}, {"data.crop": "[64, 64]"}]
    assert pq.read_table(outcome._write_table(job, rows))["data.crop"].to_pylist() == ["[512, 512]", "[64, 64]"]
    page = tuning_page.TuningPage("hunt", [tuning_page.Objective("val/miou", "max")], rows, best=(1,))
    assert "[64, 64]" in tuning_page.render(page)
