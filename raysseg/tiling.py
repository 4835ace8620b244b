"""Sliding windows: class indices of images of any size, of which but a strip of tiles is held at a time.

An image's tiles lie on a grid, and its pixels belong to cells: a cell begins where its tile begins, and ends where the
next tile does. A block is a rectangle of cells, and a pure function of the image's window that its tiles cover: it can
be decided anywhere. Each of its pixels is the sum, in the grid's order, of the scores of all tiles that cover it, each
tile scored on its own. So the bits are the same however an image is cut into blocks, as long as the machines that score
tiles give the same bits for the same tile (same device, same number of threads).

A cell is decided as soon as its own tile is scored, the last one that covers it. What is held of a block are the sums
that further tiles add to: the overlap with the next row of tiles, over the block's width, and with the next tile. It
does not grow with the image. Tiles that reach into several blocks are scored once for each: with blocks of ``COLUMNS``
cells across one column of tiles in eight, and none where an image is no wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raysseg.config import Blend
from raysseg.data.augment import Windowed
from raysseg.data.decode import Pixels
from raysseg.masks import IdMap
from raysseg.schema import ClassMap

COLUMNS = 8  # cells across a block


class Block(NamedTuple):
    """A rectangle of cells, as ranges of the grid's rows and columns."""

    rows: range
    columns: range


class Labelled(NamedTuple):
    """Some decided pixels of an image.

    Attributes:
        rows: their place.
        columns: likewise.
        labels: (h, w) class indices.
    """

    rows: slice
    columns: slice
    labels: IdMap


@dataclass(frozen=True)
class Grid:
    """Where tiles lie over an image: evenly, the first at its start and the last at its end (as nnU-Net).

    Attributes:
        size: (height, width) of the image.
        tile: (height, width) of a tile; the image's side where that is shorter. None: one tile, the whole image.
        overlap: share of a tile's side that the next one covers again, at least.
    """

    size: tuple[int, int]
    tile: tuple[int, int] | None
    overlap: float

    @cached_property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) of every tile."""
        height, width = self.size
        return (min(self.tile[0], height), min(self.tile[1], width)) if self.tile else self.size

    @cached_property
    def tops(self) -> tuple[int, ...]:
        """First row of each row of tiles."""
        return _starts(self.size[0], self.tile_size[0], self.overlap)

    @cached_property
    def lefts(self) -> tuple[int, ...]:
        """First column of each column of tiles."""
        return _starts(self.size[1], self.tile_size[1], self.overlap)

    def blocks(self, rows: int | None = None, columns: int = COLUMNS) -> list[Block]:
        """Blocks of so many cells down (None: from top to bottom) and across, which cover the image."""
        return [
            Block(down, across)
            for down in _parts(len(self.tops), rows or len(self.tops))
            for across in _parts(len(self.lefts), columns)
        ]

    def num_scored(self, block: Block) -> int:
        """Tiles that deciding a block takes."""
        (height, width), (rows, columns) = self.tile_size, block
        return len(_covering(self.tops, height, rows)) * len(_covering(self.lefts, width, columns))


def iter_labels(
    image: Pixels | Windowed,
    grid: Grid,
    block: Block,
    score: Callable[[Pixels], Tensor],
    classes: ClassMap,
    blend: Blend = "gaussian",
    device: torch.device | None = None,
) -> Iterator[Labelled]:
    """Decides a block, cell by cell in the grid's order.

    Args:
        image: (H, W, 3) RGB; it is read in windows of a tile's height and the block's width.
        grid: of the image.
        block: of the grid.
        score: a tile (h, w, 3) to new probabilities (C, h, w) of the classes.
        classes: C of them.
        blend: what tiles count where they overlap.
        device: where the scores lie.
    """
    assert image.shape[:2] == grid.size, (image.shape, grid.size)
    height, width = grid.tile_size
    rows, columns = _covering(grid.tops, height, block.rows), _covering(grid.lefts, width, block.columns)
    start, stop = grid.lefts[columns.start], grid.lefts[columns[-1]] + width
    weights = importance((height, width), blend).to(device)
    downs = [slice(grid.tops[row], _end(grid.tops, row, grid.size[0])) for row in rows]
    most = max(height - (down.stop - down.start) for down in downs)
    open_sums = _OpenSums((len(classes), most, stop - start), device)
    for row, down in zip(rows, downs, strict=True):
        strip = image[down.start : down.start + height, start:stop]
        for column in columns:
            across = slice(grid.lefts[column], _end(grid.lefts, column, grid.size[1]))
            left, cell = across.start - start, (down.stop - down.start, across.stop - across.start)
            sums = open_sums.add(_weighted(score, strip[:, left : left + width], weights), left, cell)
            if row in block.rows and column in block.columns:
                yield Labelled(down, across, _decide(sums, classes))
        open_sums.end_row(height - (down.stop - down.start))


def importance(size: tuple[int, int], blend: Blend) -> Tensor:
    """What each pixel of a tile counts, (h, w) float32 in (0, 1].

    The Gaussian has its peak in the middle and a deviation of an eighth of each side (Isensee et al. 2021).
    """
    if blend == "uniform":
        return torch.ones(size)
    down, across = (torch.exp(-32 * ((torch.arange(side) + 0.5) / side - 0.5) ** 2) for side in size)
    return down[:, None] * across


def _starts(side: int, tile: int, overlap: float) -> tuple[int, ...]:
    steps = math.ceil((side - tile) / max(1, math.floor(tile * (1 - overlap))))
    return tuple((side - tile) * i // steps for i in range(steps + 1)) if steps else (0,)


def _parts(number: int, length: int) -> list[range]:
    return [range(start, min(start + length, number)) for start in range(0, number, length)]


def _covering(starts: tuple[int, ...], side: int, cells: range) -> range:
    """The tiles that reach into some cells; the cells' own are the last of them."""
    first = next(i for i in range(len(starts)) if starts[i] + side > starts[cells[0]])
    return range(first, cells[-1] + 1)


