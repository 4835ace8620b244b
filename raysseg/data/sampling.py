"""The order of an epoch: a function of (seed, epoch), the same for every number of workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysseg.data.index import SampleIndex

Presence = npt.NDArray[np.bool_]
"""(N, C), whether a sample holds a class."""

Factors = npt.NDArray[np.float64]
"""(N,) how often an epoch shows each sample, on average; 1 at least."""

_ROWS = 1 << 16  # of (N, C) numbers in memory at a time
_BITS = 32  # cumulative factors are whole numbers of 2**-32, so that how often a sample may come is exact


@dataclass(frozen=True)
class Order:
    """An epoch's positions.

    Attributes:
        rows: (P,) position -> row of the index.
        windows: ascending positions at which other groups are opened; reading between two of them touches few groups.
    """

    rows: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


def repeat_factors(presence: Presence, threshold: float) -> Factors:
    """Repeat factors as LVIS has them (Gupta et al. 2019): the rarer an image's rarest class, the more often it comes.

    A class that a share f of the images holds has the factor max(1, sqrt(threshold / f)); an image has the largest of
    its classes', and 1 where it holds none.

    Args:
        presence: which classes each image holds.
        threshold: the share below which a class is rare.
    """
    shares = np.maximum(presence.mean(axis=0), 1 / len(presence))  # no image takes the factor of an absent class
    by_class = np.sqrt(threshold / shares)
    parts = np.array_split(presence, len(presence) // _ROWS + 1)
    return np.concatenate([np.where(part, by_class, 1.0).max(axis=1, initial=1.0) for part in parts])


def num_positions(index: SampleIndex, factors: Factors | None = None) -> int:
    """Positions of an epoch, the same in every one: the factors' sum, rounded."""
    return len(index) + int(_edges(index, factors)[-1] >> _BITS)


def num_windows(index: SampleIndex, *, open_groups: int, factors: Factors | None = None) -> int:
    """Windows of an order, the same in every epoch."""
    return -(-int(_openings(index, factors).sum()) // open_groups)


def order_hash(index: SampleIndex, *, open_groups: int, seed: int, factors: Factors | None = None) -> str:
    """What all orders of a run follow from, for checkpoints: another hash, other orders."""
    digest = hashlib.sha256(f"{index.fingerprint} {open_groups} {seed}".encode())
    if factors is not None:
        digest.update(_edges(index, factors).tobytes())
    return digest.hexdigest()[:16]


def epoch_order(
    index: SampleIndex, *, open_groups: int, seed: int, epoch: int, factors: Factors | None = None
) -> Order:
    """Shuffles an index for one epoch.

    The groups (row groups of shards; single files are groups of one) are shuffled, `open_groups` of them are open at
    once, each is shuffled within, and positions are dealt from the open ones in turn. So every batch mixes many groups,
    storage is read in large pieces, and where the number of workers divides `open_groups`, each group is read by one
    worker alone. Files of their own give a plain permutation.

    With factors, each sample comes floor(r) or ceil(r) times, r on average, by systematic sampling: equal steps from
    one random offset along the cumulative factors. What goes beyond 1 is scaled so that every epoch is as long. A
    group is then opened as often as its most frequent sample may come, at even distances, each time for the samples
    that come once more: repeats lie far apart, and a shard's row group is read again for them.

    Args:
        index: the samples.
        open_groups: groups open at once.
        seed: of the run.
        epoch: from 0.
        factors: how often samples come; None: once each.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    openings = _openings(index, factors)
    group, nth = _enumerate(openings)
    place = (rng.permutation(len(openings))[group] / len(openings) + nth / openings[group]) % 1
    slot = np.empty_like(group)  # where each opening stands in this epoch
    slot[np.argsort(place, kind="stable")] = np.arange(len(slot))

    offset = 0 if factors is None else rng.integers(1 << _BITS)
    row, nth = _enumerate(1 + np.diff((_edges(index, factors) + offset) >> _BITS))
    first = np.cumsum(openings) - openings
    slots = slot[first[index.groups[row]] + nth]

    shuffled = rng.permutation(len(row))
    shuffled = shuffled[_stable_argsort(slots[shuffled])]  # opening by opening, shuffled within
    slots = slots[shuffled]
    turn = np.arange(len(slots)) - np.searchsorted(slots, slots)  # place within its opening
    order = np.lexsort((slots, turn, slots // open_groups))
    window = (slots // open_groups)[order]
    windows = np.searchsorted(window, np.arange(-(-len(slot) // open_groups)))  # one may be empty in an epoch
    return Order(row[shuffled[order]], windows)


def _edges(index: SampleIndex, factors: Factors | None) -> npt.NDArray[np.int64]:
    """(N + 1,) cumulative factors beyond 1, in units of 2**-32, scaled to come to a whole number."""
    if factors is None:
        return np.zeros(len(index) + 1, np.int64)
    extra = np.cumsum(np.append(0.0, factors - 1))
    scale = round(len(index) + extra[-1]) - len(index)
    edges: npt.NDArray[np.int64] = np.rint(extra / max(extra[-1], 1e-9) * scale * (1 << _BITS)).astype(np.int64)
    return edges


def _openings(index: SampleIndex, factors: Factors | None) -> npt.NDArray[np.int64]:
    """(G,) how often a group is opened in an epoch: as often as any of its samples may come."""
    openings = np.ones(int(index.groups[-1]) + 1 if len(index) else 0, np.int64)
    most = 1 - (-np.diff(_edges(index, factors)) >> _BITS)  # 1 + ceil
    np.maximum.at(openings, index.groups, most)
    return openings


def _stable_argsort(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """As numpy's, in a quarter of its time; keys are at least 0, and times their number they fit 63 bits."""
    numbered = keys * len(keys) + np.arange(len(keys))
    numbered.sort()
    numbered %= len(keys)
    return numbered


def _enumerate(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """As many entries of each thing as its count: the thing's number, and how many of its entries stand before."""
    thing = np.repeat(np.arange(len(counts)), counts)
    return thing, np.arange(len(thing)) - (np.cumsum(counts) - counts)[thing]
