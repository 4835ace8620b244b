"""The order of an epoch: a function of (seed, epoch), the same for every number of workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysseg.data.index import SampleIndex


@dataclass(frozen=True)
class Order:
    """An epoch's positions.

    Attributes:
        rows: (N,) position -> row of the index.
        windows: ascending positions at which other groups are opened; reading between two of them touches few groups.
    """

    rows: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def order_hash(index: SampleIndex, *, open_groups: int, seed: int) -> str:
    """What all orders of a run follow from, for checkpoints: another hash, other orders."""
    return hashlib.sha256(f"{index.fingerprint} {open_groups} {seed}".encode()).hexdigest()[:16]


def epoch_order(index: SampleIndex, *, open_groups: int, seed: int, epoch: int) -> Order:
    """Shuffles an index for one epoch.

    The groups (row groups of shards; single files are groups of one) are shuffled, `open_groups` of them are open at
    once, each is shuffled within, and positions are dealt from the open ones in turn. So every batch mixes many groups,
    storage is read in large pieces, and where the number of workers divides `open_groups`, each group is read by one
    worker alone. Files of their own give a plain permutation.

    Args:
        index: the samples.
        open_groups: groups open at once.
        seed: of the run.
        epoch: from 0.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    num_groups = int(index.groups[-1]) + 1 if len(index) else 0
    slot = rng.permutation(num_groups)[index.groups]  # where each sample's group stands in this epoch
    shuffled = rng.permutation(len(index))
    shuffled = shuffled[np.argsort(slot[shuffled], kind="stable")]  # group by group, shuffled within
    slots = slot[shuffled]
    turn = np.arange(len(slots)) - np.searchsorted(slots, slots)  # place within its group
    order = np.lexsort((slots, turn, slots // open_groups))
    window = (slots // open_groups)[order]
    return Order(shuffled[order], np.flatnonzero(np.diff(window, prepend=-1)))
