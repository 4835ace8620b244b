"""Real runs on real nodes of this machine, which are killed, stopped and taken away: every sample is used once.

benchmarks/bench_survival.py does more of them, at random.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.survival import Nodes, Run, count_samples, draw_samples, lineage, local_run, losses, write_job

SAMPLES = 60
EPOCHS = 12


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    started = Nodes()
    started.add()
    yield started
    started.shut_down()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = tmp_path_factory.mktemp("survival")
    draw_samples(drawn, SAMPLES)
    return drawn


@pytest.fixture
def start(nodes: Nodes, folder: Path) -> Iterator[Callable[[Path, float], Run]]:
    """Starts runs, which end with the test."""
    runs: list[Run] = []

    def begin(job: Path, pause_s: float) -> Run:
        runs.append(local_run(job, folder / f"{job.stem}.log", nodes.address, pause_s))
        runs[-1].start()
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()


def assert_used_once(run: Run, epochs: int = EPOCHS) -> None:
    steps = lineage(run.lines())
    assert len(steps) == epochs * -(-SAMPLES // 8)
    assert count_samples(steps, SAMPLES) == (0, 0)
    curve = losses(steps)
    assert sum(curve[-8:]) < sum(curve[:8]), "and it learns"


def test_a_killed_worker_a_stuck_one_and_a_driver_told_to_end(
    start: Callable[[Path, float], Run], folder: Path
) -> None:
    job = write_job(folder, "workers", epochs=EPOCHS, workers=(1, 2), step_timeout_s=12)
    run = start(job, 0.05)
    run.wait_for_step(12)
    kill = run.kill_a_worker(random.Random(0))
    run.wait_for_step(run.wait_for_new_step(kill)["step"] + 5)
    victim = run.starts()[-1][0]
    os.kill(victim["pid"], signal.SIGSTOP)
    run.wait_for_new_step({"at": time.time()})
    run.process.terminate()
    assert run.process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in run.errors()
    done = max(line["step"] for line in run.starts()[-1] if line["what"] == "step")
    run.start()
    run.finish()
    assert_used_once(run)
    assert len(run.starts()) == 4
    assert next(line["step"] for line in run.starts()[-1] if line["what"] == "fit") == done, "no step is done again"
    assert f"worker {victim['rank']} (pid {victim['pid']} on" in run.errors()
    assert "is stuck at step" in run.errors()


def test_a_preempted_node_a_new_one_and_a_killed_driver(
    nodes: Nodes, start: Callable[[Path, float], Run], folder: Path
) -> None:
    epochs = 3 * EPOCHS  # a node that comes is seen after up to half a minute
    job = write_job(folder, "nodes", epochs=epochs, workers=(1, 2), every="1000 steps")
    run = start(job, 0.1)
    run.wait_for_step(5, workers=2)
    nodes.announce_removal(deadline_s=30)
    run.wait_for_error("nodes are going away")
    run.wait_for_error(": saved")  # at once: by steps none would be due
    loss = nodes.remove()
    run.wait_for_new_step(loss, workers=1)
    back = nodes.add()
    first = run.wait_for_new_step(back, workers=2)
    before = max(line["step"] for line in run.starts()[-2] if line["what"] == "step")
    assert first["step"] >= before - 20, "a group is made larger from a checkpoint of that moment"
    run.wait_for_step(first["step"] + 2)
    run.process.kill()
    run.process.wait()
    run.start()
    run.finish()
    assert_used_once(run, epochs)
    assert "resumed from" in run.errors()


def test_an_epoch_in_this_process_that_is_killed_goes_on(folder: Path) -> None:
    job = write_job(folder, "here", epochs=40, workers=0, every="2 steps")
    command = [sys.executable, "-m", "raysseg.cli", "train", str(job)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 6:" in line or "epoch 2" in line:
            break
    process.kill()
    process.communicate()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resumed from" in again.stderr
