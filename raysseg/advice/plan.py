"""`raysseg plan`: what a train job takes, before anything is rented. Memory is worked out, speed is an estimate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from raysseg.advice.amounts import in_gib, to_bytes
from raysseg.advice.costs import DTYPES, Pass, Sketch, peak_of
from raysseg.advice.gpus import BANDWIDTH, CONTEXT, EFFICIENCY, GPUS, SLACK, WORKSPACE, Gpu, find_gpu
from raysseg.advice.profiles import bytes_per_image, read_costs, read_extents
from raysseg.catalogue import MODELS
from raysseg.config import AUTO, Precision, TrainJob
from raysseg.data import read_class_map, read_images, read_index
from raysseg.data.index import Failure, SampleIndex
from raysseg.schema import ClassMap, InputError

MEASURED = Path(__file__).parent / "measured.json"

ON_CPUS = 4  # images of a micro-batch that are worth while

LAUNCH_S = (15e-6, 6e-6)  # an operation takes at least

NUM_CLASSES, IMAGE_BYTES, NUM_IMAGES = 21, 200_000, 10_000  # presumed, where the data can't be read
_LOOK = 16  # images whose size is looked at


@dataclass(frozen=True)
class Ask:
    """What is planned for; None: every GPU that is known, and the job's own numbers.

    Attributes:
        gpu: its name.
        memory: of a GPU that is not known, such as 24GiB.
        workers: of the job.
        price: US dollars an hour of a GPU.
    """

    gpu: str | None = None
    memory: str | None = None
    workers: int | None = None
    price: float | None = None


@dataclass(frozen=True)
class Data:
    """The training data, as far as they can be read.

    Attributes:
        classes: the class list.
        num_images: of an epoch.
        image_bytes: of an image's file, on average.
        presumed: what could not be read, and what is taken instead.
    """

    classes: ClassMap
    num_images: int
    image_bytes: int
    presumed: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU at the fullest moment of a step; they add up to `total`.

    Attributes:
        weights: parameters and buffers.
        gradients: those that are there at that moment.
        optimizer: its state.
        average: the moving average of the weights.
        buckets: in which DDP gathers gradients.
        inputs: images and targets of this step and the next one.
        activations: what forward passes leave for backward passes, the loss among it.
        temporary: what operations need beside: gradients of activations, casts, logits at full size.
        workspace: of cuBLAS and cuDNN; presumed.
        slack: of the allocator; presumed.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    inputs: int
    activations: int
    temporary: int
    workspace: int
    slack: int

    @property
    def allocated(self) -> int:
        """What torch should say is allocated at most."""
        return self.total - self.slack

    @property
    def total(self) -> int:
        """All."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Speed:
    """Images a second of all workers.

    Attributes:
        low: at worst.
        likely: in between.
        high: at best.
        source: `estimate`, from operations and bytes by the rates of data sheets; or when it was measured.
    """

    low: float
    likely: float
    high: float
    source: str = "estimate"


@dataclass(frozen=True)
class Choice:
    """How a job runs on a GPU.

    Attributes:
        gpu: its name; None: it is known by its memory alone.
        usable: bytes that a job can have of it.
        precision: what the job's is there.
        largest: images of the largest micro-batch that fits; 0: not even one.
        per_worker: images of a micro-batch: the job's own, or with `auto` what splits the global batch evenly.
        accumulation: micro-batches of a worker for a global batch.
        fits: whether that does.
        takes: bytes, of which memory says what they are.
        memory: see Memory.
        speed: of all workers; None where nothing is known of the GPU.
        epoch_s: seconds of an epoch, likely.
        epoch_cost: US dollars of an epoch on all workers, likely.
        read_mb_s: 10^6 bytes a second of images that this reads from storage, likely.
    """

    gpu: str | None
    usable: int
    precision: Precision
    largest: int
    per_worker: int
    accumulation: int
    fits: bool
    takes: int
    memory: Memory
    speed: Speed | None
    epoch_s: float | None
    epoch_cost: float | None
    read_mb_s: float | None


@dataclass(frozen=True)
class PlanResult:
    """What `raysseg plan` prints.

    Attributes:
        name: of the job.
        model: its name.
        task: that it is trained for.
        crop: (height, width).
        workers: that share a global batch.
        global_batch: images.
        parameters: all of them.
        trainable: those that learn.
        flops_forward: of an image's forward pass and loss.
        flops_training: of an image in training.
        num_images: of an epoch.
        image_bytes: of an image's file.
        choices: a GPU each.
        presumed: what nobody knows, and what is taken instead.
    """

    name: str
    model: str
    task: str
    crop: tuple[int, int]
    workers: int
    global_batch: int
    parameters: int
    trainable: int
    flops_forward: int
    flops_training: int
    num_images: int
    image_bytes: int
    choices: list[Choice]
    presumed: list[str]


