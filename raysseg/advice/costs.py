"""What a training step takes: parameters, operations and memory, from the real step run on phantoms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from raysseg import config
from raysseg.advice.phantom import Phantom, Phantoms, gpu_rules
from raysseg.advice.profiles import Profile
from raysseg.config import Precision, TrainJob
from raysseg.data import read_class_map
from raysseg.loop import TrainState, backward, build_state, update
from raysseg.models import Regions, Targets, outline_model
from raysseg.schema import ClassMap, Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NUM_REGIONS = 16  # of an image, where nobody knows how many it has


@dataclass(frozen=True)
class Fixed:
    """What does not depend on the batch.

    Attributes:
        parameters: all of them.
        trainable: those that learn.
        weights: bytes of parameters and buffers.
        gradients: bytes.
        optimizer: bytes of its state.
        average: bytes of the moving average of the weights.
        update: the most bytes at once while the optimiser works, beside weights, its state and the average.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    update: int


@dataclass(frozen=True)
class Pass:
    """What a step of some micro-batches takes.

    Attributes:
        images: of a micro-batch.
        inputs: bytes of its images and targets.
        saved: bytes that its forward pass leaves for the backward pass.
        peaks: bytes at most, beside inputs, weights, optimiser and average, in each part of forward and backward
            passes; gradients count as they come. A part ends where a module is entered or left, or a gradient is there:
            parts are the same for any number of images.
        flops_forward: of a micro-batch's forward pass and loss.
        flops: of its forward and backward pass.
        traffic: bytes that its operations read and write in both.
        launches: its operations.
    """

    images: int
    inputs: int
    saved: int
    peaks: tuple[int, ...]
    flops_forward: int
    flops: int
    traffic: int
    launches: int

    @property
    def peak(self) -> int:
        """The most bytes of any part."""
        return max(self.peaks)


def peak_of(few: Pass, more: Pass, images: int) -> int:
    """The peak of any number of images: each part's grows by the same with each image, but not all by the same."""
    steps = (images - few.images) / max(1, more.images - few.images)
    if len(few.peaks) != len(more.peaks):
        return round(few.peak + steps * (more.peak - few.peak))
    return round(max(a + steps * (b - a) for a, b in zip(few.peaks, more.peaks, strict=True)))


class Sketch:
    """A job's model, optimiser and average as phantoms, which go through the steps of `raysseg.loop`.

    Attributes:
        fixed: see Fixed.
    """

    def __init__(self, job: TrainJob, classes: ClassMap, dtype: torch.dtype, *, on_gpu: bool) -> None:
        self._job, self._classes, self._dtype, self._on_gpu = job, classes, dtype, on_gpu
        self._phantoms = Phantoms()
        weights = (1.0,) * len(classes) if job.loss.class_weights is not None else None
        with self._drawing():
            self._phantoms.is_building = True
            model = outline_model(job.model, classes, job.task, job.loss, weights).train()
            self._phantoms.is_building = False
            model.work_most()
            self._state = build_state(
                model, job.optimizer, torch.float32, job.ema
            )  # fp16's scaler holds next to nothing
            if job.model.checkpoint_activations:
                model.recompute_layers()
            self._phantoms.forget(_weights_of(self._state))
        self.fixed = self._measure_fixed()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        alone = patch.object(dist, "is_initialized", bool)  # the other ranks have no part in this
        with alone, self._phantoms, gpu_rules() if self._on_gpu else nullcontext():
            yield

    def _measure_fixed(self) -> Fixed:
        """Two updates, of which the first one builds the optimiser's state."""
        allocator, model = self._phantoms.allocator, self._state.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = _num_bytes([*model.parameters(), *model.buffers()])
        average = 0 if self._state.ema is None else weights
        with self._drawing():
            start = allocator.live
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            self._state.optimizer.step()
            gradients = _num_bytes(trained)
            optimizer = allocator.live - start - gradients
            allocator.mark()
            update(self._state, self._job)
            peak = allocator.mark() - start - optimizer
            if self._on_gpu and self._job.optimizer.name == "sgd":
                peak += gradients  # there, weight decay makes a copy of them all at once
            self._state.optimizer.zero_grad(set_to_none=True)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        num_trainable = sum(parameter.numel() for parameter in trained)
        return Fixed(num_parameters, num_trainable, weights, gradients, optimizer, average, peak)

    def run(self, images: int, num_passes: int = 1) -> Pass:
        """A step over so many micro-batches of so many images."""
        phantoms, allocator, model = self._phantoms, self._phantoms.allocator, self._state.model
        after_forward: list[tuple[int, int]] = []
        with self._drawing():
            before = allocator.live
            pairs = [self._batch(images) for _ in range(num_passes)]
            start = allocator.live
            phantoms.flops = phantoms.traffic = phantoms.launches = 0
            allocator.mark()
            with saved_bytes([*model.parameters(), *model.buffers(), *tensors_of(pairs)]) as saved:
                hook = model.register_forward_hook(lambda *_: after_forward.append((saved(), phantoms.flops)))
                with self._parted() as peaks:
                    backward(model, self._state, pairs, self._dtype)
                hook.remove()
            self._state.optimizer.zero_grad(set_to_none=True)
        saved_first, flops_forward = after_forward[0]
        return Pass(
            images=images,
            inputs=(start - before) // num_passes,
            saved=saved_first,
            peaks=tuple(peak - start for peak in peaks),
            flops_forward=flops_forward,
            flops=phantoms.flops // num_passes,
            traffic=phantoms.traffic // num_passes,
            launches=phantoms.launches // num_passes,
        )

    @contextmanager
    def _parted(self) -> Iterator[list[int]]:
        """Gives the peaks of the parts of passes within it; see Pass."""
        model, allocator, peaks = self._state.model, self._phantoms.allocator, list[int]()

        def mark(*_: object) -> None:
            peaks.append(allocator.mark())

        hooks = [module.register_forward_pre_hook(mark) for module in model.modules()]
        hooks += [module.register_forward_hook(mark) for module in model.modules()]
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            hooks.append(parameter.register_post_accumulate_grad_hook(mark))  # type: ignore[no-untyped-call]
        yield peaks
        mark()
        for hook in hooks:
            hook.remove()

    def _batch(self, images: int) -> tuple[Tensor, Targets]:
        """Images that nobody knows, and targets; see sketch_targets."""
        targets = sketch_targets(self._job.task, self._classes, images, self._job.data.crop)
        return torch.empty((images, 3, *self._job.data.crop), dtype=torch.uint8), targets


