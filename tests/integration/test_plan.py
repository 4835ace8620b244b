"""What a step takes, worked out without running it, against the real step."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_plan
from benchmarks.bench_plan import build, compare_saved, cost_row, make_job, measure_saved, real_models, step
from raysseg import config, standing, worker
from raysseg.advice import plan as planning
from raysseg.advice.costs import Sketch, saved_bytes, tensors_of
from raysseg.advice.gpus import GPUS, find_gpu
from raysseg.advice.phantom import Phantoms, gpu_rules
from raysseg.advice.plan import Ask, Load, choose_per_worker, plan, split_evenly
from raysseg.advice.profiles import read_costs
from raysseg.catalogue import MODELS
from raysseg.cli import main
from raysseg.config import Precision
from raysseg.data import read_class_map
from raysseg.loop import backward
from raysseg.rehearsal import rehearse
from raysseg.schema import InputError
from raysseg.train import train
from tests.conftest import example_job, rows

TINY = [name for name in MODELS if name.endswith("-tiny") and name != "mask2former-swin-tiny"]
RECOMPUTING = [name for name in TINY if MODELS[name].recomputes]
HERE = ("scaling.workers=0", "schedule.epochs=1")


def sketch(job: config.TrainJob, *, on_gpu: bool = False) -> Sketch:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    return Sketch(job, read_class_map(job.classes), dtype, on_gpu=on_gpu)


# --- against the real step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_saved_bytes_are_those_of_the_real_forward_pass(name: str, precision: Precision) -> None:
    for task in MODELS[name].tasks:
        job = make_job(name, task, 128, 3, precision)
        assert sketch(job).run(3).saved == pytest.approx(measure_saved(job), rel=0.01)


@pytest.mark.parametrize(("name", "side"), [("segformer-b0", 128), ("unet", 128), ("deeplabv3plus", 96)])
def test_saved_bytes_of_real_models(name: str, side: int) -> None:
    (row,) = compare_saved([name], side)
    assert abs(float(row["apart %"])) < 1


@pytest.mark.parametrize("name", TINY)
def test_weights_gradients_and_the_optimisers_state(name: str) -> None:
    base = make_job(name, MODELS[name].tasks[0], 128)
    for optimizer in (config.Optimizer(name="sgd", lr=1e-4), config.Optimizer(lr=1e-4)):
        job = base.model_copy(update={"optimizer": optimizer, "ema": config.Ema()})
        fixed = sketch(job).fixed
        state, pairs = build(job)
        step(state, pairs, job)
        parameters = list(state.model.parameters())
        assert fixed.parameters == sum(p.numel() for p in parameters)
        assert fixed.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
        held = [value for values in state.optimizer.state.values() for value in values.values()]
        assert fixed.optimizer == sum(value.nbytes for value in held if isinstance(value, torch.Tensor))
        assert fixed.average == fixed.weights >= sum(p.nbytes for p in parameters)


def test_operations_are_counted_as_torch_counts_them() -> None:
    job = make_job("unet-tiny", "semantic", 128)
    state, pairs = build(job)
    with FlopCounterMode(display=False) as counter:
        backward(state.model, state, pairs, torch.float32)
    assert sketch(job).run(2).flops == counter.get_total_flops()


def test_a_larger_batch_is_what_its_line_says() -> None:
    for name in ("segformer-tiny", "maskrcnn-tiny", "detr-tiny"):
        job = make_job(name, MODELS[name].tasks[0], 128)
        load = Load(job, read_class_map(job.classes), torch.bfloat16)
        for images in (1, 2, 7):
            ran, said = load.run(images), load.memory(images, images, is_alone=True)
            most = max(ran.peak, load.sketch.fixed.update)
            assert said.activations + said.temporary + said.gradients == pytest.approx(most, rel=0.01)
            assert said.inputs == pytest.approx(2 * ran.inputs, rel=0.01)


def test_phantoms_leave_torch_as_it_was() -> None:
    ours, autocast = torch.nn.functional.dropout, torch.autocast("cpu", torch.bfloat16)
    numbers = torch.randn(2, 8, dtype=torch.bfloat16)
    with Phantoms(), gpu_rules(), autocast:
        assert torch.nn.functional.layer_norm(torch.empty(2, 8, dtype=torch.bfloat16), (8,)).dtype == torch.float32
    with autocast:
        assert torch.nn.functional.layer_norm(numbers, (8,)).dtype == torch.bfloat16
    assert torch.nn.functional.dropout is ours
    assert type(torch.empty(1)) is torch.Tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peaks_are_those_that_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plan, "GPU_CASES", [("segformer-b0", 512, 4), ("unet", 512, 8), ("eomt-small", 512, 2)])
    for row in bench_plan.compare_peaks():
        assert abs(float(row["apart %"])) < 15, row


# --- computing layers twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECOMPUTING)
def test_layers_that_are_computed_twice_give_the_same_gradients_and_keep_less(name: str) -> None:
    job = make_job(name, MODELS[name].tasks[0], 128)
    found = []
    for twice in (False, True):
        state, pairs = build(job)
        if twice:
            state.model.recompute_layers()
        torch.manual_seed(1)
        kept: list[int] = []
        with saved_bytes([*state.model.parameters(), *tensors_of(pairs)]) as saved:
            state.model.register_forward_hook(lambda *_, to=kept, of=saved: to.append(of()))
            losses = backward(state.model, state, pairs, torch.float32)
        found.append((losses, [p.grad for p in state.model.parameters()], kept[0]))
    (losses, gradients, kept_whole), (losses_twice, gradients_twice, kept_part) = found
    assert losses == losses_twice
    for one, other in zip(gradients, gradients_twice, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert kept_part < kept_whole
    model = job.model.model_copy(update={"checkpoint_activations": True})
    planned = sketch(job.model_copy(update={"model": model})).run(2).saved
    assert planned == pytest.approx(kept_part, rel=0.01)


def test_models_that_cant_compute_layers_twice_say_so() -> None:
    for name in sorted(set(TINY) - set(RECOMPUTING)):
        raw = make_job(name, MODELS[name].tasks[0], 128).model_dump(mode="json")
        raw["model"]["checkpoint_activations"] = True
        raw.pop("loss")
        with pytest.raises(InputError, match=f"model.checkpoint_activations: {name} can't compute its layers twice"):
            config.parse_as(config.TrainJob, raw)


# --- the tables ---------------------------------------------------------------------------------------------------


def test_costs_cover_all_models_and_are_what_the_command_writes() -> None:
    costs = read_costs()
    assert {name: tuple(tasks) for name, tasks in costs.items()} == {name: MODELS[name].tasks for name in real_models()}
    for name, task in (("segformer-b0", "semantic"), ("maskrcnn-resnet50-fpn", "instance"), ("eomt-small", "panoptic")):
        found = cost_row(name, task)  # type: ignore[arg-type]
        assert asdict(costs[name][task]) == pytest.approx(found, rel=0.01)  # Mask R-CNN draws its samples


def test_what_was_measured_wins_over_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "measured.json"
    table.write_text("[]")
    monkeypatch.setattr(planning, "MEASURED", table)
    monkeypatch.setattr(bench_plan, "MEASURED", table)
    monkeypatch.setattr(bench_plan, "device_name", lambda: "nvidia-a10g")
    monkeypatch.setattr(bench_plan, "measure_rate", lambda job: 12.5)
    for _ in range(2):
        bench_plan.write_speed(["segformer-tiny"], 64, 2, table)
    (row,) = json.loads(table.read_text())
    assert row["device"] == "A10G"
    job = make_job("segformer-tiny", "semantic", 64, 2, row["precision"])
    (choice,) = plan(job, Ask(gpu="A10G", workers=2)).choices
    assert choice.speed is not None
    assert choice.speed.likely == 25
    assert choice.speed.source.startswith("measured")
    assert plan(job, Ask(gpu="L4")).choices[0].speed.source == "estimate"  # type: ignore[union-attr]


def test_a_rate_is_measured_on_this_machine() -> None:
    assert bench_plan.measure_rate(make_job("segformer-tiny", "semantic", 64), seconds=0.1) > 0


# --- the command --------------------------------------------------------------------------------------------------


def test_a_plan_without_data_says_what_it_presumes(capsys: pytest.CaptureFixture[str]) -> None:
    job = "jobs/nuclei-maskrcnn-instance.yaml"
    assert main(["plan", job, "data.train.annotations=/nowhere/x.json", "model.name=maskrcnn-tiny", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [choice["gpu"] for choice in result["choices"]] == list(GPUS)
    assert any("/nowhere/x.json" in line for line in result["presumed"])
    for choice in result["choices"]:
        assert choice["takes"] == sum(choice["memory"].values())
        assert choice["speed"]["low"] < choice["speed"]["likely"] < choice["speed"]["high"]
        assert choice["speed"]["source"] == "estimate"
        assert choice["per_worker"] * choice["accumulation"] * result["workers"] >= result["global_batch"]


def test_a_plan_of_real_data_and_of_a_search(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [
        f"data.{split}.{kind}={example}/{split}/{kind}" for split in ("train", "val") for kind in ("images", "masks")
    ]
    job = "jobs/example-segformer-semantic.yaml"
    arguments = [f"classes={example}/classes.json", *data, "--gpu", "a10g", "--price", "2", "--workers", "2"]
    assert main(["plan", job, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "22 images an epoch" in shown
    assert "A10G  bf16" in shown
    assert "estimates" in shown
    assert main(["plan", "jobs/example-segformer-tune.yaml", "--memory", "8", "--json"]) == 0
    (choice,) = json.loads(capsys.readouterr().out)["choices"]
    assert (choice["gpu"], choice["speed"], choice["usable"]) == (None, None, int(7.25 * 2**30))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "A10H"], "--gpu: received A10H; known: T4, V100, L4, A10G"),
        (["--workers", "0"], "--workers: received 0; allowed: numbers above 0"),
        (["--memory", "lots"], "--memory: received 'lots'; allowed"),
        (["batch.per_worker=0"], "batch.per_worker: received 0; allowed: numbers from 1 on, or auto"),
    ],
)
def test_what_cant_be_planned_is_said(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "jobs/example-segformer-semantic.yaml", *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("memory", "mend"),
    [("1.3GiB", "set model.checkpoint_activations=true: 0.5"), ("1.2GiB", r"set data.crop=\[\d+, \d+\]: 0.3")],
)
def test_what_would_make_it_fit_is_said(memory: str, mend: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.name=segformer-b0", "data.crop=[512, 512]", "batch.global_size=2"]
    assert main(["plan", "jobs/example-segformer-semantic.yaml", *overrides, "--memory", memory]) == 2
    said = capsys.readouterr().err
    assert "segformer-b0 at [512, 512] in bf16 takes 0.5" in said
    assert re.search(mend, said)
    assert "take a GPU with more memory: T4" in said


def test_gpus_are_found_by_their_letters() -> None:
    assert find_gpu("nvidia a100 40GB").name == "A100-40GB"
    assert find_gpu("rtx-4090").name == "RTX4090"


def test_a_share_is_split_evenly() -> None:
    assert [split_evenly(16, largest) for largest in (0, 1, 5, 7, 16, 99)] == [1, 1, 4, 6, 16, 16]


# --- training -----------------------------------------------------------------------------------------------------


def test_auto_is_decided_once_and_changes_no_result(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by_hand = train(example_job(str(example), str(tmp_path), *HERE, "batch={global_size: 8, per_worker: 4}", "name=a"))
    auto = example_job(str(example), str(tmp_path), *HERE, "batch={global_size: 8, per_worker: auto}", "name=b")
    with caplog.at_level(logging.INFO, logger="raysseg"):
        result = train(auto)
    assert "batch.per_worker: auto is 4 here" in caplog.text
    assert [row["train/loss"] for row in rows(result.run)] == [row["train/loss"] for row in rows(by_hand.run)]
    assert json.loads((Path(result.run) / "job.json").read_text())["batch"]["per_worker"] == "auto"
    monkeypatch.setattr(worker, "free_memory", lambda device, scaling: 0.3 * 2**30)  # a run goes on as it began
    train(auto.model_copy(update={"schedule": auto.schedule.model_copy(update={"epochs": 1})}))
    assert standing.per_worker(auto) == 4


def test_auto_goes_by_the_memory_of_the_gpu(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = example_job(str(example), str(tmp_path), *HERE, "batch={global_size: 8, per_worker: auto}")
    classes = read_class_map(job.classes)
    load = Load(job, classes, torch.float32)
    usable = load.memory(3, 8, is_alone=True).total
    monkeypatch.setattr(worker, "free_memory", lambda device, scaling: usable)
    assert np.isfinite([row["train/loss"] for row in rows(train(job).run)]).all()
    assert standing.per_worker(job) == 3  # 8 in passes of 3, 3 and 2


def test_auto_is_decided_by_one_rank_of_several() -> None:
    job = make_job("segformer-tiny", "semantic", 64, 8, "fp16")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert choose_per_worker(job, read_class_map(job.classes), torch.float16, 2**40, 2) == 4
    finally:
        dist.destroy_process_group()


def test_auto_is_for_training_and_kept_in_the_job() -> None:
    raw = make_job("segformer-tiny", "semantic", 64).model_dump(mode="json") | {"batch": {"per_worker": "auto"}}
    job = config.parse_as(config.TrainJob, raw)
    assert job.model_dump(mode="json")["batch"]["per_worker"] == "auto"
    assert config.parse_as(config.TrainJob, job.model_dump(mode="json")) == job
    predict = {"kind": "predict", "name": "a", "bundle": "b", "data": raw["data"]["train"], "batch": raw["batch"]}
    with pytest.raises(InputError, match=r'batch.per_worker: received "auto"; allowed: a whole number'):
        config.parse_as(config.PredictJob, predict | {"output": {"format": "masks", "uri": "c"}})


def test_a_rehearsal_trains_and_keeps_nothing(example: Path, tmp_path: Path) -> None:
    job = example_job(
        str(example), str(tmp_path / "runs"), "scaling.workers=0", "batch={global_size: 4, per_worker: auto}"
    )
    trial = rehearse(job)
    assert trial.images_per_s > 0
    assert trial.input_images_per_s > 0
    assert 0 <= trial.wait_share < 1
    assert trial.memory > 2**20
    assert not (tmp_path / "runs").exists()