def plan(job: TrainJob, ask: Ask) -> PlanResult:
    """Plans a train job; needs no GPU, no cluster, and no data where the job says enough.

    Raises:
        InputError: there is no such GPU, or the one that is named has no room for a single image.
    """
    wanted = _wanted(ask)
    data = read_data(job)
    planner = Planner(job, data.classes, ask.workers or max(1, job.scaling.max_workers))
    choices = [_choose(planner, data, gpu, usable, ask.price) for gpu, usable in wanted]
    if len(choices) == 1 and choices[0].largest == 0:
        raise InputError(_too_small(planner, choices[0]))
    load = planner.load(choices[0].precision)
    fixed, seen = load.sketch.fixed, load.run(3)
    return PlanResult(
        name=job.name,
        model=job.model.name,
        task=job.task,
        crop=job.data.crop,
        workers=planner.workers,
        global_batch=job.batch.global_size,
        parameters=fixed.parameters,
        trainable=fixed.trainable,
        flops_forward=seen.flops_forward // 3,
        flops_training=seen.flops // 3,
        num_images=data.num_images,
        image_bytes=data.image_bytes,
        choices=choices,
        presumed=[*data.presumed, *_presumed(job)],
    )


def _wanted(ask: Ask) -> list[tuple[Gpu | None, int]]:
    """The GPUs to plan for, and the bytes that a job can have of each; raises InputError for what can't be."""
    for option, number in (("--workers", ask.workers), ("--price", ask.price)):
        if number is not None and number <= 0:
            raise InputError(f"{option}: received {number}; allowed: numbers above 0")
    memory = None
    if ask.memory is not None:
        text = ask.memory if any(letter.isalpha() for letter in ask.memory) else f"{ask.memory}GiB"
        memory = to_bytes(text, "--memory")
    if ask.gpu is None and memory is not None:
        return [(None, int(memory - CONTEXT))]
    found = list(GPUS.values()) if ask.gpu is None else [find_gpu(ask.gpu)]
    return [(gpu, int((memory or gpu.memory * 2**30) - CONTEXT)) for gpu in found]


def _presumed(job: TrainJob) -> Iterator[str]:
    yield f"{WORKSPACE / 2**20:.0f} MiB for cuBLAS and cuDNN, {SLACK:.0%} of what batches take for the allocator"
    if job.model.weights is not None:
        yield "weights are not read: they are of the size that model.name says"
    if job.compile:
        yield "memory and speed are those without torch.compile"


# --- the data -----------------------------------------------------------------------------------------------------


def read_data(job: TrainJob) -> Data:
    """Looks at the training data; what can't be read is presumed."""
    presumed: list[str] = []
    try:
        classes = read_class_map(job.classes, job.data.train)
    except (InputError, OSError) as error:
        names = [f"class {i}" for i in range(NUM_CLASSES)] if isinstance(job.classes, str | None) else job.classes
        classes = read_class_map(names)
        presumed.append(f"{len(classes)} classes: {_first_line(error)}")
    try:
        index = read_index(job.data.train)
        num_images, image_bytes = len(index), _mean_bytes(index.thinned(_LOOK))
    except (InputError, OSError) as error:
        num_images, image_bytes = NUM_IMAGES, IMAGE_BYTES
        presumed.append(f"{NUM_IMAGES} images of {IMAGE_BYTES // 1000} kB: {_first_line(error)}")
    return Data(classes, num_images, image_bytes, tuple(presumed))


def _mean_bytes(index: SampleIndex) -> int:
    sizes = [len(sample.image) for sample in read_images(index) if not isinstance(sample, Failure) and sample.image]
    return sum(sizes) // len(sizes) if sizes else IMAGE_BYTES


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


# --- memory -------------------------------------------------------------------------------------------------------


