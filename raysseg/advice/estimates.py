"""What the models take for images of the data's size, from the table of costs. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raysseg.advice.gpus import BANDWIDTH, CONTEXT, EFFICIENCY, SLACK, WORKSPACE, Gpu, find_gpu
from raysseg.advice.profiles import SIZE, Extent, Profile, area, bytes_per_image, read_costs, read_extents
from raysseg.advice.situation import Ask
from raysseg.findings.fingerprint import Fingerprint

GPU = "A10G"  # for latency, where none is named
RESERVED = CONTEXT + WORKSPACE  # bytes of a GPU that no job has
STEP, LEAST_SIDE = 32, 64  # of crops, in pixels
MOST = 16  # images of a worker's batch, beyond which little is gained


@dataclass(frozen=True)
class Cost:
    """What a model takes, by estimates; `raysseg plan` knows a job's own.

    Attributes:
        crop: (height, width) of training.
        parameters: of the model.
        flops: of predicting an image of 512x512; a multiplication and an addition are two.
        fixed_bytes: of training: weights, gradients, the optimiser's state.
        image_bytes: of training, for each crop of a batch.
        batch: the most crops that fit into the memory that was named, 16 at most; None: none was named.
        smaller: the largest crop of this shape that fits, where this one does not; None: it does, or none does.
        size: (height, width) of the images that latency is of.
        latency_s: of such an image alone, on the GPU that was named or presumed; None: none was.
    """

    crop: tuple[int, int]
    parameters: int
    flops: float
    fixed_bytes: int
    image_bytes: int
    batch: int | None
    smaller: tuple[int, int] | None
    size: tuple[int, int]
    latency_s: float | None

    def training_bytes(self, batch: int) -> float:
        """Of a GPU, for so many crops at once."""
        return RESERVED + self.fixed_bytes + (1 + SLACK) * batch * self.image_bytes


def estimate_costs(names: Sequence[str], task: str, ask: Ask, found: Fingerprint | None) -> dict[str, Cost]:
    """The costs of those models that the table holds; prompted models are not among them.

    Raises:
        InputError: the GPU is unknown.
    """
    table, extents = read_costs(), read_extents()
    gpu = gpu_of(ask)
    memory = memory_of(ask)
    crop, size = _crop_of(found), _size_of(found)
    return {
        name: _estimate(table[name][task], extents[name], crop, size, memory, gpu)
        for name in names
        if task in table.get(name, {})
    }


def memory_of(ask: Ask) -> int | None:
    """Bytes of the GPU that was named, or that were."""
    if ask.memory is not None or ask.gpu is None:
        return ask.memory
    return round(find_gpu(ask.gpu).memory * 2**30)


def gpu_of(ask: Ask) -> Gpu | None:
    """The GPU whose speed counts, if any does."""
    if ask.gpu is None and ask.latency_s is None:
        return None
    return find_gpu(ask.gpu or GPU)


def _estimate(
    profile: Profile, extent: Extent, crop: tuple[int, int], size: tuple[int, int], memory: int | None, gpu: Gpu | None
) -> Cost:
    batch = None if memory is None else _num_fitting(profile, extent, crop, memory)
    return Cost(
        crop=crop,
        parameters=profile.parameters,
        flops=extent.prediction_flops,
        fixed_bytes=profile.bytes_fixed,
        image_bytes=bytes_per_image(profile, extent, crop),
        batch=batch,
        smaller=_smaller(profile, extent, crop, memory) if memory is not None and batch == 0 else None,
        size=size,
        latency_s=None if gpu is None else _latency(extent, gpu) * area(size) / area(SIZE),
    )


def _num_fitting(profile: Profile, extent: Extent, crop: tuple[int, int], memory: int) -> int:
    """Crops of a batch that fit into so many bytes, MOST at most."""
    room = (memory - RESERVED - profile.bytes_fixed) / ((1 + SLACK) * bytes_per_image(profile, extent, crop))
    return max(0, min(MOST, int(room)))


def _smaller(profile: Profile, extent: Extent, crop: tuple[int, int], memory: int) -> tuple[int, int] | None:
    """The largest crop of this shape, in steps of STEP pixels, of which one fits."""
    for percent in range(99, 0, -1):
        height, width = (side * percent // 100 // STEP * STEP for side in crop)
        if min(height, width) < LEAST_SIDE:
            return None
        if _num_fitting(profile, extent, (height, width), memory):
            return height, width
    return None


def _latency(extent: Extent, gpu: Gpu) -> float:
    """Seconds for an image of SIZE: for its operations or for its memory's traffic, whichever takes longer."""
    rate = gpu.half if gpu.has_bf16 else gpu.single
    traffic = extent.prediction_traffic * (1 if gpu.has_bf16 else 2)
    by_flops = extent.prediction_flops / (rate * 1e12 * math.sqrt(math.prod(EFFICIENCY)))  # in between
    return max(by_flops, traffic / (gpu.bandwidth * 1e9 * math.sqrt(math.prod(BANDWIDTH))))


def _crop_of(found: Fingerprint | None) -> tuple[int, int]:
    advised = [choice.value for choice in found.advice.choices if choice.key == "data.crop"] if found else []
    for value in advised:
        if isinstance(value, list) and len(value) == 2:
            return int(value[0]), int(value[1])
    return SIZE


def _size_of(found: Fingerprint | None) -> tuple[int, int]:
    return SIZE if found is None else (found.train.height[1], found.train.width[1])
