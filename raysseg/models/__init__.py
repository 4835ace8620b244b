"""Trainable models by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from raysseg.config import Loss, Model
from raysseg.models.base import Outputs, SegModel, Targets
from raysseg.schema import ClassMap

__all__ = ["FAMILIES", "Outputs", "SegModel", "Targets", "build_model", "load_model"]

FAMILIES = {"segformer": "raysseg.models.segformer"}
"""A name's beginning -> the module of its family, with `build` and `load`; it is imported when it is used."""


def build_model(
    model: Model, classes: ClassMap, loss: Loss | None = None, class_weights: Sequence[float] | None = None
) -> SegModel:
    """A model for a class list, from scratch or from weights.

    Args:
        model: its name, and the weights to start from.
        classes: the head is made for these.
        loss: the terms of its loss.
        class_weights: (C,) for the terms that take them.

    Raises:
        InputError: the weights can't be loaded or don't fit.
    """
    built: SegModel = _family(model.name).build(model, classes, loss, class_weights)
    return built


def load_model(name: str, folder: Path, classes: ClassMap) -> SegModel:
    """A model from the files that its `save` wrote."""
    loaded: SegModel = _family(name).load(folder, classes)
    return loaded


def _family(name: str) -> Any:
    return import_module(FAMILIES[name.partition("-")[0]])
