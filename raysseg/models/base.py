"""The only interface of a trainable model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysseg.config import Inference, Precision
from raysseg.masks import IdMap, LabelMap, View
from raysseg.schema import ClassMap, Task

Images = Tensor | Sequence[Tensor]
"""(B, 3, H, W) RGB of 0 to 255, uint8 or floating; or B of (3, H, W), where a model takes images of different sizes."""


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images in the range 0 to 1, by which most authors normalise."""


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that forward passes run in; `auto` is bf16 on GPUs that have it, else fp32."""
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class Regions(NamedTuple):
    """What one image's segments should come out as; crowds are not among them.

    Attributes:
        masks: (N, H, W) bool, none of them empty.
        class_ids: (N,) int64 class indices.
    """

    masks: Tensor
    class_ids: Tensor

    @property
    def boxes(self) -> Tensor:
        """x0, y0, x1, y1 in pixels, the right and lower edges beyond the last pixel; (N, 4) int64."""
        sides = [self.masks.any(1), self.masks.any(2)]  # (N, W), (N, H)
        first = [side.byte().argmax(1) for side in sides]
        beyond = [side.shape[1] - side.flip(1).byte().argmax(1) for side in sides]
        return torch.stack([*first, *beyond], 1)


@dataclass(frozen=True)
class Targets:
    """What a training batch should come out as.

    Attributes:
        labels: (B, H, W) int64 class indices; the class list's `ignore` where nothing counts (not labelled, padding,
            crowds), its `nothing` where there is known to be no class.
        weights: (B,) float32; 0 for rows that don't count.
        seeds: (B,) int64, the randomness of each row: follows from its place in the run, not from the micro-batch.
        regions: B, one an image; None where the task is semantic.
    """

    labels: Tensor
    weights: Tensor
    seeds: Tensor
    regions: tuple[Regions, ...] | None = None


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives.

    Attributes:
        values: the model's raw predictions by name; a dense model's are `logits`, (B, C, h, w), at its own resolution.
        losses: the terms, weighted and divided by their normalisers; they add up to the loss. Empty without targets.
    """

    values: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)


class SegModel(nn.Module, ABC):
    """A model that trains on batches and decodes to masks; normalising images belongs to it."""

    head_prefixes: tuple[str, ...] = ()
    """Names of parameters that are new to a data set, by their beginning."""
    backbone_prefixes: tuple[str, ...] = ()
    """Names of parameters that were trained on images alone, by their beginning; `optimizer.backbone_lr_factor`."""
    takes_any_sizes = False
    """Whether images of different sizes go through together."""
    is_exportable = False
    """Whether `forward` without targets is one graph, from images of one size to `logits`, that ONNX can hold."""

    def __init__(self, classes: ClassMap, task: Task, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.classes = classes
        self.task = task
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """0 to 255 -> zero mean and unit deviation, in the model's own precision."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def set_progress(self, progress: float) -> None:
        """Where the training stands before each step, 0 to 1; for models that anneal something."""

    def set_limits(self, inference: Inference) -> None:
        """What `decode` will be asked for, before forward passes in evaluation; for models that look for no more."""

    def repeated_layers(self) -> Sequence[nn.Module]:
        """What `recompute_layers` goes by: layers without BatchNorm, none of them within another."""
        return ()

    def recompute_layers(self) -> None:
        """From here on, backward passes compute these layers once more, of which forward passes keep the inputs alone.

        Copies of the model must be made before: they would compute this one's layers.
        """
        for layer in self.repeated_layers():
            layer.forward = _recomputed(layer.forward)

    def work_most(self) -> None:
        """From here on, a step takes as much memory as any step of a training may; to find out how much that is."""

    @abstractmethod
    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """What the losses average over, countable before forward; adds up over micro-batches and ranks."""

    @abstractmethod
    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """The only way in, so that DDP's hooks work.

        Args:
            images: see Images.
            targets: for the losses.
            normalisers: of the whole global batch; of these targets if left out.
        """

    @abstractmethod
    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        """What each image shows, at its (height, width): label maps, mask sets or segment maps, as the task says."""

    def class_scores(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        """Probabilities of the classes, (B, C, height, width), which add up over views of an image; semantic only."""
        raise NotImplementedError(f"{type(self).__name__} has no scores by class and pixel")

    @abstractmethod
    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes weights, configuration and preprocessing, such that the owner library's `from_pretrained` reads them.

        Args:
            folder: an empty folder.
            size: (height, width) that images are resized to first; None: they are taken as they are.
        """


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward pass, computed once more in the backward pass (Chen et al. 2016)."""

    def run(*inputs: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False, **named)
        return forward(*inputs, **named)

    return run


def to_whole_strides(pixels: Tensor, stride: int, least: int = 0) -> Tensor:
    """Images (B, 3, H, W) scaled up (bilinear) to the next multiples of a stride.

    Args:
        pixels: of images of one size.
        stride: in pixels.
        least: so many of its squares must be filled; both sides grow by the same factor until they are.
    """
    height, width = pixels.shape[2:]
    factor = max(1.0, math.sqrt(least * stride**2 / (height * width)))
    size = (math.ceil(height * factor / stride) * stride, math.ceil(width * factor / stride) * stride)
    return pixels if size == (height, width) else nn.functional.interpolate(pixels, size, mode="bilinear")


def to_label_map(scores: Tensor, size: tuple[int, int], classes: ClassMap) -> LabelMap:
    """One image's logits or probabilities, (C, h, w), scaled to a size (bilinear) and decided."""
    scaled = nn.functional.interpolate(scores[None].float(), size=size, mode="bilinear", align_corners=False)
    indices = scaled.argmax(1)[0].to(torch.uint8 if classes.dtype is np.uint8 else torch.int32)
    labels: IdMap = indices.cpu().numpy().astype(classes.dtype, copy=False)
    return LabelMap(labels, classes.ignore)
