"""From samples to batches: decode, check, resize, augment, collate. The same code feeds this process and Ray Data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from raysseg import masks
from raysseg.config import AnySource, Augment, TrainJob
from raysseg.config import Batch as BatchConfig
from raysseg.data import read_samples
from raysseg.data.augment import apply_view, choose_view, resize, resize_labels, seeded_rng, view_labels
from raysseg.data.decode import Pixels, decode_pair, open_pair
from raysseg.data.index import Failure, SampleIndex
from raysseg.data.sampling import Factors, Order, epoch_order, num_positions, num_windows
from raysseg.ledger import Ledger, deal
from raysseg.schema import ClassMap, InputError, Sample, Task

S = TypeVar("S")
T = TypeVar("T")

CHUNK_ROWS = 32  # samples that a worker's loader reads at least in one go
PART_BYTES = 8 * 2**20  # of pixels that are decoded in one go; larger arrays cost a page fault every 4 KiB


class Numbered(NamedTuple):
    """The regions of one row.

    Attributes:
        numbers: (L, H, W) uint8 or uint16, 1 + place of each pixel's region, 0 for none; see masks.Layers.
        class_ids: (N,) int64 class indices; not every region need be in sight.
    """

    numbers: masks.IdMap
    class_ids: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Training samples of one size.

    Attributes:
        images: (B, H, W, 3) uint8 RGB.
        labels: (B, H, W) class indices, uint8 or uint16; where the task is not semantic, with the class list's
            `nothing` between instances.
        weights: (B,) float32; 0 for rows that stand in for nothing or for a skipped sample, else 1.
        positions: (B,) int64 in the epoch; -1 for rows that stand in for nothing.
        regions: B; none where the task is semantic.
        failures: samples that were skipped.
    """

    images: npt.NDArray[np.uint8]
    labels: masks.IdMap
    weights: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]
    regions: tuple[Numbered, ...] = ()
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return len(self.weights)

    def slice(self, start: int, stop: int) -> Batch:
        """Some rows, as views; the failures stay with the first row."""
        rows = slice(start, stop)
        failures = self.failures if start == 0 else ()
        arrays = self.images[rows], self.labels[rows], self.weights[rows], self.positions[rows]
        return Batch(*arrays, self.regions[rows], failures)


@dataclass(frozen=True)
class Recipe:
    """How a sample becomes a row of a batch."""

    classes: ClassMap
    task: Task
    size: tuple[int, int] | None
    crop: tuple[int, int]
    augment: Augment | None
    seed: int


