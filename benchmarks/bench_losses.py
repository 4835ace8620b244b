"""What each loss term takes on one CPU core, forward and backward, beside cross-entropy."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.results import compare, device_name, write_result
from raysseg.losses import LOSSES, Settings, Term

IGNORE = 255


def draw_labels(images: int, classes: int, side: int) -> Tensor:
    """(B, H, W): blobs of all classes in each image, and some that are not labelled."""
    rng = torch.Generator().manual_seed(0)
    coarse = (images, classes, side // 16, side // 16)
    labels = interpolate(torch.randn(coarse, generator=rng), (side, side), mode="bicubic").argmax(1)
    doubt = interpolate(torch.rand((images, 1, *coarse[2:]), generator=rng), (side, side), mode="bilinear")[:, 0]
    return labels.masked_fill(doubt > 0.85, IGNORE)


def seconds(term: Term, logits: Tensor, labels: Tensor) -> float:
    """Of this process's CPU time, since others share the core."""
    weights = torch.ones(len(labels))
    logits.grad = None
    started = time.process_time()
    term(logits, labels, weights, Settings(IGNORE)).backward()
    return time.process_time() - started


def rounds_of(count: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Each side's figures, taken in turn; the first round is not counted."""
    rounds = [[side() for side in sides] for _ in range(count + 1)][1:]
    return [list(figures) for figures in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    labels = draw_labels(options.images, options.classes, options.side)
    logits = torch.randn(options.images, options.classes, options.side, options.side, requires_grad=True)
    terms = {name: term for name, (term, _) in LOSSES.items()}
    sides = [lambda term=term: seconds(term, logits, labels) for term in terms.values()]
    found = dict(zip(terms, rounds_of(options.rounds, *sides), strict=True))
    rows = [compare(f"{name}, s", taken, found["cross_entropy"], "") for name, taken in found.items()]
    rows.sort(key=lambda row: row["ratio"])
    print(f"cross-entropy: {median(found['cross_entropy']) * 1e3:.0f} ms")
    write_result("losses", device_name(), rows, vars(options))


if __name__ == "__main__":
    main()
