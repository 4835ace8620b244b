"""An epoch's bundle over the validation split, as the run's own metrics."""

from __future__ import annotations

from raysseg import standing
from raysseg.config import Batch, EvaluateJob, Scaling
from raysseg.evaluate import score
from raysseg.worker import Plan


def validate_bundle(plan: Plan, step: int, scaling: Scaling) -> dict[str, float]:
    """Scores the bundle of a step, and leaves the numbers where the run finds them."""
    found = score(evaluation_of(plan, standing.bundle_uri(plan.job, step), scaling), plan.classes)
    metrics = {f"val/{name}": value for name, value in found.items()}
    standing.write_validation(plan.job, step, metrics)
    return metrics


def evaluation_of(plan: Plan, bundle_uri: str, scaling: Scaling) -> EvaluateJob:
    """The job that scores a bundle over the validation split."""
    job = plan.job
    return EvaluateJob(
        kind="evaluate",
        name=job.name,
        task=job.task,
        data=job.data.val,
        bundle=bundle_uri,
        metrics=job.metrics,
        inference=job.inference,
        batch=Batch(global_size=job.batch.global_size, per_worker=standing.per_worker(job)),
        precision=job.precision,
        scaling=scaling,
    )
