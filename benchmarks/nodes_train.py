"""A train job on nodes, the first rank's of which is killed: a part of bench_nodes."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

from benchmarks.nodes import S3, Ground
from benchmarks.results import Row, to_value_rows
from benchmarks.survival import GLOBAL_SIZE, Line, Run, count_samples, draw_samples, lineage, recovery, write_job
from raysseg import storage

SAMPLES = 124  # the last global batch of an epoch is smaller
EPOCHS = 12
CHECKPOINT_STEPS = 9
ENVIRONMENT = {"SURVIVAL_PAUSE_S": "0.5"}  # after each step, so that there is time to disturb
_EPOCH_STEPS = -(-SAMPLES // GLOBAL_SIZE)


def measure(ground: Ground, *, silent: bool) -> list[Row]:
    """What became of the samples, and how long it took."""
    draw_samples(ground.folder / "data", SAMPLES)
    ground.upload("data")
    job = write_job(
        ground.folder,
        "nodes",
        epochs=EPOCHS,
        workers=(1, 2),
        every=f"{CHECKPOINT_STEPS} steps",
        where="${BUCKET}/data",
    )
    job.write_text(json.dumps({**json.loads(job.read_text()), "s3": S3}))
    run = Run(ground.folder / "train.log", *ground.submit(job))
    drive_noting(ground.folder / "bin", run.log)
    began = time.time()
    run.start()
    try:
        return disturb(ground, run, began, silent=silent)
    finally:
        run.process.kill()
        run.process.wait()
        print(run.errors(), file=sys.stderr)


def disturb(ground: Ground, run: Run, began: float, *, silent: bool) -> list[Row]:
    """Takes the first rank's node from a run, gives it a new one, and waits for its end."""
    struck = run.wait_for(lambda line: is_amid(line) and line["rank"] == 0 and line["workers"] == 2)
    kill = {"at": ground.take_away(ground.cluster.at(struck["node"]), silent=silent)}
    alone = run.wait_for_new_step(kill, workers=1)
    added = {"at": time.time()}
    newcomer = ground.cluster.add(num_cpus=1)
    whole = run.wait_for_new_step(added, workers=2)
    result = run.finish()
    steps = lineage(run.lines())
    missing, twice = count_samples(steps, SAMPLES)
    groups = [{line["node"] for line in start} for start in run.starts()]
    first = [line for line in run.starts()[0] if line["what"] == "step"]
    return to_value_rows(
        ("steps that the model descends from", len(steps), str(EPOCHS * _EPOCH_STEPS)),
        ("samples missing", missing, "0"),
        ("samples used twice", twice, "0"),
        ("the bundle is there", storage.exists(f"{result['bundle']}/bundle.json"), "1"),
        ("groups of workers", len(groups), "3"),
        ("nodes of the first group", len(groups[0]), "2"),
        ("nodes of the last group", len(groups[-1]), "2"),
        ("the new node is one of them", newcomer.address in groups[-1], "1"),
        ("steps done again", max(line["step"] for line in first) + 1 - alone["step"], f"<= {CHECKPOINT_STEPS}"),
        ("from the submission to the first step, s", first[0]["at"] - began, "-"),
        ("from the kill to the next step, s", alone["at"] - kill["at"], "-"),
        *((f"of it: {what}", seconds, "-") for what, seconds in recovery(run.lines(), kill).items()),
        ("from the new node's start to its use, s", whole["at"] - added["at"], "-"),
        ("all of it, s", time.time() - began, "-"),
    )


def is_amid(line: Line) -> bool:
    """Whether it tells of a step in the middle of an epoch that is not the first one."""
    return bool(line["what"] == "step" and line["step"] > _EPOCH_STEPS and line["step"] % _EPOCH_STEPS == 6)


def drive_noting(folder: Path, log: Path) -> None:
    """Puts a `python` in the nodes' path that runs `raysseg train` by survival_driver."""
    real = shlex.quote(sys.executable)
    script = f"""#!/bin/sh
[ "$2 $3" = "raysseg.cli train" ] || exec {real} "$@"
shift 3
exec {real} -m benchmarks.survival_driver {shlex.quote(str(log))} "$@"
"""
    folder.mkdir()
    (folder / "python").write_text(script)
    (folder / "python").chmod(0o755)
