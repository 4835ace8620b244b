"""What the index of a data set costs by the number of its samples: made up, or listed, read, ordered and dealt out."""

from __future__ import annotations

import json
import pickle
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import MIB
from raysseg import storage
from raysseg.config import Batch as BatchConfig
from raysseg.config import CocoSource, MasksSource, ShardsSource
from raysseg.data import files, masks, read_index, read_samples, shards, stream
from raysseg.data.batches import Feed, Recipe, request_chunk
from raysseg.data.index import SampleIndex
from raysseg.data.sampling import epoch_order, order_hash, repeat_factors
from raysseg.ledger import Ledger
from raysseg.losses import count_pixels
from raysseg.masks import encode_id_map
from raysseg.metrics import Metrics
from raysseg.schema import ClassMap, Sample

T = TypeVar("T")
Row = dict[str, str | float]

CLASSES = ClassMap((0, 1, 2), ("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 99, 99)), (False,) * 3)
ROWS_PER_GROUP = 32  # what `raysseg shard` writes
WORKERS = (1, 2, 4, 8, 16)


def row(part: str, what: str, size: float, value: float, unit: str) -> Row:
    return {"part": part, "what": what, "size": float(size), "value": float(value), "unit": unit}


def alone(act: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of an act in a process of its own, and MiB that it holds at most beyond what was there."""
    context = get_context("fork")
    here, there = context.Pipe()

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        kept = act()
        seconds = time.process_time() - started
        there.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
        del kept

    process = context.Process(target=run)
    process.start()
    there.close()
    found: tuple[float, float] = here.recv()
    process.join()
    return found


def costs(part: str, what: str, size: float, act: Callable[[], object]) -> Iterator[Row]:
    seconds, mib = alone(act)
    yield row(part, what, size, seconds, "CPU s")
    yield row(part, f"{what}: peak", size, mib, "MiB")


# --- made up ------------------------------------------------------------------------------------------------------


def made_up(num_samples: int, group: int = 1) -> SampleIndex:
    """An index of names alone; a name has 24 bytes."""
    names = pa.array([f"train/{i // 1000:05d}/{i:012d}" for i in range(num_samples)])
    table = pa.table({"sample_id": names, "image": names, "mask": names})
    source = MasksSource(images="/d", masks="/d")
    return SampleIndex(source, table, np.arange(num_samples) // group).in_one_piece


def feed_of(index: SampleIndex, *, rank: int = 0, num_workers: int = 1, epochs: int = 1, open_groups: int = 16) -> Feed:
    recipe = Recipe(CLASSES, "semantic", None, (64, 64), None, 0)
    batch = BatchConfig(global_size=16 * num_workers, per_worker=4)
    return Feed(index, recipe, batch, open_groups, epochs, Ledger(), rank, num_workers)


def order_rows(sizes: tuple[int, ...]) -> Iterator[Row]:
    for size in sizes:
        for what, group in (("files", 1), ("shards", ROWS_PER_GROUP)):
            index = made_up(size, group)
            order = partial(epoch_order, index, open_groups=16, seed=0, epoch=0)
            yield from costs("order", f"an epoch's order, {what}", size, order)
        yield from costs("order", "hash of the order", size, partial(order_hash, index, open_groups=16, seed=0))
        yield row("order", "pickled index", size, len(pickle.dumps(index, 5)) / MIB, "MiB")
        yield row("order", "pickled feed of a task", size, len(pickle.dumps(feed_of(index).bare, 5)) / MIB, "MiB")
        yield from _request_rows(index)


def _request_rows(index: SampleIndex) -> Iterator[Row]:
    """What a rank asks its tasks for: the time to deal it out, and its bytes."""
    for num_workers in WORKERS:
        feed = feed_of(index, num_workers=num_workers)
        request_chunk(feed, 0)  # computes the order
        numbers = range(min(200, feed.num_chunks))
        started = time.perf_counter()
        tables = [stream._to_table(request_chunk(feed, number)) for number in numbers]
        seconds = time.perf_counter() - started
        samples = sum(map(len, tables))
        what = f"{len(index):.0e} samples: a chunk is dealt out"
        yield row("order", what, num_workers, 1000 * seconds / len(numbers), "ms")
        yield row("order", f"{what}: bytes a sample", num_workers, sum(t.nbytes for t in tables) / samples, "bytes")


def reading_rows(num_samples: int = 500_000) -> Iterator[Row]:
    """How often all ranks together read a row group, as tasks find their samples."""
    index = made_up(num_samples, ROWS_PER_GROUP)
    for num_workers in (*WORKERS, 24, 32, 64, 100, 128):
        for open_groups in sorted({16, -(-16 // num_workers) * num_workers}):
            read = rows = 0
            for rank in range(0, num_workers, max(1, num_workers // 8)):
                feed = feed_of(index, rank=rank, num_workers=num_workers, open_groups=open_groups)
                for number in range(feed.num_chunks):
                    request = request_chunk(feed, number)
                    read += len(np.unique(request.index.groups)) * ROWS_PER_GROUP
                    rows += len(request.positions)
            what = f"rows read a row used, open_shards={'16' if open_groups == 16 else 'workers'}"
            yield row("reading", what, num_workers, read / rows, "times")


# --- listed and read ----------------------------------------------------------------------------------------------


def former_by_stem(folder: str, suffixes: frozenset[str], end: str = "") -> dict[str, str]:
    """As it was: a path object a file."""
    by_stem: dict[str, str] = {}
    for entry in storage.list_tree(folder):
        path = PurePosixPath(entry.path)
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.stem.endswith(end):
            continue
        by_stem[str(path.with_suffix("")).removesuffix(end)] = str(path)
    return by_stem


def index_rows(size: int = 10**6) -> Iterator[Row]:
    listing = [storage.FileEntry(f"train/{i // 1000:05d}/{i:012d}.png", 10**5) for i in range(size)]
    real, storage.list_tree = storage.list_tree, lambda uri: listing
    try:
        for name, by_stem in (("before", former_by_stem), ("now", files.files_by_stem)):
            masks.files_by_stem = by_stem
            read = partial(masks.read_index, MasksSource(images="/d", masks="/d"))
            yield from costs("index", f"mask folders, listed already, {name}", size, read)
    finally:
        storage.list_tree, masks.files_by_stem = real, files.files_by_stem
    with TemporaryDirectory() as folder:
        yield from _shard_index_rows(folder, size)
        yield from _coco_rows(folder, size)


def _shard_index_rows(folder: str, size: int) -> Iterator[Row]:
    number = np.arange(size)
    table = pa.table(
        {
            "sample_id": [f"train/{i // 1000:05d}/{i:012d}" for i in range(size)],
            "file_number": (number // 512).astype(np.int32),
            "row_group": (number % 512 // ROWS_PER_GROUP).astype(np.int32),
            "row": (number % ROWS_PER_GROUP).astype(np.int32),
            "height": np.full(size, 512, np.int32),
            "width": np.full(size, 512, np.int32),
        }
    )
    shards.finish(folder, [table], CLASSES)
    yield row("index", "index.parquet of shards", size, Path(folder, shards.INDEX).stat().st_size / MIB, "MiB")
    source = ShardsSource(format="shards", uri=folder)
    yield from costs("index", "shards", size, partial(read_index, source))
    chunked = pq.read_table(Path(folder, shards.INDEX))
    for name, index in (
        ("before", SampleIndex(source, chunked, number)),
        ("now", SampleIndex(source, chunked, number).in_one_piece),
    ):
        started = time.perf_counter()
        for _ in range(50):
            index.take(number[:32])
        yield row("index", f"32 rows are taken of it, {name}", size, (time.perf_counter() - started) * 20, "ms")


def _coco_rows(folder: str, num_instances: int) -> Iterator[Row]:
    """Seven instances an image, of polygons with sixteen corners, as COCO has them on average."""
    polygon = json.dumps([[round(x, 1) for x in np.linspace(10, 400, 32).tolist()]])
    images = ",".join(
        f'{{"id":{i},"file_name":"{i:012d}.jpg","height":480,"width":640}}' for i in range(num_instances // 7 + 1)
    )
    annotations = ",".join(
        f'{{"id":{i},"image_id":{i // 7},"category_id":1,"iscrowd":0,"area":5000.0,"bbox":[1.0,2.0,30.0,40.0],'
        f'"segmentation":{polygon}}}'
        for i in range(num_instances)
    )
    path = Path(folder, "instances.json")
    path.write_text(f'{{"images":[{images}],"annotations":[{annotations}],"categories":[{{"id":1,"name":"thing"}}]}}')
    del images, annotations
    yield row("index", "COCO file", num_instances, path.stat().st_size / MIB, "MiB")
    source = CocoSource(format="coco", images=folder, annotations=str(path))
    yield from costs("index", "COCO, by instances", num_instances, partial(read_index, source))


def listing_rows(bucket: str, requests: list[str], num_keys: int = 3000) -> Iterator[Row]:
    """Requests of a listing and of reading, counted between us and an S3 server."""
    tiny = encode_id_map(np.zeros((64, 64), np.uint8))
    for name in ("flat", "folders"):
        for i in range(num_keys // 2):
            inner = f"{i // 100:03d}/" if name == "folders" else ""
            storage.write_bytes(f"{bucket}/{name}/{inner}{i:06d}.png", tiny)
        before, started = len(requests), time.perf_counter()
        storage.list_tree(f"{bucket}/{name}")
        yield row("listing", f"S3, {name}: listing", num_keys // 2, time.perf_counter() - started, "s")
        yield row("listing", f"S3, {name}: requests", num_keys // 2, len(requests) - before, "requests")
    index = read_index(MasksSource(images=f"{bucket}/flat", masks=f"{bucket}/flat")).take(np.arange(64))
    yield _requests_of("mask folders", index, requests)
    samples = [Sample(f"{i:04d}", tiny, 64, 64, tiny) for i in range(512)]
    written = shards.write_part(f"{bucket}/shards", 0, samples, CLASSES, rows_per_group=ROWS_PER_GROUP)
    shards.finish(f"{bucket}/shards", [written.rows], CLASSES)
    index = read_index(ShardsSource(format="shards", uri=f"{bucket}/shards"))
    read_samples(index.take(np.arange(1)))  # its footer
    yield _requests_of("shards", index.take(np.arange(64)), requests)
    with TemporaryDirectory() as folder:
        for i in range(20_000):
            Path(folder, f"{i:06d}.png").touch()
        yield from costs("listing", "local folder", 20_000, partial(storage.list_files, folder))


def _requests_of(what: str, index: SampleIndex, requests: list[str]) -> Row:
    before = len(requests)
    assert all(isinstance(sample, Sample) for sample in read_samples(index))
    asked = (len(requests) - before) / len(index)
    return row("listing", f"{what}: requests a sample read", len(index), asked, "requests")


# --- counted ------------------------------------------------------------------------------------------------------


def former_factors(presence: np.ndarray, threshold: float) -> np.ndarray:
    """As they were: all numbers by sample and class at a time."""
    shares = np.maximum(presence.mean(axis=0), 1 / len(presence))
    return np.where(presence, np.sqrt(threshold / shares), 1.0).max(axis=1, initial=1.0)


def balance_rows(size: int = 10**6, num_classes: int = 133) -> Iterator[Row]:
    presence = np.random.default_rng(0).random((size, num_classes), np.float32) < np.geomspace(0.5, 1e-4, num_classes)
    assert np.array_equal(former_factors(presence, 0.01), repeat_factors(presence, 0.01))
    for name, act in (("before", former_factors), ("now", repeat_factors)):
        what = f"repeat factors of {num_classes} classes, {name}"
        yield from costs("balance", what, size, partial(act, presence, 0.01))
    labels = np.random.default_rng(0).integers(0, 19, (512, 512)).astype(np.uint8)
    started = time.perf_counter()
    for _ in range(200):
        count_pixels(labels, 19)
    yield row("balance", "pixels of a 512x512 mask are counted", 1, (time.perf_counter() - started) * 5, "ms")


def metrics_rows(sizes: tuple[int, ...]) -> Iterator[Row]:
    """States as if CamVid's masks had been scored: some forty places of a confusion matrix are not 0."""
    places = np.arange(40)
    for size in sizes:
        whole = Metrics("semantic", CLASSES_11)
        shares = [
            {
                f"val/{i:09d}": (np.stack([places, places + i]).astype(np.uint32).tobytes(),)
                for i in range(start, size, 16)
            }
            for start in range(16)
        ]
        pickled = sum(len(pickle.dumps(share, 5)) for share in shares)
        yield row("metrics", "pickled state", size, pickled / size, "bytes an image")

        def merge(shares: list[dict[str, tuple[bytes]]] = shares, whole: Metrics = whole) -> Metrics:
            for share in shares:
                whole.merge(share)
            return whole

        yield from costs("metrics", "16 states are merged", size, merge)
        merge()
        yield from costs("metrics", "numbers of them", size, whole.compute)


CLASSES_11 = ClassMap(tuple(range(11)), tuple("abcdefghijk"), ((0, 0, 0),) * 11, (False,) * 11)
