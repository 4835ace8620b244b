"""COCO's run-length encoding: lengths of runs down the columns, the first of background; compressed to text.

pycocotools encodes and rasterises. Decoding is our own, since pycocotools reads beyond its memory where an RLE falls
short of its image, and since painting needs the runs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from raysseg.schema import InputError

Runs = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
"""(H, W)."""


def from_mask(mask: Mask) -> bytes:
    """Compresses a mask, (H, W)."""
    counts: bytes = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    return counts


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


def paint(pixels: npt.NDArray[np.integer], runs: Runs, value: int) -> None:
    """Gives the foreground of runs a value, in an image that lies down the columns, (W * H,)."""
    window, is_foreground = _foreground(pixels, runs)
    window[is_foreground] = value


def is_painted(pixels: npt.NDArray[np.integer], runs: Runs) -> bool:
    """Whether any pixel of the foreground of runs has a value already; see paint."""
    window, is_foreground = _foreground(pixels, runs)
    return bool(window[is_foreground].any())


def _foreground(pixels: npt.NDArray[np.integer], runs: Runs) -> tuple[npt.NDArray[np.integer], Mask]:
    """The pixels from the first of the foreground to the last, and which of them belong to it."""
    spans = runs[1 : len(runs) // 2 * 2]
    is_foreground: Mask = (np.arange(len(spans)) % 2 == 0).repeat(spans)
    return pixels[runs[0] :][: len(is_foreground)], is_foreground


def area(runs: Runs) -> int:
    """Pixels of the foreground."""
    return int(runs[1::2].sum())


def _unfit(num_pixels: int, size: tuple[int, int]) -> str:
    return f"has an RLE of {num_pixels} pixels, but its image has {size[1]}x{size[0]} (width x height); encode it anew"
