"""What ranks cost each other by their number: agreeing, telling the driver, restoring; and a feed on Ray Data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.memory import MIB
from benchmarks.scale_data import WORKERS, Row, alone, feed_of, made_up, row
from raysseg import checkpoint, runtime
from raysseg.conductor import Conductor, Sign
from raysseg.config import MasksSource, Scaling
from raysseg.data import read_index, stream
from raysseg.data.batches import Feed, decode_chunk, iter_batches, read_chunk, request_chunk
from raysseg.data.example import EXAMPLE_CLASSES, draw_example
from raysseg.data.index import SampleIndex
from raysseg.data.shards import to_table
from raysseg.link import Wish
from raysseg.loop import TrainState
from raysseg.schema import Sample
from raysseg.worker import _Agreement

STEPS = 300


def on_ranks(act: Callable[[int, int], list[float]], num_workers: int) -> list[list[float]]:
    """What an act gives on each rank of a group of real processes, over gloo."""
    context = get_context("fork")
    with TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(num_workers)]
        arguments = [(act, rank, num_workers, folder, pipe[1]) for rank, pipe in enumerate(pipes)]
        processes = [context.Process(target=_run_rank, args=entry) for entry in arguments]
        for process in processes:
            process.start()
        found: list[list[float]] = [here.recv() for here, _ in pipes]
        for process in processes:
            process.join()
    return found


def _run_rank(
    act: Callable[[int, int], list[float]], rank: int, num_workers: int, folder: str, there: Connection
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_workers)
    there.send(act(rank, num_workers))
    dist.barrier()
    dist.destroy_process_group()


def agree(rank: int, num_workers: int) -> list[float]:
    """Seconds until the group stands; wall and CPU seconds and loopback's bytes of a step; open sockets."""
    started = time.perf_counter()
    agreement = _Agreement(num_workers, 60.0)
    agreement(Wish.NOTHING)
    begun = time.perf_counter() - started
    dist.barrier()
    sent, started, cpu = _loopback_bytes(), time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        agreement(Wish.NOTHING)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    sent = _loopback_bytes() - sent
    sockets = sum("socket" in str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return [begun, wall / STEPS, cpu / STEPS, sent / STEPS, sockets]


def _loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[1])


def agreement_rows() -> Iterator[Row]:
    for num_workers in WORKERS:
        begun, wall, cpu, sent, sockets = np.array(on_ranks(agree, num_workers)).max(axis=0).tolist()
        yield row("agreement", "its group stands after", num_workers, begun, "s")
        yield row("agreement", "a step", num_workers, 1000 * wall, "ms")
        yield row("agreement", "a step: CPU of a rank", num_workers, 1000 * cpu, "ms")
        yield row("agreement", "a step: bytes of all ranks, headers too", num_workers, sent, "bytes")
        yield row("agreement", "sockets of a rank", num_workers, sockets, "sockets")


# --- the conductor ------------------------------------------------------------------------------------------------


def conductor_rows() -> Iterator[Row]:
    """The table of signs is made anew with each of them: that grows with the ranks, and the signs do, too."""
    for num_workers in (*WORKERS, 100, 1000):
        signs = [Sign(rank, num_workers, "pid 1 on 10.0.0.1", "step", (1, 1), 0.1) for rank in range(num_workers)]
        conductor, rounds, started = Conductor(), -(-2000 // num_workers), time.perf_counter()
        for _ in range(rounds):
            for sign in signs:
                conductor.exchange(sign, "actor")
        spent = (time.perf_counter() - started) / rounds / num_workers
        yield row("reports", "work of an exchange", num_workers, 1e6 * spent, "us")


def reports_rows() -> Iterator[Row]:
    """What the actor takes of callers with one call under way each; here they are threads of one process."""
    import ray

    conductor = ray.remote(_Watched).options(num_cpus=0).remote()
    ray.get(conductor.spent.remote())

    def call(rank: int) -> None:
        sign = Sign(rank, num_workers, "pid 1 on 10.0.0.1", "step", (1, 1), 0.1)
        for _ in range(200):
            ray.get(conductor.exchange.remote(sign, conductor))

    for num_workers in WORKERS:
        started, spent = time.perf_counter(), ray.get(conductor.spent.remote())
        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(call, range(num_workers)))
        calls, spent = 200 * num_workers, ray.get(conductor.spent.remote()) - spent
        yield row("reports", "exchanges a second", num_workers, calls / (time.perf_counter() - started), "1/s")
        yield row("reports", "the actor's CPU of an exchange", num_workers, 1e6 * spent / calls, "us")