class Load:
    """What a job takes in one precision; micro-batches are run as phantoms when they are asked for.

    Attributes:
        sketch: of the job.
    """

    def __init__(self, job: TrainJob, classes: ClassMap, dtype: torch.dtype) -> None:
        self._runs: dict[int, Pass] = {}
        self.sketch = Sketch(job, classes, dtype, on_gpu=True)

    def run(self, images: int) -> Pass:
        """A micro-batch of so many images."""
        if images not in self._runs:
            self._runs[images] = self.sketch.run(images)
        return self._runs[images]

    def memory(self, per_worker: int, share: int, *, is_alone: bool) -> Memory:
        """Of a worker; a single image is run by itself, as torch does without some copies then.

        Args:
            per_worker: images of a micro-batch.
            share: of a global batch, images of this worker.
            is_alone: there are no other workers.
        """
        few, more = (self.run(1), self.run(1)) if per_worker == 1 else (self.run(2), self.run(3))
        peak = peak_of(few, more, per_worker)
        saved = few.saved + (per_worker - few.images) * (more.saved - few.saved)
        fixed = self.sketch.fixed
        # from the second micro-batch on, all gradients are there from the start
        most = max(peak + (fixed.gradients if share > per_worker else 0), fixed.update)
        inputs = 2 * share * more.inputs // more.images
        gradients = max(0, min(fixed.gradients, most - saved))
        return Memory(
            weights=fixed.weights,
            gradients=gradients,
            optimizer=fixed.optimizer,
            average=fixed.average,
            buckets=0 if is_alone else fixed.gradients,
            inputs=inputs,
            activations=saved,
            temporary=max(0, most - saved - gradients),
            workspace=int(WORKSPACE),
            slack=int(SLACK * (most + inputs)),
        )

    def largest(self, usable: float, share: int, *, is_alone: bool) -> int:
        """Images of the largest micro-batch, of a share, that fits into so many bytes; 0: none does."""
        low, high = 0, share
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.memory(middle, share, is_alone=is_alone).total <= usable
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def split_evenly(share: int, largest: int) -> int:
    """Images of a micro-batch, so that a worker's share of a global batch falls into as few, even ones as fit."""
    return math.ceil(share / math.ceil(share / max(1, largest)))


def choose_per_worker(job: TrainJob, classes: ClassMap, dtype: torch.dtype, usable: float, workers: int) -> int:
    """What `batch.per_worker: auto` is.

    Args:
        job: see TrainJob.
        classes: its class list.
        dtype: of its passes.
        usable: bytes that a worker can have of its GPU; infinitely many on CPUs, where larger passes are no faster.
        workers: that share a global batch.
    """
    share = math.ceil(job.batch.global_size / workers)
    if math.isinf(usable):
        return split_evenly(share, ON_CPUS)
    return split_evenly(share, Load(job, classes, dtype).largest(usable, share, is_alone=workers == 1))


class Planner:
    """A job and the loads of its precisions.

    Attributes:
        job: see TrainJob.
        classes: its class list.
        workers: that share a global batch.
        share: of a global batch, images of each of them.
    """

    def __init__(self, job: TrainJob, classes: ClassMap, workers: int) -> None:
        self.job, self.classes, self.workers = job, classes, workers
        self.share = math.ceil(job.batch.global_size / workers)
        self._loads: dict[Precision, Load] = {}

    def memory(self, load: Load, per_worker: int) -> Memory:
        """Of each worker, with a load of the job's or one that is changed."""
        return load.memory(per_worker, self.share, is_alone=self.workers == 1)

    def load(self, precision: Precision) -> Load:
        """The job's, in a precision that is not `auto`."""
        if precision not in self._loads:
            self._loads[precision] = Load(self.job, self.classes, DTYPES[precision])
        return self._loads[precision]


def _choose(planner: Planner, data: Data, gpu: Gpu | None, usable: int, price: float | None) -> Choice:
    """How the job runs on a GPU."""
    job, workers = planner.job, planner.workers
    asked = job.precision
    precision = gpu.resolve(asked) if gpu is not None else ("bf16" if asked == "auto" else asked)
    load = planner.load(precision)
    share, own = planner.share, job.batch.per_worker
    largest = load.largest(usable, share, is_alone=workers == 1)
    per_worker = split_evenly(share, largest) if own == AUTO else min(own, share)
    memory = planner.memory(load, per_worker)
    speed = _speed(planner, gpu, precision, per_worker) if gpu is not None else None
    seconds = data.num_images / speed.likely if speed is not None else None
    hourly = None if gpu is None else price if price is not None else gpu.price
    return Choice(
        gpu=gpu.name if gpu is not None else None,
        usable=usable,
        precision=precision,
        largest=largest,
        per_worker=per_worker,
        accumulation=math.ceil(share / per_worker),
        fits=per_worker <= largest,
        takes=memory.total,
        memory=memory,
        speed=speed,
        epoch_s=seconds,
        epoch_cost=hourly * workers * seconds / 3600 if hourly is not None and seconds is not None else None,
        read_mb_s=speed.likely * data.image_bytes / 1e6 if speed is not None else None,
    )


# --- speed --------------------------------------------------------------------------------------------------------


def _speed(planner: Planner, gpu: Gpu, precision: Precision, per_worker: int) -> Speed:
    """Images a second of all workers: measured, if that was done for this very case, else the roofline's."""
    job = planner.job
    case = (job.model.name, job.task, list(job.data.crop), precision, gpu.name)
    for row in read_measured():
        if (row.model, row.task, list(row.crop), row.precision, row.device) == case:
            rate = row.images_per_s * planner.workers
            return Speed(rate, rate, rate, f"measured {row.date} with {row.per_worker} images a pass")
    seconds = [_pass_seconds(planner.load(precision).run(3), gpu, precision, per_worker, end) for end in (0, 1)]
    low, high = (planner.workers * per_worker / each for each in seconds)
    return Speed(low, math.sqrt(low * high), high)


