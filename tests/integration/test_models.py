"""SegFormer: weights from folders and S3, the loop's options, the optimiser's groups."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raysseg import checkpoint, config, storage
from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.data.batches import Batch
from raysseg.loop import Step, build_optimizer, build_state, fit, learning_rate_factor, wrap
from raysseg.masks import LabelMap
from raysseg.models import Targets, build_model
from raysseg.models.segformer import SIZES
from raysseg.schema import ClassMap, InputError
from raysseg.shard import shard
from raysseg.train import train
from tests.conftest import example_job

CLASSES = ClassMap((3, 5), ("road", "car"), ((1, 1, 1), (2, 2, 2)), (False, True))
OTHERS = ClassMap((0, 1, 2), ("sky", "tree", "water"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), (False,) * 3)
TINY = Model(name="segformer-tiny", weights=None)


def test_the_job_names_every_model() -> None:
    assert set(SIZES) == {name for name, entry in MODELS.items() if entry.family == "segformer"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SegFormer as transformers saves it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    build_model(TINY, CLASSES).save(folder, None)
    return folder


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_same_classes_keep_the_head(saved: Path) -> None:
    again = weights_of(build_model(Model(name="segformer-tiny", weights=str(saved)), CLASSES))
    torch.manual_seed(1)
    for name, tensor in weights_of(build_model(TINY, CLASSES)).items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("classes", [OTHERS, ClassMap((0, 1), ("x", "y"), ((0, 0, 0), (1, 1, 1)), (False, False))])
def test_other_classes_get_a_new_head_and_it_is_said(
    saved: Path, classes: ClassMap, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="raysseg"):
        model = weights_of(build_model(Model(name="segformer-tiny", weights=str(saved)), classes))
    assert "new in this model: decode_head.classifier.bias, decode_head.classifier.weight" in caplog.text
    torch.manual_seed(1)
    for name, tensor in weights_of(build_model(TINY, CLASSES)).items():
        if "classifier" not in name:
            assert torch.equal(model[name], tensor), name
    assert model["net.decode_head.classifier.weight"].shape[0] == len(classes)
    assert (model["net.decode_head.classifier.bias"] == 0).all()


def test_weights_from_s3(saved: Path, s3_bucket: str) -> None:
    for path in saved.iterdir():
        storage.write_bytes(f"{s3_bucket}/weights/{path.name}", path.read_bytes())
    model = build_model(Model(name="segformer-tiny", weights=f"{s3_bucket}/weights"), CLASSES)
    here = build_model(Model(name="segformer-tiny", weights=str(saved)), CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), here.parameters(), strict=True))


def test_weights_of_another_size_are_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="which is no segformer-b0"):
        build_model(Model(name="segformer-b0", weights=str(saved)), CLASSES)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (64, 200)])
def test_decode_gives_the_size_asked_for(size: tuple[int, int]) -> None:
    model = build_model(TINY, CLASSES).eval()
    outputs = model(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    first, second = model.decode(outputs, [size, (31, 77)], Inference())
    assert isinstance(first, LabelMap)
    assert (first.labels.shape, second.labels.shape) == (size, (31, 77))
    assert set(np.unique(first.labels)) <= {0, 1}


def test_all_ignored_targets_give_no_loss_and_no_gradient() -> None:
    model = build_model(TINY, CLASSES)
    targets = Targets(torch.full((1, 64, 64), CLASSES.ignore), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    losses = model(torch.zeros(1, 3, 64, 64), targets).losses
    sum(losses.values(), torch.zeros(())).backward()
    assert all(float(loss.detach()) == 0 for loss in losses.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_norms_and_biases_carry_no_weight_decay_and_the_head_has_its_rate() -> None:
    model = build_model(TINY, CLASSES)
    groups = build_optimizer(model, config.Optimizer(lr=1.0, head_lr_factor=10, weight_decay=0.1)).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate = 10.0 if name.startswith("net.decode_head.") else 1.0
        assert found[id(parameter)] == (rate, 0.1 if parameter.ndim > 1 else 0.0), name


def test_learning_rate_rises_and_decays() -> None:
    schedule = config.Schedule(warmup=0.1, decay="polynomial", power=1.0)
    factors = [learning_rate_factor(schedule, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    cosine = [learning_rate_factor(config.Schedule(warmup=0, decay="cosine"), step, 100) for step in (0, 50, 99)]
    assert cosine == pytest.approx([1.0, 0.5, 0.000247], abs=1e-5)


def losses_of(job: config.TrainJob, dtype: torch.dtype, device: str, steps: int = 6) -> list[float]:
    """The loss of one batch, trained on again and again."""
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 2, (4, 4, 4)), np.ones((16, 16), np.int64)).astype(np.uint8)
    images = np.repeat((labels * 150 + rng.integers(0, 60, labels.shape)).astype(np.uint8)[..., None], 3, axis=3)
    torch.manual_seed(0)
    model = build_model(TINY, CLASSES).to(device)
    state = build_state(model, job.optimizer, dtype)
    batch = Batch(images, labels, np.ones(4, np.float32), np.arange(4))
    wrapped = wrap(model, is_compiled=job.compile, channels_last=job.channels_last)
    repeated = iter([[batch.slice(0, 2), batch.slice(2, 4)]] * steps)
    events = fit(wrapped, state, repeated, num_samples=4, order_hash="", job=job, dtype=dtype)
    return [float(event.loss) for event in events if isinstance(event, Step)]


@pytest.fixture
def fit_job() -> config.TrainJob:
    overrides = ["batch={global_size: 4, per_worker: 2}", "schedule={epochs: 6, warmup: 0}", "optimizer.lr=3e-3"]
    return example_job("x", "x", *overrides)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"channels_last": True}, torch.float32),
        ({}, torch.bfloat16),
        ({"optimizer": config.Optimizer(name="sgd", lr=0.05)}, torch.float32),
    ],
)
def test_loss_goes_down_with_every_option(
    fit_job: config.TrainJob, options: dict[str, object], dtype: torch.dtype
) -> None:
    losses = losses_of(fit_job.model_copy(update=options), dtype, "cpu")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_goes_down_on_a_gpu(fit_job: config.TrainJob, dtype: torch.dtype, compiled: bool) -> None:
    losses = losses_of(fit_job.model_copy(update={"compile": compiled, "channels_last": True}), dtype, "cuda")
    assert losses[-1] < 0.9 * losses[0]


def test_shards_train_and_only_the_best_stay(example: Path, s3_bucket: str) -> None:
    """Folders to shards on S3, and three epochs from them with one bundle kept."""
    splits = {}
    for split in ("train", "val"):
        source = {"format": "masks", "images": str(example / split / "images"), "masks": str(example / split / "masks")}
        splits[split] = {"format": "shards", "uri": f"{s3_bucket}/shards/{split}"}
        job = {
            "kind": "shard",
            "name": "shards",
            "task": "semantic",
            "classes": str(example / "classes.json"),
            "data": source,
            "output": {"uri": splits[split]["uri"], "rows_per_file": 10, "rows_per_group": 3},
            "scaling": {"workers": 0},
        }
        uri = shard(config.parse_as(config.ShardJob, job)).uri
        assert len([entry for entry in storage.list_files(uri) if entry.path.startswith("shard-")]) == 3
    folders = example_job(str(example), f"{s3_bucket}/runs").model_dump(mode="json")
    folders["data"] |= splits
    folders |= {"scaling": {"workers": 0}, "schedule": {"epochs": 3}, "checkpoint": {"keep": 1}}
    result = train(config.parse_as(config.TrainJob, folders))
    bundles = {entry.path.split("/")[0] for entry in storage.list_files(f"{result.run}/bundles")}
    assert len(bundles) == 1
    assert 2 <= len(checkpoint.steps(result.run)) <= 3
    assert 0 < result.metrics["val/miou"] < 1
