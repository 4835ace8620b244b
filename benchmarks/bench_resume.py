"""Seconds from building a loader to its first new batch, after a run that broke off at 90 % of an epoch.

ledger: raysseg goes on from the checkpoint's position. replay: the same loader from the epoch's first batch, batches
thrown away until the position, which is what a loader without a state does. Streaming: MosaicML Streaming's own
`state_dict` and `load_state_dict`, the better of 0 and 1 worker processes, where its package is named on the command
line (`pip install --target DIR mosaicml-streaming`); the same
files, decoded by OpenCV alone, and the same crops.

Each measurement is a fork of this process: modules are imported, nothing else is kept. The clock starts before the
index is read and stops when the batch is there. Files are in the page cache on all sides. Which samples come is checked
first: those before the position and those after it must be the whole epoch, each sample once, in the unbroken order.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow.dataset  # noqa: F401  (with pandas, which pyarrow takes when it is first used: so that no fork has to)
import torch.utils.data  # noqa: F401  (likewise)
import transformers.tokenization_utils_base  # noqa: F401  (likewise, for Streaming)

from benchmarks.input_sides import source_of
from benchmarks.results import Row, compare, device_name, write_result
from raysseg import config
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import Feed, build_feed, iter_batches, iter_chunks, read_chunk, request_chunk
from raysseg.data.decode import decode_rgb
from raysseg.data.example import draw_example
from raysseg.ledger import Ledger
from raysseg.schema import Sample
from raysseg.shard import shard

T = TypeVar("T")

CROP = (160, 224)
SIZE = (192, 256)
COPIES = 16  # of each scene: drawing takes longer than all that is measured


@dataclass(frozen=True)
class Setting:
    """What is read, and from where on: the same for all sides.

    Attributes:
        root: folder of the data set in every side's form.
        batch: images in a global batch.
        position: that the run goes on from, a multiple of `batch`.
    """

    root: str
    batch: int
    position: int

    def job(self, source: str) -> config.TrainJob:
        data = source_of(self.root, source)
        raw = {
            "kind": "train",
            "name": "resume",
            "task": "semantic",
            "classes": f"{self.root}/classes.json",
            "data": {"train": data, "val": data, "crop": CROP, "augment": None},
            "model": {"name": "segformer-b0", "weights": None},
            "schedule": {"epochs": 1},
            "batch": {"global_size": self.batch, "per_worker": self.batch},
            "storage": "-",
        }
        return config.parse_as(config.TrainJob, raw)


def fork(work: Callable[..., T], *arguments: object) -> T:
    """What `work` returns, done in a fork of this process."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def prepare(root: Path, num_samples: int) -> None:
    """Draws scenes and writes them as folders and as shards."""
    draw_example(root / "drawn", num_train=-(-num_samples // COPIES), num_val=1, size=SIZE)
    shutil.copy(root / "drawn/classes.json", root)
    for kind in ("images", "masks"):
        (root / kind).mkdir()
        drawn = sorted((root / "drawn/train" / kind).iterdir())
        for number in range(num_samples):
            path = drawn[number // COPIES]
            shutil.copyfile(path, root / kind / f"{number:06d}{path.suffix}")
    raw = {"kind": "shard", "name": "resume", "task": "semantic", "classes": f"{root}/classes.json"}
    raw |= {"data": {"format": "masks", "images": f"{root}/images", "masks": f"{root}/masks"}}
    shard(config.parse_as(config.ShardJob, raw | {"output": {"uri": f"{root}/shards"}, "scaling": {"workers": 0}}))


# --- raysseg ------------------------------------------------------------------------------------------------------


def feed_of(setting: Setting, source: str, position: int, rank: int, num_workers: int) -> Feed:
    job = setting.job(source)
    classes = read_class_map(job.classes)
    start = Ledger(0, position)
    return build_feed(job, read_index(job.data.train), classes, start, rank=rank, num_workers=num_workers)


def time_ours(setting: Setting, source: str, skipped: int, rank: int = 0, num_workers: int = 1) -> float:
    """Seconds to the batch at the setting's position, of which so many positions are replayed."""
    started = time.perf_counter()
    feed = feed_of(setting, source, setting.position - skipped, rank, num_workers)
    steps = iter_batches(feed, iter_chunks(feed))
    batch = next(islice(steps, skipped // setting.batch, None))
    seconds = time.perf_counter() - started
    mine = range(setting.position + rank, setting.position + setting.batch, num_workers)
    assert [p for part in batch for p in part.positions.tolist()] == list(mine)
    return seconds


def time_ranks(setting: Setting, source: str, skipped: int, num_workers: int) -> float:
    """The slowest rank's, one after another."""
    return max(fork(time_ours, setting, source, skipped, rank, num_workers) for rank in range(num_workers))


def our_ids(setting: Setting, source: str, position: int, num_workers: int) -> list[str]:
    """Samples that all ranks read from a position on, in the order of their positions."""
    found: dict[int, str] = {}
    for rank in range(num_workers):
        feed = feed_of(setting, source, position, rank, num_workers)
        for number in range(feed.num_chunks):
            chunk = read_chunk(request_chunk(feed, number))
            for place, sample in zip(chunk.positions.tolist(), chunk.samples, strict=True):
                assert isinstance(sample, Sample)
                assert place not in found
                found[place] = sample.sample_id
    assert sorted(found) == list(range(position, feed.num_positions))
    return [found[place] for place in sorted(found)]


# --- MosaicML Streaming -------------------------------------------------------------------------------------------


def write_mds(setting: Setting) -> None:
    import streaming

    root = Path(setting.root)
    columns = {"sample_id": "str", "image": "bytes", "mask": "bytes"}
    with streaming.MDSWriter(out=f"{root}/mds", columns=columns) as writer:
        for image in sorted((root / "images").iterdir()):
            mask = (root / "masks" / f"{image.stem}.png").read_bytes()
            writer.write({"sample_id": image.stem, "image": image.read_bytes(), "mask": mask})


def loader_of(setting: Setting, num_processes: int, batch: int, with_pixels: bool) -> Any:
    """Its loader; batches are dicts of a list of names and, with pixels, images and labels as uint8 tensors."""
    import streaming

    height, width = CROP

    class Pairs(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: object) -> dict[str, object]:
            stored = super().__getitem__(at)
            if not with_pixels:
                return {"sample_id": stored["sample_id"]}
            pixels = decode_rgb(stored["image"])
            labels = cv2.imdecode(np.frombuffer(stored["mask"], np.uint8), cv2.IMREAD_GRAYSCALE)
            return stored | {"image": pixels[:height, :width], "mask": labels[:height, :width]}

    dataset = Pairs(local=f"{setting.root}/mds", shuffle=True, batch_size=batch)
    return streaming.StreamingDataLoader(dataset, batch_size=batch, num_workers=num_processes)


def time_streaming(setting: Setting, num_processes: int, state: dict[str, object]) -> float:
    started = time.perf_counter()
    loader = loader_of(setting, num_processes, setting.batch, with_pixels=True)
    loader.load_state_dict(state)
    batch = next(iter(loader))
    seconds = time.perf_counter() - started
    assert batch["image"].shape == (setting.batch, *CROP, 3)
    return seconds


Epoch = tuple[list[str], dict[str, object]]
"""Samples in the order in which one rank has them, and the loader's state after them."""


def stream(
    setting: Setting, state: dict[str, object] | None, steps: int | None, rank: int, ranks: int, port: int
) -> Epoch:
    """What one rank gets from a state on, in so many steps or in all."""
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    if ranks > 1:
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        import torch.distributed as dist

        dist.init_process_group("gloo")
    loader = loader_of(setting, 0, setting.batch // ranks, with_pixels=False)
    if state is not None:
        loader.load_state_dict(state)
    found: list[str] = []
    for batch in islice(loader, steps):
        found += batch["sample_id"]
    state = loader.state_dict()
    if ranks > 1:
        dist.barrier()
    return found, state


def streamed(setting: Setting, state: dict[str, object] | None, steps: int | None, ranks: int) -> Epoch:
    """What all ranks get, each a process, and the first one's state."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(ranks, get_context("fork")) as pool:
        jobs = [pool.submit(stream, setting, state, steps, rank, ranks, port) for rank in range(ranks)]
        parts = [job.result() for job in jobs]
    return [name for names, _ in parts for name in names], parts[0][1]


# --- all sides ----------------------------------------------------------------------------------------------------


def describe(setting: Setting, found: list[str]) -> str:
    """Whether two halves are a whole epoch."""
    times = Counter(found)
    expected = {path.stem for path in Path(setting.root, "images").iterdir()}
    return f"{sum(n > 1 for n in times.values())} twice, {len(expected - set(times))} missing"


def check_ours(setting: Setting, source: str, ranks_before: int, ranks_after: int) -> str:
    whole = fork(our_ids, setting, source, 0, ranks_before)
    after = fork(our_ids, setting, source, setting.position, ranks_after)
    assert after == whole[setting.position :], "the unbroken order"
    return describe(setting, whole[: setting.position] + after)


def check_streaming(setting: Setting, ranks_before: int, ranks_after: int) -> str:
    before, state = streamed(setting, None, setting.position // setting.batch, ranks_before)
    after, _ = streamed(setting, state, None, ranks_after)
    return describe(setting, before + after)


def compare_sides(setting: Setting, rounds: int, with_streaming: bool) -> list[Row]:
    """All sides in turn, round by round; with two ranks, the slower one's seconds."""
    sides: dict[str, Callable[[], float]] = {}
    ours = {"shards, 1 rank": ("shards", 1), "folders, 1 rank": ("folders", 1), "shards, now 2 ranks": ("shards", 2)}
    for what, (source, ranks) in ours.items():
        sides[f"{what}, ledger"] = partial(time_ranks, setting, source, 0, ranks)
        sides[f"{what}, replay"] = partial(time_ranks, setting, source, setting.position, ranks)
    if with_streaming:
        _, state = streamed(setting, None, setting.position // setting.batch, 1)
        for number in (0, 1):
            sides[f"Streaming, {number} processes"] = partial(fork, time_streaming, setting, number, state)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
        print({name: round(seconds[-1], 3) for name, seconds in found.items()}, file=sys.stderr, flush=True)
    rows: list[Row] = []
    for what in ours:
        ledger, replay = found[f"{what}, ledger"], found[f"{what}, replay"]
        rows.append(compare(f"{what}: s, against replay", ledger, replay, "<= 0.2" if "1 rank" in what else ""))
    if with_streaming:
        best = min((found[f"Streaming, {number} processes"] for number in (0, 1)), key=median)
        rows += [
            compare(f"{what}: s, against Streaming", found[f"{what}, ledger"], best, "<= 1")
            for what in ours
            if "1 rank" in what
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2003, help="of an epoch; the default is a prime")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streaming", help="folder into which MosaicML Streaming was installed")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.streaming:
        sys.path.append(options.streaming)  # last, so that it gets what we have installed
        import streaming  # noqa: F401  (so that no fork has to)
    position = int(options.samples * 0.9) // options.batch * options.batch
    with tempfile.TemporaryDirectory() as root:
        setting = Setting(root, options.batch, position)
        fork(prepare, Path(root), options.samples)
        worlds = [(1, 1), (2, 1), (1, 2)]
        checks = {
            f"{source}, {before} -> {after} ranks": check_ours(setting, source, before, after)
            for source in ("shards", "folders")
            for before, after in worlds
        }
        if options.streaming:
            fork(write_mds, setting)
            for before, after in worlds:
                checks[f"Streaming, {before} -> {after} ranks"] = check_streaming(setting, before, after)
        else:
            print("--streaming is not given, so MosaicML Streaming is left out", file=sys.stderr)
        for what, found in checks.items():
            print(f"{what}: {found}", file=sys.stderr, flush=True)
        rows = compare_sides(setting, options.rounds, bool(options.streaming))
    settings = {"samples": options.samples, "batch": options.batch, "rounds": options.rounds, "position": position}
    write_result("resume", device_name(), rows, settings | {"size": SIZE, "crop": CROP, "checks": checks})


if __name__ == "__main__":
    main()
