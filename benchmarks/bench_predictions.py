"""What a model takes to predict one image: writes raysseg/advice/predictions.json, which `raysseg recommend` goes by.

A forward pass in evaluation over an image of 512x512, 21 classes, bf16, on tensors without contents. Mask R-CNN looks
at all of its proposals, but finds nothing, so that its masks are not counted.
"""

from __future__ import annotations

import json

import torch

from benchmarks.results import print_rows
from raysseg.advice.phantom import Phantoms, gpu_rules
from raysseg.advice.profiles import PREDICTIONS, read_costs
from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.data import read_class_map
from raysseg.models import outline_model

SIZE = (512, 512)
CLASSES = read_class_map([f"class {i}" for i in range(21)])


def predict_one(name: str) -> dict[str, int]:
    """Operations, and bytes that are read and written."""
    phantoms = Phantoms()
    with phantoms, gpu_rules():
        phantoms.is_building = True
        model = outline_model(Model(name=name, weights=None), CLASSES, MODELS[name].tasks[0]).eval()
        phantoms.is_building = False
        buffers = (buffer for key, buffer in model.named_buffers() if not key.startswith("criterion."))
        phantoms.forget([*model.parameters(), *buffers])
        model.work_most()
        model.set_limits(Inference())
        phantoms.flops = phantoms.traffic = 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(torch.empty((1, 3, *SIZE), dtype=torch.uint8))
    return {"flops": phantoms.flops, "traffic": phantoms.traffic}


def main() -> None:
    found = {name: predict_one(name) for name in read_costs()}
    PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n")
    print_rows([{"model": name, **{key: value / 1e9 for key, value in row.items()}} for name, row in found.items()])


if __name__ == "__main__":
    main()
