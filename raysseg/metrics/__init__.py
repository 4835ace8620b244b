"""Metrics: what they are called, and the protocol that all of them follow. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from raysseg.masks import LabelMap
from raysseg.metrics.semantic import SemanticMetric
from raysseg.schema import ClassMap

State = npt.NDArray[np.int64]


class Metric(Protocol):
    """Counts over a data set, which add up in any order and over any number of workers."""

    def update(self, prediction: LabelMap, truth: LabelMap) -> State:
        """Counts one sample; returns its own counts."""

    def state(self) -> State:
        """Everything counted so far."""

    def merge(self, state: State) -> None:
        """Adds what another worker has counted."""

    def compute(self) -> dict[str, float]:
        """The numbers, by name."""

    def absent(self) -> list[str]:
        """Classes without ground truth, which the means leave out."""


METRICS: dict[str, Callable[[ClassMap], Metric]] = {"semantic": SemanticMetric}
"""By task."""