def _pass_seconds(seen: Pass, gpu: Gpu, precision: Precision, per_worker: int, end: int) -> float:
    """A micro-batch's time by the roofline (Williams et al. 2009), at worst (end 0) or at best (end 1).

    At best, computing and moving go on at once, and launching too; at worst, one waits for the other.
    """
    images = per_worker / seen.images
    rate = (gpu.single if precision == "fp32" else gpu.half) * 1e12
    computing = images * seen.flops / (rate * EFFICIENCY[end])
    moving = images * seen.traffic / (gpu.bandwidth * 1e9 * BANDWIDTH[end])
    launching = seen.launches * LAUNCH_S[end]
    return max(computing + moving, launching) if end == 0 else max(computing, moving, launching)


@dataclass(frozen=True)
class Measured:
    """A measured rate of training.

    Attributes:
        model: its name.
        task: that it was trained for.
        crop: (height, width).
        precision: of the passes.
        device: a GPU of the table, or such as `cpu2` for two cores.
        per_worker: images of a micro-batch.
        images_per_s: of one worker.
        date: of the measurement.
    """

    model: str
    task: str
    crop: tuple[int, int]
    precision: Precision
    device: str
    per_worker: int
    images_per_s: float
    date: str


def read_measured() -> list[Measured]:
    """What was measured so far; `python -m benchmarks.bench_plan --part speed` adds to it."""
    return [Measured(**{**row, "crop": tuple(row["crop"])}) for row in json.loads(MEASURED.read_text())]


# --- what would help ----------------------------------------------------------------------------------------------


def _too_small(planner: Planner, choice: Choice) -> str:
    """Why not a single image fits, and what would make it fit."""
    job, usable = planner.job, choice.usable
    need = planner.memory(planner.load(choice.precision), 1).total
    where = choice.gpu or "the GPU"
    mends = list(_mends(planner, choice))
    return (
        f"{job.model.name} at {list(job.data.crop)} in {choice.precision} takes {in_gib(need)} for a single image, and "
        f"a job can have {in_gib(usable)} of {where}; " + "; or ".join(mends or ["take a larger GPU"])
    )


def _mends(planner: Planner, choice: Choice) -> Iterator[str]:
    """Changes that make one image fit, each with what it comes to."""
    for what, changed, precision in _changes(planner.job, choice):
        need = planner.memory(Load(changed, planner.classes, DTYPES[precision]), 1).total
        if need <= choice.usable:
            yield f"set {what}: {in_gib(need)}"
            break  # the least that has to change; the others are tried alone no more
    if smaller_models := _smaller_models(planner.job, choice.usable):
        yield f"take a smaller model: {', '.join(smaller_models)}"
    total = planner.memory(planner.load(choice.precision), 1).total
    if larger := [gpu.name for gpu in GPUS.values() if gpu.memory * 2**30 - CONTEXT >= total]:
        yield f"take a GPU with more memory: {', '.join(larger)}"


def _changes(job: TrainJob, choice: Choice) -> Iterator[tuple[str, TrainJob, Precision]]:
    """What of the job could be set otherwise, the job with that, and its precision; what costs least first."""
    if choice.precision == "fp32" and (choice.gpu is None or GPUS[choice.gpu].has_bf16):
        yield "precision=bf16", job, "bf16"
    if MODELS[job.model.name].recomputes and not job.model.checkpoint_activations:
        model = job.model.model_copy(update={"checkpoint_activations": True})
        yield "model.checkpoint_activations=true", job.model_copy(update={"model": model}), choice.precision
    for share in (0.75, 0.5, 0.25):
        crop = tuple(max(64, round(side * share / 32) * 32) for side in job.data.crop)
        data = job.data.model_copy(update={"crop": crop})
        yield f"data.crop={list(crop)}", job.model_copy(update={"data": data}), choice.precision


def _smaller_models(job: TrainJob, usable: int) -> list[str]:
    """Models for the same task that take less than a job can have, by their profiles; at most three, the largest."""
    extents = read_extents()
    needs = {
        name: profile.bytes_fixed + bytes_per_image(profile, extents[name], job.data.crop) + WORKSPACE
        for name, tasks in read_costs().items()
        if (profile := tasks.get(job.task)) is not None and name != job.model.name
    }
    fitting = sorted((need, name) for name, need in needs.items() if need * (1 + SLACK) <= usable)
    return [f"{name} (about {in_gib(need)})" for need, name in fitting[-3:][::-1]]
