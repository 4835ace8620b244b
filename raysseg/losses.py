"""Loss terms as sums, beside what they are to be divided by; pure functions and their table.

Every term is a sum over pixels or images, never an average: it is divided by the normaliser of the whole global batch,
so that the gradient does not depend on how the batch was split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from raysseg.config import ClassWeightScheme, Loss


@dataclass(frozen=True)
class Settings:
    """What the terms need beside logits and labels.

    Attributes:
        ignore: the label of pixels that don't count.
        class_weights: (C,), or None for all 1.
        loss: the terms' knobs; its weights are not applied here.
    """

    ignore: int
    class_weights: Tensor | None = None
    loss: Loss = field(default_factory=Loss)


# --- terms that add up over pixels --------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Weighted cross-entropy, summed over labelled pixels.

    Args:
        logits: (B, C, H, W), float32 or float64.
        labels: (B, H, W) int64.
        weights: (B,); unused here, since rows of weight 0 carry no label.
        settings: see Settings.
    """
    return F.cross_entropy(logits, labels, settings.class_weights, ignore_index=settings.ignore, reduction="sum")


def focal(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Focal loss over softmax (Lin et al. 2017), class-weighted, summed over labelled pixels; see cross_entropy."""
    surprise = F.cross_entropy(logits, labels, ignore_index=settings.ignore, reduction="none")  # (B, H, W)
    # a root, gamma below 1, has no slope at 0
    doubt = (1 - torch.exp(-surprise)).clamp(min=1e-7)
    return (doubt**settings.loss.focal_gamma * surprise * _pixel_weights(labels, settings)).sum()


def boundary(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Cross-entropy near boundaries: weighted by exp(-d^2 / 2 sigma^2), summed over labelled pixels.

    d is the distance to the nearest pixel of another class, see squared_distances; beyond 3 sigma the weight is 0.
    Beside a cross-entropy of 1 this is the weight map of U-Net (Ronneberger et al. 2015, equation 2, with w0 = 10 and
    sigma = 5), with one distance, as classes have no second nearest cell. Arguments as cross_entropy.
    """
    sigma = settings.loss.boundary_sigma
    squares = squared_distances(labels, settings.ignore, math.ceil(3 * sigma))
    nearness = torch.exp(squares.to(logits.dtype) / (-2 * sigma**2)) * (squares <= (3 * sigma) ** 2)
    losses = F.cross_entropy(logits, labels, settings.class_weights, ignore_index=settings.ignore, reduction="none")
    return (nearness * losses).sum()


def squared_distances(labels: Tensor, ignore: int, reach: int) -> Tensor:
    """How far each labelled pixel is from the nearest pixel that is labelled otherwise: exact, squared, Euclidean.

    Ignored pixels are no class: what lies beyond them counts. By two passes over rows and columns on the labels' own
    device, whatever the number of classes: 40 ms for 512 x 512 pixels and a reach of 15 on one CPU core, where OpenCV's
    distance transform of each of 11 classes takes as long.

    Args:
        labels: (B, H, W) int64.
        ignore: the label of pixels that don't count; what is found there means nothing.
        reach: pixels, 126 at most.

    Returns:
        (B, H, W) int16, in pixels squared; more than reach^2 where there is none within reach.
    """
    far = (reach + 1) ** 2
    height, width = labels.shape[1:]
    labels, is_ignored = labels.int(), labels == ignore
    sides = [
        (step**2, here, there)
        for step in range(1, min(reach, width - 1) + 1)
        for here, there in ((slice(step, None), slice(-step)), (slice(-step), slice(step, None)))
    ]
    # Each row's nearest label, how far it is, and how far the nearest one is that differs from it; the first two in one
    # number, so that the smallest is the nearest. No torch.where: it takes 20 times as long as arithmetic on CPUs.
    keys = labels.masked_fill(is_ignored, far << 16)
    nearest = keys.clone()
    for square, here, there in sides:
        nearest[:, :, here].clamp_(max=keys[:, :, there] + (square << 16))
    first, nearest = (nearest >> 16).short(), nearest & 0xFFFF
    second = torch.full_like(first, far)
    for square, here, there in sides:
        is_none = (labels[:, :, there] == nearest[:, :, here]) | is_ignored[:, :, there]
        second[:, :, here].clamp_(max=is_none.short().mul_(far).add_(square))
    gap = second - first
    squares = torch.full_like(first, far)
    for step in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        here, there = slice(max(0, -step), height - max(0, step)), slice(max(0, step), height - max(0, -step))
        is_same = nearest[:, there] == labels[:, here]
        squares[:, here].clamp_(max=is_same.short().mul_(gap[:, there]).add_(first[:, there]).add_(step**2))
    return squares


# --- terms that are taken per image -------------------------------------------------------------------------------


def dice(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016), summed over images.

    Each image's loss is the mean of 1 - Dice over the classes that its labels hold; an image without labels gives 0.

    Args:
        logits: (B, C, H, W), float32 or float64.
        labels: (B, H, W) int64.
        weights: (B,), 0 for rows that don't count.
        settings: see Settings; class weights have no part.
    """
    hits, predicted, true = _soft_counts(logits, labels, settings)
    is_present = true > 0
    losses = (1 - 2 * hits / (predicted + true).clamp(min=1)) * is_present
    return (_mean_of_present(losses, is_present) * weights).sum()


def tversky(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Tversky loss (Salehi et al. 2017), over classes and images as dice is; arguments as dice.

    A class's index is hits / (hits + alpha false positives + beta false negatives), all soft. Its loss is 1 - index to
    the power of gamma (focal Tversky, Abraham and Khan 2019, who write 1 / gamma).
    """
    knobs = settings.loss
    hits, predicted, true = _soft_counts(logits, labels, settings)
    is_present = true > 0
    whole = hits + knobs.tversky_alpha * (predicted - hits) + knobs.tversky_beta * (true - hits)
    # a root, gamma below 1, has no slope at 0
    losses = (1 - hits / whole.where(is_present, 1)).clamp(min=1e-7) ** knobs.tversky_gamma * is_present
    return (_mean_of_present(losses, is_present) * weights).sum()


def lovasz(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Lovasz-Softmax (Berman et al. 2018), over classes and images as dice is; arguments as dice.

    The convex extension of 1 - IoU to probabilities.
    """
    probabilities = logits.flatten(2).softmax(1)  # (B, C, P)
    # the loss is linear in the probabilities for as long as their order stays
    slopes = torch.zeros_like(probabilities)
    perfect = probabilities.new_zeros(len(labels))
    for i, truth in enumerate(labels.flatten(1)):
        is_valid = truth != settings.ignore
        present = truth[is_valid].bincount(minlength=logits.shape[1]).nonzero()[:, 0]  # (K,)
        is_class = truth == present[:, None]  # (K, P)
        errors = (is_class.to(logits.dtype) - probabilities.detach()[i, present]).abs() * is_valid
        growth = _jaccard_growth(errors - (~is_valid).to(logits.dtype), is_class) * is_valid / max(1, len(present))
        slopes[i, present] = torch.where(is_class, -growth, growth)
        perfect[i] = (growth * is_class).sum()
    return (((probabilities * slopes).sum((1, 2)) + perfect) * weights).sum()


def _jaccard_growth(errors: Tensor, is_class: Tensor) -> Tensor:
    """What each pixel adds to 1 - IoU as pixels turn wrong one by one, the largest error first; all (K, P).

    One of the class leaves the intersection: 1 / union. Another joins the union: intersection / (union (union - 1)).
    """
    order = _descending(errors)
    is_class = is_class.gather(1, order)
    found = is_class.cumsum(1, dtype=errors.dtype)
    total = is_class.sum(1, keepdim=True)
    union = total - found + torch.arange(1, errors.shape[1] + 1, dtype=errors.dtype, device=errors.device)
    growth = torch.where(is_class, 1 / union, (total - found) / (union * (union - 1)).clamp(min=1))
    return torch.empty_like(errors).scatter_(1, order, growth)


def ohem(logits: Tensor, labels: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Cross-entropy of each image's hard pixels, class-weighted; their mean, summed over images. Arguments as dice.

    Hard are pixels to whose class the model gives less than `ohem_threshold`; where these are less than `ohem_min_kept`
    of the labelled pixels, those with the smallest probability, with all that equal the last. Pixels of class weight 0
    are not among them. Online hard example mining (Shrivastava et al. 2016) by pixels, as Wu et al. 2016
    (arXiv:1605.06885) and BiSeNet's code have it, whose settings are the defaults.
    """
    knobs = settings.loss
    surprise = F.cross_entropy(logits, labels, ignore_index=settings.ignore, reduction="none")
    shares = _pixel_weights(labels, settings).to(surprise.dtype)
    losses = []
    for values, share in zip(surprise.unbind(), shares.unbind(), strict=True):
        values, share = values[share > 0], share[share > 0]
        is_hard = values > -math.log(knobs.ohem_threshold)
        if count := math.ceil(knobs.ohem_min_kept * len(values)):
            is_hard |= values >= values.detach().kthvalue(len(values) - count + 1).values
        share = share * is_hard
        losses.append((values * share).sum() / share.sum().clamp(min=1e-12))
    return (torch.stack(losses) * weights).sum()


Term = Callable[[Tensor, Tensor, Tensor, Settings], Tensor]

LOSSES: dict[str, tuple[Term, str]] = {
    "cross_entropy": (cross_entropy, "pixels"),
    "focal": (focal, "pixels"),
    "boundary": (boundary, "pixels"),
    "dice": (dice, "images"),
    "tversky": (tversky, "images"),
    "lovasz": (lovasz, "images"),
    "ohem": (ohem, "images"),
}
"""Each term, and the normaliser that it is divided by; `config.Loss` has a weight for each."""


def count_normalisers(labels: Tensor, weights: Tensor, settings: Settings) -> dict[str, Tensor]:
    """What the terms average over, countable before any forward pass: class-weighted valid pixels, and images.

    Args:
        labels: (B, H, W) int64.
        weights: (B,).
        settings: see Settings.

    Returns:
        float64 scalars.
    """
    pixels = _pixel_weights(labels, settings).sum(dtype=torch.float64)
    return {"pixels": pixels, "images": weights.sum(dtype=torch.float64)}


def _pixel_weights(labels: Tensor, settings: Settings) -> Tensor:
    """(B, H, W): each labelled pixel's class weight, 0 elsewhere."""
    is_valid = labels != settings.ignore
    if settings.class_weights is None:
        return is_valid.float()
    return settings.class_weights[labels.where(is_valid, 0)] * is_valid


def _soft_counts(logits: Tensor, labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """By image and class, (B, C): probability on the class's own pixels, on all labelled pixels, and the pixels."""
    is_valid = (labels != settings.ignore).flatten(1)
    indices = labels.flatten(1).where(is_valid, 0)  # (B, P)
    probabilities = logits.flatten(2).softmax(dim=1) * is_valid[:, None]  # (B, C, P)
    own = probabilities.gather(1, indices[:, None])[:, 0]
    # one after another, so many numbers add up to too few digits in float32
    zeros = torch.zeros(probabilities.shape[:2], dtype=torch.float64, device=labels.device)
    hits, true = (zeros.scatter_add(1, indices, values.double()) for values in (own, is_valid))
    return hits.to(own.dtype), probabilities.sum(2), true.to(own.dtype)


def _mean_of_present(losses: Tensor, is_present: Tensor) -> Tensor:
    """(B,): of losses by image and class, (B, C), which are 0 where the class is absent."""
    return losses.sum(1) / is_present.sum(1).clamp(min=1)


def _descending(values: Tensor) -> Tensor:
    """The order of each row of (K, P), largest first; on CPUs by numpy, which takes a fifth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(-values.numpy(), axis=1))
    return values.argsort(dim=1, descending=True)


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
