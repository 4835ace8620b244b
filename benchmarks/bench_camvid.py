"""CamVid from scratch, by raysseg and by a plain torch loop with torchvision's transforms: the scores of both."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.results import device_name, write_result
from raysseg import config
from raysseg.data import read_class_map, read_index
from raysseg.data.augment import FILL
from raysseg.data.batches import iter_pairs
from raysseg.data.index import Failure
from raysseg.loop import learning_rate_factor
from raysseg.masks import to_indices
from raysseg.metrics import Metrics
from raysseg.models import SegModel, build_model
from raysseg.models.base import resolve_precision
from raysseg.models.segformer import MEAN, STD
from raysseg.predictor import predict, predict_pairs
from raysseg.runtime import log_to_stderr
from raysseg.schema import ClassMap
from raysseg.train import train

JOB = "jobs/camvid-segformer-semantic.yaml"
PEER = "plain torch, torchvision.transforms.v2, a DataLoader"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Random crops, normalised (3, h, w), and labels, (h, w), of the job's training split."""

    def __init__(self, job: config.TrainJob, classes: ClassMap) -> None:
        source, augment = job.data.train, job.data.augment
        assert isinstance(source, config.MasksSource)
        assert source.images
        assert source.masks
        assert augment
        self._classes = classes
        self._images, self._masks = (sorted(Path(folder).iterdir()) for folder in (source.images, source.masks))
        size = job.data.size or Image.open(self._images[0]).size[::-1]
        fill = {tv_tensors.Image: FILL, tv_tensors.Mask: classes.ignore}
        self._transform = v2.Compose(
            [
                v2.Resize(size),
                v2.RandomResize(*(round(min(size) * scale) for scale in augment.scale)),
                v2.RandomCrop(job.data.crop, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(augment.flip),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = tv_tensors.Image(Image.open(self._images[i]).convert("RGB"))
        labels = tv_tensors.Mask(torch.from_numpy(to_indices(np.array(Image.open(self._masks[i])), self._classes)))
        image, labels = self._transform(image, labels)
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)


def train_ours(job: config.TrainJob) -> dict[str, float]:
    """Scores after the last epoch, and the seconds that the training steps took."""
    train(job)
    rows = [json.loads(line) for line in Path(job.run_uri, "metrics.jsonl").read_text().splitlines()]
    num_images = len(read_index(job.data.train))
    scores = {name.removeprefix("val/"): score for name, score in rows[-1].items()}
    return scores | {"training s": sum(num_images / row["train/images_per_s"] for row in rows)}


def train_plain(job: config.TrainJob, classes: ClassMap) -> dict[str, float]:
    """The same by hand; transformers' own model, loss and all."""
    torch.manual_seed(job.seed)
    dtype = resolve_precision(job.precision, DEVICE)
    model = build_model(job.model, classes).to(DEVICE)
    net: nn.Module = model.net
    num_workers = max(1, (os.cpu_count() or 1) - 1)
    loader = DataLoader(
        Scenes(job, classes),
        job.batch.global_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=True,
        pin_memory=DEVICE.type == "cuda",
    )
    optimizer = torch.optim.AdamW(net.parameters(), job.optimizer.lr, weight_decay=job.optimizer.weight_decay)
    factor = partial(learning_rate_factor, job.schedule, total=len(loader) * job.schedule.epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    net.train()
    started = time.perf_counter()
    for _ in range(job.schedule.epochs):
        for images, labels in loader:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = net(pixel_values=images.to(DEVICE), labels=labels.to(DEVICE)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), job.optimizer.clip_norm)
            optimizer.step()
            schedule.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return score(model.eval(), job, classes, dtype) | {"training s": seconds}


def score(model: SegModel, job: config.TrainJob, classes: ClassMap, dtype: torch.dtype) -> dict[str, float]:
    """Over the validation split, at the images' own size."""
    metric = Metrics("semantic", classes)
    forward = partial(predict, model, size=job.data.size, dtype=dtype, inference=job.inference)
    for batch in predict_pairs(forward, iter_pairs(read_index(job.data.val), classes, rows=8)):
        for item in batch:
            assert not isinstance(item, Failure)
            metric.update(item.pair.sample_id, item.prediction, item.pair.truth)
    return metric.compute()


def gain(what: str, ours: list[float], plain: list[float]) -> dict[str, str | float]:
    """A row: the means over the seeds, and our gain, with its standard error, from its lowest to its highest."""
    gains = sorted(a - b for a, b in zip(ours, plain, strict=True))
    means = mean(ours), mean(plain)
    return {
        "what": what,
        "ours": means[0],
        "peer": means[1],
        "gain": means[0] - means[1],
        "error": stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan"),
        "lowest": gains[0],
        "highest": gains[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="segformer-tiny")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, nargs=2, default=(160, 224), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each side for each of these")
    options = parser.parse_args()
    os.environ.setdefault("CAMVID", f"{os.environ.get('RAYSSEG_DATA', '../shared/data')}/camvid")
    overrides = [
        f"model.name={options.model}",
        f"schedule.epochs={options.epochs}",
        f"data.size={list(options.size)}",
        f"data.crop={list(options.crop)}",
        f"batch={{global_size: {options.batch}, per_worker: {options.batch}}}",
        f"precision={options.precision}",
        f"optimizer.lr={options.lr}",
        "loss={dice: 0, class_weights: null}",
        "data.augment={brightness: 0, contrast: 0, saturation: 0, hue: 0}",
        "scaling.workers=0",
    ]
    log_to_stderr()
    ours, plain = [], []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            job = config.load(JOB, [*overrides, f"storage={folder}", f"seed={seed}"])
            assert isinstance(job, config.TrainJob)
            classes = read_class_map(job.classes)
            ours.append(train_ours(job))
            plain.append(train_plain(job, classes))
    per_class = (f"{kind}/{name}" for kind in ("iou", "dice") for name in classes.names)
    names = ["miou", "mean_dice", "pixel_accuracy", *per_class, "training s"]
    rows = [gain(name, [run[name] for run in ours], [run[name] for run in plain]) for name in names]
    settings = {"job": JOB, "overrides": overrides, "seeds": options.seeds, "peer": PEER}
    numbers = "-".join(map(str, options.seeds))
    write_result(f"camvid-{options.model}-seeds-{numbers}", device_name(), rows, settings)


if __name__ == "__main__":
    main()