def _end(starts: tuple[int, ...], cell: int, side: int) -> int:
    """The first pixel behind a cell."""
    return starts[cell + 1] if cell + 1 < len(starts) else side


class _OpenSums:
    """Sums of the pixels that a further tile of a block adds to: those below the decided cells, and those beside them.

    Args:
        shape: (classes, most rows that are open below, columns of the block's tiles).
        device: where the scores lie.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device | None) -> None:
        self._below = torch.zeros(shape, device=device)  # of the row of tiles above, from this row's first pixel on
        self._num_rows = 0  # of them that count
        self._beside = self._below[:, :0, :0]  # of the tile before, from this tile's first column on

    @torch.inference_mode()
    def add(self, scores: Tensor, left: int, cell: tuple[int, int]) -> Tensor:
        """Adds a tile, the next one of its row.

        Args:
            scores: (C, h, w), weighted; overwritten.
            left: the tile's first column in the block.
            cell: (height, width) of its cell.

        Returns:
            The sums of the cell, which no further tile adds to.
        """
        (_, height, width), (rows, columns) = scores.shape, cell
        if done := self._beside.shape[2]:  # these columns hold what is below, too
            scores[:, :, :done].add_(self._beside)
        scores[:, : self._num_rows, done:].add_(self._below[:, : self._num_rows, left + done : left + width])
        self._beside = scores[:, :, columns:].clone()
        self._below[:, : height - rows, left : left + columns] = scores[:, rows:, :columns]
        return scores[:, :rows, :columns]

    def end_row(self, num_rows: int) -> None:
        """Turns to the next row of tiles, whose first rows are open."""
        self._num_rows = num_rows
        self._beside = self._below[:, :0, :0]


@torch.inference_mode()
def _weighted(score: Callable[[Pixels], Tensor], tile: Pixels, weights: Tensor) -> Tensor:
    """A tile's scores times the weights; apart from the sum, as fused ones may round by a pixel's place in memory."""
    return score(tile).mul_(weights)


@torch.inference_mode()
def _decide(sums: Tensor, classes: ClassMap) -> IdMap:
    indices = sums.argmax(0).to(torch.uint8 if classes.dtype is np.uint8 else torch.int32)
    labels: IdMap = indices.cpu().numpy().astype(classes.dtype, copy=False)
    return labels
