"""What `raysseg plan` says against what is measured: saved bytes on the CPU, and peaks on a GPU.

--costs writes the table that advice goes by, --part speed the measured rates that win over estimates.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.bench_train import DEVICE
from benchmarks.results import device_name, write_result
from raysseg.advice.costs import DTYPES, Sketch, bare_job, profile, saved_bytes, sketch_targets, tensors_of
from raysseg.advice.gpus import GPUS
from raysseg.advice.plan import MEASURED, Ask, Load, Measured, plan, read_measured
from raysseg.advice.profiles import COSTS
from raysseg.catalogue import MODELS
from raysseg.config import Precision, TrainJob
from raysseg.data import read_class_map
from raysseg.loop import TrainState, backward, build_state, update
from raysseg.models import Targets, build_model
from raysseg.schema import Task

NUM_CLASSES = 21
GPU_CASES = [  # model, side of the crop, images of a micro-batch
    *(("segformer-b0", 512, n) for n in (2, 8)),
    *(("segformer-b3", 512, n) for n in (2, 4)),
    *(("unet", 512, n) for n in (4, 16)),
    ("deeplabv3plus", 512, 8),
    *(("maskrcnn-resnet50-fpn", 512, n) for n in (2, 8)),
    ("maskrcnn-resnet50-fpn-v2", 768, 2),
    *(("detr-resnet-50", side, 2) for side in (384, 512)),
    *(("mask2former-swin-tiny", side, 2) for side in (384, 512)),
    *(("eomt-base", side, 4) for side in (384, 512)),
    ("rfdetr-seg-nano", 312, 4),
]


def make_job(model: str, task: Task, side: int, per_worker: int = 2, precision: Precision = "fp32") -> TrainJob:
    """A job that names no data; see bare_job."""
    return bare_job(model, task, NUM_CLASSES, (side, side), images=per_worker, precision=precision)


def real_models() -> list[str]:
    """All but the tiny ones, which are for tests."""
    return [name for name in MODELS if not name.endswith("-tiny") or name == "mask2former-swin-tiny"]


# --- tables that the package holds --------------------------------------------------------------------------------


def cost_row(model: str, task: Task) -> dict[str, int]:
    """A row of costs.json."""
    return asdict(profile(model, task, NUM_CLASSES, (512, 512)))


def write_costs() -> None:
    """Writes the profiles of all models."""
    content = {}
    for model in real_models():
        content[model] = {task: cost_row(model, task) for task in MODELS[model].tasks}
        print(model, json.dumps(content[model]), flush=True)
    COSTS.write_text(json.dumps(content, indent=1) + "\n")


def write_speed(models: Sequence[str], side: int, per_worker: int, path: Path = MEASURED) -> None:
    """Measures training on this machine and puts the rates in the place of older ones."""
    precision: Precision = "bf16" if DEVICE.type == "cuda" else "fp32"
    device = next((name for name in GPUS if _is(name, device_name())), device_name())
    rows = []
    for model in models:
        job = make_job(model, MODELS[model].tasks[0], side, per_worker, precision)
        rate, size = round(measure_rate(job), 3), (side, side)
        date = time.strftime("%Y-%m-%d")
        rows.append(Measured(model, job.task, size, precision, device, per_worker, rate, date))
        print(asdict(rows[-1]), flush=True)
    new = {_case(row) for row in rows}
    kept = [row for row in read_measured() if _case(row) not in new]
    path.write_text(json.dumps([asdict(row) for row in [*kept, *rows]], indent=1) + "\n")


def _is(gpu: str, device: str) -> bool:
    """Whether a GPU of the table is the one that torch names so."""
    return re.fullmatch(rf"(nvidia-|geforce-)*{gpu.lower().replace('rtx', 'rtx-')}(-.*)?", device) is not None


def _case(row: Measured) -> tuple[object, ...]:
    return (row.model, row.task, row.crop, row.precision, row.device)


# --- the real step ------------------------------------------------------------------------------------------------


def build(job: TrainJob) -> tuple[TrainState, list[tuple[torch.Tensor, Targets]]]:
    """A job's state and one micro-batch, on the device."""
    classes = read_class_map(job.classes)
    torch.manual_seed(0)
    model = build_model(job.model, classes, job.task, job.loss).train().to(DEVICE)
    model.work_most()
    images = job.batch.per_worker
    targets = sketch_targets(job.task, classes, images, job.data.crop)
    moved = [tensor.to(DEVICE) for tensor in (targets.labels, targets.weights)]
    regions = targets.regions and tuple(type(r)(*(tensor.to(DEVICE) for tensor in r)) for r in targets.regions)
    pixels = torch.randint(0, 256, (images, 3, *job.data.crop), dtype=torch.uint8).to(DEVICE)
    state = build_state(model, job.optimizer, DTYPES[job.precision], job.ema)
    return state, [(pixels, Targets(*moved, targets.seeds, regions))]


def step(state: TrainState, pairs: list[tuple[torch.Tensor, Targets]], job: TrainJob) -> None:
    """A training step."""
    backward(state.model, state, pairs, DTYPES[job.precision])
    update(state, job)


def measure_rate(job: TrainJob, seconds: float = 10.0) -> float:
    """Images a second of training steps, over about so many seconds."""
    state, pairs = build(job)
    step(state, pairs, job)
    before, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - before < seconds:
        step(state, pairs, job)
        steps += 1
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return steps * job.batch.per_worker / (time.perf_counter() - before)


