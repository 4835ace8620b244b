"""What each model costs, as far as it can be said without a job. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COSTS = Path(__file__).parent / "costs.json"
PREDICTIONS = Path(__file__).parent / "predictions.json"


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
class Prediction:
    """What an image takes in prediction.

    Attributes:
        flops: of its forward pass; a multiplication and an addition are two.
        traffic: bytes that operations read and write.
    """

    flops: int
    traffic: int


@cache
def read_predictions() -> dict[str, Prediction]:
    """What each model of `read_costs` takes to predict an image of 512x512 in bf16.

    `python -m benchmarks.bench_predictions` writes them.
    """
    return {model: Prediction(**row) for model, row in json.loads(PREDICTIONS.read_text()).items()}
