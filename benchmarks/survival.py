"""Runs that are disturbed, and what became of every sample: for the benchmark and the test of survival."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.survival_driver import colour_of, hurry_file

SIZE = 64
GLOBAL_SIZE = 8
JOB = {
    "kind": "train",
    "task": "semantic",
    "classes": ["left", "right", "blob"],
    "model": {"name": "segformer-tiny", "weights": None},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "backbone_lr_factor": 1.0},
    "batch": {"global_size": GLOBAL_SIZE, "per_worker": 4},
    "validation": {"where": "inline"},
}
Line = dict[str, Any]


def draw_samples(folder: Path, num_samples: int) -> None:
    """Images of one colour each, by which a sample is known wherever it goes, and masks of their own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_samples), ("val", 4)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = np.full((SIZE, SIZE, 3), colour_of(i), np.uint8)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[:, rng.integers(16, 48) :] = 1
            top, left = rng.integers(0, 40, 2)
            mask[top : top + 20, left : left + 20] = 2
            Image.fromarray(image).save(folder / split / "images" / f"{i:05d}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i:05d}.png")


def write_job(
    folder: Path,
    name: str,
    *,
    epochs: int,
    workers: int | tuple[int, int],
    every: str = "9 steps",
    step_timeout_s: float = 60,
    where: str = "",
) -> Path:
    """A train job on the samples of a folder, or of its copy elsewhere, which keeps the runs, too."""
    where = where or str(folder)
    sources = {
        split: {"format": "masks", "images": f"{where}/{split}/images", "masks": f"{where}/{split}/masks"}
        for split in ("train", "val")
    }
    job = JOB | {
        "name": name,
        "data": sources | {"crop": [SIZE, SIZE], "augment": None},
        "schedule": {"epochs": epochs, "warmup": 0.0, "decay": "polynomial"},
        "checkpoint": {"every": every},
        "scaling": {"workers": workers, "cpus_per_worker": 1.0, "step_timeout_s": step_timeout_s, "max_failures": 5},
        "storage": f"{where}/runs",
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path


class Nodes:
    """A Ray cluster of processes on this machine: a head and, if asked, a second node, with room for a worker each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._second: Any = None

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Line:
        """Starts the second node."""
        event = {"what": "node added", "at": time.time()}
        self._second = self._cluster.add_node(num_cpus=1)
        return event

    def announce_removal(self, deadline_s: int) -> None:
        """Tells Ray what a cloud tells of a spot instance: the second node goes away."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        command += ["--node-id", self._second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "test", "--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run(command, check=True, capture_output=True)

    def remove(self) -> Line:
        """Kills the second node, and what runs on it."""
        event = {"what": "node removed", "at": time.time()}
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None
        return event

    def shut_down(self) -> None:
        self._cluster.shutdown()


@dataclass
class Run:
    """A train job in a process of its own, whose workers write a log."""

    log: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        errors = self.log.with_suffix(".err").open("a")
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

    def lines(self) -> list[Line]:
        if not self.log.exists():
            return []
        return [json.loads(text) for text in self.log.read_text().splitlines() if text.endswith("}")]

    def wait_for(self, is_there: Any, timeout_s: float = 180.0) -> Line:
        """The first new line that fits; the run must not end before."""
        seen = len(self.lines())
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            for line in self.lines()[seen:]:
                if is_there(line):
                    return line
            if ended:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the run did not get there: {self.errors()[-3000:]}")

    def wait_for_error(self, text: str, timeout_s: float = 60.0) -> None:
        """Until the run tells something on stderr."""
        deadline = time.monotonic() + timeout_s
        while text not in self.errors():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run does not say {text!r}: {self.errors()[-3000:]}")
            time.sleep(0.2)

    def wait_for_step(self, step: int, workers: int | None = None) -> Line:
        """The first step from that one on, with as many workers."""
        return self.wait_for(
            lambda line: line["what"] == "step" and line["step"] >= step and workers in (None, line["workers"])
        )

    def wait_for_new_step(self, event: Line, workers: int | None = None) -> Line:
        """The first step after an event that a group of workers does which started after it."""
        known = {line["pid"] for line in self.lines() if line["at"] <= event["at"]}
        return self.wait_for(
            lambda line: line["what"] == "step" and line["pid"] not in known and workers in (None, line["workers"])
        )

    def starts(self) -> list[list[Line]]:
        """See attempts."""
        return attempts(self.lines())

    def kill_a_worker(self, rng: random.Random) -> Line:
        """SIGKILL for one of the workers that now train."""
        newest = attempts(self.lines())[-1]
        victim = rng.choice(sorted({line["pid"] for line in newest}))
        os.kill(victim, signal.SIGKILL)
        return {"what": "kill", "at": time.time(), "pid": victim}

    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()

    def finish(self, timeout_s: float = 600.0) -> dict[str, Any]:
        """Waits for the end, in a hurry; the run's result."""
        hurry_file(self.log).touch()
        output, _ = self.process.communicate(timeout=timeout_s)
        if self.process.returncode:
            raise RuntimeError(f"exit {self.process.returncode}: {self.errors()[-3000:]}")
        result: dict[str, Any] = json.loads(output)
        return result


def local_run(job: Path, log: Path, address: str, step_pause_s: float = 0.0) -> Run:
    """A run whose driver is a process of this machine."""
    environment = {"RAY_ADDRESS": address, "SURVIVAL_PAUSE_S": str(step_pause_s)}
    return Run(log, ["-m", "benchmarks.survival_driver", str(log), str(job)], environment)


def recovery(lines: Sequence[Line], kill: Line) -> dict[str, float]:
    """The parts of the seconds from a kill to the next step: new processes run our code, the state is there, a step."""
    enter = next(line for line in lines if line["what"] == "enter" and line["at"] > kill["at"])
    fit = next(line for line in lines if line["what"] == "fit" and line["at"] > enter["at"])
    step = next(line for line in lines if line["what"] == "step" and line["at"] > fit["at"])
    return {
        "new processes, s": enter["at"] - kill["at"],
        "imports and state, s": fit["at"] - enter["at"],
        "data and a step, s": step["at"] - fit["at"],
    }


# --- judging ------------------------------------------------------------------------------------------------------


def attempts(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines of each group of workers that came to train, first group first."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line["what"] != "enter":
            groups.setdefault(line["group"], []).append(line)
    return list(groups.values())


def lineage(lines: Sequence[Line]) -> list[list[Line]]:
    """Each step that the final model descends from: what its ranks have noted of it, first step first."""
    steps: list[list[Line]] = []
    end = None  # the step that a later start went on from
    for start in reversed(attempts(lines)):
        first = next(line["step"] for line in start if line["what"] == "fit")
        if end is not None and first >= end:
            continue  # what it did was undone by a later one
        by_rank = [merged(start, rank) for rank in sorted({line["rank"] for line in start})]
        last = min(len(ranks) for ranks in by_rank) + first
        if end is not None and last < end:
            continue
        stop = last if end is None else end
        steps = [[ranks[step - first] for ranks in by_rank] for step in range(first, stop)] + steps
        end = first
        if first == 0:
            break
    return steps


def merged(start: Sequence[Line], rank: int) -> list[Line]:
    """A rank's steps of one start: the samples that its optimiser has used, with the step's number and loss."""
    mine = [line for line in start if line["rank"] == rank]
    used = [line for line in mine if line["what"] == "used"]
    done = [line for line in mine if line["what"] == "step"]
    return [{**step, "ids": use["ids"]} for use, step in zip(used, done, strict=False)]


def count_samples(steps: Sequence[Sequence[Line]], num_samples: int) -> tuple[int, int]:
    """How many samples are missing, and how many come twice, over all epochs."""
    by_epoch: dict[int, Counter[int]] = {}
    for ranks in steps:
        for line in ranks:
            by_epoch.setdefault(line["epoch"], Counter()).update(line["ids"])
    missing = sum(num_samples - len(counts) for counts in by_epoch.values())
    twice = sum(counts.total() - len(counts) for counts in by_epoch.values())
    return missing, twice


def losses(steps: Sequence[Sequence[Line]]) -> list[float]:
    """The loss of each step, over all ranks: each tells its part, scaled to the whole."""
    return [float(np.mean([line["loss"] for line in ranks])) for ranks in steps]
