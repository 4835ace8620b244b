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


_MAX_PARTS = 7
"""Of a number in a compressed RLE: 35 bits."""


def from_mask(mask: Mask) -> bytes:
    """Compresses a mask, (H, W)."""
    return from_masks(mask[None])[0]


def from_masks(masks: npt.NDArray[np.bool_]) -> list[bytes]:
    """Compresses masks, (N, H, W), to the bytes of pycocotools, which would need them turned to columns first."""
    if not len(masks):
        return []
    num_masks, height, width = masks.shape
    size = height * width
    number, place = _changes(np.ascontiguousarray(masks))
    row = place // width
    edges = number * size + (place - row * width) * height + row  # down the columns of one mask after the other
    edges = np.append(edges, np.arange(1, num_masks + 1) * size)
    edges.sort()
    return _compress(np.diff(edges, prepend=0), np.bincount(number, minlength=num_masks) + 1)


def _changes(masks: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where pixels differ from the one before, down the columns: numbers of masks, and places along the rows.

    Before the head of a column is the foot of the last one; before the first pixel, background.
    """
    num_masks, height, width = masks.shape
    size = height * width
    pixels = masks.view(np.uint8).reshape(num_masks, size)
    end = (height - 1) * width // 8 * 8  # of whole words of 8 pixels below the first row, of which few hold a change
    lower, upper = pixels[:, width : width + end].view(np.uint64), pixels[:, :end].view(np.uint64)
    parts = [np.flatnonzero(one != other) for one, other in zip(lower, upper, strict=True)]
    owner, word = np.arange(num_masks).repeat([len(part) for part in parts]), np.concatenate(parts)
    found = np.flatnonzero((lower[owner, word] ^ upper[owner, word]).view(np.bool_))
    number, place = owner[found >> 3], word[found >> 3] * 8 + (found & 7) + width
    rest = np.concatenate([pixels[:, :width], pixels[:, width + end :] ^ pixels[:, end : size - width]], axis=1)
    rest[:, 1:width] ^= pixels[:, size - width : -1]
    of_rest, column = np.divmod(np.flatnonzero(rest.view(np.bool_)), rest.shape[1])
    column[column >= width] += end
    return np.append(number, of_rest), np.append(place, column)


def _compress(runs: Runs, counts: npt.NDArray[np.int64]) -> list[bytes]:
    """The text of runs that stand one mask after the other, so many a mask."""
    ends = counts.cumsum()
    numbers = runs.copy()
    numbers[2:] -= runs[:-2]
    whole = np.minimum((ends - counts)[:, None] + np.arange(3), len(runs) - 1)  # a mask's first three: no differences
    numbers[whole] = runs[whole]
    _, bits = np.frexp(numbers ^ (numbers >> 63))
    lengths = (bits + 5) // 5  # parts of five bits, of which the last one's highest is the sign
    stops = lengths.cumsum()
    part = np.arange(stops[-1]) - (stops - lengths).repeat(lengths)
    text = (numbers.repeat(lengths) >> (5 * part)) & 31
    text += 80  # 48, and 32 where more parts follow
    text[stops - 1] -= 32
    written = text.astype(np.uint8).tobytes()
    return [written[start:stop] for start, stop in pairwise([0, *stops[ends - 1].tolist()])]


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
    if lengths.max() > _MAX_PARTS:
        raise InputError(f"has an RLE with a number that no image has ({rle[:20]!r}); write the file anew")
    place = np.arange(len(parts)) - first.repeat(lengths)
    numbers = np.add.reduceat((parts & 31) << (5 * place), first)
    numbers -= ((parts[is_last] & 16) != 0) * (np.int64(1) << (5 * lengths))  # the highest bit is the sign
    numbers[1::2] = numbers[1::2].cumsum()  # from the fourth on, a number is the difference to the last but one
    numbers[2::2] = numbers[2::2].cumsum()
    if numbers.min() < 0 or numbers.max() > size[0] * size[1] or numbers.sum() != size[0] * size[1]:
        raise InputError(_unfit(sum(numbers.tolist()), size))  # numpy's own sum may wrap
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
