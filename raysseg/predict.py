"""A bundle's predictions over a data set, spread over the cluster, as a data set again.

The index is cut into parts of whole batches. A part's predictions are written as soon as they are made, and its rows,
with what the end needs of them, last: a run that was broken off goes on with the parts that are missing. Images of
several blocks of tiles are left for later where there are several workers, which then share the blocks of each.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysseg import bundle as bundles
from raysseg import masks, storage
from raysseg.catalogue import METRICS
from raysseg.config import OUTPUTS, PredictJob
from raysseg.data import WRITERS, coco, read_images, read_index, read_samples
from raysseg.data.augment import Windowed
from raysseg.data.batches import read_ahead
from raysseg.data.decode import Pixels, open_image, open_pair
from raysseg.data.files import suffix_of
from raysseg.data.index import Failure, SampleIndex, write_failures
from raysseg.masks import IdMap, LabelMap, View
from raysseg.metrics import Metrics
from raysseg.predictor import Predictor, kept_predictor, resolve_inference
from raysseg.runtime import num_shares, spread
from raysseg.schema import ClassMap, InputError, Sample, Task
from raysseg.tiling import Block, Grid

logger = logging.getLogger(__name__)

MANIFEST = "predict.json"
_PARTS = "parts"  # folder of what is done so far; gone in the end
_BLOCK_ROWS = 8  # cells of a block from top to bottom
_STRIP = 512  # rows of a large image that are decoded at a time


@dataclass(frozen=True)
class PredictResult:
    """What `raysseg predict` prints.

    Attributes:
        name: of the job.
        metrics: by name, where the job asks for them.
        absent: classes without ground truth, which the means leave out.
        num_samples: images with predictions.
        skipped: images without; skipped.json lists them.
        bundle: what predicted.
        format: of the output.
        output: its folder.
    """

    name: str
    metrics: dict[str, float]
    absent: list[str]
    num_samples: int
    skipped: int
    bundle: str
    format: str
    output: str


@dataclass(frozen=True)
class _Plan:
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
        rows = self.job.batch.per_worker
        return -(-self.job.output.rows_per_file // rows) * rows

    @property
    def num_parts(self) -> int:
        return -(-len(self.index) // self.rows_per_part)

    @property
    def num_shares(self) -> int:
        return num_shares(self.job.scaling)

    @cached_property
    def parts_uri(self) -> str:
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return storage.join(self.job.output.uri, _PARTS, digest[:16])

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


class _Segmented(NamedTuple):
    """A prediction, the name of its image, and what each measure has counted."""

    row: int
    sample: Sample
    name: str
    record: tuple[bytes, ...]


def predict(job: PredictJob) -> PredictResult:
    """Runs a predict job: writes predictions with the ids of the bundle's classes, and scores them where asked to.

    A job that was broken off goes on where it stopped; one that is finished is not done again.

    Raises:
        InputError: an image can't be used and the source does not skip, the bundle's task does not suit the output, or
            the output's folder holds something else.
        StorageError: bundle, data or output can't be reached.
    """
    plan = _plan(job)
    result = _begin(plan)
    if result is None:
        _predict_parts(plan)
        _predict_large(plan)
        result = _finish(plan)
    storage.delete_folder(storage.join(job.output.uri, _PARTS))
    return replace(result, name=job.name)


def _plan(job: PredictJob) -> _Plan:
    bundle = bundles.read(job.bundle)
    if job.output.format not in (allowed := OUTPUTS[bundle.task]):
        raise InputError(
            f"output.format: received {job.output.format!r}; allowed where a bundle segments for {bundle.task!r}: "
            f"{', '.join(allowed)}"
        )
    if surplus := [name for name in job.more_metrics if name not in METRICS[bundle.task]]:
        raise InputError(
            f"metrics: {surplus[0]} is none of {bundle.task} segmentation; allowed: {', '.join(METRICS[bundle.task])}"
        )
    job = job.model_copy(update={"inference": resolve_inference(bundle, job.inference)})
    index = read_index(job.source)
    settings = {
        "bundle": bundles.identify(job.bundle),
        "data": job.source.model_dump(mode="json", exclude={"on_error"}),
        "samples": f"{len(index)} {index.fingerprint}",
        "output": job.output.model_dump(mode="json", exclude={"uri"}),
        "inference": job.inference.model_dump(mode="json"),
        "precision": job.precision,
        "batch.per_worker": job.batch.per_worker,
        "metrics": job.model_dump(mode="json")["metrics"],
    }
    return _Plan(job, bundle.task, bundle.classes, index, settings)


# --- the folder ---------------------------------------------------------------------------------------------------


def _begin(plan: _Plan) -> PredictResult | None:
    """Takes up the output's folder; the result of a run that is finished already."""
    folder = plan.job.output.uri
    uri = storage.join(folder, MANIFEST)
    if storage.exists(uri):
        content = json.loads(storage.read_text(uri))
        if differing := [key for key in plan.settings if content["settings"].get(key) != plan.settings[key]]:
            raise InputError(
                f"output.uri: {folder} holds predictions of the job {content['name']!r} with another "
                f"{' and another '.join(differing)} (its bundle: {content['bundle']}; {MANIFEST} says all); name "
                "another folder, or delete this one to begin anew"
            )
        return PredictResult(**content["result"]) if content["result"] is not None else None
    if storage.exists(folder) and storage.list_files(folder):
        raise InputError(
            f"output.uri: {folder} holds files that are no predictions of ours; name a folder of their own"
        )
    _write_manifest(plan, None)
    return None


