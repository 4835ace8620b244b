"""What a train job reads before it trains: its splits, looked at and counted, and the plan that follows from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysseg.config import Scaling, TrainJob
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.batches import iter_pairs
from raysseg.data.index import Failure, SampleIndex
from raysseg.data.sampling import Factors, Presence, num_positions, repeat_factors
from raysseg.losses import ClassPixels, balance, count_pixels, count_regions
from raysseg.masks import BINARY_MEND, MaskSet, SegmentMap, to_dense, to_view
from raysseg.metrics import Metrics
from raysseg.runtime import spread
from raysseg.schema import ClassMap, InputError, Task
from raysseg.worker import Plan

_LOOK = 8  # samples of each split that are decoded before anything is started
_COUNT = 2000  # masks of a split that are counted in this process, and at most unless balancing needs all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a train job's data hold.

    Attributes:
        classes: the class list.
        splits: train and val.
        counts: pixels by class of each split; of an even choice of its masks, where they are many.
        presence: (N, C), which classes each counted training sample holds.
        balance: by what class weights go: pixels, or instances and segments where the task is not semantic; of all
            training samples, if classes are balanced.
    """

    classes: ClassMap
    splits: dict[str, SampleIndex]
    counts: dict[str, ClassPixels]
    presence: Presence
    balance: ClassPixels


def read_inputs(job: TrainJob, *, is_balanced: bool = False) -> Inputs:
    """Reads the splits' indexes, decodes a few samples and counts the masks.

    Args:
        job: see TrainJob.
        is_balanced: classes will be balanced, even if this job's own settings don't say so.

    Raises:
        InputError: the data can't be used.
        StorageError: a source can't be reached.
    """
    classes = read_class_map(job.classes, job.data.train)
    _check_metrics(job, classes)
    splits = {"train": read_index(job.data.train), "val": read_index(job.data.val)}
    for split, index in splits.items():
        _look_at(split, index, classes, job.task)
    is_balanced |= isinstance(job.loss.class_weights, str) or job.data.oversample is not None
    train, presence = _count(job, "train", splits["train"], classes, is_whole=is_balanced)
    val, _ = _count(job, "val", splits["val"], classes, is_whole=False)
    counts = train
    if is_balanced and job.task != "semantic":
        counts = _count_regions(job, splits["train"], classes)
    return Inputs(classes, splits, {"train": train, "val": val}, presence, counts)


def build_plan(job: TrainJob, inputs: Inputs) -> Plan:
    """What the workers of a job need; its data are those that the inputs were read from.

    Raises:
        InputError: the class weights don't fit the class list.
    """
    splits, counts = inputs.splits, inputs.counts
    fingerprint = {
        split: {"samples": len(index), "hash": index.fingerprint, "pixels": counts[split].pixels.tolist()}
        for split, index in splits.items()
    }
    _warn_of_readers(job, splits["train"])
    weights = _class_weights(job, inputs.balance, inputs.classes)
    factors = _repeat_factors(job, splits["train"], inputs.presence)
    return Plan(job, inputs.classes, splits["train"], splits["val"], weights, fingerprint, factors)


