"""A bundle's predictions over a data set, spread over the cluster, as a data set again.

The index is cut into parts, which workers finish one by one (see labelling): a run that was broken off goes on with
those that are missing. What stands once, such as an annotations file, is put together from them in the end.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from raysseg import bundle as bundles
from raysseg import storage
from raysseg.catalogue import METRICS
from raysseg.config import OUTPUTS, PredictJob
from raysseg.data import WRITERS, coco, read_index
from raysseg.data.index import Failure, write_failures
from raysseg.labelling import (
    PARTS,
    Plan,
    join_blocks,
    large_name,
    list_done,
    marker_name,
    part_name,
    predict_blocks,
    predict_share,
    read_part,
)
from raysseg.metrics import Metrics
from raysseg.predictor import resolve_inference
from raysseg.runtime import spread
from raysseg.schema import InputError

logger = logging.getLogger(__name__)

MANIFEST = "predict.json"


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
    storage.delete_folder(storage.join(job.output.uri, PARTS))
    return replace(result, name=job.name)


def _plan(job: PredictJob) -> Plan:
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
    return Plan(job, bundle.task, bundle.classes, index, settings)


# --- the folder ---------------------------------------------------------------------------------------------------


def _begin(plan: Plan) -> PredictResult | None:
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


def _write_manifest(plan: Plan, result: PredictResult | None) -> None:
    content = {
        "version": 1,
        "name": plan.job.name,
        "bundle": plan.job.bundle,
        "settings": plan.settings,
        "result": asdict(result) if result is not None else None,
    }
    storage.write_text(storage.join(plan.job.output.uri, MANIFEST), json.dumps(content, indent=2))


# --- the work -----------------------------------------------------------------------------------------------------


def _predict_parts(plan: Plan) -> None:
    there = list_done(plan)
    missing = [number for number in range(plan.num_parts) if part_name(number) not in there]
    if len(missing) < plan.num_parts:
        logger.info("predict: %d of %d parts are there already", plan.num_parts - len(missing), plan.num_parts)
    if not missing:
        return
    plan = replace(plan, missing=missing)
    num_rows = sum(len(plan.rows_of(number)) for number in missing)
    _follow(
        "images", num_rows, spread(predict_share, plan, range(min(plan.num_shares, len(missing))), plan.job.scaling)
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


def _predict_large(plan: Plan) -> None:
    """Does the images that the parts have left out, block by block."""
    there = list_done(plan)
    rows = [row for row in range(len(plan.index)) if marker_name(row) in there and large_name(row) not in there]
    if not rows:
        return
    logger.info("predict: %d large images are shared by the workers", len(rows))
    plan = replace(plan, missing=rows)
    shares = range(plan.num_shares)
    for _ in spread(predict_blocks, plan, shares, plan.job.scaling):
        pass
    _follow("large images", len(rows), spread(join_blocks, plan, shares, plan.job.scaling))


# --- the end ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """The rows of all parts, read one by one whenever they are gone through; with image ids where there are some."""

    plan: Plan
    names: list[str]
    image_ids: list[int]

    def __iter__(self) -> Iterator[pa.Table]:
        start = 0
        for name in self.names:
            rows = read_part(self.plan, name)
            image_ids = self.image_ids[start : start + len(rows)]
            start += len(rows)
            rows = rows.drop_columns(["index_row", "record"]).replace_schema_metadata()
            is_coco = "annotations" in rows.column_names
            yield rows.append_column("image_id", pa.array(image_ids, pa.int64())) if is_coco else rows


def _finish(plan: Plan) -> PredictResult:
    """Writes what stands once, and the result last."""
    names = sorted(name for name in list_done(plan) if name.endswith(".parquet"))
    metrics = Metrics(plan.task, plan.classes, plan.job.more_metrics)
    sample_ids: list[str] = []
    rows: list[int] = []
    failures = list(plan.index.failures)
    for name in names:
        part = read_part(plan, name, ["sample_id", "index_row", "record"])
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