class _Watched(Conductor):
    def spent(self) -> float:
        """CPU seconds of its process."""
        return time.process_time()


# --- checkpoints --------------------------------------------------------------------------------------------------


def build_state(side: int = 1500) -> TrainState:
    model = nn.Linear(side, side)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, side)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None)  # type: ignore[arg-type]


def checkpoint_rows(bucket: str, requests: list[str]) -> Iterator[Row]:
    """What n ranks on one disk ask of S3 for one checkpoint of three numbers a parameter.

    The checkpoint is written by a process of its own: a client of S3 must not be forked.
    """
    run_uri = f"{bucket}/run"
    seconds, _ = alone(lambda: checkpoint.write(run_uri, checkpoint.take(build_state())))
    size = sum(p.numel() for p in build_state().model.parameters()) * 12 / MIB
    yield row("checkpoint", "written: MiB of state", size, seconds, "s")

    def restore(rank: int, num_workers: int) -> list[float]:
        state, started = build_state(), time.perf_counter()
        assert checkpoint.restore_newest(run_uri, state) is not None
        return [time.perf_counter() - started]

    once = checkpoint._fetch_once
    for num_workers in WORKERS[:4]:
        for name, fetch in (("before", checkpoint._fetch), ("now", once)):
            checkpoint._fetch_once = fetch
            before = len(requests)
            seconds = max(on_ranks(restore, num_workers))[0]
            asked = requests[before:]
            fetched = sum(request.startswith("GET") and ".pt" in request for request in asked)
            yield row("checkpoint", f"restored, {name}", num_workers, seconds, "s")
            yield row("checkpoint", f"restored, {name}: the state is fetched", num_workers, fetched, "times")
            yield row("checkpoint", f"restored, {name}: requests", num_workers, len(asked), "requests")
    checkpoint._fetch_once = once


# --- Ray Data -----------------------------------------------------------------------------------------------------


