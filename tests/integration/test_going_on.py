"""Runs that are broken off, or that go wrong, in this process: what is saved, what is told, what comes of them."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raysseg import bundle, checkpoint, config, standing, storage, worker
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import iter_chunks
from raysseg.link import Alone, Signals, Wish
from raysseg.loop import build_state
from raysseg.models import Outputs, SegModel, build_model
from raysseg.schema import InputError
from raysseg.storage import StorageError
from raysseg.train import train
from raysseg.worker import train_epochs
from tests.conftest import example_job, plan_of, rows

HERE = ("scaling.workers=0", "schedule.epochs=2", "ema.decay=0.9")
CPU = torch.device("cpu")


@dataclass
class AskAt:
    """Asks at some questions, each after a step or an epoch."""

    wish: Wish
    at: tuple[int, ...]
    asked: int = 0

    def wishes(self) -> Wish:
        self.asked += 1
        return self.wish if self.asked in self.at else Wish.NOTHING

    def mark(self, phase: str, step: int) -> None: ...

    def beat(self) -> None: ...

    def is_preempted(self) -> bool:
        return False


def newest_state(run_uri: str) -> tuple[dict[str, object], dict[str, object]]:
    """The newest checkpoint's manifest and tensors."""
    folder = Path(checkpoint.uri_of(run_uri, checkpoint.steps(run_uri)[-1]))
    (state,) = folder.glob("*.pt")
    return json.loads((folder / checkpoint.MANIFEST).read_text()), torch.load(state, weights_only=True)


def assert_same(a: object, b: object) -> None:
    """Bit for bit, tensor by tensor."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def unbroken(example: Path, tmp_path_factory: pytest.TempPathFactory) -> config.TrainJob:
    """Two epochs of three steps at once."""
    job = example_job(str(example), str(tmp_path_factory.mktemp("unbroken")), *HERE)
    assert len(list(train_epochs(plan_of(job), iter_chunks, CPU, Alone(Signals())))) == 2
    return job


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(
    stop_at: int, unbroken: config.TrainJob, example: Path, tmp_path: Path
) -> None:
    """Weights, optimiser, average and the epochs' rows equal those of a run that was never stopped."""
    job = example_job(str(example), str(tmp_path), *HERE)
    list(train_epochs(plan_of(job), iter_chunks, CPU, AskAt(Wish.STOP, (stop_at,))))
    assert checkpoint.steps(job.run_uri)[-1] == stop_at - (stop_at > 3)  # the fourth question is the first epoch's end
    list(train_epochs(plan_of(job), iter_chunks, CPU, Alone(Signals())))
    manifest, tensors = newest_state(job.run_uri)
    expected_manifest, expected = newest_state(unbroken.run_uri)
    assert_same(tensors, expected)
    assert manifest["ledger"] == expected_manifest["ledger"]
    for ours, theirs in zip(rows(job.run_uri), rows(unbroken.run_uri), strict=True):
        for name in (key for key in theirs if key.startswith("val/") or key in ("epoch", "step", "train/lr")):
            assert ours[name] == pytest.approx(theirs[name], abs=0, nan_ok=True), name
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-12)


def test_checkpoints_within_epochs_come_by_steps(example: Path, tmp_path: Path) -> None:
    job = example_job(str(example), str(tmp_path), *HERE, "checkpoint={every: 2 steps, keep: 9}")
    seen: list[int] = []

    class Watching(Alone):
        def wishes(self) -> Wish:
            time.sleep(0.5)  # a step takes milliseconds here, and one checkpoint is under way at a time
            seen.extend(step for step in checkpoint.steps(job.run_uri) if step not in seen)
            return super().wishes()

    list(train_epochs(plan_of(job), iter_chunks, CPU, Watching(Signals())))
    assert {2, 3, 5} <= set(seen)  # every second step since the last one, and each epoch's end
    assert 6 in checkpoint.steps(job.run_uri)
    manifest, _ = newest_state(job.run_uri)
    assert manifest["ledger"] == {"epoch": 2, "position": 0, "order_hash": manifest["ledger"]["order_hash"]}  # type: ignore[index]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_in_order_and_the_same_command_goes_on(name: str, example: Path, tmp_path: Path) -> None:
    job = example_job(str(example), str(tmp_path), *HERE, "schedule.epochs=400", "checkpoint.every=1 epoch")
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job.model_dump(mode="json")))
    command = [sys.executable, "-m", "raysseg.cli", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(job.run_uri) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), errors
    assert "stopped" in errors
    assert "goes on" in errors
    step = checkpoint.steps(job.run_uri)[-1]
    list(train_epochs(plan_of(job), iter_chunks, CPU, AskAt(Wish.STOP, (1,))))
    assert checkpoint.steps(job.run_uri)[-1] in (step, step + 1)  # where only the validation was to come, no step


