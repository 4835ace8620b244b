"""Memory that sliding windows take beyond the image and its labels, from 4 to 268 megapixels; and what they cost."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.memory import MIB, held
from benchmarks.results import device_name, write_result
from raysseg.config import Inference
from raysseg.data.decode import Pixels
from raysseg.masks import IdMap, View
from raysseg.models import Images, Outputs, SegModel, Targets
from raysseg.predictor import iter_labels, predict
from raysseg.schema import ClassMap
from raysseg.tiling import Grid

NUM_CLASSES = 5
PATCH = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Drawn:
    """An image that is drawn where it is looked at: a patch, repeated, which gets brighter from window to window."""

    shape: tuple[int, int, int]

    def __getitem__(self, window: tuple[slice, slice]) -> Pixels:
        rows, columns = (np.arange(part.start, part.stop) for part in window)
        tiled: Pixels = PATCH[rows % 256][:, columns % 256]
        return tiled + (rows[:, None, None] // 256).astype(np.uint8)


class Coarse(SegModel):
    """A model that costs little: one convolution of stride 16."""

    def __init__(self) -> None:
        names = tuple(str(i) for i in range(NUM_CLASSES))
        classes = ClassMap(tuple(range(NUM_CLASSES)), names, ((0, 0, 0),) * NUM_CLASSES, (False,) * NUM_CLASSES)
        super().__init__(classes, "semantic", (0.5,) * 3, (0.25,) * 3)
        self.layer = nn.Conv2d(3, NUM_CLASSES, 16, stride=16)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        assert isinstance(images, Tensor)
        return Outputs({"logits": self.layer(self.normalise(images))})

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        raise NotImplementedError

    def class_scores(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return nn.functional.interpolate(outputs.values["logits"], size=size, mode="bilinear").softmax(1)

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        raise NotImplementedError


def trim() -> None:
    """Gives the allocator's free pages back, so that what is measured is what is held."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """The most that this process holds between two moments, looked at every 20 ms."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._own = multiprocessing.current_process().pid
        assert self._own is not None
        trim()
        self._before = self._most = held([self._own], "Pss_Anon")
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, held([self._own or 0], "Pss_Anon"))

    def stop(self) -> float:
        """MiB beyond those at the start."""
        self._done.set()
        self._thread.join()
        return (self._most - self._before) / MIB


def measure(side: int, tile: int, how: str, answer: Connection) -> None:
    """Sends the peak in MiB and the seconds of one image, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inference = Coarse().eval(), Inference(tile=(tile, tile))
    warm = Drawn((tile, tile, 3))
    list(iter_labels(model, warm, None, torch.float32, inference))
    size, drawn = (side, side), Drawn((side, side, 3))
    if how == "windows":
        started, peak = time.perf_counter(), Peak()
        counts = np.zeros(NUM_CLASSES, np.int64)
        for _, _, labels in iter_labels(model, drawn, None, torch.float32, inference):
            counts += np.bincount(labels.ravel(), minlength=NUM_CLASSES)
        assert counts.sum() == side * side
        answer.send((peak.stop(), time.perf_counter() - started))
        return
    image: Pixels = np.empty((*size, 3), np.uint8)
    for top in range(0, side, 256):
        image[top : top + 256] = drawn[slice(top, min(top + 256, side)), slice(0, side)]
    started, peak = time.perf_counter(), Peak()
    if how == "array":
        found = predict(model, [image], None, torch.float32, inference)
        assert len(found) == 1
    else:
        sum_at_full_size(model, image, inference)
    answer.send((peak.stop() - side * side / MIB, time.perf_counter() - started))  # less the labels


def sum_at_full_size(model: SegModel, image: Pixels, inference: Inference) -> IdMap:
    """What is usually done: scores and weights of the whole image."""
    grid = Grid((image.shape[0], image.shape[1]), inference.tile, inference.overlap)
    height, width = grid.tile_size
    scores, weights = torch.zeros(NUM_CLASSES, *grid.size), torch.zeros(grid.size)
    with torch.inference_mode():
        for top in grid.tops:
            for left in grid.lefts:
                place = np.s_[..., top : top + height, left : left + width]
                tile = torch.tensor(image[place[1:]]).permute(2, 0, 1)[None]
                scores[place] += model.class_scores(model(tile), (height, width))[0]
                weights[place] += 1
        labels: IdMap = scores.div_(weights).argmax(0).to(torch.uint8).numpy()
    return labels


def in_a_process(side: int, tile: int, how: str) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(side, tile, how, there))
    process.start()
    there.close()  # so that a process that fails ends the waiting
    found: tuple[float, float] = here.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--full", type=int, default=4096, help="the largest side that is summed at full size, too")
    options = parser.parse_args()
    rows = []
    for side in options.sides:
        grid = Grid((side, side), (options.tile, options.tile), Inference().overlap)
        tiles, scored = len(grid.tops) * len(grid.lefts), sum(map(grid.num_scored, grid.blocks()))
        found = {how: in_a_process(side, options.tile, how) for how in ("windows", "array")}
        usual = in_a_process(side, options.tile, "full")[0] if side <= options.full else float("nan")
        rows.append(
            {
                "side": f"{side}x{side}",
                "by windows, MiB": found["windows"][0],
                "an array, MiB": found["array"][0],
                "full-size sums, MiB": f"{usual:.0f}" if usual == usual else "not run",
                "tiles": str(tiles),
                "scored": str(scored),
                "s by windows": found["windows"][1],
            }
        )
        print(rows[-1], flush=True)
    settings = {"tile": options.tile, "overlap": Inference().overlap, "classes": NUM_CLASSES, "threads": 1}
    write_result("tiling-memory", device_name(), rows, settings)


if __name__ == "__main__":
    main()
