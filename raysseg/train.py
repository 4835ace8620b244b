"""A train job, whole: look at the data, train on Ray or in this process, publish the best bundle, draw the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysseg import bundle as bundles
from raysseg import report, standing, storage
from raysseg.config import Scaling, TrainJob
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.batches import iter_chunks, iter_pairs
from raysseg.data.index import Failure, SampleIndex, update_failures
from raysseg.data.sampling import Factors, Presence, num_positions, repeat_factors
from raysseg.evaluate import Evaluation, describe_failures, measure
from raysseg.link import Alone, signals_noted
from raysseg.losses import ClassPixels, balance, count_pixels, count_regions
from raysseg.masks import BINARY_MEND, MaskSet, SegmentMap, to_dense, to_view
from raysseg.metrics import Metrics
from raysseg.runtime import spread
from raysseg.schema import ClassMap, InputError, RunStopped, Task
from raysseg.trackers import check_trackers
from raysseg.validation import evaluation_of, validate_bundle
from raysseg.worker import Plan, train_epochs

logger = logging.getLogger(__name__)

_LOOK = 8  # samples of each split that are decoded before anything is started
_COUNT = 2000  # masks of a split that are counted in this process, and at most unless balancing needs all
_EVALUATE = 100  # validation samples that are not worth starting workers for once more
_MOVABLE = (  # may change when a run goes on
    *("scaling", "s3", "checkpoint", "validation", "compile", "channels_last", "on_nonfinite", "trackers"),
    *("batch.per_worker", "schedule.early_stopping"),
)


@dataclass(frozen=True)
class TrainResult:
    """What `raysseg train` prints."""

    name: str
    metrics: dict[str, float]
    run: str
    bundle: str
    report: str


def train(job: TrainJob) -> TrainResult:
    """Runs a train job; the same job again goes on where the run stopped.

    Raises:
        InputError: the data or the weights can't be used, or the run exists with other settings.
        StorageError: a source or the storage can't be reached.
        RunStopped: SIGTERM or Ctrl-C ended the run, which is saved.
    """
    classes = read_class_map(job.classes, job.data.train)
    _check_metric(job, classes)
    check_trackers(job)
    splits = {"train": read_index(job.data.train), "val": read_index(job.data.val)}
    for split, index in splits.items():
        _look_at(split, index, classes, job.task)
    counted = {split: _count(job, split, index, classes) for split, index in splits.items()}
    counts = {split: pixels for split, (pixels, _) in counted.items()}
    _open_run(job)
    fingerprint = {
        split: {"samples": len(index), "hash": index.fingerprint, "pixels": counts[split].pixels.tolist()}
        for split, index in splits.items()
    }
    weights = _class_weights(job, splits["train"], counts["train"], classes)
    factors = _repeat_factors(job, splits["train"], counted["train"][1])
    plan = Plan(job, classes, splits["train"], splits["val"], weights, fingerprint, factors)
    if _unfinished(job):
        _train(plan)
    return _finish(plan, counts)


# --- before ---------------------------------------------------------------------------------------------------------


def _check_metric(job: TrainJob, classes: ClassMap) -> None:
    known = ["train/loss", *(f"val/{name}" for name in Metrics(job.task, classes, job.metrics).compute())]
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


def _count(job: TrainJob, split: str, index: SampleIndex, classes: ClassMap) -> tuple[ClassPixels, Presence]:
    """Pixels by class, and classes by sample: of all masks where balancing needs them, else of an even choice."""
    is_balanced = isinstance(job.loss.class_weights, str) or job.data.oversample is not None
    if split == "val" or not is_balanced:
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


def _class_weights(
    job: TrainJob, index: SampleIndex, pixels: ClassPixels, classes: ClassMap
) -> tuple[float, ...] | None:
    given = job.loss.class_weights
    if given is None:
        return None
    if isinstance(given, str):
        counts = pixels if job.task == "semantic" else _count_regions(job, index, classes)
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


def _open_run(job: TrainJob) -> None:
    """Writes job.json, or checks that the run which is there is this one."""
    uri = storage.join(job.run_uri, "job.json")
    now = job.model_dump(mode="json")
    if storage.exists(uri):
        before = json.loads(storage.read_text(uri))
        moved = sorted(_differences(_fixed(before), _fixed(now)))
        if moved:
            raise InputError(
                f"{job.run_uri}: this run exists with other settings: {'; '.join(moved[:5])}. Give the job another "
                "name, set these back to go on with the run, or delete its folder"
            )
    storage.write_text(uri, json.dumps(now, indent=2))


def _fixed(job: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The keys that a run keeps for good."""
    parts = {key: _fixed(value, f"{path}{key}.") if isinstance(value, dict) else value for key, value in job.items()}
    return {key: value for key, value in parts.items() if f"{path}{key}" not in _MOVABLE}


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield f"{path} was {json.dumps(before)}, now {json.dumps(now)}"