@dataclass(frozen=True, eq=False)
class Feed:
    """All that one rank's training batches follow from, up to the last epoch; told apart by identity."""

    index: SampleIndex
    recipe: Recipe
    batch: BatchConfig
    open_groups: int
    epochs: int
    start: Ledger
    rank: int = 0
    num_workers: int = 1
    factors: Factors | None = None

    @cached_property
    def num_positions(self) -> int:
        """Of an epoch, over all ranks."""
        return num_positions(self.index, self.factors)

    @cached_property
    def num_windows(self) -> int:
        """Of an epoch's order."""
        return num_windows(self.index, open_groups=self.open_groups, factors=self.factors)

    def first_position(self, epoch: int) -> int:
        """From which an epoch's global batches are counted."""
        return self.start.position if epoch == self.start.epoch else 0

    @property
    def windows_per_chunk(self) -> int:
        """Windows of the order that are read in one go: at least CHUNK_ROWS of this rank's rows."""
        return max(1, round(CHUNK_ROWS * self.num_workers * self.num_windows / self.num_positions))

    @property
    def chunks_per_epoch(self) -> int:
        """The same in every epoch, whatever its order."""
        return -(-self.num_windows // self.windows_per_chunk)

    @cached_property
    def first_chunk(self) -> int:
        """Of the start's epoch: chunks before it lie wholly before the start, and are never asked for."""
        if self.start.position == 0:
            return 0  # an order takes a second for a million files
        windows = _order(self, self.start.epoch).windows
        window = np.searchsorted(windows, self.start.position, side="right") - 1
        return int(window) // self.windows_per_chunk

    @property
    def num_chunks(self) -> int:
        """From the start to the end of the last epoch."""
        return max(0, (self.epochs - self.start.epoch) * self.chunks_per_epoch - self.first_chunk)

    @property
    def bare(self) -> Feed:
        """The feed without its samples, as small for any number of them: it reads and decodes requests of this one."""
        return replace(self, index=self.index.take(np.zeros(0, np.int64)), factors=None)


def build_feed(
    job: TrainJob,
    index: SampleIndex,
    classes: ClassMap,
    start: Ledger,
    *,
    rank: int,
    num_workers: int,
    factors: Factors | None = None,
) -> Feed:
    """The feed of one rank."""
    recipe = Recipe(classes, job.task, job.data.size, job.data.crop, job.data.augment, job.seed)
    return Feed(index, recipe, job.batch, job.data.open_shards, job.schedule.epochs, start, rank, num_workers, factors)


# --- chunks: the unit of reading; their parts: the unit of decoding -----------------------------------------------


@dataclass(frozen=True)
class Request:
    """What one chunk is to hold.

    Attributes:
        epoch: from 0.
        positions: (N,) int64 in the epoch, ascending.
        index: the samples at these positions.
    """

    epoch: int
    positions: npt.NDArray[np.int64]
    index: SampleIndex


@dataclass(frozen=True)
class Chunk:
    """Samples of an epoch as they lie on storage.

    Attributes:
        epoch: from 0.
        positions: (N,) int64 in the epoch, ascending.
        samples: at these positions.
    """

    epoch: int
    positions: npt.NDArray[np.int64]
    samples: Sequence[Sample | Failure]


def request_chunk(feed: Feed, chunk: int) -> Request:
    """One chunk of a feed, counted from its start: the rank's rows of some windows of the order, by position."""
    epochs, place = divmod(feed.first_chunk + chunk, feed.chunks_per_epoch)
    epoch = feed.start.epoch + epochs
    order = _order(feed, epoch)
    first = place * feed.windows_per_chunk
    last = first + feed.windows_per_chunk
    stop = order.windows[last] if last < len(order.windows) else len(order)
    begin = feed.first_position(epoch)
    positions = np.arange(max(order.windows[first], begin), stop)
    positions = positions[(positions - begin) % feed.batch.global_size % feed.num_workers == feed.rank]
    return Request(epoch, positions, feed.index.take(order.rows[positions]))


def read_chunk(request: Request) -> Chunk:
    """Reads what is requested."""
    return Chunk(request.epoch, request.positions, read_samples(request.index))


def iter_parts(feed: Feed, chunk: Chunk) -> Iterator[Chunk]:
    """Cuts a chunk where micro-batches end, so that a part need not be copied to become some.

    The feed's first part is one micro-batch, which a run that starts or goes on waits for. The chunk at the start may
    hold none of the rank's rows, and then there is no part.
    """
    if not len(chunk.positions):
        return
    height, width = feed.recipe.crop
    batches_per_part = max(1, PART_BYTES // (feed.batch.per_worker * height * width * 4))
    global_batch, place = np.divmod(chunk.positions - feed.first_position(chunk.epoch), feed.batch.global_size)
    micro_batch = place // feed.num_workers // feed.batch.per_worker
    ends = np.flatnonzero(np.diff(global_batch) | np.diff(micro_batch)) + 1
    is_first = chunk.epoch == feed.start.epoch and global_batch[0] == 0
    ends = ends[0 if is_first else batches_per_part - 1 :: batches_per_part]
    edges = [0, *ends.tolist(), len(chunk.positions)]
    for start, stop in pairwise(edges):
        yield Chunk(chunk.epoch, chunk.positions[start:stop], chunk.samples[start:stop])


def decode_chunk(feed: Feed, chunk: Chunk) -> Batch:
    """Decodes, augments and collates.

    Raises:
        InputError: a sample can't be used, and the source does not skip.
    """
    recipe, num_rows = feed.recipe, len(chunk.positions)
    images = np.empty((num_rows, *recipe.crop, 3), np.uint8)
    labels = np.empty((num_rows, *recipe.crop), recipe.classes.dtype)
    weights = np.ones(num_rows, np.float32)
    regions, failures = [], []
    for row, (position, sample) in enumerate(zip(chunk.positions, chunk.samples, strict=True)):
        rng = seeded_rng(recipe.seed, chunk.epoch, int(position))
        try:
            if isinstance(sample, Failure):
                raise InputError(sample.reason)
            images[row], labels[row], numbered = _to_row(sample, recipe, rng)
        except InputError as error:
            if not feed.index.source.is_skipping:
                raise
            images[row], labels[row], weights[row] = 0, recipe.classes.ignore, 0
            numbered = _no_regions(recipe)
            failures.append(Failure(sample.sample_id, str(error)))
        regions.append(numbered)
    is_semantic = recipe.task == "semantic"
    return Batch(images, labels, weights, chunk.positions, () if is_semantic else tuple(regions), tuple(failures))


def _to_row(sample: Sample, recipe: Recipe, rng: np.random.Generator) -> tuple[Pixels, masks.IdMap, Numbered]:
    """One training crop: image, labels and, unless the task is semantic, regions."""
    image, truth = open_pair(sample, recipe.classes, recipe.task)
    ignore = recipe.classes.ignore
    numbers: Sequence[masks.IdMap] = ()
    if isinstance(truth, masks.LabelMap):
        labels, class_ids = truth.labels, np.zeros(0, np.int64)
    else:
        layers = masks.to_layers(truth, recipe.classes)
        labels, numbers, class_ids = layers.labels, list(layers.numbers), layers.class_ids
    with masks.naming(sample):
        if recipe.size is not None:
            image, labels = resize(image[:, :], labels, recipe.size)
            numbers = [resize_labels(layer, recipe.size) for layer in numbers]
        counted = labels if not numbers else np.where(labels == recipe.classes.nothing, ignore, labels)
        view = choose_view(counted, crop=recipe.crop, config=recipe.augment, ignore=ignore, rng=rng)
        pixels, labels = apply_view(view, image, labels, ignore=ignore)
    shown = [view_labels(view, layer, fill=0) for layer in numbers]
    return pixels, labels, Numbered(np.stack(shown), class_ids) if shown else _no_regions(recipe)


@lru_cache(maxsize=2)
def _no_regions(recipe: Recipe) -> Numbered:
    return Numbered(np.zeros((1, *recipe.crop), np.uint8), np.zeros(0, np.int64))


@lru_cache(maxsize=2)
def _order(feed: Feed, epoch: int) -> Order:
    """The order of an epoch, kept: every chunk asks for it."""
    return epoch_order(
        feed.index, open_groups=feed.open_groups, seed=feed.recipe.seed, epoch=epoch, factors=feed.factors
    )


def read_ids(feed: Feed, epoch: int, positions: Sequence[int]) -> list[str]:
    """The samples at some positions of an epoch, by their ids."""
    rows = _order(feed, epoch).rows[np.array(positions, np.int64)]
    return feed.index.take(rows).sample_ids


# --- evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An image, (H, W, 3) uint8, and its ground truth of the same size."""

    sample_id: str
    image: Pixels
    truth: masks.View


def iter_pairs(
    index: SampleIndex,
    classes: ClassMap,
    task: Task = "semantic",
    *,
    rows: int,
    share: int = 0,
    num_shares: int = 1,
    with_images: bool = True,
    threads: int = 2,
) -> Iterator[list[Pair | Failure]]:
    """Batches for evaluation, fixed by the index: batch i starts at row `i * rows` and goes to share `i % num_shares`.

    Raises:
        InputError: a sample can't be used, and the source does not skip.
    """

    def load(start: int) -> list[Pair | Failure]:
        part = index.take(np.arange(start, min(start + rows, len(index))))
        return [_to_pair(sample, classes, task, index.source) for sample in read_samples(part, with_images=with_images)]

    return read_ahead(load, range(share * rows, len(index), num_shares * rows), threads)


def _to_pair(sample: Sample | Failure, classes: ClassMap, task: Task, source: AnySource) -> Pair | Failure:
    """Decodes a sample, in grey where it has no image; a bad one raises InputError, or comes back as a Failure."""
    try:
        if isinstance(sample, Failure):
            raise InputError(sample.reason)
        if sample.image is not None:
            return Pair(sample.sample_id, *decode_pair(sample, classes, task))
        truth = masks.to_view(sample, classes, task)
        return Pair(sample.sample_id, np.full((*masks.size_of(truth), 3), 127, np.uint8), truth)
    except InputError as error:
        if not source.is_skipping:
            raise
        return Failure(sample.sample_id, str(error))


# --- steps --------------------------------------------------------------------------------------------------------


def read_ahead(load: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """`load` of each item in turn, a few ahead, by threads of this process."""
    with ThreadPoolExecutor(threads, thread_name_prefix="raysseg-data") as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(load, item))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def iter_chunks(feed: Feed, *, threads: int = 2) -> Iterator[Batch]:
    """The rows of a feed in turn, without Ray: a thread reads ahead of those that decode."""
    chunks = read_ahead(lambda number: read_chunk(request_chunk(feed, number)), range(feed.num_chunks), 1)
    return decode_ahead(feed, chunks, threads)


def decode_ahead(feed: Feed, chunks: Iterable[Chunk], threads: int) -> Iterator[Batch]:
    """Decodes chunks as they come, part by part, by threads of this process."""
    parts = (part for chunk in chunks for part in iter_parts(feed, chunk))
    return read_ahead(partial(decode_chunk, feed), parts, threads)


def iter_batches(feed: Feed, chunks: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Cuts a feed's chunks into micro-batches: one list a global batch, as long on every rank.

    A micro-batch for which this rank has no position is a single row of weight 0, so that all ranks run as many passes.
    """
    rows = _Cursor(iter(chunks))
    for epoch in range(feed.start.epoch, feed.epochs):
        for start in range(feed.first_position(epoch), feed.num_positions, feed.batch.global_size):
            stop = min(start + feed.batch.global_size, feed.num_positions)
            shares = deal(start, stop, per_worker=feed.batch.per_worker, rank=feed.rank, num_workers=feed.num_workers)
            yield [rows.take(len(share)) if len(share) else stand_in(feed.recipe) for share in shares]


class _Cursor:
    """Takes rows off a stream of batches of any length; copies only where a cut runs across two of them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._rest: Batch | None = None

    def take(self, num_rows: int) -> Batch:
        parts: list[Batch] = []
        while num_rows:
            rest = self._rest if self._rest is not None else next(self._batches)
            part = rest.slice(0, num_rows)
            num_rows -= len(part)
            self._rest = rest.slice(len(part), len(rest)) if len(part) < len(rest) else None
            parts.append(part)
        return parts[0] if len(parts) == 1 else _concatenated(parts)


def _concatenated(parts: list[Batch]) -> Batch:
    return Batch(
        np.concatenate([p.images for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.weights for p in parts]),
        np.concatenate([p.positions for p in parts]),
        tuple(numbered for p in parts for numbered in p.regions),
        tuple(failure for p in parts for failure in p.failures),
    )


@lru_cache(maxsize=2)
def stand_in(recipe: Recipe) -> Batch:
    """A row of weight 0, where there is no position."""
    return Batch(
        np.full((1, *recipe.crop, 3), 127, np.uint8),
        np.full((1, *recipe.crop), recipe.classes.ignore, recipe.classes.dtype),
        np.zeros(1, np.float32),
        np.full(1, -1, np.int64),
        () if recipe.task == "semantic" else (_no_regions(recipe),),
    )
