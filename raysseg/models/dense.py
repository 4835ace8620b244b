"""What models with one score a class and pixel share: the house's losses over logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysseg.config import Loss
from raysseg.losses import LOSSES, Settings, count_normalisers
from raysseg.models.base import Targets
from raysseg.schema import ClassMap


class DenseLoss(nn.Module):
    """The terms of a job's `loss` over logits that are scaled to the labels' size (bilinear)."""

    def __init__(self, classes: ClassMap, loss: Loss, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self._ignore = classes.ignore
        self._loss = loss
        self.class_weights: Tensor | None
        weights = torch.tensor(class_weights, dtype=torch.float32) if class_weights is not None else None
        self.register_buffer("class_weights", weights, persistent=False)

    @property
    def _settings(self) -> Settings:
        return Settings(self._ignore, self.class_weights, self._loss)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Class-weighted labelled pixels, and images."""
        return count_normalisers(targets.labels, targets.weights, self._settings)

    def forward(self, logits: Tensor, targets: Targets, normalisers: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The terms of logits (B, C, h, w), weighted and divided by their normalisers; in float32 at least."""
        normalisers = normalisers or self.normalisers(targets)
        size = targets.labels.shape[-2:]
        losses = {}
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            scaled = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            for name, weight in self._loss.terms.items():
                term, normaliser = LOSSES[name]
                divisor = normalisers[normaliser].clamp(min=1e-12)
                losses[name] = weight * term(scaled, targets.labels, targets.weights, self._settings) / divisor
        return losses
