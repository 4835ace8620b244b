"""Searches: what a trial costs beyond its training, what pruning saves, what tuned class weights gain.

Parts:
    overhead  trials of one worker against the same runs by hand, in a loop in one process; trials one at a time.
    pruning   ASHA against none: the same seeds, space and number of trials.
    weights   CamVid: an exponent of class weights is searched, then trained with other seeds beside none and
              median_frequency; all is scored on val, which the exponent was chosen on too.
    workers   trials of two workers on this machine, one after another; the placement groups that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import optuna
import ray
import ray.util
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from benchmarks.results import Row, device_name, write_result
from raysseg import config
from raysseg.data.example import draw_example
from raysseg.inputs import build_plan, read_inputs
from raysseg.link import Signals
from raysseg.runtime import log_to_stderr
from raysseg.train import iter_epochs_here
from raysseg.tune import tune

CAMVID = f"{os.environ.get('RAYSSEG_DATA', '../shared/data')}/camvid"
ONE_WORKER = {"workers": 1, "max_failures": 0}
EXPONENT = {"loss.class_weights": {"exponent": [0.0, 1.0]}}
SPACE = {
    "optimizer.lr": {"log_uniform": [3e-4, 3e-2]},
    "schedule.decay": {"choice": ["polynomial", "cosine"]},
    **EXPONENT,
}


def example_keys(folder: Path, scaling: Mapping[str, object]) -> dict[str, Any]:
    """The example's train job on data drawn into a folder."""
    if not (folder / "data").exists():
        draw_example(folder / "data", num_train=160, num_val=40)
    os.environ["EXAMPLE"], os.environ["RUNS"] = str(folder / "data"), str(folder / "runs")
    job = config.load("jobs/example-segformer-semantic.yaml")
    return job.model_dump(mode="json", exclude={"kind", "name"}) | {"scaling": dict(scaling)}


def camvid_keys(epochs: int, storage: Path, **keys: object) -> dict[str, Any]:
    """A small SegFormer from scratch on CamVid at a third of its size."""
    splits = {
        split: {"format": "masks", "images": f"{CAMVID}/{split}/images", "masks": f"{CAMVID}/{split}/masks"}
        for split in ("train", "val")
    }
    return {
        "task": "semantic",
        "classes": f"{CAMVID}/classes.json",
        "data": {**splits, "size": [120, 160], "crop": [96, 128]},
        "model": {"name": "segformer-tiny", "weights": None},
        "optimizer": {"lr": 3e-3},
        "schedule": {"epochs": epochs, "decay": "cosine"},
        "batch": {"global_size": 8, "per_worker": 8},
        "precision": "fp32",
        "scaling": ONE_WORKER,
        "storage": str(storage),
        **keys,
    }


def search_job(name: str, train: Mapping[str, Any], **search: Any) -> config.TuneJob:
    """A search of that name over a train job's keys."""
    job = config.compose({"kind": "tune", "name": name, "train": dict(train), "search": search}, [])
    assert isinstance(job, config.TuneJob)
    return job


def trials_of(job: config.TuneJob) -> list[FrozenTrial]:
    """A finished search's, from its study."""
    backend = JournalFileBackend(f"{job.run_uri}/study.log")
    return optuna.load_study(study_name=job.name, storage=JournalStorage(backend)).trials


