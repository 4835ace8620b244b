"""What a worker of a predict job does: parts of the index, image by image, and blocks of large images.

A part is whole batches of the index. Its predictions are written as soon as they are made, and its rows, with what the
end of the job needs of them, last: they declare it done. Images of several blocks of tiles are left for later where
there are several workers, which then share the blocks of each.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysseg import masks, storage
from raysseg.config import PredictJob
from raysseg.data import WRITERS, read_images, read_samples
from raysseg.data.augment import Windowed
from raysseg.data.batches import read_ahead
from raysseg.data.decode import Pixels, open_image, open_pair
from raysseg.data.files import suffix_of
from raysseg.data.index import Failure, SampleIndex
from raysseg.masks import IdMap, LabelMap, View
from raysseg.metrics import Metrics
from raysseg.predictor import Predictor, kept_predictor
from raysseg.runtime import num_shares
from raysseg.schema import ClassMap, InputError, Sample, Task
from raysseg.tiling import Block, Grid

PARTS = "parts"  # folder of what is done so far; gone in the end
_BLOCK_ROWS = 8  # cells of a block from top to bottom
_STRIP = 512  # rows of a large image that are decoded at a time


@dataclass(frozen=True)
class Plan:
    """What every task needs.

    Attributes:
        job: with all keys of its inference.
        task: the bundle's.
        classes: likewise.
        index: the images.
        settings: what predictions follow from; a run goes on with another's parts only where they are the same.
        missing: parts, or images, that are still to be done.
    """

    job: PredictJob
    task: Task
    classes: ClassMap
    index: SampleIndex
    settings: dict[str, Any]
    missing: Sequence[int] = ()

    @cached_property
    def rows_per_part(self) -> int:
        """Rows of the index: whole batches."""
        rows = self.job.batch.per_worker
        return -(-self.job.output.rows_per_file // rows) * rows

    @property
    def num_parts(self) -> int:
        """Of the index."""
        return -(-len(self.index) // self.rows_per_part)

    @property
    def num_shares(self) -> int:
        """Of the work: one a worker."""
        return num_shares(self.job.scaling)

    @cached_property
    def parts_uri(self) -> str:
        """Folder of what is done so far, by jobs of the same settings."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return storage.join(self.job.output.uri, PARTS, digest[:16])

    def rows_of(self, number: int) -> range:
        """The rows of a part."""
        return range(len(self.index))[number * self.rows_per_part : (number + 1) * self.rows_per_part]

    def share(self, share: int) -> Sequence[int]:
        """What of the missing one worker does."""
        return self.missing[share :: self.num_shares]

    def predictor(self) -> Predictor:
        """The bundle, once a process."""
        return kept_predictor(self.job.bundle, self.job.precision, self.job.inference)

    def grid(self, image: Pixels | Windowed) -> Grid:
        """Of an image's tiles."""
        return Grid((image.shape[0], image.shape[1]), self.job.inference.tile, self.job.inference.overlap)


class _Opened(NamedTuple):
    """An image that can be used, in its row of the index; what it is scored by."""

    row: int
    sample: Sample
    image: Pixels | Windowed
    truth: View | None


class _Batch(NamedTuple):
    """Images that go through the model together."""

    part: int
    items: list[_Opened | Failure]
    ends_part: bool


class _Segmented(NamedTuple):
    """A prediction, the name of its image, and what each measure has counted."""

    row: int
    sample: Sample
    name: str
    record: tuple[bytes, ...]


def part_name(number: int) -> str:
    """File of a part's rows."""
    return f"{number:08d}.parquet"


def large_name(row: int) -> str:
    """File of the row of a large image."""
    return f"large-{row:08d}.parquet"


def marker_name(row: int) -> str:
    """File that says that an image is large, and left for later."""
    return f"large-{row:08d}.waits"


def _block_name(row: int, number: int) -> str:
    return f"large-{row:08d}-{number:06d}.block"


def list_done(plan: Plan) -> set[str]:
    """The files in the folder of parts."""
    return {entry.path for entry in storage.list_files(plan.parts_uri)} if storage.exists(plan.parts_uri) else set()


