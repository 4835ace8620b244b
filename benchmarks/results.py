"""What every benchmark ends with: one table on stdout and its JSON in benchmarks/results/."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from raysseg.bundle import installed_versions

FOLDER = Path(__file__).parent / "results"

Row = Mapping[str, str | float]


def device_name() -> str:
    """`cpu2` on two cores, else the GPU's name: `nvidia-h100-80gb-hbm3`."""
    if not torch.cuda.is_available():
        return f"cpu{os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def compare(what: str, ours: Sequence[float], peer: Sequence[float], target: str) -> dict[str, str | float]:
    """A row: the medians of both, their ratio, and the ratios of the single rounds from lowest to highest."""
    ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
    return {
        "what": what,
        "ours": median(ours),
        "peer": median(peer),
        "ratio": median(ours) / median(peer),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "target": target,
    }


def to_value_rows(*values: tuple[str, float, str]) -> list[Row]:
    """A row for each name, value and aim."""
    return [{"what": name, "value": value, "target": target} for name, value, target in values]


def print_rows(rows: Sequence[Row]) -> None:
    """Prints the rows as a table."""
    print(_as_table(rows))


def write_result(what: str, device: str, rows: Sequence[Row], settings: Mapping[str, object]) -> Path:
    """Prints the rows as a table and writes them to benchmarks/results/<date>-<what>-<device>.json."""
    path = FOLDER / f"{time.strftime('%Y-%m-%d')}-{what}-{device}.json"
    content = {
        "what": what,
        "device": device,
        "command": " ".join(
            ["python", *(Path(part).name if part.startswith("/") else part for part in sys.orig_argv[1:])]
        ),
        "versions": installed_versions() | {name: version(name) for name in ("ray", "opencv-python-headless")},
        "settings": dict(settings),
        "rows": [dict(row) for row in rows],
    }
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    print_rows(rows)
    print(f"\n{path}")
    return path


def _as_table(rows: Sequence[Row]) -> str:
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