def test_early_stopping_ends_a_run_and_holds_when_it_is_run_again(example: Path, tmp_path: Path) -> None:
    rule = "schedule={epochs: 30, early_stopping: {patience: 2, min_delta: 1.0}}"  # nothing is better by so much
    job = example_job(str(example), str(tmp_path), *HERE[:1], rule, "name=early")
    result = train(job)
    assert len(rows(result.run)) == 3  # the first one, and two that were not better
    storage.delete_folder(result.bundle)
    assert train(job).metrics == pytest.approx(result.metrics, nan_ok=True)
    assert len(rows(result.run)) == 3


def test_early_stopping_by_a_metric_that_there_is_not(example: Path, tmp_path: Path) -> None:
    rule = "schedule.early_stopping={patience: 2, metric: val/mious}"
    job = example_job(str(example), str(tmp_path), *HERE[:1], rule)
    with pytest.raises(InputError, match=r"early_stopping\.metric: received 'val/mious'; allowed: .*val/miou"):
        train(job)


def test_the_bundle_holds_the_average_that_validation_scored(unbroken: config.TrainJob) -> None:
    best = json.loads(storage.read_text(f"{unbroken.run_uri}/best.json"))
    weights = load_file(Path(unbroken.run_uri, best["bundle"], "model.safetensors"))
    folder = Path(checkpoint.uri_of(unbroken.run_uri, best["step"]))
    tensors = torch.load(next(folder.glob("*.pt")), weights_only=True)
    average, last = ({k.removeprefix("net."): v for k, v in tensors[name].items()} for name in ("ema", "model"))
    names = [name for name in weights if name in average and weights[name].is_floating_point()]
    assert len(names) > 5  # transformers renames the others
    assert all(torch.equal(weights[name], average[name]) for name in names)
    assert not all(torch.equal(weights[name], last[name]) for name in names)


def test_the_average_is_what_one_computes_by_hand(example: Path) -> None:
    job = example_job(str(example), "unused", *HERE)
    torch.manual_seed(0)
    model = build_model(job.model, read_class_map(job.classes), job.task, job.loss, None)
    state = build_state(model, job.optimizer, torch.float32, config.Ema(decay=0.9))
    assert state.ema is not None
    name, parameter = next(iter(model.named_parameters()))
    expected = parameter.detach().clone().double()
    from raysseg.loop import _average

    for step in range(3):
        with torch.no_grad():
            parameter.add_(1.0)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
        _average(state.ema, model, decay)
    torch.testing.assert_close(state.ema.get_parameter(name).double(), expected, rtol=1e-6, atol=1e-6)
    assert not state.ema.get_parameter(name).requires_grad


# --- steps that go wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def broken_model(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Models whose loss is not a number in some forward passes, counted from 1."""
    bad: set[int] = set()
    count = 0
    build = worker.build_model

    def build_broken(*arguments: object) -> SegModel:
        model = build(*arguments)  # type: ignore[arg-type]
        forward = model.forward

        def broken(*given: object) -> Outputs:
            nonlocal count
            outputs: Outputs = forward(*given)  # type: ignore[arg-type]
            count += model.training
            if count in bad and outputs.losses:
                outputs.losses["cross_entropy"] = outputs.losses["cross_entropy"] * float("nan")
                for module in model.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.running_mean.data.fill_(float("nan"))  # type: ignore[union-attr]
            return outputs

        model.forward = broken  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(worker, "build_model", build_broken)
    return bad


def test_a_loss_that_is_no_number_stops_and_names_its_samples(
    broken_model: set[int], example: Path, tmp_path: Path
) -> None:
    broken_model.add(6)  # global batches of 8 in micro-batches of 2: the second step's second pass
    job = example_job(str(example), str(tmp_path), *HERE)
    with pytest.raises(InputError, match=r"step 2: the gradient is not finite, with the samples .*on_nonfinite=skip"):
        train(job)
    (path,) = Path(job.run_uri, "nonfinite").iterdir()
    told = json.loads(path.read_text())
    index = read_index(job.data.train)
    from raysseg.data.sampling import epoch_order

    order = epoch_order(index, open_groups=job.data.open_shards, seed=job.seed, epoch=0)
    assert told["sample_ids"] == [index.sample_ids[row] for row in order.rows[[10, 11]]]
    assert told["losses"].count("nan") == 1


