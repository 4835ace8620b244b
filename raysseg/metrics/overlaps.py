"""The pixels that the regions of two maps have in common: the joint histogram that most metrics start from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysseg.masks import IdMap

Pixels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlaps:
    """The pixels that two maps of numbers have in common, by pairs of numbers.

    Attributes:
        pairs: (K,) int64, 65536 * the first map's number + the second's, ascending.
        pixels: (K,) int64, none of them 0.
    """

    pairs: Pixels
    pixels: Pixels

    @property
    def first(self) -> Pixels:
        """Numbers in the first map, (K,)."""
        return self.pairs >> 16

    @property
    def second(self) -> Pixels:
        """Numbers in the second map, (K,)."""
        return self.pairs & 0xFFFF

    def areas(self, num_first: int, num_second: int) -> tuple[Pixels, Pixels]:
        """Pixels of each number in either map, of so many numbers from 0 on; what is beyond is left out."""
        return _areas(self.first, self.pixels, num_first), _areas(self.second, self.pixels, num_second)

    def of(self, pairs: Pixels) -> Pixels:
        """Pixels of some pairs, 0 of those that have none in common."""
        place = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        return np.where(self.pairs[place] == pairs, self.pixels[place], 0)


def count_overlaps(first: IdMap, second: IdMap) -> Overlaps:
    """The joint histogram of two maps of numbers, (H, W) each and not empty.

    Along the rows numbers seldom change: sorted and added up are runs, not pixels. The memory does not depend on how
    many segments there are.
    """
    assert max(first.itemsize, second.itemsize) <= 2, "numbers are uint8 or uint16"
    one, other = first.ravel(), second.ravel()
    is_end = one[1:] != one[:-1]
    is_end |= other[1:] != other[:-1]
    ends = np.append(np.flatnonzero(is_end), one.size - 1)
    # one word a run, since words sort fastest: 16 bits for either number, 32 for the length
    runs = one.take(ends).astype(np.uint64)
    for low, bits in ((other.take(ends), 16), (np.diff(ends, prepend=-1).view(np.uint64), 32)):
        runs <<= np.uint64(bits)
        runs |= low
    runs.sort()
    pairs = runs >> np.uint64(32)
    starts = np.append(0, np.flatnonzero(pairs[1:] != pairs[:-1]) + 1)
    pixels = np.add.reduceat(runs & np.uint64(0xFFFFFFFF), starts)
    return Overlaps(pairs[starts].astype(np.int64), pixels.astype(np.int64))


def _areas(numbers: Pixels, pixels: Pixels, length: int) -> Pixels:
    is_kept = numbers < length
    return np.bincount(numbers[is_kept], pixels[is_kept], length).astype(np.int64)