def measure_saved(job: TrainJob) -> int:
    """Bytes that a real forward pass on the CPU leaves for the backward pass."""
    state, pairs = build(job)
    dtype = DTYPES[job.precision]
    model = state.model
    with saved_bytes([*model.parameters(), *model.buffers(), *tensors_of(pairs)]) as saved:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(*pairs[0], model.normalisers(pairs[0][1]))
        return saved()


def compare_saved(models: Sequence[str], side: int) -> list[dict[str, str | float]]:
    """Planned against real saved bytes on the CPU, a row a model."""
    rows = []
    for model in models:
        job = make_job(model, MODELS[model].tasks[0], side)
        sketch = Sketch(job, read_class_map(job.classes), torch.float32, on_gpu=False)
        planned = sketch.run(job.batch.per_worker).saved
        measured = measure_saved(job)
        what = {"model": model, "task": job.task, "images": f"2 of {side}x{side}"}
        mib = {"planned MiB": planned / 2**20, "measured MiB": measured / 2**20}
        rows.append({**what, **mib, "apart %": 100 * (planned / measured - 1)})
        print(rows[-1], flush=True)
    return rows


def time_plans(models: Sequence[str]) -> list[dict[str, str | float]]:
    """CPU seconds of a plan for one GPU, imports left out, at 512x512; one thread takes as long where it is alone."""
    rows = []
    for model in models:
        job = make_job(model, MODELS[model].tasks[0], 512, 16, "auto")
        Sketch(make_job(model, job.task, 64), read_class_map(job.classes), torch.float32, on_gpu=True)  # imports
        started = time.process_time()
        plan(job, Ask(gpu="H200"))
        rows.append({"model": model, "plan s": time.process_time() - started})
        print(rows[-1], flush=True)
    return rows


# --- on a GPU -----------------------------------------------------------------------------------------------------


def measure_peak(job: TrainJob) -> int:
    """What torch says was allocated at most in two steps."""
    torch.cuda.empty_cache()
    state, pairs = build(job)
    step(state, pairs, job)
    torch.cuda.reset_peak_memory_stats()
    step(state, pairs, job)
    return torch.cuda.max_memory_allocated()


def compare_peaks() -> list[dict[str, str | float]]:
    """Planned against real peaks in bf16; the planned inputs are those of one step here."""
    rows = []
    for model, side, images in GPU_CASES:
        job = make_job(model, MODELS[model].tasks[0], side, images, "bf16")
        planned = Load(job, read_class_map(job.classes), torch.bfloat16).memory(images, images, is_alone=True)
        expected = planned.allocated - planned.inputs // 2
        measured = measure_peak(job)
        what = {"model": model, "task": job.task, "images": f"{images} of {side}x{side}"}
        gib = {"planned GiB": expected / 2**30, "measured GiB": measured / 2**30}
        rows.append({**what, **gib, "apart %": 100 * (expected / measured - 1)})
    return rows


def try_edge(model: str, side: int, share: float) -> dict[str, str | float]:
    """The largest micro-batch that a share of this GPU's memory should hold, and whether it and one more do.

    The share keeps batches, and hence minutes, few; torch then refuses to allocate more.
    """
    usable = torch.cuda.mem_get_info()[0] * share
    torch.cuda.set_per_process_memory_fraction(usable / torch.cuda.get_device_properties(DEVICE).total_memory)
    job = make_job(model, MODELS[model].tasks[0], side, 1, "bf16")
    load = Load(job, read_class_map(job.classes), torch.bfloat16)
    largest = max(n for n in range(512) if n == 0 or load.memory(n, n, is_alone=True).total <= usable)
    fits = [_fits(make_job(model, job.task, side, images, "bf16")) for images in (largest, largest + 1, largest + 2)]
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"model": model, "edge": largest, "fits": fits[0], "one more": fits[1], "two more": fits[2]}


def _fits(job: TrainJob) -> bool:
    try:
        measure_peak(job)
    except torch.OutOfMemoryError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", action="store_true", help="write raysseg/advice/costs.json")
    parser.add_argument("--part", choices=("saved", "time", "gpu", "speed"))
    parser.add_argument("--models", nargs="*", help="default: all")
    parser.add_argument("--side", type=int, default=256, help="of the crops")
    parser.add_argument("--images", type=int, default=2, help="of a micro-batch; of --part speed")
    options = parser.parse_args()
    models = options.models or real_models()
    if options.costs:
        write_costs()
    if options.part == "saved":
        which = "-".join(["plan-saved", *(options.models or [])[:1]])
        write_result(which, device_name(), compare_saved(models, options.side), vars(options))
    if options.part == "time":
        write_result("plan-time", device_name(), time_plans(models), vars(options))
    if options.part == "speed":
        write_speed(models, options.side, options.images)
    if options.part == "gpu":
        if not torch.cuda.is_available():
            parser.error("--part gpu needs a CUDA device; there is none here")
        write_result("plan-peaks", device_name(), compare_peaks(), vars(options))
        edges = [try_edge(model, 512, 0.1) for model in ("segformer-b0", "unet", "maskrcnn-resnet50-fpn", "eomt-base")]
        write_result("plan-edges", device_name(), edges, vars(options))


if __name__ == "__main__":
    main()
