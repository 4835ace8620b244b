"""How long training stands still for validation: by the workers themselves, against a task beside them."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.results import device_name, write_result
from raysseg import config
from raysseg.data.example import draw_example
from raysseg.runtime import connect
from raysseg.train import train

JOB = "jobs/example-segformer-semantic.yaml"
WHERE = ("inline", "beside")


def run_job(data: Path, runs: Path, where: str, epochs: int) -> dict[str, float]:
    """Seconds of the pauses between epochs, and of all epochs, of one run by one worker."""
    name = f"{where}-{len(list(runs.iterdir()))}"
    settings = [
        f"name={name}",
        f"schedule.epochs={epochs}",
        "scaling={workers: 1, cpus_per_worker: 0.5}",
        f"validation={{where: {where}, cpus: 0.5}}",
    ]
    job = config.load(JOB, settings)
    assert isinstance(job, config.TrainJob)
    result = train(job)
    rows = [json.loads(line) for line in Path(result.run, "metrics.jsonl").read_text().splitlines()]
    return {"stall": mean(row["train/stall_s"] for row in rows[1:]), "miou": result.metrics["val/miou"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--val", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, runs = Path(folder, "data"), Path(folder, "runs")
        runs.mkdir()
        draw_example(data, num_train=160, num_val=options.val)
        os.environ |= {"EXAMPLE": str(data), "RUNS": str(runs)}
        connect()
        found = {where: [] for where in WHERE}
        for _ in range(options.rounds):
            for where in WHERE:
                found[where].append(run_job(data, runs, where, options.epochs))
    rows = [
        {
            "validation": where,
            "s of standstill an epoch": mean(run["stall"] for run in of_one),
            "lowest": min(run["stall"] for run in of_one),
            "highest": max(run["stall"] for run in of_one),
            "val mIoU": mean(run["miou"] for run in of_one),
        }
        for where, of_one in found.items()
    ]
    write_result("validation", device_name(), rows, {"job": JOB, **vars(options), "runs": found})


if __name__ == "__main__":
    main()