def read_part(plan: Plan, name: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part, or of a large image: what the writer left of each sample, its row in the index, and what each
    measure has counted; the images that were skipped are in the metadata, as JSON."""
    data = storage.read_bytes(storage.join(plan.parts_uri, name), may_change=False)
    return pq.read_table(io.BytesIO(data), columns=columns)


# --- parts --------------------------------------------------------------------------------------------------------


def predict_share(plan: Plan, share: int) -> Iterator[int]:
    """Does some parts in turn; one is written while the next one is predicted. Yields how many images are done."""
    there = list_done(plan)  # the task may be a second try
    numbers = [number for number in plan.share(share) if part_name(number) not in there]
    step = plan.job.batch.per_worker
    pieces = [
        (number, rows[i : i + step], i + step >= len(rows))
        for number in numbers
        for rows in [plan.rows_of(number)]
        for i in range(0, len(rows), step)
    ]
    predictor = plan.predictor()
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        done: list[_Segmented | Failure] = []
        for batch in read_ahead(partial(_load, plan), pieces, 2):
            done += _segment(plan, predictor, batch)
            yield len(batch.items)
            if batch.ends_part:  # written before the next batch is asked for, which may be one that stops the job
                if writing is not None:
                    writing.result()
                writing = pool.submit(_write_part, plan, batch.part, part_name(batch.part), done)
                done = []
        if writing is not None:
            writing.result()


def _load(plan: Plan, piece: tuple[int, range, bool]) -> _Batch:
    number, rows, ends_part = piece
    return _Batch(number, list(_iter_opened(plan, rows, is_checked=False)), ends_part)


def _iter_opened(plan: Plan, rows: Sequence[int], *, is_checked: bool) -> Iterator[_Opened | Failure]:
    """Some rows of the index; a bad image raises InputError, or comes back as a Failure."""
    part = plan.index.take(np.array(rows, np.int64))
    for row, sample in zip(rows, read_samples(part) if plan.job.is_scored else read_images(part), strict=True):
        try:
            yield _open(plan, row, sample, is_checked=is_checked)
        except InputError as error:
            if not plan.index.source.is_skipping:
                raise
            yield Failure(sample.sample_id, str(error))


def _open(plan: Plan, row: int, sample: Sample | Failure, *, is_checked: bool) -> _Opened:
    """Large images stay encoded; unless that was checked before, all of it is decoded once, strip by strip."""
    if isinstance(sample, Failure):
        raise InputError(sample.reason)
    image: Pixels | Windowed
    truth = None
    if plan.job.is_scored:
        image, truth = open_pair(sample, plan.classes, plan.task)
    with masks.naming(sample):
        if sample.image is None:
            raise InputError("has no image")
        if truth is None:
            image = open_image(sample.image)
        if len(_blocks(plan, image)) == 1:
            image = image[:, :]
        elif not is_checked:
            for top in range(0, image.shape[0], _STRIP):
                image[top : top + _STRIP, :]
    return _Opened(row, sample, image, truth)


def _segment(plan: Plan, predictor: Predictor, batch: _Batch) -> Iterator[_Segmented | Failure]:
    """A batch's predictions; large images are marked and left out, where several workers can share them."""
    whole: list[_Opened] = []
    for item in batch.items:
        if isinstance(item, Failure):
            yield item
        elif plan.num_shares > 1 and len(_blocks(plan, item.image)) > 1:
            storage.write_bytes(storage.join(plan.parts_uri, marker_name(item.row)), b"")
        else:
            whole.append(item)
    for item, view in zip(whole, predictor.predict([item.image for item in whole]), strict=True):
        yield _to_segmented(plan, item, view)


def _to_segmented(plan: Plan, item: _Opened, view: View) -> _Segmented:
    record: tuple[bytes, ...] = ()
    if item.truth is not None:
        metrics = Metrics(plan.task, plan.classes, plan.job.more_metrics)
        metrics.update(item.sample.sample_id, view, item.truth)
        record = metrics.state()[item.sample.sample_id]
    sample_id, image, output = item.sample.sample_id, item.sample.image, plan.job.output.format
    assert image is not None, "what was opened has one"
    name = f"{sample_id}{_suffix(plan, item.row) or suffix_of(image)}"
    if output == "coco" and isinstance(view, LabelMap):
        view = masks.to_regions(view)
    kept = image if output == "shards" else None
    return _Segmented(item.row, masks.to_sample(sample_id, view, plan.classes, kept), name, record)


def _suffix(plan: Plan, row: int) -> str:
    """Of the image's file, where it is one by itself."""
    references = plan.index.references
    return PurePosixPath(references["image"][row].as_py()).suffix if "image" in references.column_names else ""


def _write_part(plan: Plan, number: int, name: str, items: Sequence[_Segmented | Failure]) -> None:
    """Writes predictions, and then their rows, which declare them done."""
    output, done = plan.job.output, [item for item in items if isinstance(item, _Segmented)]
    written = WRITERS[output.format].write_part(
        output.uri,
        number,
        [item.sample for item in done],
        plan.classes.at_rest,
        rows_per_group=output.rows_per_group,
        names=[item.name for item in done],
    )
    rows = written.rows.append_column("index_row", pa.array([item.row for item in done], pa.int64()))
    rows = rows.append_column("record", pa.array([item.record for item in done], pa.list_(pa.binary())))
    failures = [asdict(item) for item in items if isinstance(item, Failure)]
    sink = io.BytesIO()
    pq.write_table(rows.replace_schema_metadata({"failures": json.dumps(failures)}), sink)
    storage.write_bytes(storage.join(plan.parts_uri, name), sink.getvalue())


# --- large images -------------------------------------------------------------------------------------------------


def _blocks(plan: Plan, image: Pixels | Windowed) -> list[Block]:
    """The blocks that several workers share; one where an image is none of several rows or columns of them."""
    return plan.grid(image).blocks(_BLOCK_ROWS)


def predict_blocks(plan: Plan, share: int) -> Iterator[int]:
    """Does a share of the blocks of every large image."""
    there, predictor = list_done(plan), plan.predictor()
    for item in _iter_large(plan, plan.missing):
        blocks = _blocks(plan, item.image)
        for number in range(share, len(blocks), plan.num_shares):
            if (name := _block_name(item.row, number)) in there:
                continue
            parts = list(predictor.iter_labels(item.image, blocks[number]))
            top, left = parts[0].rows.start, parts[0].columns.start
            labels: IdMap = np.empty((parts[-1].rows.stop - top, parts[-1].columns.stop - left), plan.classes.dtype)
            for rows, columns, part in parts:
                labels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = part
            storage.write_bytes(storage.join(plan.parts_uri, name), masks.compress_id_map(labels))
            yield 1


def join_blocks(plan: Plan, share: int) -> Iterator[int]:
    """Puts some large images together, each a part of its own."""
    for item in _iter_large(plan, plan.share(share)):
        labels: IdMap = np.empty(item.image.shape[:2], plan.classes.dtype)
        grid = plan.grid(item.image)
        for number, block in enumerate(_blocks(plan, item.image)):
            data = storage.read_bytes(storage.join(plan.parts_uri, _block_name(item.row, number)), may_change=False)
            part = masks.decode_id_map(data)
            top, left = grid.tops[block.rows.start], grid.lefts[block.columns.start]
            labels[top : top + part.shape[0], left : left + part.shape[1]] = part
        segmented = _to_segmented(plan, item, LabelMap(labels, plan.classes.ignore))
        _write_part(plan, plan.num_parts + item.row, large_name(item.row), [segmented])
        yield 1


def _iter_large(plan: Plan, rows: Sequence[int]) -> Iterator[_Opened]:
    for row in rows:
        for item in _iter_opened(plan, [row], is_checked=True):
            if isinstance(item, Failure):
                raise InputError(f"{item.reason}; it could be read a while ago: run the job again")
            yield item
