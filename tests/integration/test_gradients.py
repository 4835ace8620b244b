"""The gradient of a global batch does not depend on how it is split, and the loop is what one would write by hand."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raysseg import config, losses
from raysseg.data.batches import Batch
from raysseg.ledger import deal
from raysseg.loop import build_state, fit, wrap
from raysseg.models import build_model
from raysseg.models.dense import DenseLoss
from raysseg.schema import ClassMap

CLASSES = ClassMap((0, 1, 2), ("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 99, 99)), (False,) * 3)
WEIGHTS = (0.2, 1.0, 7.0)
NUM_IMAGES = 8
SPLITS = {"one batch": (1, 8), "1 worker x 4": (1, 2), "2 workers x 2": (2, 2), "3 workers, uneven": (3, 2)}


def make_job(per_worker: int) -> config.TrainJob:
    folder = {"format": "masks", "images": "x", "masks": "x"}
    return config.parse_as(
        config.TrainJob,
        {
            "kind": "train",
            "name": "gradients",
            "task": "semantic",
            "classes": list(CLASSES.names),
            "data": {"train": folder, "val": folder, "crop": [32, 32]},
            "model": {"name": "segformer-tiny", "weights": None},
            "loss": {"focal_gamma": 1.5, "boundary_sigma": 1.0, **dict.fromkeys(losses.LOSSES, 0.7)},
            "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None},
            "schedule": {"epochs": 1, "warmup": 0, "decay": "none"},
            "batch": {"global_size": NUM_IMAGES, "per_worker": per_worker},
            "storage": "x",
        },
    )


def make_samples() -> tuple[np.ndarray, np.ndarray]:
    """Images, and labels whose share of ignored pixels runs from none to nearly all."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (NUM_IMAGES, 32, 32)).astype(np.uint8)
    for i in range(NUM_IMAGES):
        labels[i][rng.random((32, 32)) < i / NUM_IMAGES] = 255
    return images, labels


def make_model() -> nn.Module:
    """In float64, BatchNorm frozen, dropout and drop path 0: what exactness is promised for."""
    torch.manual_seed(0)
    model = build_model(
        config.Model(name="segformer-tiny", weights=None), CLASSES, loss=make_job(1).loss, class_weights=WEIGHTS
    ).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "SegformerDropPath":
            module.drop_prob = 0.0  # type: ignore[assignment]
    return model


def freeze_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def gradients(per_worker: int, rank: int, num_workers: int) -> dict[str, torch.Tensor]:
    """One step of the real loop by SGD at rate 1: the gradient is what the parameters moved by."""
    images, labels = make_samples()
    model = make_model()
    freeze_batch_norm(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    job = make_job(per_worker)
    state = build_state(model, job.optimizer, torch.float64)
    shares = deal(0, NUM_IMAGES, per_worker=per_worker, rank=rank, num_workers=num_workers)
    step = [
        Batch(images[s], labels[s], np.ones(len(s), np.float32), s)
        if len(s)
        else Batch(images[:1], np.full_like(labels[:1], 255), np.zeros(1, np.float32), np.full(1, -1))
        for s in shares
    ]
    wrapped = wrap(model, is_compiled=False, channels_last=False)
    list(fit(wrapped, state, iter([step]), num_samples=NUM_IMAGES, order_hash="", job=job, dtype=torch.float64))
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def naive_gradients() -> dict[str, torch.Tensor]:
    """What most trainers do: each micro-batch's loss over its own pixels, averaged over micro-batches."""
    images, labels = make_samples()
    model = make_model()
    freeze_batch_norm(model)
    settings = losses.Settings(255, torch.tensor(WEIGHTS, dtype=torch.float64))
    for start in range(0, NUM_IMAGES, 2):
        pixels = torch.from_numpy(images[start : start + 2]).permute(0, 3, 1, 2)
        targets = torch.from_numpy(labels[start : start + 2]).long()
        logits = nn.functional.interpolate(
            model(pixels).values["logits"], size=(32, 32), mode="bilinear", align_corners=False
        )
        pixels_weight = losses.count_normalisers(targets, torch.ones(2), settings)["pixels"]
        (losses.cross_entropy(logits, targets, torch.ones(2), settings) / pixels_weight / 4).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    found: dict[str, Any] = {}
    world = dist.group.WORLD
    for name, (num_workers, per_worker) in SPLITS.items():
        group = dist.new_group(list(range(num_workers)))
        if rank < num_workers:
            dist.distributed_c10d._update_default_pg(group)
            found[name] = gradients(per_worker, rank, num_workers)
            dist.distributed_c10d._update_default_pg(world)
        dist.barrier()
    if rank == 0:
        found["naive"] = naive_gradients()
        Path(folder, "found.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("gradients")
    mp.spawn(work, args=(str(folder),), nprocs=3)
    loaded: dict[str, dict[str, torch.Tensor]] = pickle.loads((folder / "found.pickle").read_bytes())
    return loaded


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference over the tensor's own scale."""
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-9)) for name in b)


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "one batch"])
def test_gradient_is_the_same_for_every_split(found: dict[str, dict[str, torch.Tensor]], split: str) -> None:
    assert distance(found[split], found["one batch"]) < 1e-5


