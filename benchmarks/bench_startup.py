"""From the command to the first training step: `raysseg train` against a bare TorchTrainer, and without Ray."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.commands import run
from benchmarks.results import compare, device_name, write_result
from raysseg.data.example import draw_example
from raysseg.runtime import RAY_ENVIRONMENT

JOB = "jobs/example-segformer-semantic.yaml"
IMPORTS = "import torch, transformers.models.segformer.modeling_segformer, cv2, PIL.Image, pyarrow, pydantic"


def our_start(data: Path, *overrides: str) -> float:
    with tempfile.TemporaryDirectory() as runs:
        arguments = ["-m", "raysseg.cli", "train", JOB, "schedule.epochs=1", *overrides]
        return run(arguments, {"EXAMPLE": str(data), "RUNS": runs}, "step 1/")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {"ours": [], "bare": [], "here": [], "imports": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        draw_example(data)
        for _ in range(rounds):
            times["bare"].append(run(["-m", "benchmarks.bare_trainer"], RAY_ENVIRONMENT, "FIRST STEP")[0])
            times["ours"].append(our_start(data))
            times["imports"].append(run(["-c", IMPORTS], {})[0])
            times["here"].append(our_start(data, "scaling.workers=0"))
    here = compare("0 workers over bare imports, s to step 1", times["here"], times["imports"], "")
    here["target"] = f"{here['ours'] - here['peer']:+.1f} s, at most +3"
    rows = [compare("2 workers over a bare TorchTrainer, s to step 1", times["ours"], times["bare"], "< 1.10")]
    write_result("startup", device_name(), [*rows, here], {"job": JOB, "rounds": rounds, "seconds": times})


if __name__ == "__main__":
    main()