def sketch_targets(task: Task, classes: ClassMap, images: int, size: tuple[int, int]) -> Targets:
    """Targets of images that are cut into bands from top to bottom, a class and a region each."""
    height, width = size
    things = [i for i in range(len(classes)) if task == "semantic" or classes.things[i]] or [0]
    bands = torch.arange(height) * NUM_REGIONS // height  # (H,)
    class_ids = torch.tensor([things[i % len(things)] for i in range(NUM_REGIONS)])
    labels = class_ids[bands][None, :, None].expand(images, height, width).contiguous()
    regions = None
    if task != "semantic":
        masks = [(bands == torch.arange(NUM_REGIONS)[:, None])[..., None].expand(-1, -1, width) for _ in range(images)]
        regions = tuple(Regions(each.contiguous(), class_ids) for each in masks)
    return Targets(labels, torch.ones(images), torch.arange(images), regions)


@contextmanager
def saved_bytes(own: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Counts what forward passes within it leave for backward passes, each storage once; gives the sum so far.

    Args:
        own: what is there anyway, and does not count: weights, images, targets.
    """
    left_out = {_storage_of(tensor)[0] for tensor in own}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place, num_bytes = _storage_of(tensor)
        if place not in left_out:
            found[place] = num_bytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(found.values())


def tensors_of(pairs: Sequence[tuple[Tensor, Targets]]) -> Iterator[Tensor]:
    """All that batches hold."""
    for images, targets in pairs:
        yield from (images, targets.labels, targets.weights, targets.seeds)
        for region in targets.regions or ():
            yield from region


def _storage_of(tensor: Tensor) -> tuple[int, int]:
    """Which storage a tensor lies in, and its bytes."""
    if isinstance(tensor, Phantom):
        return id(tensor.block), tensor.block.num_bytes
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _weights_of(state: TrainState) -> Iterable[Tensor]:
    """Weights and buffers, but for the class weights of losses: code looks at these."""
    for model in (state.model, state.ema):
        if model is not None:
            yield from model.parameters()
            yield from (buffer for name, buffer in model.named_buffers() if not name.startswith("criterion."))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their blocks, each counted once."""
    return sum(dict(map(_storage_of, tensors)).values())


# --- profiles -----------------------------------------------------------------------------------------------------


def bare_job(
    model: str, task: Task, num_classes: int, size: tuple[int, int], *, images: int = 16, precision: Precision = "auto"
) -> TrainJob:
    """A job from scratch with the settings of the model's authors, which names no data.

    Args:
        model: a name of raysseg.catalogue.MODELS.
        task: that it is trained for.
        num_classes: of the data.
        size: (height, width) of crops.
        images: of the global batch, in one pass of one worker.
        precision: of the passes.
    """
    nowhere = {"format": "masks", "images": "-", "masks": "-"}
    raw = {
        "kind": "train",
        "name": "bare",
        "task": task,
        "classes": [f"class {i}" for i in range(num_classes)],
        "data": {"train": nowhere, "val": nowhere, "crop": list(size)},
        "model": {"name": model, "weights": None},
        "batch": {"global_size": images, "per_worker": images},
        "precision": precision,
        "storage": "-",
    }
    return config.parse_as(TrainJob, raw)


def profile(model: str, task: Task, num_classes: int, size: tuple[int, int], precision: Precision = "bf16") -> Profile:
    """What training takes on a GPU, from scratch, with the settings of the model's authors.

    Args:
        model: a name of raysseg.catalogue.MODELS.
        task: that it is trained for.
        num_classes: of the data.
        size: (height, width) of crops.
        precision: auto is bf16.
    """
    job = bare_job(model, task, num_classes, size)
    dtype = DTYPES["bf16" if precision == "auto" else precision]
    sketch = Sketch(job, read_class_map(job.classes), dtype, on_gpu=True)
    few, many = sketch.run(2), sketch.run(3)
    fixed, inputs = sketch.fixed, many.inputs // 3
    at_4, at_16 = (peak_of(few, many, images) + images * inputs for images in (4, 16))
    slope = (at_16 - at_4) // 12
    whole = fixed.weights + fixed.optimizer + at_4
    return Profile(
        parameters=fixed.parameters,
        trainable=fixed.trainable,
        flops_forward=many.flops_forward // 3,
        flops_training=many.flops // 3,
        bytes_fixed=whole - 4 * slope,
        bytes_per_image=slope,
        traffic_per_image=many.traffic // 3,
    )
