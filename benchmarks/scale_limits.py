"""From what bench_scale measured to the size at which each part breaks: the table and the picture of docs/scale.md.

Usage: python -m benchmarks.scale_limits benchmarks/results/<date>-scale-*.json

Every limit is a constant that was measured, or one of the assumptions below, scaled up in a straight line.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).parents[1] / "docs" / "scale.svg"

DRIVER_MIB = 64 * 1024  # of memory for the driver
NODE_MIB = 128 * 1024  # of memory for the ranks of a node
STORE_MIB = 60 * 1024  # of object store a node: 30 % of 200 GiB
RANKS = 8  # a node
IMAGES_PER_S = 25  # of a GPU
EPOCHS = 50
LIST_S = 0.1  # a listing request of S3
REQUESTS_PER_S = 5500  # GET and HEAD that S3 promises a prefix
PATIENCE_S = 600  # of a start, or of one that goes on after a failure
PER_IMAGE = 7  # instances
TICKS = ("1", "10", "100", "1 k", "10 k", "100 k", "1 M", "10 M", "100 M", "1 G", "10 G")


class Limit(NamedTuple):
    """A size at which something breaks: before, and now; infinite where it does not grow."""

    what: str
    before: float
    now: float


class Measured:
    def __init__(self, paths: Sequence[str]) -> None:
        self._rows = [row for path in paths for row in json.loads(Path(path).read_text())["rows"]]

    def __call__(self, what: str, size: float | None = None) -> float:
        """The value of a row; of the largest size, unless one is named."""
        found = [row for row in self._rows if row["what"] == what and size in (None, row["size"])]
        return float(max(found, key=lambda row: row["size"])["value"])

    def per_unit(self, what: str) -> float:
        """The value by one of its size, as the largest size has it."""
        found = [row for row in self._rows if row["what"] == what]
        largest = max(found, key=lambda row: row["size"])
        return float(largest["value"] / largest["size"])


def sample_limits(of: Measured) -> list[Limit]:
    index = of.per_unit("pickled index")  # MiB a sample
    order = of.per_unit("an epoch's order, files: peak")
    listing = 2 * of.per_unit("local folder: peak")
    start = of("10 epochs, one execution: first batch", 1e5) / (1e6 / 32)  # a chunk
    presence = 133 / 2**20
    stems = [f"mask folders, listed already, {when}: peak" for when in ("before", "now")]
    factors = [f"repeat factors of 133 classes, {when}: peak" for when in ("before", "now")]
    return [
        Limit("COCO file in the driver", *[DRIVER_MIB / PER_IMAGE / of.per_unit("COCO, by instances: peak")] * 2),
        Limit("start of 50 epochs, 8 workers", PATIENCE_S / start * 32 * 8 / EPOCHS, math.inf),
        Limit("index, as tasks of 100 workers have it", STORE_MIB / index / 100, STORE_MIB / index),
        Limit("listing of one flat folder", PATIENCE_S / LIST_S * 1000 / 2, PATIENCE_S / LIST_S * 1000),
        Limit("listing of 16 folders and more", PATIENCE_S / LIST_S * 1000 / 2, 16 * PATIENCE_S / LIST_S * 1000),
        Limit("balancing 133 classes in the driver", *(DRIVER_MIB / (presence + of.per_unit(p)) for p in factors)),
        Limit("an epoch's order, 8 ranks a node", *[NODE_MIB / RANKS / order] * 2),
        Limit("mask folders in the driver", *(DRIVER_MIB / (listing + of.per_unit(peak)) for peak in stems)),
        Limit("shards in the driver", *[DRIVER_MIB / of.per_unit("shards: peak")] * 2),
    ]


def worker_limits(of: Measured) -> list[Limit]:
    files = REQUESTS_PER_S / (of("mask folders: requests a sample read") / 2) / IMAGES_PER_S
    grouped = REQUESTS_PER_S / of("shards: requests a sample read") / IMAGES_PER_S
    return [
        Limit("S3's requests, mask folders", files, files),
        Limit("S3's requests, shards", grouped, grouped),
        Limit("sockets of a rank, ulimit -n 1024", *[1024 / of.per_unit("sockets of a rank")] * 2),
        Limit("signs of life, one a second", *[1e6 / of("the actor's CPU of an exchange")] * 2),
    ]


def draw(panels: Sequence[tuple[str, Sequence[Limit], float, float]]) -> str:
    """Bars on logarithmic axes, light before and dark now; a bar without an end goes to the edge."""
    lines, top = [], 10
    for title, limits, least, most in panels:
        lines.append(f'<text x="10" y="{top + 14}" font-weight="bold">{title}</text>')
        scale = 420 / math.log10(most / least)

        def place(value: float, least: float = least, most: float = most, scale: float = scale) -> float:
            return 300 + scale * math.log10(min(max(value, least), most) / least)

        bottom = top + 24 + 26 * len(limits)
        for power in range(round(math.log10(least)), round(math.log10(most)) + 1):
            x = place(10.0**power)
            lines.append(f'<path d="M{x:.0f} {top + 20}V{bottom}" stroke="#ddd"/>')
            lines.append(f'<text x="{x:.0f}" y="{bottom + 13}" text-anchor="middle">{TICKS[power]}</text>')
        for number, limit in enumerate(limits):
            y = top + 26 + 26 * number
            lines.append(f'<text x="292" y="{y + 14}" text-anchor="end">{limit.what}</text>')
            for offset, value, colour in ((0, limit.before, "#f0b07a"), (9, limit.now, "#33658a")):
                width = place(value) - 300
                lines.append(f'<rect x="300" y="{y + offset}" width="{width:.0f}" height="8" fill="{colour}"/>')
        top = bottom + 28
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 {top}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="790" height="{top}" fill="#fff"/>', *lines, "</svg>\n"])


def main() -> None:
    of = Measured(sys.argv[1:])
    samples, workers = sorted(sample_limits(of), key=lambda limit: limit.now), worker_limits(of)
    for limit in (*samples, *workers):
        print(f"| {limit.what} | {limit.before:.2g} | {limit.now:.2g} |")
    panels = [
        ("samples at which it breaks: before (light), now (dark)", samples, 1e5, 1e10),
        ("workers at which it breaks", workers, 1e1, 1e5),
    ]
    PICTURE.write_text(draw(panels))


if __name__ == "__main__":
    main()
