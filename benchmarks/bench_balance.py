"""CrackForest (1.6 % crack) from scratch: what each remedy for imbalance does to the crack's IoU.

Every image of CrackForest holds crack, so no image is rarer than another: oversampling images can't do anything here,
its runs equal the plain ones, and the table says so. Crops around classes are the remedy of the same spirit that can.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

from benchmarks.results import device_name, write_result
from raysseg import config
from raysseg.runtime import log_to_stderr
from raysseg.train import train

DATA = f"{os.environ.get('RAYSSEG_DATA', '../shared/data')}/crackforest"
CRACK = "val/iou/crack"
PLAIN = "plain cross-entropy"
OVERSAMPLE = "oversample 1.0 (no effect: every image holds crack)"
REMEDIES = {
    "class weights (median_frequency)": ["loss.class_weights=median_frequency"],
    "focal": ["loss.cross_entropy=0", "loss.focal=1"],
    "cross-entropy + dice": ["loss.dice=1"],
    OVERSAMPLE: ["data.oversample=1.0"],
    "class_crop 0.5": ["data.augment.class_crop=0.5"],
}
"""Each remedy as what it changes of the job; any two go together."""
TERMS = {
    "cross-entropy + tversky": ["loss.tversky=1"],
    "cross-entropy + lovasz": ["loss.lovasz=1"],
    "cross-entropy + boundary": ["loss.boundary=10"],
}
"""Further terms, to be run by their names."""


def repeat_images(folder: str, times: int) -> None:
    """Lays the training split so often side by side into a folder that validating takes a small part of a run."""
    for kind in ("images", "masks"):
        Path(folder, kind).mkdir()
        for path in Path(DATA, "train", kind).iterdir():
            for i in range(times):
                shutil.copy(path, Path(folder, kind, f"{i}-{path.name}"))


def build_job(options: argparse.Namespace, changes: list[str], folder: str, seed: int) -> config.TrainJob:
    """The job of one run in a folder with the training images."""
    splits = {
        split: {"format": "masks", "images": f"{place}/images", "masks": f"{place}/masks"}
        for split, place in (("train", folder), ("val", f"{DATA}/test"))
    }
    # judging crops by their largest class is off: nearly every crop is background
    augment = {"scale": [0.75, 1.5], "max_class_share": 1, "vertical_flip": 0.5}
    job = {
        "kind": "train",
        "name": "run",
        "task": "semantic",
        "classes": f"{DATA}/classes.json",
        "data": {**splits, "crop": [options.crop, options.crop], "augment": augment},
        "model": {"name": "segformer-tiny", "weights": None},
        "optimizer": {"lr": options.lr},
        "schedule": {"epochs": options.epochs, "decay": "cosine"},
        "batch": {"global_size": 4, "per_worker": 4},
        "precision": "fp32",
        "scaling": {"workers": 0},
        "seed": seed,
        "storage": folder,
    }
    path = Path(folder, "job.yaml")
    path.write_text(json.dumps(job))  # which is YAML
    loaded = config.load(str(path), changes)
    assert isinstance(loaded, config.TrainJob)
    return loaded


def crack_iou(options: argparse.Namespace, changes: list[str], seed: int) -> tuple[float, float]:
    """The crack's IoU on the test split after the last epoch, and the seconds that the run took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        repeat_images(folder, options.passes)
        job = build_job(options, changes, folder, seed)
        train(job)
        last = Path(job.run_uri, "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last)[CRACK], time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--passes", type=int, default=7, help="over the images in an epoch")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each remedy, of seeds 0, 1, ...")
    parser.add_argument("--only", choices=[*REMEDIES, *TERMS], help="one remedy alone; default: those of the table")
    options = parser.parse_args()
    log_to_stderr()
    torch.set_num_threads(1)  # so small a model gains little from a second one, and loses where it is busy
    found: dict[str, list[tuple[float, float]]] = {}

    def run(name: str, changes: list[str]) -> None:
        found[name] = [crack_iou(options, changes, seed) for seed in range(options.seeds)]

    if options.only:
        run(options.only, (REMEDIES | TERMS)[options.only])
    else:
        for name, changes in {PLAIN: [], **REMEDIES}.items():
            run(name, changes)
        means = {name: mean(iou for iou, _ in found[name]) for name in REMEDIES if name != OVERSAMPLE}
        one, other = sorted(means, key=means.__getitem__, reverse=True)[:2]
        run(f"{one} and {other}", REMEDIES[one] + REMEDIES[other])
    rows = [_row(name, runs) for name, runs in found.items()]
    settings = {"data": "crackforest", **vars(options), "remedies": REMEDIES | TERMS}
    what = re.sub(r"[^a-z0-9]+", "-", f"balance-crackforest {options.only or ''}".strip())
    write_result(what, device_name(), rows, settings)


def _row(name: str, runs: list[tuple[float, float]]) -> dict[str, str | float]:
    ious = [iou for iou, _ in runs]
    seconds = mean(seconds for _, seconds in runs)
    return {"what": name, "crack IoU": mean(ious), "lowest": min(ious), "highest": max(ious), "s a run": seconds}


if __name__ == "__main__":
    main()