def _write_manifest(plan: _Plan, result: PredictResult | None) -> None:
    content = {
        "version": 1,
        "name": plan.job.name,
        "bundle": plan.job.bundle,
        "settings": plan.settings,
        "result": asdict(result) if result is not None else None,
    }
    storage.write_text(storage.join(plan.job.output.uri, MANIFEST), json.dumps(content, indent=2))


def _part_name(number: int) -> str:
    return f"{number:08d}.parquet"


def _large_name(row: int) -> str:
    return f"large-{row:08d}.parquet"


def _marker_name(row: int) -> str:
    return f"large-{row:08d}.waits"


def _block_name(row: int, number: int) -> str:
    return f"large-{row:08d}-{number:06d}.block"


def _list(plan: _Plan) -> set[str]:
    """What there is in the folder of parts."""
    return {entry.path for entry in storage.list_files(plan.parts_uri)} if storage.exists(plan.parts_uri) else set()


# --- parts --------------------------------------------------------------------------------------------------------


def _predict_parts(plan: _Plan) -> None:
    there = _list(plan)
    missing = [number for number in range(plan.num_parts) if _part_name(number) not in there]
    if len(missing) < plan.num_parts:
        logger.info("predict: %d of %d parts are there already", plan.num_parts - len(missing), plan.num_parts)
    if not missing:
        return
    plan = replace(plan, missing=missing)
    num_rows = sum(len(plan.rows_of(number)) for number in missing)
    _follow(
        "images", num_rows, spread(_predict_share, plan, range(min(plan.num_shares, len(missing))), plan.job.scaling)
    )


def _follow(what: str, total: int, counts: Iterator[int]) -> None:
    """Tells how far the work has come, by the counts that it yields."""
    done, started, reported = 0, time.monotonic(), time.monotonic()
    for count in counts:
        done += count
        now = time.monotonic()
        if now - reported > 5 or done == total:
            reported = now
            logger.info("predict: %d of %d %s, %.1f a second", done, total, what, done / max(now - started, 1e-9))