def files_over_and_over(folder: str, num_samples: int) -> SampleIndex:
    """So many samples, all of which are one real image with its mask."""
    import cv2

    cv2.imwrite(f"{folder}/a.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    cv2.imwrite(f"{folder}/a.png", np.zeros((64, 64), np.uint8))
    index = made_up(num_samples)
    table = index.references.drop_columns(["image", "mask"])
    for name, file in (("image", "a.jpg"), ("mask", "a.png")):
        table = table.append_column(name, [[file] * num_samples])
    return SampleIndex(MasksSource(images=folder, masks=folder), table, index.groups).in_one_piece


def traffic_rows() -> Iterator[Row]:
    """Bytes of a sample in the object store, beside those of its files, for scenes of 512x512."""
    with TemporaryDirectory() as folder:
        draw_example(Path(folder), num_train=32, num_val=1, size=(512, 512))
        index = read_index(MasksSource(images=f"{folder}/train/images", masks=f"{folder}/train/masks"))
        feed = feed_of(index)
        feed = replace(feed, recipe=replace(feed.recipe, classes=EXAMPLE_CLASSES, crop=(512, 512)))
        chunk = read_chunk(request_chunk(feed, 0))
        files = sum(
            path.stat().st_size for kind in ("images", "masks") for path in Path(folder, "train", kind).iterdir()
        )
        decoded = stream._to_block(decode_chunk(feed, chunk), "")
        samples = [sample for sample in chunk.samples if isinstance(sample, Sample)]
        assert len(samples) == 32
        for what, num_bytes in (
            ("its files", files),
            ("decode: trainer", to_table(samples).nbytes),
            ("decode: cluster", sum(column.nbytes for column in decoded.values())),
        ):
            yield row("stream", f"bytes of a sample, {what}", 512, num_bytes / 32, "bytes")


def stream_rows() -> Iterator[Row]:
    yield from traffic_rows()
    span = stream._SPAN
    with TemporaryDirectory() as folder:
        for num_samples, epochs in ((10**5, 1), (10**5, 10), (10**6, 50)):
            index = files_over_and_over(folder, num_samples)
            num_chunks = feed_of(index, epochs=epochs).num_chunks
            for name, most in (("one execution", 10**9), ("now", span)):
                if min(num_chunks, most) > 40_000:
                    continue  # minutes
                stream._SPAN = most
                first, rate = _time_stream(feed_of(index, epochs=epochs))
                yield row("stream", f"{epochs} epochs, {name}: first batch", num_samples, first, "s")
                yield row("stream", f"{epochs} epochs, {name}: images/s then", num_samples, rate, "1/s")
        stream._SPAN = span
        yield from ranks_rows(index)


def ranks_rows(index: SampleIndex) -> Iterator[Row]:
    """Several ranks at once, whose tasks share the processes of two cores: one's chunks come between the others'."""
    for num_workers in (1, 2, 4):
        feeds = [feed_of(index, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
        with ThreadPoolExecutor(num_workers) as pool:
            rates = [rate for _, rate in pool.map(_time_stream, feeds)]
        yield row("stream", f"{len(index):.0e} samples: images/s of all ranks", num_workers, sum(rates), "1/s")


def _time_stream(feed: Feed, steps: int = 100) -> tuple[float, float]:
    started = time.perf_counter()
    batches = iter_batches(feed, stream.iter_chunks(feed, lambda _: None, decode="cluster", threads=2))
    next(batches)
    first = time.perf_counter()
    for _ in range(steps):
        next(batches)
    rate = 16 * steps / (time.perf_counter() - first)
    batches.close()  # type: ignore[attr-defined]
    return first - started, rate


def handover_rows() -> Iterator[Row]:
    """The longest wait of training that takes 50 ms a step, over four executions of 64 chunks of two steps each."""
    span, overlap = stream._SPAN, stream._OVERLAP
    stream._SPAN = 64
    with TemporaryDirectory() as folder:
        feed = feed_of(files_over_and_over(folder, 32 * 64 * 4))
        for when, share in (("when one is through", 0.0), ("early", overlap)):
            stream._OVERLAP = share
            waits, asked = [], time.perf_counter()
            for _ in iter_batches(feed, stream.iter_chunks(feed, lambda _: None, decode="cluster", threads=2)):
                waits.append(time.perf_counter() - asked)
                time.sleep(0.05)
                asked = time.perf_counter()
            what = f"longest wait for a batch, the next execution begins {when}"
            yield row("handover", what, len(waits), 1000 * max(waits[100:]), "ms")
    stream._SPAN, stream._OVERLAP = span, overlap


def spread_rows() -> Iterator[Row]:
    """Tasks that do nothing, by their number: all asked for at once, and some hundred at a time."""
    at_once = runtime._AT_ONCE
    for num_pieces in (1000, 4000):
        for name, most in (("before", 10**9), ("now", at_once)):
            runtime._AT_ONCE = most
            started = time.perf_counter()
            found = list(runtime.spread(_nothing, 0, range(num_pieces), Scaling(workers=2, gpus_per_worker=0)))
            assert sorted(found) == list(range(num_pieces))
            spent = (time.perf_counter() - started) / num_pieces
            yield row("spread", f"a piece, {name}", num_pieces, 1000 * spent, "ms")
    runtime._AT_ONCE = at_once


def _nothing(shared: int, piece: int) -> Iterator[int]:
    yield piece