def epochs_of(job: config.TuneJob, number: int) -> list[dict[str, float]]:
    """The rows of a trial's metrics.jsonl."""
    lines = Path(job.run_uri, "trials", f"{number:04d}", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# --- overhead -----------------------------------------------------------------------------------------------------


def measure_overhead(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Seconds from one trial's end to the next one's, and of the same runs in a loop, in turns."""
    rows: list[Row] = []
    torch.set_num_threads(os.cpu_count() or 1)
    keys = example_keys(folder, ONE_WORKER)
    for i in range(options.rounds):
        job = search_job(
            f"overhead-{i}", keys, space=SPACE, sampler="random", trials=options.trials, epochs=2, concurrent=1, seed=i
        )
        tune(job)
        trials = trials_of(job)
        ends = [trial.datetime_complete for trial in trials]
        ours = [(after - before).total_seconds() for before, after in pairwise(ends) if before and after]
        by_hand = loop_by_hand(job, [trial.user_attrs["overrides"] for trial in trials])[1:]
        first = (ends[0] - trials[0].datetime_start).total_seconds() if ends[0] and trials[0].datetime_start else 0.0
        extra = [a - b for a, b in zip(ours, by_hand, strict=True)]
        rows.append(
            {
                "round": i,
                "trial s": median(ours),
                "by hand s": median(by_hand),
                "overhead s": median(extra),
                "most s": max(extra),
                "first trial s": first,
                "target s": 6.0,
            }
        )
    return rows


def loop_by_hand(job: config.TuneJob, overrides: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of each run, trained one after another in this process."""
    inputs = read_inputs(job.train_job({}), is_balanced=True)
    seconds = []
    for i, values in enumerate(overrides):
        started = time.perf_counter()
        run = job.trial_job(i, values).model_copy(update={"name": f"hand-{i}"})
        list(iter_epochs_here(build_plan(run, inputs), Signals()))
        seconds.append(time.perf_counter() - started)
    return seconds


# --- pruning ------------------------------------------------------------------------------------------------------


def measure_pruning(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Epochs and best scores with ASHA and without."""
    rows: list[Row] = []
    keys = example_keys(folder, ONE_WORKER)
    for seed in range(options.seeds):
        row: dict[str, str | float] = {"seed": seed}
        for rule, pruning in {"none": None, "asha": {"rule": "asha"}}.items():
            search = {"space": SPACE, "trials": options.trials, "epochs": 9, "seed": seed, "pruning": pruning}
            job = search_job(f"{rule}-{seed}", keys | {"seed": seed}, **search)
            started = time.perf_counter()
            tune(job)
            trials = trials_of(job)
            done = [trial.value for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
            row |= {
                f"{rule}: epochs": sum(len(epochs_of(job, trial.number)) for trial in trials),
                f"{rule}: best val/miou": max(done),
                f"{rule}: s": time.perf_counter() - started,
            }
        row["epochs saved"] = 1 - float(row["asha: epochs"]) / float(row["none: epochs"])
        rows.append(row)
    return rows


# --- class weights ------------------------------------------------------------------------------------------------


def measure_weights(options: argparse.Namespace, folder: Path) -> list[Row]:
    """IoU by class, in the mean over seeds: none, median_frequency, and the tuned exponent."""
    keys = camvid_keys(options.epochs, folder)
    found = tune(search_job("weights", keys, space=EXPONENT, trials=options.trials, seed=0))
    tuned = found.overrides.get("loss.class_weights")
    best = trials_of(search_job("weights", keys, space=EXPONENT))[found.trial]
    exponent = best.params["loss.class_weights.exponent"]
    schemes = {"none": None, "median_frequency": "median_frequency", f"tuned (exponent {exponent:.2f})": tuned}
    space = {
        "loss.class_weights": {"choice": list(schemes.values())},
        "seed": {"choice": list(range(1, 1 + options.seeds))},
    }
    job = search_job("schemes", camvid_keys(options.epochs, folder, seed=1), space=space, sampler="grid", trials=99)
    tune(job)
    last = [(trial.user_attrs["overrides"], epochs_of(job, trial.number)[-1]) for trial in trials_of(job)]
    names = [name for name in last[0][1] if name.startswith("val/iou/")]

    def scores(name: str, weights: object) -> list[float]:
        return [row[name] for values, row in last if values.get("loss.class_weights") == weights]

    rows: list[Row] = []
    for name in [*names, "val/miou"]:
        by_scheme = {scheme: scores(name, weights) for scheme, weights in schemes.items()}
        means = {scheme: mean(values) for scheme, values in by_scheme.items()}
        ranges = {f"{scheme}: range": max(values) - min(values) for scheme, values in by_scheme.items()}
        rows.append({"class": name.removeprefix("val/").removeprefix("iou/"), **means, **ranges})
    return rows


# --- two workers --------------------------------------------------------------------------------------------------


def measure_workers(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Trials of two workers, pruned by ASHA; how many groups of workers stood at once, and what was left."""
    job = search_job(
        "workers",
        example_keys(folder, {"workers": 2, "cpus_per_worker": 0.5}),
        space=SPACE,
        trials=options.trials,
        epochs=3,
        pruning={"rule": "asha"},
    )
    started = time.perf_counter()
    found = tune(job)
    seconds = time.perf_counter() - started
    time.sleep(5)
    left = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return [{"trials": options.trials, **found.trials, "s a trial": seconds / options.trials, "groups left": len(left)}]


PARTS: dict[str, tuple[Callable[[argparse.Namespace, Path], list[Row]], int]] = {
    "overhead": (measure_overhead, 6),
    "pruning": (measure_pruning, 12),
    "weights": (measure_weights, 12),
    "workers": (measure_workers, 8),
}
"""Each part, and its number of trials."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--trials", type=int, help="default: 6, 12, 12 and 8, as the part is")
    parser.add_argument("--rounds", type=int, default=3, help="of overhead")
    parser.add_argument("--seeds", type=int, default=3, help="of pruning and weights")
    parser.add_argument("--epochs", type=int, default=12, help="of weights")
    options = parser.parse_args()
    log_to_stderr()
    for part in options.part:
        measure, trials = PARTS[part]
        settings = argparse.Namespace(**vars(options) | {"trials": options.trials or trials})
        with tempfile.TemporaryDirectory(prefix="raysseg-bench-") as folder:
            rows = measure(settings, Path(folder))
        write_result(f"tune-{part}", device_name(), rows, {**vars(settings), "part": part})


if __name__ == "__main__":
    main()