def _predict_share(plan: _Plan, share: int) -> Iterator[int]:
    """Does some parts in turn; one is written while the next one is predicted. Yields how many images are done."""
    there = _list(plan)  # the task may be a second try
    numbers = [number for number in plan.share(share) if _part_name(number) not in there]
    step = plan.job.batch.per_worker
    pieces = [
        (number, rows[i : i + step])
        for number in numbers
        for rows in [plan.rows_of(number)]
        for i in range(0, len(rows), step)
    ]
    predictor = plan.predictor()
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for number, batches in groupby(read_ahead(partial(_load, plan), pieces, 2), attrgetter("part")):
            done: list[_Segmented | Failure] = []
            for batch in batches:
                done += _segment(plan, predictor, batch)
                yield len(batch.items)
            if writing is not None:
                writing.result()
            writing = pool.submit(_write_part, plan, number, _part_name(number), done)
        if writing is not None:
            writing.result()


def _load(plan: _Plan, piece: tuple[int, range]) -> _Batch:
    number, rows = piece
    return _Batch(number, list(_iter_opened(plan, rows)))


def _iter_opened(plan: _Plan, rows: Sequence[int]) -> Iterator[_Opened | Failure]:
    """Some rows of the index; a bad image raises InputError, or comes back as a Failure."""
    part = plan.index.take(np.array(rows, np.int64))
    for row, sample in zip(rows, read_samples(part) if plan.job.is_scored else read_images(part), strict=True):
        try:
            yield _open(plan, row, sample)
        except InputError as error:
            if not plan.index.source.is_skipping:
                raise
            yield Failure(sample.sample_id, str(error))


def _open(plan: _Plan, row: int, sample: Sample | Failure) -> _Opened:
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
        else:  # whether all of it can be decoded
            for top in range(0, image.shape[0], _STRIP):
                image[top : top + _STRIP, :]
    return _Opened(row, sample, image, truth)


def _segment(plan: _Plan, predictor: Predictor, batch: _Batch) -> Iterator[_Segmented | Failure]:
    """A batch's predictions; large images are marked and left out, where several workers can share them."""
    whole: list[_Opened] = []
    for item in batch.items:
        if isinstance(item, Failure):
            yield item
        elif plan.num_shares > 1 and len(_blocks(plan, item.image)) > 1:
            storage.write_bytes(storage.join(plan.parts_uri, _marker_name(item.row)), b"")
        else:
            whole.append(item)
    for item, view in zip(whole, predictor.predict([item.image for item in whole]), strict=True):
        yield _to_segmented(plan, item, view)


def _to_segmented(plan: _Plan, item: _Opened, view: View) -> _Segmented:
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


def _suffix(plan: _Plan, row: int) -> str:
    """Of the image's file, where it is one by itself."""
    references = plan.index.references
    return PurePosixPath(references["image"][row].as_py()).suffix if "image" in references.column_names else ""


def _write_part(plan: _Plan, number: int, name: str, items: Sequence[_Segmented | Failure]) -> None:
    """Writes predictions, and then their rows, which declare them done."""
    output, done = plan.job.output, [item for item in items if isinstance(item, _Segmented)]
    rows = (
        WRITERS[output.format]
        .write_part(
            output.uri,
            number,
            [item.sample for item in done],
            plan.classes.at_rest,
            rows_per_group=output.rows_per_group,
            names=[item.name for item in done],
        )
        .rows
    )
    rows = rows.append_column("index_row", pa.array([item.row for item in done], pa.int64()))
    rows = rows.append_column("record", pa.array([item.record for item in done], pa.list_(pa.binary())))
    failures = [asdict(item) for item in items if isinstance(item, Failure)]
    sink = io.BytesIO()
    pq.write_table(rows.replace_schema_metadata({"failures": json.dumps(failures)}), sink)
    storage.write_bytes(storage.join(plan.parts_uri, name), sink.getvalue())


# --- large images -------------------------------------------------------------------------------------------------


def _blocks(plan: _Plan, image: Pixels | Windowed) -> list[Block]:
    """The blocks that several workers share; one where an image is none of several rows or columns of them."""
    return plan.grid(image).blocks(_BLOCK_ROWS)


