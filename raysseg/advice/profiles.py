"""What each model costs, as far as it can be said without a job. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COSTS = Path(__file__).parent / "costs.json"
EXTENTS = Path(__file__).parent / "extents.json"

SIZE = (512, 512)  # pixels: of the tables, and presumed where no data say otherwise


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Attributes:
        parameters: all of them.
        trainable: those that learn from scratch.
        flops_forward: of an image's forward pass and loss; a multiplication and an addition are two.
        flops_training: of an image's forward and backward pass.
        bytes_fixed: weights, gradients, the optimiser's state, and what else a batch does not change.
        bytes_per_image: by which each image of a micro-batch raises the most memory that a step takes.
        traffic_per_image: bytes that operations read and write in an image's forward and backward pass.
    """

    parameters: int
    trainable: int
    flops_forward: int
    flops_training: int
    bytes_fixed: int
    bytes_per_image: int
    traffic_per_image: int


@cache
def read_costs() -> dict[str, dict[str, Profile]]:
    """The profile of each model of the catalogue but the tiny ones, by task: of 21 classes, 512x512, bf16.

    `python -m benchmarks.bench_plan --costs` writes them.
    """
    content = json.loads(COSTS.read_text())
    return {model: {task: Profile(**row) for task, row in tasks.items()} for model, tasks in content.items()}


@dataclass(frozen=True)
class Extent:
    """What a model takes beside a training step at 512x512.

    Attributes:
        prediction_flops: of predicting an image of 512x512; a multiplication and an addition are two.
        prediction_traffic: bytes that operations read and write for it.
        bytes_per_image_256: as a profile's, for crops of 256x256.
        bytes_per_image_1024: for crops of 1024x1024.
    """

    prediction_flops: int
    prediction_traffic: int
    bytes_per_image_256: int
    bytes_per_image_1024: int


@cache
def read_extents() -> dict[str, Extent]:
    """The extent of each model of `read_costs`, of 21 classes and in bf16; `python -m benchmarks.bench_extents`."""
    return {model: Extent(**row) for model, row in json.loads(EXTENTS.read_text()).items()}


def bytes_per_image(profile: Profile, extent: Extent, size: tuple[int, int]) -> int:
    """Bytes of training for each crop of a batch: between the sizes that are known they grow with the pixels."""
    known = ((256, extent.bytes_per_image_256), (512, profile.bytes_per_image), (1024, extent.bytes_per_image_1024))
    (low, least), (high, most) = known[:2] if area(size) < area(SIZE) else known[1:]
    slope = (most - least) / (high**2 - low**2)
    return max(1, round(least + slope * (area(size) - low**2)))


def area(size: tuple[int, int]) -> int:
    """Pixels of a (height, width)."""
    return size[0] * size[1]