def test_such_a_step_can_be_left_out(
    broken_model: set[int], example: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken_model.add(6)
    job = example_job(str(example), str(tmp_path), *HERE, "on_nonfinite=skip")
    with caplog.at_level(logging.WARNING, logger="raysseg"):
        result = train(job)
    assert "the step is left out" in caplog.text
    _, tensors = newest_state(result.run)
    assert all(bool(torch.isfinite(t).all()) for t in tensors["model"].values())  # type: ignore[attr-defined]
    assert np.isfinite(rows(result.run)[0]["train/loss"])


def test_too_many_in_a_row_end_the_run(broken_model: set[int], example: Path, tmp_path: Path) -> None:
    broken_model.update(range(1000))
    job = example_job(str(example), str(tmp_path), *HERE, "on_nonfinite=skip", "schedule.epochs=9")
    with pytest.raises(InputError, match=r"step 10: .*10 times in a row"):
        train(job)


def test_memory_that_does_not_suffice_halves_the_passes_once(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What torch raises on a GPU is raised here for passes of more than two images."""
    build, sizes = worker.build_model, []
    limit = 2

    def build_small(*arguments: object) -> SegModel:
        model = build(*arguments)  # type: ignore[arg-type]
        forward = model.forward

        def limited(images: torch.Tensor, *given: object) -> Outputs:
            if model.training:
                sizes.append(len(images))
                if len(images) > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return forward(images, *given)  # type: ignore[arg-type, no-any-return]

        model.forward = limited  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(worker, "build_model", build_small)
    job = example_job(str(example), str(tmp_path), *HERE, "batch={global_size: 8, per_worker: 4}")
    with caplog.at_level(logging.WARNING, logger="raysseg"):
        result = train(job)
    assert "out of memory with batch.per_worker=4; the run goes on with 2" in caplog.text
    assert sizes[0] == 4
    assert max(sizes[1:]) == 2
    assert [row["step"] for row in rows(result.run)] == [3, 6]  # the global batch is as it was
    again = example_job(str(example), str(tmp_path), *HERE, "batch={global_size: 8, per_worker: 3}")
    assert standing.per_worker(job) == 2
    assert standing.per_worker(again) == 3, "what the user sets now counts"
    limit = 1
    other = example_job(str(example), str(tmp_path), *HERE, "batch={global_size: 8, per_worker: 4}", "name=other")
    with pytest.raises(InputError, match=r"batch\.per_worker: 2 images of \[64, 64\] do not fit"):
        train(other)


# --- saving beside training ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_fails_is_left_out_and_an_epoch_that_fails_ends_the_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = example_job(str(example), str(tmp_path), *HERE, "checkpoint.every=1 steps")
    monkeypatch.setattr("raysseg.saver._PAUSES_S", (0.0,))
    write, fails = checkpoint.write, [1, 2]

    def write_badly(run_uri: str, snapshot: checkpoint.Snapshot) -> str:
        if snapshot.step in fails:
            raise StorageError(run_uri, "the storage is away", "Wait.", is_transient=True)
        return write(run_uri, snapshot)

    monkeypatch.setattr(checkpoint, "write", write_badly)
    with caplog.at_level(logging.WARNING, logger="raysseg"):
        list(train_epochs(plan_of(job), iter_chunks, CPU, Alone(Signals())))
    assert "a checkpoint was left out; training goes on" in caplog.text
    assert checkpoint.steps(job.run_uri)[-1] == 6
    fails.append(3)
    other = example_job(str(example), str(tmp_path), *HERE, "checkpoint.every=1 epoch", "name=other")
    with pytest.raises(StorageError, match="the storage is away"):
        list(train_epochs(plan_of(other), iter_chunks, CPU, Alone(Signals())))


@pytest.mark.parametrize("what", ["bundle.write", "standing.settle"])
def test_a_kill_while_the_last_epoch_is_saved_leaves_a_run_that_can_be_finished(
    what: str, example: Path, tmp_path: Path, unbroken: config.TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = example_job(str(example), str(tmp_path), *HERE)
    module, name = {"bundle": bundle, "standing": standing}[what.split(".")[0]], what.split(".")[1]
    original = getattr(module, name)

    def killed(*arguments: object) -> None:
        if checkpoint.steps(job.run_uri):
            raise RuntimeError("killed")
        original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, killed)
        with pytest.raises(RuntimeError, match="killed"):
            list(train_epochs(plan_of(job), iter_chunks, CPU, Alone(Signals())))
    result = train(job)
    assert [row["step"] for row in rows(result.run)] == [3, 6]
    best = json.loads(storage.read_text(f"{unbroken.run_uri}/best.json"))
    assert json.loads(storage.read_text(f"{result.run}/best.json")) == best


def test_a_snapshot_is_not_what_training_changes(example: Path) -> None:
    job = example_job(str(example), "unused", *HERE)
    model = build_model(job.model, read_class_map(job.classes), job.task, job.loss, None)
    state = build_state(model, job.optimizer, torch.float32)
    first = checkpoint.take(state)
    kept = {name: value.clone() for name, value in first.tensors["model"].items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_same(first.tensors["model"], kept)
    again = checkpoint.take(state, into=first)
    name = next(iter(kept))
    assert again.tensors["model"][name].data_ptr() == first.tensors["model"][name].data_ptr()  # memory is lent on
    assert_same(again.tensors["model"], dict(model.state_dict()))


def test_the_newest_two_checkpoints_and_the_best_stay(example: Path, tmp_path: Path) -> None:
    job = example_job(str(example), str(tmp_path), *HERE, "checkpoint={every: 1 steps, keep: 1}", "schedule.epochs=3")
    list(train_epochs(plan_of(job), iter_chunks, CPU, Alone(Signals())))
    assert len(checkpoint.steps(job.run_uri)) <= 3
    assert checkpoint.steps(job.run_uri)[-1] == 9
