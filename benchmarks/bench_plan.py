"""What `raysseg plan` says against what is measured; --costs writes the table that advice goes by."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from raysseg.advice import costs
from raysseg.advice.profiles import COSTS
from raysseg.catalogue import MODELS
from raysseg.schema import Task

SIZE, NUM_CLASSES = (512, 512), 21


def real_models() -> list[str]:
    """All but the tiny ones, which are for tests."""
    return [name for name in MODELS if not name.endswith("-tiny") or name == "mask2former-swin-tiny"]


def cost_row(model: str, task: Task) -> dict[str, int]:
    """A row of costs.json."""
    return asdict(costs.profile(model, task, NUM_CLASSES, SIZE))


def write_costs(path: Path) -> None:
    """Writes the table of raysseg.advice.costs."""
    content = {}
    for model in real_models():
        content[model] = {task: cost_row(model, task) for task in MODELS[model].tasks}
        print(model, json.dumps(content[model]), flush=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", action="store_true", help="write raysseg/advice/costs.json")
    options = parser.parse_args()
    if options.costs:
        write_costs(COSTS)


if __name__ == "__main__":
    main()
