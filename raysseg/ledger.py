"""How far an epoch has come, and who takes which positions: exactly once, for any number of workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Ledger:
    """What a checkpoint holds of the data: everything before it has been used once, nothing after it.

    Attributes:
        epoch: from 0.
        position: first position of the epoch that is not used yet; all of them where only the validation is to come.
        order_hash: of the epoch's order; another hash means that the data, their factors or the seed have changed.
    """

    epoch: int = 0
    position: int = 0
    order_hash: str = ""


def num_steps(num_samples: int, global_size: int) -> int:
    """Optimiser steps of an epoch; the last, smaller batch counts."""
    return -(-num_samples // global_size)


def deal(start: int, stop: int, *, per_worker: int, rank: int, num_workers: int) -> list[npt.NDArray[np.int64]]:
    """A worker's micro-batches of the global batch at positions `start` to `stop`.

    Positions are dealt to the ranks in turn. Every rank gets as many micro-batches; some may be empty.

    Returns:
        Positions, one array a forward pass, each of `per_worker` at most.
    """
    passes = -(-(stop - start) // (num_workers * per_worker))
    mine = np.arange(start + rank, stop, num_workers, dtype=np.int64)
    return [mine[i * per_worker : (i + 1) * per_worker] for i in range(passes)]
