"""Runs whose workers are killed while their number goes 2 -> 1 -> 2: is every sample used once, is the loss the same?

Usage: python -m benchmarks.bench_survival [--runs 20]

Each run has its own random choices: at some step one of the two workers is killed (SIGKILL); later the second node is
killed with the worker on it, and the run goes on with one; after some steps the node comes back, and Ray Train makes
the group larger. The samples are counted where torch's optimiser used them, over the steps that the final model
descends from; see survival_driver.py. The losses are held against those of a run that nothing disturbed.

Printed beside: seconds from a kill to the next step that is new, and their parts.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.results import device_name, write_result
from benchmarks.survival import (
    GLOBAL_SIZE,
    Line,
    Nodes,
    count_samples,
    draw_samples,
    lineage,
    local_run,
    losses,
    recovery,
    write_job,
)

SAMPLES = 124  # the last global batch of an epoch is smaller
EPOCHS = 20
PAUSE_S = 0.1  # after each step, so that there is time to disturb


def run_once(folder: Path, nodes: Nodes, seed: int) -> dict[str, float | str]:
    """One run, disturbed; a row of the table."""
    rng = random.Random(seed)
    name = f"run-{seed}"
    job = write_job(folder, name, epochs=EPOCHS, workers=(1, 2))
    run = local_run(job, folder / f"{name}.log", nodes.address, PAUSE_S)
    started = time.monotonic()
    run.start()
    run.wait_for_step(rng.randint(3, 40), workers=2)
    kill = run.kill_a_worker(rng)
    after_kill = run.wait_for_new_step(kill)
    step = after_kill["step"]
    run.wait_for_step(step + rng.randint(3, 40), workers=2)
    loss = nodes.remove()
    after_loss = run.wait_for_new_step(loss, workers=1)
    run.wait_for_step(after_loss["step"] + rng.randint(1, 20), workers=1)
    back = nodes.add()
    after_back = run.wait_for_new_step(back, workers=2)
    run.finish()
    steps = lineage(run.lines())
    missing, twice = count_samples(steps, SAMPLES)
    return {
        "seed": seed,
        "steps": len(steps),
        "starts": len(run.starts()),
        "missing": missing,
        "twice": twice,
        "seconds": time.monotonic() - started,
        "after the kill, s": after_kill["at"] - kill["at"],
        "after the node's loss, s": after_loss["at"] - loss["at"],
        "until the node is used, s": after_back["at"] - back["at"],
        **recovery(run.lines(), kill),
    } | {"losses": losses(steps)}  # type: ignore[dict-item]


def undisturbed(folder: Path, nodes: Nodes) -> list[float]:
    """The losses of a run with two workers."""
    job = write_job(folder, "undisturbed", epochs=EPOCHS, workers=(1, 2))
    run = local_run(job, folder / "undisturbed.log", nodes.address)
    run.start()
    run.finish()
    return losses(lineage(run.lines()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--folder", help="for the runs and their logs; default: a temporary one")
    options = parser.parse_args()
    rows: list[Line] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        draw_samples(folder, SAMPLES)
        nodes = Nodes()
        try:
            nodes.add()
            expected = undisturbed(folder, nodes)
            assert len(expected) == EPOCHS * -(-SAMPLES // GLOBAL_SIZE)
            for seed in range(options.runs):
                row = run_once(folder, nodes, seed)
                found = row.pop("losses")
                apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]
                rows.append({**row, "losses apart": apart})
                print({key: round(value, 6) for key, value in rows[-1].items()}, flush=True)
        finally:
            nodes.shut_down()
    total = {key: sum(row[key] for row in rows) for key in ("missing", "twice", "steps", "starts")}
    total |= {key: median(row[key] for row in rows) for key in rows[0] if "s" in key.split(", ")}
    total |= {"seed": "all: sums and medians", "losses apart": max(row["losses apart"] for row in rows)}
    rows.append({key: total.get(key, "") for key in rows[0]})
    write_result("survival", device_name(), rows, {"runs": options.runs})


if __name__ == "__main__":
    main()
