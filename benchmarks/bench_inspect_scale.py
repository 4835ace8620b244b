"""What `raysseg inspect` costs: memory against the number of images, and time on one core against two."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np

from benchmarks.memory import MIB, descendants, held
from benchmarks.results import compare, device_name, write_result
from raysseg.config import InspectJob
from raysseg.data import shards
from raysseg.data.example import EXAMPLE_CLASSES
from raysseg.fingerprint import inspect
from raysseg.masks import encode_id_map
from raysseg.schema import Sample

SIZE = (48, 64)
PER_FILE = 5000
Row = dict[str, str | float]


# --- memory -------------------------------------------------------------------------------------------------------


def draw_shards(root: Path, number: int) -> None:
    """Writes so many small scenes of coloured patches, all different, as shards."""
    rows = [
        shards.write_part(
            str(root),
            part,
            list(iter_scenes(start, min(start + PER_FILE, number))),
            EXAMPLE_CLASSES,
            rows_per_group=64,
        ).rows
        for part, start in enumerate(range(0, number, PER_FILE))
    ]
    shards.finish(str(root), rows, EXAMPLE_CLASSES)


def iter_scenes(start: int, stop: int) -> Iterator[Sample]:
    height, width = SIZE
    for number in range(start, stop):
        rng = np.random.default_rng(number)
        patches = rng.choice(rng.integers(1, len(EXAMPLE_CLASSES) + 1, 2), (3, 4)).astype(np.uint8)
        ids = cv2.resize(patches, (width, height), interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), (width, height))
        encoded = cv2.imencode(".jpg", image)[1].tobytes()
        yield Sample(f"{number:06d}", encoded, height, width, encode_id_map(ids))


def measure_memory(number: int, workers: int) -> Row:
    """Peaks of the driver and of its workers while a fresh process inspects so many images."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        draw_shards(Path(folder) / "shards", number)
        source = {"format": "shards", "uri": f"{folder}/shards"}
        job = {"kind": "inspect", "name": "many", "data": source, "storage": f"{folder}/runs"}
        process = multiprocessing.get_context("spawn").Process(
            target=run_job, args=({**job, "task": "semantic", "scaling": {"workers": workers}},)
        )
        started, driver, own, others = time.perf_counter(), 0, 0, 0
        process.start()
        assert process.pid is not None
        while process.is_alive():
            driver = max(driver, held([process.pid]))
            own = max(own, held([process.pid], "Pss_Anon"))
            others = max(others, held(filter(is_worker, descendants(process.pid))))
            process.join(0.5)
        assert process.exitcode == 0
        seconds = time.perf_counter() - started
    held_mib = {"driver, MiB": driver / MIB, "less shared files": own / MIB, "workers, MiB": others / MIB}
    return {"images": float(number), **held_mib, "seconds": seconds}


def run_job(job: dict[str, object]) -> None:
    inspect(InspectJob.model_validate(job))


def is_worker(process: int) -> bool:
    """Whether it is one of Ray's."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


# --- time ---------------------------------------------------------------------------------------------------------


def measure_speed(data: str, name: str, rounds: int) -> list[Row]:
    """Rates on one core with one worker and on two with two, in turn: of a first job, and of one more on that Ray."""
    seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for _ in range(rounds):
            for workers, found in seconds.items():
                found.append(time_jobs(real_job(data, name, workers, folder), workers))
                print(name, workers, [round(s, 1) for s in found[-1]], flush=True)
    rows = []
    for place, what in enumerate(("start-up included", "without start-up")):
        one, two = ([1 / times[place] for times in seconds[workers]] for workers in (1, 2))
        rows.append(compare(f"{name}: jobs/s on 2 cores against 1, {what}", two, one, ">= 1.6"))
    return rows


def real_job(data: str, name: str, workers: int, folder: str) -> dict[str, object]:
    is_coco = (Path(data) / name / "annotations_train.json").exists()
    root = Path(data) / name
    sources = {
        split: {"format": "coco", "images": f"{root}/{split}/images", "annotations": f"{root}/annotations_{split}.json"}
        if is_coco
        else {"format": "masks", "images": f"{root}/{split}/images", "masks": f"{root}/{split}/masks"}
        for split in ("train", "val")
    }
    job = {"kind": "inspect", "name": name, "data": sources, "storage": folder, "scaling": {"workers": workers}}
    return job | ({"task": "instance"} if is_coco else {"task": "semantic", "classes": f"{root}/classes.json"})


def time_jobs(job: dict[str, object], cores: int) -> tuple[float, float]:
    """Seconds of a job in a fresh process bound to so many cores, imports and Ray's start included; and of another."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    started = time.perf_counter()
    process = context.Process(target=run_twice, args=(job, cores, there))
    process.start()
    there.close()  # so that a process that fails ends the waiting
    here.recv()
    first = time.perf_counter()
    here.recv()
    second = time.perf_counter()
    process.join()
    return first - started, second - first


def run_twice(job: dict[str, object], cores: int, done: Connection) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    for _ in range(2):
        run_job(job)
        done.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("memory", "speed"), required=True)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1000, 10_000, 100_000], help="images, for memory")
    parser.add_argument("--workers", type=int, default=2, help="for memory")
    parser.add_argument("--data", default=os.environ.get("RAYSSEG_DATA", "../shared/data"))
    parser.add_argument("--sets", nargs="+", default=["camvid", "coco_instances"], help="for speed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.part == "memory":
        rows = []
        for number in options.numbers:
            rows.append(measure_memory(number, options.workers))
            print(rows[-1], flush=True)
        settings = {"workers": options.workers, "size": SIZE}
    else:
        rows = [row for name in options.sets for row in measure_speed(options.data, name, options.rounds)]
        settings = {"rounds": options.rounds}
    write_result(f"inspect-{options.part}", device_name(), rows, settings)


if __name__ == "__main__":
    main()
