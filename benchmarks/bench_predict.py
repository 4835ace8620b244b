"""Images a second of `raysseg predict`, against a loop over a DataLoader that writes the same PNG masks."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.results import compare, device_name, write_result
from raysseg import bundle as bundles
from raysseg.bundle import Bundle, Preprocessing
from raysseg.config import Inference, Model, PredictJob, parse_as
from raysseg.data import read_class_map
from raysseg.data.decode import Pixels, decode_image
from raysseg.masks import LabelMap, encode_id_map, to_ids
from raysseg.models import build_model
from raysseg.predict import predict
from raysseg.predictor import Predictor

MODEL = "segformer-tiny"
BATCH = 4


class Images(torch.utils.data.Dataset[tuple[str, Pixels]]):
    """The images of a folder."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: int) -> tuple[str, Pixels]:
        path = self._paths[place]
        return path.stem, decode_image(path.read_bytes())


def write_bundle(data: Path, uri: str) -> None:
    classes = read_class_map(str(data / "classes.json"))
    torch.manual_seed(0)
    model = build_model(Model(name=MODEL, weights=None), classes).eval()
    bundles.write(Bundle(uri, "semantic", classes, MODEL, Preprocessing(None), {}, {}, {}, Inference(), {}), model)


def loop(predictor: Predictor, images: Path, out: Path) -> None:
    """What one would write without us."""
    classes = predictor.bundle.classes
    out.mkdir()
    for batch in DataLoader(Images(images), BATCH, num_workers=2, collate_fn=list):
        views = predictor.predict([image for _, image in batch])
        for (name, _), view in zip(batch, views, strict=True):
            assert isinstance(view, LabelMap)
            (out / f"{name}.png").write_bytes(encode_id_map(to_ids(view.labels, classes), classes))


def job(bundle: str, images: Path, out: Path, workers: int) -> None:
    raw = {
        "kind": "predict",
        "name": "bench",
        "bundle": bundle,
        "data": {"format": "masks", "images": str(images)},
        "output": {"format": "masks", "uri": str(out)},
        "batch": {"per_worker": BATCH},
        "scaling": {"workers": workers, "cpus_per_worker": 1},
    }
    predict(parse_as(PredictJob, raw))


def rate(run: Callable[[Path], None], number: int, folder: Path) -> float:
    """Images a second, from the first one's reading to the last one's file."""
    out = folder / "out"
    started = time.perf_counter()
    run(out)
    elapsed = time.perf_counter() - started
    shutil.rmtree(out)
    return number / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RAYSSEG_DATA", "../shared/data")) / "camvid")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process with a model")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # Ray's processes have it from here
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, bundle = folder / "images", str(folder / "bundle")
        images.mkdir()
        for path in sorted((options.data / "val/images").iterdir())[: options.images]:
            shutil.copy(path, images)
        write_bundle(options.data, bundle)
        predictor, number = Predictor(bundle), len(list(images.iterdir()))
        ours: dict[int, list[float]] = {workers: [] for workers in options.workers}
        theirs: list[float] = []
        for workers in ours:
            rate(lambda out, workers=workers: job(bundle, images, out, workers), number, folder)  # starts what it takes
        for _ in range(options.rounds):
            theirs.append(rate(lambda out: loop(predictor, images, out), number, folder))
            for workers, rates in ours.items():
                rates.append(rate(lambda out, workers=workers: job(bundle, images, out, workers), number, folder))
    rows = [
        compare(f"images/s, {workers} workers", rates, theirs, ">= 1 without Ray" if not workers else "-")
        for workers, rates in ours.items()
    ]
    settings = {"model": MODEL, "batch": BATCH, "images": number, "rounds": options.rounds, "threads": options.threads}
    settings |= {"data": options.data.name, "ours": ours, "peer": theirs}
    write_result(f"predict-threads-{options.threads}", device_name(), rows, settings)


if __name__ == "__main__":
    main()
