"""A train job, whole: look at the data, train on Ray or in this process, publish the best bundle, draw the report."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from raysseg import bundle as bundles
from raysseg import report, standing, storage
from raysseg.config import Scaling, TrainJob
from raysseg.data.batches import iter_chunks
from raysseg.data.index import update_failures
from raysseg.evaluate import Evaluation, describe_failures, measure
from raysseg.inputs import Inputs, build_plan, read_inputs
from raysseg.link import Alone, Signals, signals_noted
from raysseg.runtime import connect
from raysseg.saver import Saved
from raysseg.schema import RunStopped
from raysseg.trackers import check_trackers
from raysseg.validation import evaluation_of, validate_bundle
from raysseg.worker import Plan, train_epochs

_EVALUATE = 100  # validation samples that are not worth starting workers for once more

MOVABLE = (
    *("scaling", "s3", "checkpoint", "validation", "compile", "channels_last", "on_nonfinite", "trackers"),
    *("batch.per_worker", "schedule.early_stopping"),
)
"""Dotted paths that may change when a run goes on."""

logger = logging.getLogger(__name__)


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
    check_trackers(job)
    inputs = read_inputs(job)
    standing.open_run(job, MOVABLE)
    plan = build_plan(job, inputs)
    if storage.exists(storage.join(job.run_uri, "bundle", bundles.MANIFEST)):
        logger.info("%s is finished already; its bundle stands", job.run_uri)
    else:
        _train(plan)
    return publish(plan, inputs)


def _train(plan: Plan) -> None:
    """All epochs, here or on Ray; RunStopped where a signal asked to end, even if it came after the last step."""
    is_here = plan.job.scaling.in_process
    if not is_here:
        connect()  # before: starting Ray takes SIGTERM for itself
    with signals_noted() as signals:
        if is_here:
            list(iter_epochs_here(plan, signals))
        else:
            from raysseg.trainer import train_on_ray

            train_on_ray(plan, signals)
    if signals.received is not None:
        raise RunStopped(f"{plan.job.run_uri} is saved; the same command goes on from there", signals.received)


def iter_epochs_here(plan: Plan, signals: Signals) -> Generator[Saved, None, None]:
    """Trains in this process, without Ray; yields each epoch once it is on storage."""
    has_gpu = torch.cuda.is_available() and plan.job.scaling.gpus_per_worker != 0
    device = torch.device("cuda" if has_gpu else "cpu")
    try:
        yield from train_epochs(plan, iter_chunks, device, Alone(signals))
        return
    except torch.OutOfMemoryError:
        pass  # what the first attempt held is freed only outside of this block
    yield from train_epochs(plan, iter_chunks, device, Alone(signals))


def publish(plan: Plan, inputs: Inputs) -> TrainResult:
    """Publishes a trained run's best bundle as <run>/bundle, evaluates it once more, and draws the report."""
    job = plan.job
    bundle_uri = storage.join(job.run_uri, "bundle")
    scaling = job.scaling if len(plan.val) > _EVALUATE else Scaling(workers=0)
    history = _whole_history(plan, scaling)
    best = standing.read_best(job)
    if not storage.exists(storage.join(bundle_uri, bundles.MANIFEST)):
        (row,) = (row for row in history if row["step"] == best["step"])
        bundles.copy(storage.join(job.run_uri, best["bundle"]), bundle_uri, row)
    evaluation = measure(evaluation_of(plan, bundle_uri, scaling), plan.classes)
    update_failures(job.run_uri, "val", evaluation.failures)
    report_uri = storage.join(job.run_uri, "report.html")
    storage.write_text(report_uri, report.render(_report_page(plan, inputs, evaluation, history, best)))
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
    inputs: Inputs,
    evaluation: Evaluation,
    history: standing.History,
    best: dict[str, Any],
) -> report.ReportPage:
    job = plan.job
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
            report.SplitCounts(split, len(inputs.splits[split]), count.pixels, count.ignored)
            for split, count in inputs.counts.items()
        ],
        examples=evaluation.examples,
        facts=facts,
        notes=describe_failures(evaluation.failures),
    )
