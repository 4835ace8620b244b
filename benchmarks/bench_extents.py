"""What models take to predict, and to train on other sizes: writes raysseg/advice/extents.json, for recommending.

Prediction is a forward pass in evaluation over an image of 512x512, 21 classes, bf16, on tensors without contents. Mask
R-CNN looks at all of its proposals, but finds nothing, so that its masks are not counted. --check says how far memory
between the sizes of the table is from what `raysseg plan` works out.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.results import device_name, print_rows, write_result
from raysseg.advice.costs import profile
from raysseg.advice.phantom import Phantoms, gpu_rules
from raysseg.advice.profiles import EXTENTS, SIZE, bytes_per_image, read_costs, read_extents
from raysseg.catalogue import MODELS
from raysseg.config import Inference, Model
from raysseg.data import read_class_map
from raysseg.models import outline_model

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
    return {"prediction_flops": phantoms.flops, "prediction_traffic": phantoms.traffic}


def extent(name: str) -> dict[str, int]:
    """A row of extents.json."""
    sides = {
        f"bytes_per_image_{side}": profile(name, MODELS[name].tasks[0], len(CLASSES), (side, side)).bytes_per_image
        for side in (256, 1024)
    }
    return {**predict_one(name), **sides}


def deviations(name: str) -> dict[str, str | float]:
    """Of the memory of four crops, the estimate over what a profile at that size says, less 1."""
    found: dict[str, str | float] = {"model": name}
    task = MODELS[name].tasks[0]
    known = read_costs()[name][task]
    for size in ((352, 480), (768, 768)):
        real = profile(name, task, len(CLASSES), size)
        estimate = known.bytes_fixed + 4 * bytes_per_image(known, read_extents()[name], size)
        found[f"{size[0]}x{size[1]}"] = estimate / (real.bytes_fixed + 4 * real.bytes_per_image) - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", nargs="+", choices=list(read_costs()), help="compare these, and write nothing")
    if names := parser.parse_args().check:
        write_result("extents", device_name(), [deviations(name) for name in names], {"crops": 4})
        return
    found = {name: extent(name) for name in read_costs()}
    EXTENTS.write_text(json.dumps(found, indent=1) + "\n")
    print_rows([{"model": name, **{key: value / 1e9 for key, value in row.items()}} for name, row in found.items()])


if __name__ == "__main__":
    main()
