"""Annotations in memory: readers that share one index on a node, against a pycocotools object in each process.

Memory is what the readers' processes hold (PSS: pages that several processes share count in parts), above what empty
readers hold; to ours the copy in the object store is added in full.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import ray
from pycocotools.coco import COCO

from benchmarks.memory import held
from benchmarks.results import device_name, write_result
from raysseg.config import CocoSource
from raysseg.data import read_index, read_samples
from raysseg.data.index import SampleIndex
from raysseg.runtime import connect

BATCH = 8  # images
PER_IMAGE = 8  # instances
SIZE = (480, 640)


def draw_annotations(path: Path, num_instances: int) -> None:
    """Writes COCO instances: polygons of 12 to 40 points with two decimals, as COCO's own."""
    rng = np.random.default_rng(0)
    num_images = num_instances // PER_IMAGE
    height, width = SIZE
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": height, "width": width} for i in range(num_images)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(80)]
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number in range(num_images * PER_IMAGE):
            turns = np.sort(rng.random(int(rng.integers(12, 40)))) * 2 * np.pi
            radius, centre = rng.uniform(5, 60), rng.uniform((60, 60), (width - 60, height - 60))
            points = np.round(centre + radius * np.stack([np.cos(turns), np.sin(turns)], 1), 2)
            low, high = points.min(0), points.max(0)
            record = {
                "id": number + 1,
                "image_id": number // PER_IMAGE,
                "category_id": int(rng.integers(80)),
                "iscrowd": 0,
                "area": round(3.14 * radius**2, 2),
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "segmentation": [points.ravel().tolist()],
            }
            file.write(("," if number else "") + json.dumps(record))
        file.write("]}")


# --- ours ---------------------------------------------------------------------------------------------------------


class Reader:
    """One reader on the node; a Ray actor."""

    def pid(self) -> int:
        return os.getpid()

    def read(self, index: SampleIndex, seed: int) -> int:
        """Reads a batch of images' annotations; keeps the index, as a worker does."""
        self._index = index
        rows = np.random.default_rng(seed).integers(0, len(index), BATCH)
        return len(read_samples(index.take(rows), with_images=False))


def measure_ours(path: Path, num_readers: int) -> tuple[int, float]:
    """Bytes above empty readers, with the object store's copy in full; seconds from the file to the first batch."""
    actor = ray.remote(num_cpus=0)(Reader)
    readers = [actor.remote() for _ in range(num_readers)]
    processes = ray.get([reader.pid.remote() for reader in readers])
    before = held(processes)
    started = time.perf_counter()
    index = read_index(CocoSource(format="coco", annotations=str(path)))
    stored = ray.put(index)
    ray.get([reader.read.remote(stored, i) for i, reader in enumerate(readers)])
    seconds = time.perf_counter() - started
    grown = held(processes) - before + index.references.nbytes
    for reader in readers:
        ray.kill(reader)
    return grown, seconds


# --- the peer -----------------------------------------------------------------------------------------------------


def hold_coco(path: Path, connection: Connection) -> None:
    """A process that holds a COCO object."""
    connection.recv()
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO(str(path))
    image_ids = np.random.default_rng(0).choice(data.getImgIds(), BATCH)
    for annotation in data.loadAnns(data.getAnnIds(imgIds=image_ids)):
        data.annToRLE(annotation)
    connection.send("read")
    connection.recv()


def measure_peer(path: Path, num_readers: int) -> tuple[int, float]:
    """Bytes above empty readers, and seconds from the file to the first batch of one.

    They load one after another: what each needs beside the object while it loads would not fit four times.
    """
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(num_readers)]
    readers = [context.Process(target=hold_coco, args=(path, theirs)) for _, theirs in ends]
    for reader in readers:
        reader.start()
    time.sleep(15)  # all imports are done
    processes = [reader.pid for reader in readers if reader.pid]
    before = held(processes)
    started = time.perf_counter()
    for ours, theirs in ends:
        theirs.close()  # so that a reader's death ends the wait
        ours.send("go")
        ours.recv()
    seconds = (time.perf_counter() - started) / num_readers
    grown = held(processes) - before
    for (ours, _), reader in zip(ends, readers, strict=True):
        ours.send("stop")
        reader.join()
    return grown, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1_000_000)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    connect()
    sides: tuple[Callable[[Path, int], tuple[int, float]], ...] = (measure_ours, measure_peer)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        draw_annotations(path, options.instances)
        for number in options.readers:
            (ours, our_s), (peer, peer_s) = (measure(path, number) for measure in sides)
            print(f"{number} readers: {ours / 2**20:.0f} and {peer / 2**20:.0f} MiB", file=sys.stderr, flush=True)
            what = f"{number} readers, "
            target = "<= 0.2" if number == 4 else ""
            memory = {"ours": ours / 2**20, "peer": peer / 2**20, "ratio": ours / peer, "target": target}
            rows.append({"what": what + "MiB", **memory})
            first = {"ours": our_s, "peer": peer_s, "ratio": our_s / peer_s, "target": ""}
            rows.append({"what": what + "s to the first batch", **first})
        settings = {"instances": options.instances, "file, MiB": path.stat().st_size / 2**20}
    write_result("annotations", device_name(), rows, settings | {"peer": "a pycocotools COCO object a process"})


if __name__ == "__main__":
    main()
