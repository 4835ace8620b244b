"""Facts of many samples in little memory: compressed where they are made, and looked at one after another."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from raysseg.findings.facts import SampleFacts


class Block(NamedTuple):
    """Facts of samples that follow each other in a split; `start` is the first one's row."""

    split: str
    start: int
    number: int
    packed: bytes


def pack(split: str, start: int, facts: Sequence[SampleFacts]) -> Block:
    """Compresses facts to a few hundred bytes a sample."""
    return Block(split, start, len(facts), zlib.compress(pickle.dumps(list(facts), pickle.HIGHEST_PROTOCOL), 1))


class FactStore(Collection[SampleFacts]):
    """Facts of samples by place in the index, whatever order their blocks came in; iterating unpacks block by block."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = sorted(blocks)

    def __len__(self) -> int:
        return sum(block.number for block in self._blocks)

    def __iter__(self) -> Iterator[SampleFacts]:
        for block in self._blocks:
            yield from pickle.loads(zlib.decompress(block.packed))

    def __contains__(self, sample: object) -> bool:
        return any(sample is other for other in self)

    def split(self, name: str) -> FactStore:
        """Those of one split."""
        return FactStore(block for block in self._blocks if block.split == name)
