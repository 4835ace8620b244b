"""Trainable models by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from raysseg.catalogue import MODELS
from raysseg.config import Loss, Model
from raysseg.models.base import Images, Outputs, Regions, SegModel, Targets
from raysseg.schema import ClassMap, Task

__all__ = ["Images", "Outputs", "Regions", "SegModel", "Targets", "build_model", "load_model", "outline_model"]


class Family(Protocol):
    """A module of models; it is imported when it is used.

    Where weights change more than what parameters hold, it has `outline`, too: as `build`, as if with weights.
    """

    @staticmethod
    def build(
        model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None
    ) -> SegModel:
        """A model for a class list, from scratch or from weights."""

    @staticmethod
    def load(name: str, folder: Path, classes: ClassMap, task: Task) -> SegModel:
        """A model from the files that its `save` wrote."""


def build_model(
    model: Model,
    classes: ClassMap,
    task: Task = "semantic",
    loss: Loss | None = None,
    class_weights: Sequence[float] | None = None,
) -> SegModel:
    """A model for a class list, from scratch or from weights.

    Args:
        model: its name, and the weights to start from.
        classes: the head is made for these.
        task: what it segments for.
        loss: the terms of its loss.
        class_weights: (C,) for the terms that take them.

    Raises:
        InputError: the weights can't be loaded or don't fit.
    """
    return _family(model.name).build(model, classes, task, loss or Loss(), class_weights)


def outline_model(
    model: Model,
    classes: ClassMap,
    task: Task = "semantic",
    loss: Loss | None = None,
    class_weights: Sequence[float] | None = None,
) -> SegModel:
    """As build_model, with what weights would freeze, but without them: nothing is read."""
    family = _family(model.name)
    make = family.build if model.weights is None else getattr(family, "outline", family.build)
    made: SegModel = make(model.model_copy(update={"weights": None}), classes, task, loss or Loss(), class_weights)
    return made


def load_model(name: str, folder: Path, classes: ClassMap, task: Task) -> SegModel:
    """A model from the files that its `save` wrote."""
    return _family(name).load(name, folder, classes, task)


def _family(name: str) -> Family:
    return cast(Family, import_module(f"raysseg.models.{MODELS[name].family}"))
