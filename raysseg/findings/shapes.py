"""Measures of masks: how wide, in how many pieces, how rough, and whether they lie on the image's edges."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from raysseg.masks import IdMap

Bits = npt.NDArray[np.uint8]
"""(H, W), 0 or 1."""

REGION = np.dtype(
    [
        ("class_id", np.int32),
        ("number", np.int32),
        ("is_crowd", np.bool_),
        ("area", np.int64),
        ("box", np.int32, 4),
        ("width", np.float32),
        ("rough", np.float32),
        ("holes", np.int32),
        ("clusters", np.int32),
        ("far", np.float32),
        ("neck", np.float32),
        ("lobes", np.float32),
        ("solidity", np.float32),
    ]
)
"""What is kept of a segment, or of all pixels of one id.

number: of the segment, from 1 on; 0 for label images. box: x0, y0, x1, y1. width: of a typical stroke, in pixels.
rough: pixels that smoothing turns over those of the smoothed outline. holes: small, compact ones. clusters: groups of
pieces with gaps between them, 1 where other segments fill these; far: the share of the area outside of the largest.
neck: length of the cut that parts the mask in two, over the thinner part's width; 1 where there is none. lobes: the
lower solidity of these parts, else 0. solidity: area over that of the hull.
"""

Regions = npt.NDArray[np.void]
"""(N,) of REGION."""

THIN = 4.0  # pixels: strokes narrower than that suffer from halving an image, or from smoothing
_SMALL_HOLE = (4, 40)  # pixels; smaller ones are specks that many masks have, larger ones are more often true
_SHIFT_SIDE = 512  # pixels: larger images are scaled down to look for a shift
_REACH = 14  # pixels to each side that a shift is looked for
_MAX_PIECES = 60  # the largest ones, when pieces are grouped
_CONVEX = 0.94  # solidity of masks that no cut makes much more compact
_WHOLE = 0.95  # of the area, that is one piece
_LEAST_PART = 0.15  # of the area, that each of two things has
_CORES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # of the greatest depth


def measure_region(
    mask: Bits, class_id: int, number: int, is_crowd: bool, numbers: IdMap | None = None
) -> tuple[object, ...]:
    """A row of REGION.

    Args:
        mask: of the region.
        class_id: of its pixels.
        number: of the segment, from 1 on; 0 for label images.
        is_crowd: whether the segment is a group.
        numbers: (H, W) of all segments, 0 for none; None for label images, of which clusters, far, neck, lobes and
            solidity are not measured.
    """
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return (class_id, number, is_crowd, 0, (0, 0, 0, 0), 0.0, 0.0, 0, 0, 0.0, 1.0, 0.0, 1.0)
    crop: Bits = cv2.copyMakeBorder(mask[y : y + height, x : x + width], 3, 3, 3, 3, cv2.BORDER_CONSTANT)
    area = int(np.count_nonzero(crop))
    depth = cv2.distanceTransform(crop, cv2.DIST_L2, 3)
    clusters, far, neck, lobes, solidity = (1, 0.0, 1.0, 0.0, 1.0)
    if numbers is not None and not is_crowd:
        clusters, far = _group_pieces(crop, area)
        if clusters > 2 and _is_hidden(crop, numbers[y : y + height, x : x + width]):
            clusters, far = 1, 0.0
        solidity = _solidity(crop, area)
        if solidity < _CONVEX:
            neck, lobes = _cut_at_neck(crop, depth, area)
    return (
        class_id,
        number,
        is_crowd,
        area,
        (x, y, x + width, y + height),
        4 * float(np.median(depth[crop > 0])),  # depth is even between 0 and half of a stroke's width
        _roughness(crop),
        _count_small_holes(crop),
        clusters,
        far,
        neck,
        lobes,
        solidity,
    )


def component_areas(mask: Bits) -> list[int]:
    """Pixels of each connected part."""
    areas: list[int] = cv2.connectedComponentsWithStats(mask, connectivity=8)[2][1:, cv2.CC_STAT_AREA].tolist()
    return areas


def _roughness(crop: Bits) -> float:
    smooth = cv2.medianBlur(crop, 3)
    outline = cv2.morphologyEx(smooth, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return float(np.count_nonzero(smooth != crop) / (np.count_nonzero(outline) / 2 + 10))


def _count_small_holes(crop: Bits) -> int:
    _, _, width, height, area = cv2.connectedComponentsWithStats(1 - crop, connectivity=4)[2][1:].T
    is_small = (area >= _SMALL_HOLE[0]) & (area <= _SMALL_HOLE[1])
    return int((is_small & (2 * area >= width * height)).sum())  # compact: no slit


def _group_pieces(crop: Bits, area: int) -> tuple[int, float]:
    """Groups of pieces that lie far apart for the size of the largest, and the share outside of the largest group."""
    stats = cv2.connectedComponentsWithStats(crop, connectivity=8)[2][1:]
    stats = stats[np.argsort(-stats[:, cv2.CC_STAT_AREA], kind="stable")][:_MAX_PIECES]
    if len(stats) == 1:
        return 1, 0.0
    low, high = stats[:, :2], stats[:, :2] + stats[:, 2:4]
    gaps = np.maximum(low[:, None] - high[None], low[None] - high[:, None]).clip(0)  # (P, P, 2), boxes' gaps by axis
    is_near = np.hypot(gaps[..., 0], gaps[..., 1]) <= max(6.0, 0.4 * np.sqrt(stats[0, cv2.CC_STAT_AREA]))
    for _ in range(int(np.ceil(np.log2(len(stats))))):
        is_near = (is_near.astype(np.float32) @ is_near.astype(np.float32)) > 0  # near by way of others
    groups = np.unique(is_near.argmax(axis=1), return_inverse=True)[1]
    areas = np.bincount(groups, stats[:, cv2.CC_STAT_AREA])
    counted = areas >= 0.02 * area
    return int(counted.sum()), float(1 - areas.max() / areas.sum())


def _is_hidden(crop: Bits, numbers: IdMap) -> bool:
    """Whether other segments fill two thirds of what lies between the pieces: a thing behind others."""
    hull = np.zeros_like(crop)
    cv2.fillConvexPoly(hull, cv2.convexHull(cv2.findNonZero(crop)), 1)
    between = (hull > crop)[3:-3, 3:-3]
    return bool(3 * np.count_nonzero(numbers[between]) > 2 * np.count_nonzero(between))


def _cut_at_neck(crop: Bits, depth: npt.NDArray[np.float32], area: int) -> tuple[float, float]:
    """The length of the cut that parts a mask in two, over the thinner part's width, and the parts' lower solidity.

    Cores are what is deeper than some share of the deepest place; every pixel belongs to the nearest one.
    """
    if max(component_areas(crop)) < _WHOLE * area:
        return 1.0, 0.0  # something lies before it
    for share in _CORES:
        cores = (depth > share * depth.max()).view(np.uint8)
        nearest = cv2.distanceTransformWithLabels(1 - cores, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP)[1]
        parts = np.where(crop, nearest, 0)
        sizes = np.bincount(parts.ravel(), minlength=3) * (np.arange(max(3, parts.max() + 1)) > 0)
        first, second = np.argsort(-sizes, kind="stable")[:2]
        if sizes[second] >= _LEAST_PART * area and sizes[first] + sizes[second] >= (1 - _LEAST_PART) * area:
            one, other = ((parts == i).view(np.uint8) for i in (first, second))
            cut = np.count_nonzero(cv2.dilate(one, np.ones((3, 3), np.uint8)) & other)
            width = 2 * min(cv2.minMaxLoc(depth, mask=part)[1] for part in (one, other))
            return cut / width, min(_solidity(one, int(sizes[first])), _solidity(other, int(sizes[second])))
    return 1.0, 0.0


def _solidity(crop: Bits, area: int) -> float:
    outlines, _ = cv2.findContours(crop, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(outlines))
    # through the pixels' centres: half a pixel more on every side (Pick's theorem)
    return min(1.0, area / (cv2.contourArea(hull) + cv2.arcLength(hull, True) / 2 + 1))


def measure_shift(image: npt.NDArray[np.uint8], ids: IdMap, ignored: int) -> tuple[int, int, float]:
    """Where the labels' boundaries would lie on the strongest edges of the image.

    Args:
        image: (H, W, 3).
        ids: (H, W) labels.
        ignored: the id whose outlines do not count.

    Returns:
        How far down and across the labels would have to move, in pixels, and what that gains: the difference of the
        mean gradient there and here, over the spread of the gradient in all directions.
    """
    scale = min(1.0, _SHIFT_SIDE / max(ids.shape))
    if scale < 1:
        size = (max(1, round(ids.shape[1] * scale)), max(1, round(ids.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    if min(ids.shape) < 4 * _REACH:
        return 0, 0, 0.0
    edges = _edge_strength(image)
    outline = _outline(ids, ignored)
    inner = outline[_REACH:-_REACH, _REACH:-_REACH]
    if (num := int(inner.sum())) < 200 or not edges.any():
        return 0, 0, 0.0
    energy = cv2.matchTemplate(edges, inner, cv2.TM_CCORR) / num  # (2 * _REACH + 1, same)
    best = np.unravel_index(int(energy.argmax()), energy.shape)
    gain = float((energy[best] - energy[_REACH - 1 : _REACH + 2, _REACH - 1 : _REACH + 2].max()) / energy.std())
    down, across = (int(place) - _REACH for place in best)
    return round(down / scale), round(across / scale), round(gain, 3)


def _edge_strength(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The gradient's magnitude, (H, W), its strongest parts cut so that a few hard edges don't decide."""
    strength = np.zeros(image.shape[:2], np.float32)
    for channel in cv2.split(cv2.GaussianBlur(image, (0, 0), 1.0)):
        slope = cv2.magnitude(cv2.Sobel(channel, cv2.CV_32F, 1, 0), cv2.Sobel(channel, cv2.CV_32F, 0, 1))
        strength = cv2.max(strength, slope)
    strength = np.sqrt(strength)
    capped: npt.NDArray[np.float32] = np.minimum(strength, np.float32(np.quantile(strength[::2, ::2], 0.97)))
    return capped


def _outline(ids: IdMap, ignored: int) -> npt.NDArray[np.float32]:
    """Pixels on both sides of boundaries, (H, W)."""
    outline = np.zeros(ids.shape, np.float32)
    known = ids != ignored
    sides = ids[:, 1:] != ids[:, :-1]
    tops = ids[1:] != ids[:-1]
    if ignored:
        sides &= known[:, 1:] & known[:, :-1]
        tops &= known[1:] & known[:-1]
    outline[:, 1:] += sides
    outline[:, :-1] += sides
    outline[1:] += tops
    outline[:-1] += tops
    return np.minimum(outline, 1)
