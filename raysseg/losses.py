"""Loss terms as sums, beside what they are to be divided by; pure functions and their table.

Every term is a sum over pixels or images, never an average: it is divided by the normaliser of the whole global batch,
so that the gradient does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from raysseg.config import ClassWeightScheme


@dataclass(frozen=True)
class Settings:
    """What the terms need beside logits and labels.

    Attributes:
        ignore: the label of pixels that don't count.
        class_weights: (C,), or None for all 1.
        focal_gamma: exponent of the focal term.
    """

    ignore: int
    class_weights: Tensor | None = None
    focal_gamma: float = 2.0


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Weighted cross-entropy, summed over labelled pixels.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64.
        weights: (B,); unused here, since rows of weight 0 carry no label.
        settings: see Settings.
    """
    return F.cross_entropy(logits, labels, settings.class_weights, ignore_index=settings.ignore, reduction="sum")


def focal(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Focal loss over softmax (Lin et al. 2017), class-weighted, summed over labelled pixels; see cross_entropy."""
    log_p = F.log_softmax(logits, dim=1)
    likelihood = F.nll_loss(log_p, labels, ignore_index=settings.ignore, reduction="none")  # (B, H, W)
    weighted = F.nll_loss(log_p, labels, settings.class_weights, ignore_index=settings.ignore, reduction="none")
    return ((1 - torch.exp(-likelihood)) ** settings.focal_gamma * weighted).sum()


def dice(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016), summed over images; arguments as cross_entropy.

    Each image's loss is the mean of 1 - Dice over the classes that its labels hold; an image without labels gives 0.
    """
    num_classes = logits.shape[1]
    is_valid = labels != settings.ignore
    probabilities = logits.softmax(dim=1) * is_valid[:, None]
    truth = F.one_hot(labels.where(is_valid, 0), num_classes).movedim(-1, 1) * is_valid[:, None]  # (B, C, H, W)
    overlap = (probabilities * truth).sum((2, 3))
    total = probabilities.sum((2, 3)) + truth.sum((2, 3))
    is_present = truth.any(dim=3).any(dim=2)  # (B, C)
    losses = (1 - 2 * overlap / total.clamp(min=1)) * is_present
    return (losses.sum(1) / is_present.sum(1).clamp(min=1) * weights).sum()


Term = Callable[[Tensor, Tensor, Tensor, Settings], Tensor]

LOSSES: dict[str, tuple[Term, str]] = {
    "cross_entropy": (cross_entropy, "pixels"),
    "focal": (focal, "pixels"),
    "dice": (dice, "images"),
}
"""Each term, and the normaliser that it is divided by."""


def count_normalisers(labels: Tensor, weights: Tensor, settings: Settings) -> dict[str, Tensor]:
    """What the terms average over, countable before any forward pass: class-weighted valid pixels, and images.

    Args:
        labels: (B, H, W) int64.
        weights: (B,).
        settings: see Settings.

    Returns:
        float64 scalars.
    """
    is_valid = labels != settings.ignore
    if settings.class_weights is None:
        pixels = is_valid.sum(dtype=torch.float64)
    else:
        per_pixel = settings.class_weights.double()[labels.where(is_valid, 0)]
        pixels = (per_pixel * is_valid).sum()
    return {"pixels": pixels, "images": weights.sum(dtype=torch.float64)}


@dataclass(frozen=True)
class ClassPixels:
    """Pixel counts of a data set.

    Attributes:
        pixels: (C,) int64, labelled pixels of each class.
        pixels_where_present: (C,) int64, labelled pixels of the images that hold the class.
        images: (C,) int64, images that hold the class.
        ignored: pixels without a label.
        num_images: images counted.
    """

    pixels: npt.NDArray[np.int64]
    pixels_where_present: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]
    ignored: int
    num_images: int

    @classmethod
    def none(cls, num_classes: int) -> ClassPixels:
        """Of no image."""
        zeros = np.zeros(num_classes, np.int64)
        return cls(zeros, zeros, zeros, 0, 0)

    def __add__(self, other: ClassPixels) -> ClassPixels:
        return ClassPixels(
            self.pixels + other.pixels,
            self.pixels_where_present + other.pixels_where_present,
            self.images + other.images,
            self.ignored + other.ignored,
            self.num_images + other.num_images,
        )


def count_pixels(labels: npt.NDArray[np.integer], num_classes: int) -> ClassPixels:
    """Counts one image's labels, (H, W) class indices; anything beyond the classes is ignored."""
    counts = np.bincount(np.minimum(labels, num_classes).ravel(), minlength=num_classes + 1)
    pixels, is_present = counts[:-1], counts[:-1] > 0
    return ClassPixels(pixels, is_present * pixels.sum(), is_present.astype(np.int64), int(counts[-1]), 1)


def count_regions(class_ids: npt.NDArray[np.integer], num_classes: int) -> ClassPixels:
    """One image's regions by class, (N,), in the place of pixels: for models that learn from regions."""
    regions = np.bincount(class_ids, minlength=num_classes)
    is_present = regions > 0
    return ClassPixels(regions, is_present * regions.sum(), is_present.astype(np.int64), 0, 1)


def balance(scheme: ClassWeightScheme, counts: ClassPixels, beta: float) -> npt.NDArray[np.float64]:
    """Class weights from the training masks, (C,), with mean 1 over the classes that occur; the others get 0.

    inverse: 1 / pixels. median_frequency: median of the frequencies over the class's own, where a frequency is a
    class's pixels over those of the images that hold it (Eigen and Fergus 2015). effective_number: (1 - beta) /
    (1 - beta^pixels) (Cui et al. 2019).
    """
    is_present = counts.pixels > 0
    pixels = counts.pixels[is_present].astype(np.float64)
    if scheme == "inverse":
        raw = 1 / pixels
    elif scheme == "median_frequency":
        frequency = pixels / counts.pixels_where_present[is_present]
        raw = np.median(frequency) / frequency
    else:
        raw = (1 - beta) / -np.expm1(pixels * np.log(beta)) if beta > 0 else np.ones_like(pixels)
    weights = np.zeros(len(counts.pixels))
    weights[is_present] = raw / raw.mean()
    return weights