def test_average_of_averages_is_another_gradient(found: dict[str, dict[str, torch.Tensor]]) -> None:
    whole = naive_reference()
    assert distance(found["naive"], whole) > 0.05


def naive_reference() -> dict[str, torch.Tensor]:
    """Cross-entropy alone, over the whole batch at once: what the naive average should have come to."""
    images, labels = make_samples()
    model = make_model()
    freeze_batch_norm(model)
    settings = losses.Settings(255, torch.tensor(WEIGHTS, dtype=torch.float64))
    targets = torch.from_numpy(labels).long()
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2)).values["logits"]
    scaled = nn.functional.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    divisor = losses.count_normalisers(targets, torch.ones(NUM_IMAGES), settings)["pixels"]
    (losses.cross_entropy(scaled, targets, torch.ones(NUM_IMAGES), settings) / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


STEPS = 6


def plain_loop(job: config.TrainJob, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """By hand: transformers' model and its own loss, torch's optimiser, clipping and schedule."""
    model = make_model()
    net = model.net
    vectors, matrices = ([p for p in net.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (False, True))
    groups = [{"params": matrices, "weight_decay": job.optimizer.weight_decay}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, job.optimizer.lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, 2),
            torch.optim.lr_scheduler.PolynomialLR(optimizer, STEPS - 2, power=1.0),
        ],
        [2],
    )
    net.train()
    for batch in batches:
        images = torch.from_numpy(batch.images).permute(0, 3, 1, 2).double()
        optimizer.zero_grad()
        net(
            pixel_values=(images - model.mean) / model.std, labels=torch.from_numpy(batch.labels).long()
        ).loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), job.optimizer.clip_norm)
        optimizer.step()
        schedule.step()
    return dict(model.named_parameters())


def test_training_is_the_loop_that_one_writes_by_hand() -> None:
    """Same batches, no dropout: the weights after some steps of AdamW, warm-up, decay and clipping are the same."""
    adamw = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5}
    schedule = {"epochs": 1, "warmup": 2 / STEPS, "decay": "polynomial"}
    raw = make_job(NUM_IMAGES).model_dump(mode="json")
    raw |= {"optimizer": adamw, "schedule": schedule, "loss": {"cross_entropy": 1.0}}
    job = config.parse_as(config.TrainJob, raw)
    images, labels = make_samples()
    rows = np.ones(NUM_IMAGES, np.float32), np.arange(NUM_IMAGES)
    batches = [Batch(np.roll(images, i, axis=1), np.roll(labels, i, axis=1), *rows) for i in range(STEPS)]
    model = make_model()
    model.criterion = DenseLoss(CLASSES, job.loss)
    state = build_state(model, job.optimizer, torch.float64)
    feed = iter([[batch] for batch in batches])
    list(fit(model, state, feed, num_samples=STEPS * NUM_IMAGES, order_hash="", job=job, dtype=torch.float64))
    expected = plain_loop(job, batches)
    start = dict(make_model().named_parameters())
    moved = max(float((expected[name] - start[name]).detach().abs().max()) for name in expected)
    apart = max(float((p - expected[name]).detach().abs().max()) for name, p in model.named_parameters())
    assert moved > 1e-3
    assert apart < 1e-6 * moved
