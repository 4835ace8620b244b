"""The only interface of a trainable model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from raysseg.masks import IdMap, LabelMap
from raysseg.schema import ClassMap


@dataclass(frozen=True)
class Targets:
    """What a training batch should come out as.

    Attributes:
        labels: (B, H, W) int64 class indices, or the class list's `ignore`.
        weights: (B,) float32; 0 for rows that don't count.
    """

    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives.

    Attributes:
        logits: (B, C, h, w), at the model's own resolution.
        losses: the terms, weighted and divided by their normalisers; they add up to the loss. Empty without targets.
    """

    logits: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class SegModel(nn.Module, ABC):
    """A model that trains on batches and decodes to masks.

    Images go in as they are, (B, 3, H, W) RGB of 0 to 255, uint8 or floating; normalising belongs to the model.
    """

    head_prefixes: tuple[str, ...] = ()
    """Names of parameters that are new to a data set, by their beginning."""

    def __init__(self, classes: ClassMap, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.classes = classes
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """0 to 255 -> zero mean and unit deviation, in the model's own precision."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    @abstractmethod
    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """What the losses average over, countable before forward; adds up over micro-batches and ranks."""

    @abstractmethod
    def forward(
        self, images: Tensor, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """The only way in, so that DDP's hooks work.

        Args:
            images: (B, 3, H, W).
            targets: for the losses.
            normalisers: of the whole global batch; of these targets if left out.
        """

    @abstractmethod
    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[LabelMap]:
        """Masks of each image, at its (height, width)."""

    @abstractmethod
    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes weights, configuration and preprocessing, such that the owner library's `from_pretrained` reads them.

        Args:
            folder: an empty folder.
            size: (height, width) that images are resized to first; None: they are taken as they are.
        """


def to_label_map(logits: Tensor, size: tuple[int, int], classes: ClassMap) -> LabelMap:
    """One image's logits, (C, h, w), scaled to a size (bilinear) and decided."""
    scaled = nn.functional.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)
    indices = scaled.argmax(1)[0].to(torch.uint8 if classes.dtype is np.uint8 else torch.int32)
    labels: IdMap = indices.cpu().numpy().astype(classes.dtype, copy=False)
    return LabelMap(labels, classes.ignore)
