"""Boundary IoU (Cheng et al. 2021): IoU of the pixels within a mask that lie near its contour."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
"""(H, W)."""


def boundary_width(size: tuple[int, int], ratio: float = 0.02) -> int:
    """How many pixels from the contour still belong to the boundary, of an image of this (height, width)."""
    return max(1, round(ratio * math.hypot(*size)))


def inner_boundary(mask: Mask, width: int) -> Mask:
    """The pixels of a mask at most so far from what does not belong to it, in the larger of both axes.

    The image's edge counts as a contour, as in the authors' code.
    """
    side = 2 * width + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    inside = cv2.erode(mask.view(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    found: Mask = mask & (inside == 0)
    return found