def _warn_of_readers(job: TrainJob, train: SampleIndex) -> None:
    """Says so where several workers read a row group of shards, each for a few of its samples."""
    workers, open_groups = job.scaling.max_workers, job.data.open_shards
    readers = workers // math.gcd(workers, open_groups) if workers else 1
    if readers > 1 and train.groups[-1] + 1 < len(train):
        logger.warning(
            "data.open_shards: %d row groups are open at once, of which %d workers read each one %d times over; with "
            "data.open_shards=%d, or another multiple of the workers, it is read once. It is part of the samples' "
            "order: set it before the run's first step",
            open_groups,
            workers,
            readers,
            -(-open_groups // workers) * workers,
        )


def known_metrics(job: TrainJob, classes: ClassMap) -> list[str]:
    """The names that each epoch's row of metrics has, of those that tell how good a model is."""
    return ["train/loss", *(f"val/{name}" for name in Metrics(job.task, classes, job.metrics).compute())]


def _check_metrics(job: TrainJob, classes: ClassMap) -> None:
    known = known_metrics(job, classes)
    asked = {"checkpoint.metric": job.checkpoint.metric}
    if job.schedule.early_stopping is not None and job.schedule.early_stopping.metric is not None:
        asked["schedule.early_stopping.metric"] = job.schedule.early_stopping.metric
    for key, metric in asked.items():
        if metric not in known:
            raise InputError(f"{key}: received {metric!r}; allowed: {', '.join(known)}")


def _look_at(split: str, index: SampleIndex, classes: ClassMap, task: Task) -> None:
    """Decodes a few samples, so that what is wrong with all of them shows before a cluster starts."""
    try:
        for _ in iter_pairs(index.thinned(_LOOK), classes, task, rows=1):
            pass
    except InputError as error:
        raise InputError(f"data.{split}: {error}") from error
    logger.info("data.%s: %d samples", split, len(index))


def _count(
    job: TrainJob, split: str, index: SampleIndex, classes: ClassMap, *, is_whole: bool
) -> tuple[ClassPixels, Presence]:
    """Pixels by class, and classes by sample: of all masks, or of an even choice."""
    if not is_whole:
        index = index.thinned(_COUNT)
    scaling = job.scaling if len(index) > _COUNT else Scaling(workers=0)
    pieces = np.array_split(np.arange(len(index)), max(1, len(index) // 256))
    parts = spread(_count_rows, (index, classes), pieces, scaling)
    total, presence = ClassPixels.none(len(classes)), np.zeros((len(index), len(classes)), np.bool_)
    for rows, pixels, is_present in parts:
        total += pixels
        presence[rows] = is_present
    if (
        job.task == "semantic"
        and len(classes) == 2
        and total.pixels[1] == 0
        and total.ignored
        and classes.ignore_index == 255
    ):
        raise InputError(
            f"data.{split}: no mask holds the class {classes.names[1]!r} (id {classes.ids[1]}), but {total.ignored} "
            f"pixels are 255, which is the ignore_index: the whole foreground would be ignored. {BINARY_MEND}"
        )
    if not total.pixels.any():
        raise InputError(
            f"data.{split}: no mask holds a labelled pixel; check the class list's ids and its ignore_index"
        )
    return total, presence


def _count_rows(
    shared: tuple[SampleIndex, ClassMap], rows: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], ClassPixels, Presence]]:
    """Counts some rows of an index; what can't be used holds no class."""
    index, classes = shared
    total, presence = ClassPixels.none(len(classes)), np.zeros((len(rows), len(classes)), np.bool_)
    for i, sample in enumerate(read_samples(index.take(rows), with_images=False)):
        try:
            if isinstance(sample, Failure):
                raise InputError(sample.reason)
            counts = count_pixels(to_dense(sample, classes).labels, len(classes))
        except InputError:
            if not index.source.is_skipping:
                raise
        else:
            total += counts
            presence[i] = counts.images > 0
    yield rows, total, presence


def _repeat_factors(job: TrainJob, index: SampleIndex, presence: Presence) -> Factors | None:
    if job.data.oversample is None:
        return None
    factors = repeat_factors(presence, job.data.oversample)
    total = num_positions(index, factors)
    if total == len(index):
        logger.warning(
            "data.oversample: %g has no effect: no class is rarer among the images by enough to repeat one; "
            "data.augment.class_crop and loss.class_weights go by pixels",
            job.data.oversample,
        )
        return None
    logger.info(
        "oversampling: %d positions an epoch of %d samples; the rarest come %.3g times",
        total,
        len(index),
        factors.max(),
    )
    return factors


def _class_weights(job: TrainJob, counts: ClassPixels, classes: ClassMap) -> tuple[float, ...] | None:
    given = job.loss.class_weights
    if given is None:
        return None
    if isinstance(given, str):
        weights = tuple(balance(given, counts, job.loss.effective_beta).tolist())
    elif len(given) != len(classes):
        raise InputError(
            f"loss.class_weights: received {len(given)} weights for {len(classes)} classes; "
            f"give one each, in this order: {', '.join(classes.names)}"
        )
    else:
        weights = given
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(classes.names, weights, strict=True))
    logger.info("class weights: %s", shown)
    return weights


def _count_regions(job: TrainJob, index: SampleIndex, classes: ClassMap) -> ClassPixels:
    """Instances, or segments, by class."""
    pieces = np.array_split(np.arange(len(index)), max(1, len(index) // 256))
    scaling = job.scaling if len(index) > _COUNT else Scaling(workers=0)
    parts = spread(_count_regions_of_rows, (index, classes, job.task), pieces, scaling)
    return sum(parts, ClassPixels.none(len(classes)))


def _count_regions_of_rows(
    shared: tuple[SampleIndex, ClassMap, Task], rows: npt.NDArray[np.int64]
) -> Iterator[ClassPixels]:
    index, classes, task = shared
    for sample in read_samples(index.take(rows), with_images=False):
        try:
            view = to_view(sample, classes, task) if not isinstance(sample, Failure) else None
        except InputError:
            continue  # told, or skipped, where all is counted
        if isinstance(view, MaskSet | SegmentMap):
            yield count_regions(view.class_ids[~view.is_crowd], len(classes))
