"""Metrics: what one sample counts, as a small record; and the numbers that follow from all records. numpy only.

Records are kept by sample id: they merge in any order, over any number of workers, and a sample that is seen twice
counts once, so that the numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raysseg.catalogue import METRICS
from raysseg.masks import View
from raysseg.schema import ClassMap, Task

State = Mapping[str, tuple[bytes, ...]]
"""By sample id, the record of each measure."""


class Measure(Protocol):
    """One way of counting, for one class list; holds no counts itself."""

    def count(self, prediction: Any, truth: Any) -> bytes:
        """What one sample comes to, as small as it can be; both sides are the task's view, of one size."""

    def score(self, record: bytes) -> float:
        """One sample alone, in [0, 1], to tell good ones from bad; NaN where there is nothing to score."""

    def compute(self, records: Sequence[bytes]) -> dict[str, float]:
        """The numbers of a data set by name; NaN for a class that the truth lacks. Of no records: the same names.

        The order of the records may break ties, and changes nothing else.
        """

    def absent(self, records: Sequence[bytes]) -> list[str]:
        """Classes without ground truth, which the means leave out."""


OWN: dict[Task, tuple[str, ...]] = {
    "semantic": ("semantic.Confusion",),
    "instance": ("instance.MaskAp", "instance.BoxAp"),
    "panoptic": ("panoptic.PanopticQuality",),
}
"""What each task is always measured by; the first one's score is a sample's."""

MORE: dict[str, str] = {
    "boundary_iou": "boundary.BoundaryIou",
    "surface": "surface.SurfaceDistance",
    "boundary_ap": "instance.BoundaryAp",
    "boundary_pq": "panoptic.BoundaryPanopticQuality",
}
"""What a job can name beside."""


def build_measure(name: str, classes: ClassMap) -> Measure:
    """A measure by its module and class."""
    module, _, kind = name.partition(".")
    measure: Measure = getattr(import_module(f"raysseg.metrics.{module}"), kind)(classes)
    return measure


class Metrics:
    """All that a task is measured by, over a data set.

    Args:
        task: decides what is always measured.
        classes: of both sides.
        more: names in MORE.
    """

    def __init__(self, task: Task, classes: ClassMap, more: Sequence[str] = ()) -> None:
        assert set(more) <= set(METRICS[task]), more
        self._measures = [build_measure(name, classes) for name in (*OWN[task], *(MORE[name] for name in more))]
        self._records: dict[str, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def update(self, sample_id: str, prediction: View, truth: View) -> float:
        """Counts one sample; returns its own score."""
        self._records[sample_id] = tuple(measure.count(prediction, truth) for measure in self._measures)
        return self._measures[0].score(self._records[sample_id][0])

    def state(self) -> State:
        """Everything counted so far."""
        return self._records

    def merge(self, state: State) -> None:
        """Takes over what another worker has counted."""
        self._records |= state

    def scores(self) -> dict[str, float]:
        """Each sample's own score."""
        return {sample_id: self._measures[0].score(records[0]) for sample_id, records in self._records.items()}

    def compute(self, ranking: Sequence[str] | None = None) -> dict[str, float]:
        """The numbers, by name.

        Args:
            ranking: all sample ids, in the order in which ties between samples are broken; None: sorted.
        """
        sample_ids = sorted(self._records) if ranking is None else [i for i in ranking if i in self._records]
        assert len(sample_ids) == len(self._records), "the ranking names every sample"
        found: dict[str, float] = {}
        for i, measure in enumerate(self._measures):
            found |= measure.compute([self._records[sample_id][i] for sample_id in sample_ids])
        return found

    def absent(self) -> list[str]:
        """Classes without ground truth, which the means leave out."""
        return self._measures[0].absent(self._by(0))

    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Pixels by (truth, prediction), (C, C + 1), the last column no class; None where that is not counted."""
        from raysseg.metrics.semantic import Confusion

        first = self._measures[0]
        return first.total(self._by(0)) if isinstance(first, Confusion) else None

    def _by(self, i: int) -> list[bytes]:
        """One measure's records, in an order that does not depend on who counted them."""
        return [self._records[sample_id][i] for sample_id in sorted(self._records)]
