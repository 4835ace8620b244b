"""COCO's run-length encoding: lengths of runs down the columns, the first of background; compressed to text.

pycocotools rasterises. Decoding is our own, since pycocotools reads beyond its memory where an RLE falls short of its
image, and since painting needs the runs alone; so is encoding, which pycocotools does from masks turned to columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from raysseg.schema import InputError

Pixel = TypeVar("Pixel", np.integer, np.bool_)
Runs = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
"""(H, W)."""


def from_mask(mask: Mask) -> bytes:
    """Compresses a mask, (H, W)."""
    return from_masks(mask[None])[0]


def from_masks(masks: npt.NDArray[np.bool_] | Sequence[Mask]) -> list[bytes]:
    """Compresses masks of one size, (N, H, W): the bytes of pycocotools, without turning the masks' axes first."""
    if not len(masks):
        return []
    changes = np.zeros(-(-masks[0].size // 8) * 8, np.bool_)  # of one mask after the other, in whole words
    edges = [_edges(np.ascontiguousarray(mask, np.bool_), changes) for mask in masks]
    ends = np.array([len(found) for found in edges]).cumsum()
    places = np.concatenate(edges)
    runs = np.diff(places, prepend=0)
    is_first = np.zeros(len(runs), np.bool_)
    is_first[ends[:-1]] = True
    runs[is_first] = places[is_first]
    return _compress(runs, ends)


def _edges(mask: Mask, changes: Mask) -> Runs:
    """Where the runs of a mask end, counted down the columns; the last one ends with the image."""
    height, width = mask.shape
    rows = changes[: mask.size].reshape(height, width)
    rows[0, 0] = mask[0, 0]
    np.bitwise_xor(mask[0, 1:], mask[-1, :-1], out=rows[0, 1:])  # a column goes on from the foot of the last one
    np.bitwise_xor(mask[1:], mask[:-1], out=rows[1:])
    words = np.flatnonzero(changes.view(np.uint64) != 0)  # most runs of 8 pixels hold no change
    found = np.flatnonzero(changes.reshape(-1, 8)[words])
    places = words[found >> 3] * 8 + (found & 7)
    row = places // width
    edges = np.append((places - row * width) * height + row, mask.size)
    edges.sort()
    return edges


def _compress(runs: Runs, ends: npt.NDArray[np.int64]) -> list[bytes]:
    """The text of runs that stand one mask after the other; `ends` are the numbers of runs up to each mask's last."""
    place = np.arange(len(runs)) - np.repeat(np.append(0, ends[:-1]), np.diff(ends, prepend=0))
    numbers = runs.copy()
    numbers[2:] -= np.where(place[2:] > 2, runs[:-2], 0)
    size = np.where(numbers < 0, ~numbers, numbers)
    lengths = np.searchsorted(_ROOM, size, side="right") + 1  # parts of five bits, the sign in the last one's highest
    stops = lengths.cumsum()
    part = np.arange(stops[-1]) - (stops - lengths).repeat(lengths)
    text = (numbers.repeat(lengths) >> (5 * part)) & 31
    text += 80  # 48, and 32 where more parts follow
    text[stops - 1] -= 32
    written = text.astype(np.uint8).tobytes()
    return [written[start:stop] for start, stop in pairwise([0, *stops[ends - 1].tolist()])]


_ROOM = 1 << np.arange(4, 64, 5)
"""What a number must fall short of, to fit in 1, 2, 3, ... parts."""


def from_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> bytes:
    """The union of polygons as pycocotools rasterises it; what lies outside of the image is cut.

    Args:
        polygons: each x, y, x, y, ... in pixels; no holes.
        size: (height, width).

    Raises:
        InputError: there is none, or one has fewer than three points or half a point.
    """
    if not polygons:
        raise InputError("has no polygon; remove the annotation, or draw it")
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise InputError(
                f"has a polygon of {len(polygon)} numbers; allowed: x, y of three points or more, in one list a polygon"
            )
    # frPyObjects takes lists of 4 numbers for boxes, hence the check above
    counts: bytes = coco_mask.merge(coco_mask.frPyObjects(list(polygons), *size))["counts"]
    return counts


def from_counts(counts: Sequence[int], size: tuple[int, int]) -> bytes:
    """Compresses uncompressed RLE; raises InputError if it does not fill an image of this (height, width)."""
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise InputError(_unfit(sum(counts), size))
    compressed: bytes = coco_mask.frPyObjects({"size": list(size), "counts": list(counts)}, *size)["counts"]
    return compressed


def to_runs(rle: bytes, size: tuple[int, int]) -> Runs:
    """The runs of a compressed RLE, background first; raises InputError if they don't fill this (height, width)."""
    parts = np.frombuffer(rle, np.uint8).astype(np.int64) - 48
    is_last = (parts & 32) == 0  # of the five-bit parts of a number, the lowest first
    if not len(parts) or parts.min() < 0 or parts.max() > 63 or not is_last[-1]:
        raise InputError(f"has an RLE that can't be decoded ({rle[:20]!r}); allowed: COCO's compressed counts")
    first = np.flatnonzero(np.concatenate([[True], is_last[:-1]]))
    lengths = np.diff(first, append=len(parts))
    place = np.arange(len(parts)) - first.repeat(lengths)
    numbers = np.add.reduceat((parts & 31) << (5 * place), first)
    numbers -= ((parts[is_last] & 16) != 0) * (np.int64(1) << (5 * lengths))  # the highest bit is the sign
    numbers[1::2] = numbers[1::2].cumsum()  # from the fourth on, a number is the difference to the last but one
    numbers[2::2] = numbers[2::2].cumsum()
    if numbers.min() < 0 or numbers.sum() != size[0] * size[1]:
        raise InputError(_unfit(int(numbers.sum()), size))
    return numbers


def to_mask(runs: Runs, size: tuple[int, int]) -> Mask:
    """The mask of runs that fill this (height, width); a view, down the columns in memory."""
    mask: Mask = (np.arange(len(runs)) % 2 == 1).repeat(runs).reshape(size[::-1]).T
    return mask


def to_crop(runs: Runs, size: tuple[int, int]) -> tuple[Mask, tuple[int, int]]:
    """A mask within its bounding box, its axes turned, (w, h), and the box's first column and row in the image.

    The runs fill an image of this (height, width), and have some foreground.
    """
    height = size[0]
    edges = runs.cumsum()
    first, last = edges[:-1:2], edges[1::2] - 1  # pixels of each run of the foreground
    left, right = int(first[0] // height), int(last[-1] // height)
    whole: Mask = np.zeros((right + 1 - left) * height, np.bool_)
    window, is_foreground = _foreground(whole, np.append(runs[0] - left * height, runs[1:]))
    window[:] = is_foreground
    is_split = (first // height != last // height).any()  # from the foot of a column to the head of the next
    top, bottom = (0, height - 1) if is_split else (int((first % height).min()), int((last % height).max()))
    return whole.reshape(-1, height)[:, top : bottom + 1], (left, top)


def paint(pixels: npt.NDArray[np.integer], runs: Runs, value: int) -> None:
    """Gives the foreground of runs a value, in an image that lies down the columns, (W * H,)."""
    window, is_foreground = _foreground(pixels, runs)
    window[is_foreground] = value


def is_painted(pixels: npt.NDArray[np.integer], runs: Runs) -> bool:
    """Whether any pixel of the foreground of runs has a value already; see paint."""
    window, is_foreground = _foreground(pixels, runs)
    return bool(window[is_foreground].any())


def _foreground(pixels: npt.NDArray[Pixel], runs: Runs) -> tuple[npt.NDArray[Pixel], Mask]:
    """The pixels from the first of the foreground to the last, and which of them belong to it."""
    spans = runs[1 : len(runs) // 2 * 2]
    is_foreground: Mask = (np.arange(len(spans)) % 2 == 0).repeat(spans)
    return pixels[runs[0] :][: len(is_foreground)], is_foreground


def area(runs: Runs) -> int:
    """Pixels of the foreground."""
    return int(runs[1::2].sum())


def _unfit(num_pixels: int, size: tuple[int, int]) -> str:
    return f"has an RLE of {num_pixels} pixels, but its image has {size[1]}x{size[0]} (width x height); encode it anew"