def _unfinished(job: TrainJob) -> bool:
    if storage.exists(storage.join(job.run_uri, "bundle", bundles.MANIFEST)):
        logger.info("%s is finished already; its bundle stands", job.run_uri)
        return False
    return True


# --- training -----------------------------------------------------------------------------------------------------


def _train(plan: Plan) -> None:
    """All epochs, here or on Ray; RunStopped where a signal asked to end, even if it came after the last step."""
    if plan.job.scaling.in_process:
        received = _train_here(plan)
    else:
        from raysseg.trainer import train_on_ray

        received = train_on_ray(plan)
    if received is not None:
        raise RunStopped(f"{plan.job.run_uri} is saved; the same command goes on from there", received)


def _train_here(plan: Plan) -> int | None:
    """All epochs in this process, without Ray; returns the signal that asked to end, if there was one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with signals_noted() as signals:
        try:
            list(train_epochs(plan, iter_chunks, device, Alone(signals)))
            return signals.received
        except torch.OutOfMemoryError:
            pass  # what the first attempt held is freed only outside of this block
        list(train_epochs(plan, iter_chunks, device, Alone(signals)))
    return signals.received


# --- after --------------------------------------------------------------------------------------------------------


def _finish(plan: Plan, counts: dict[str, ClassPixels]) -> TrainResult:
    """Publishes the best bundle as <run>/bundle, evaluates it once more, and draws the report."""
    job = plan.job
    bundle_uri = storage.join(job.run_uri, "bundle")
    scaling = job.scaling if len(plan.val) > _EVALUATE else Scaling(workers=0)
    history = _whole_history(plan, scaling)
    best = json.loads(storage.read_text(storage.join(job.run_uri, "best.json")))
    if not storage.exists(storage.join(bundle_uri, bundles.MANIFEST)):
        (row,) = (row for row in history if row["step"] == best["step"])
        bundles.copy(storage.join(job.run_uri, best["bundle"]), bundle_uri, row)
    evaluation = measure(evaluation_of(plan, bundle_uri, scaling), plan.classes)
    update_failures(job.run_uri, "val", evaluation.failures)
    report_uri = storage.join(job.run_uri, "report.html")
    storage.write_text(report_uri, report.render(_report_page(plan, counts, evaluation, history, best)))
    metrics = {f"val/{name}": value for name, value in evaluation.metrics.items()}
    return TrainResult(job.name, metrics, job.run_uri, bundle_uri, report_uri)


def _whole_history(plan: Plan, scaling: Scaling) -> standing.History:
    """The run's rows, every epoch validated: those that were cut off are validated now."""
    job = plan.job
    history = standing.read_history(job)
    for step in standing.not_validated(history):
        if storage.exists(storage.join(standing.bundle_uri(job, step), bundles.MANIFEST)):
            logger.info("step %d: its validation was cut off; it is done now", step)
            validate_bundle(plan, step, scaling)
    history = standing.with_validations(job, history)
    standing.settle(job, history)
    return history


def _report_page(
    plan: Plan,
    counts: dict[str, ClassPixels],
    evaluation: Evaluation,
    history: standing.History,
    best: dict[str, Any],
) -> report.ReportPage:
    job = plan.job
    sizes = {"train": len(plan.train), "val": len(plan.val)}
    facts = {
        "best epoch": str(next(int(row["epoch"]) + 1 for row in history if row["step"] == best["step"])),
        "model": f"{job.model.name}, {job.model.weights or 'from scratch'}",
        "images per second": f"{history[-1]['train/images_per_s']:.1f} in training",
        "workers": str(job.scaling.workers),
        "raysseg": bundles.installed_versions()["raysseg"],
    }
    return report.ReportPage(
        title=job.name,
        task=job.task,
        classes=plan.classes,
        job=job.model_dump(mode="json"),
        metrics=evaluation.metrics,
        absent=evaluation.absent,
        confusion=evaluation.confusion,
        history=[{**row, "epoch": row["epoch"] + 1} for row in history],  # people count from 1
        splits=[
            report.SplitCounts(split, sizes[split], count.pixels, count.ignored) for split, count in counts.items()
        ],
        examples=evaluation.examples,
        facts=facts,
        notes=describe_failures(evaluation.failures),
    )