def _predict_large(plan: _Plan) -> None:
    """Does the images that the parts have left out, block by block."""
    there = _list(plan)
    rows = [row for row in range(len(plan.index)) if _marker_name(row) in there and _large_name(row) not in there]
    if not rows:
        return
    logger.info("predict: %d large images are shared by the workers", len(rows))
    plan = replace(plan, missing=rows)
    shares = range(plan.num_shares)
    for _ in spread(_predict_blocks, plan, shares, plan.job.scaling):
        pass
    _follow("large images", len(rows), spread(_join_blocks, plan, shares, plan.job.scaling))


def _predict_blocks(plan: _Plan, share: int) -> Iterator[int]:
    """Does a share of the blocks of every large image."""
    there, predictor = _list(plan), plan.predictor()
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


def _join_blocks(plan: _Plan, share: int) -> Iterator[int]:
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
        _write_part(plan, plan.num_parts + item.row, _large_name(item.row), [segmented])
        yield 1


def _iter_large(plan: _Plan, rows: Sequence[int]) -> Iterator[_Opened]:
    for row in rows:
        for item in _iter_opened(plan, [row]):
            if isinstance(item, Failure):
                raise InputError(f"{item.reason}; it could be read a while ago: run the job again")
            yield item


# --- the end ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The rows of all parts, read one by one whenever they are gone through; with image ids where there are some."""

    plan: _Plan
    names: list[str]
    image_ids: list[int]

    def __iter__(self) -> Iterator[pa.Table]:
        start = 0
        for name in self.names:
            rows = _read_part(self.plan, name)
            image_ids = self.image_ids[start : start + len(rows)]
            start += len(rows)
            rows = rows.drop_columns(["index_row", "record"]).replace_schema_metadata()
            is_coco = "annotations" in rows.column_names
            yield rows.append_column("image_id", pa.array(image_ids, pa.int64())) if is_coco else rows


def _read_part(plan: _Plan, name: str, columns: list[str] | None = None) -> pa.Table:
    data = storage.read_bytes(storage.join(plan.parts_uri, name), may_change=False)
    return pq.read_table(io.BytesIO(data), columns=columns)


def _finish(plan: _Plan) -> PredictResult:
    """Writes what stands once, and the result last."""
    names = sorted(name for name in _list(plan) if name.endswith(".parquet"))
    metrics = Metrics(plan.task, plan.classes, plan.job.more_metrics)
    sample_ids: list[str] = []
    rows: list[int] = []
    failures = list(plan.index.failures)
    for name in names:
        part = _read_part(plan, name, ["sample_id", "index_row", "record"])
        found: list[str] = part["sample_id"].to_pylist()
        if plan.job.is_scored:
            metrics.merge(dict(zip(found, map(tuple, part["record"].to_pylist()), strict=True)))
        sample_ids += found
        rows += part["index_row"].to_pylist()
        failures += [Failure(**entry) for entry in json.loads(part.schema.metadata[b"failures"])]
    if not rows:
        raise InputError(f"data: none of the {len(failures)} images can be used, such as {failures[0].reason}")
    references, output = plan.index.references, plan.job.output
    has_ids = "image_id" in references.column_names
    image_ids = references["image_id"].take(pa.array(rows)).to_pylist() if has_ids else coco.to_image_ids(sample_ids)
    parts = _Parts(plan, names, image_ids)
    write_failures(output.uri, {"data": failures})
    WRITERS[output.format].finish(output.uri, parts, plan.classes.at_rest)
    if output.format == "coco":
        coco.write_results(output.uri, parts)
    result = PredictResult(
        plan.job.name,
        metrics.compute(plan.index.ranking) if plan.job.is_scored else {},
        metrics.absent() if plan.job.is_scored else [],
        len(rows),
        len(failures),
        plan.job.bundle,
        output.format,
        output.uri,
    )
    _write_manifest(plan, result)
    return result
