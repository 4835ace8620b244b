"""From the command to the first training step: `raysseg train` against a bare TorchTrainer, and without Ray."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.commands import START, Line, alternate_quiet, find, is_quiet, run
from benchmarks.results import compare, device_name, write_result
from raysseg.data.example import draw_example
from raysseg.runtime import RAY_ENVIRONMENT

JOB = "jobs/example-segformer-semantic.yaml"
IMPORTS = "import torch, transformers.models.segformer.modeling_segformer, cv2, PIL.Image, pyarrow, pydantic"


def our_start(data: Path, *overrides: str) -> float | None:
    """Seconds to the first step; None if the machine was busy."""
    with tempfile.TemporaryDirectory() as runs:
        arguments = ["-m", "raysseg.cli", "train", JOB, "schedule.epochs=1", *overrides]
        return seconds_to(run(arguments, {"EXAMPLE": str(data), "RUNS": runs}), "step 1/")


def bare_start() -> float | None:
    """The same of the bare trainer."""
    return seconds_to(run(["-m", "benchmarks.bare_trainer"], RAY_ENVIRONMENT), "FIRST STEP")


def bare_imports() -> float | None:
    """Seconds that the imports alone take."""
    return seconds_to(run(["-c", f"{IMPORTS}; import sys; print('IMPORTED', file=sys.stderr)"], {}), "IMPORTED")


def seconds_to(lines: list[Line], awaited: str) -> float | None:
    """When a line arrived; None if the machine was busy until then."""
    line = find(lines, awaited)
    return line.at if is_quiet(START, line) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        draw_example(data, num_val=8)
        here, imports = alternate_quiet(partial(our_start, data, "scaling.workers=0"), bare_imports, rounds)
        ours, bare = alternate_quiet(partial(our_start, data), bare_start, rounds)
    alone = compare("0 workers over bare imports, s to step 1", here, imports, "")
    alone["target"] = f"{median(here) - median(imports):+.1f} s, at most +3"
    rows = [compare("2 workers over a bare TorchTrainer, s to step 1", ours, bare, "< 1.10"), alone]
    seconds = {"ours": ours, "bare": bare, "0 workers": here, "imports": imports}
    write_result("startup", device_name(), rows, {"job": JOB, "rounds": rounds, "seconds": seconds})


if __name__ == "__main__":
    main()
