"""Train, tune, evaluate and serve image-segmentation models on a Ray cluster.

Jobs run by the functions of their stages: raysseg.train.train, raysseg.evaluate.evaluate, raysseg.predict.predict,
raysseg.shard.shard; raysseg.serve.build_app is what serves. The names below load what they need when they are first
used: importing raysseg costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysseg.config import load as load_job
    from raysseg.data.example import draw_example
    from raysseg.models.sam import PromptModel
    from raysseg.predictor import Predictor
    from raysseg.schema import ClassMap, InputError, Prompt, Sample

__all__ = [
    "ClassMap",
    "InputError",
    "Predictor",
    "Prompt",
    "PromptModel",
    "Sample",
    "draw_example",
    "load_job",
]

_HOMES = {
    "ClassMap": "schema",
    "InputError": "schema",
    "Prompt": "schema",
    "Sample": "schema",
    "Predictor": "predictor",
    "PromptModel": "models.sam",
    "draw_example": "data.example",
    "load_job": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raysseg' has no attribute {name!r}")
    return getattr(import_module(f"raysseg.{_HOMES[name]}"), "load" if name == "load_job" else name)
