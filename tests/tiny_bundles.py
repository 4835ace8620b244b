"""Bundles of tiny models that know nothing, but say something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from raysseg import bundle as bundles
from raysseg.bundle import Bundle, Preprocessing
from raysseg.config import AnySource, Inference, Model
from raysseg.data import read_class_map
from raysseg.models import build_model
from raysseg.schema import Task

MODELS: dict[Task, str] = {"semantic": "segformer-tiny", "instance": "maskrcnn-tiny", "panoptic": "mask2former-tiny"}
_CLASSIFIERS = ("classifier", "cls_score", "cls_logits", "class_predictor")


def source(task: Task, folder: str) -> dict[str, Any]:
    """The validation split, as a task has it."""
    images = f"{folder}/val/images"
    if task == "semantic":
        return {"format": "masks", "images": images, "masks": f"{folder}/val/masks"}
    if task == "instance":
        return {"format": "coco", "images": images, "annotations": f"{folder}/val/instances.json"}
    return {
        "format": "coco_panoptic",
        "images": images,
        "annotations": f"{folder}/val/panoptic.json",
        "masks": f"{folder}/val/panoptic",
    }


def write_bundle(task: Task, example: Path, uri: str, seed: int = 0) -> None:
    """A tiny model that knows nothing, but says something."""
    data = TypeAdapter[AnySource](AnySource).validate_python(source(task, str(example)))
    classes = read_class_map(str(example / "classes.json") if task == "semantic" else None, data)
    torch.manual_seed(seed)
    model = build_model(Model(name=MODELS[task], weights=None), classes, task).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in _CLASSIFIERS):
            nn.init.normal_(parameter, std=0.5)
    bundles.write(Bundle(uri, task, classes, MODELS[task], Preprocessing(None), {}, {}, {}, Inference(), {}), model)
