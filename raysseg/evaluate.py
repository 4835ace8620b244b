"""Metrics of a bundle, or of stored predictions, over a data set, spread over the cluster."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from raysseg import bundle as bundles
from raysseg import masks, report, storage
from raysseg.config import EvaluateJob
from raysseg.data import read_class_map, read_index, read_predictions, read_samples
from raysseg.data.batches import Pair, iter_pairs
from raysseg.data.index import Failure, SampleIndex, write_failures
from raysseg.metrics import Metrics, State
from raysseg.predictor import Predicted, kept_predictor, predict_pairs, resolve_inference
from raysseg.runtime import num_shares, spread
from raysseg.schema import ClassMap, InputError, Sample

logger = logging.getLogger(__name__)

_EXAMPLES = 3  # of the worst, the median and the best each


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has found.

    Attributes:
        metrics: by name; NaN for a class that the truth lacks.
        absent: those classes.
        confusion: (C, C) pixels by (truth, prediction); None unless the task is semantic.
        scores: of each sample by its id: mIoU, mask AP or PQ.
        examples: the worst, the median and the best samples.
        failures: samples that were skipped.
        images_per_s: over all workers, start-up left out.
    """

    metrics: dict[str, float]
    absent: list[str]
    confusion: npt.NDArray[np.int64] | None
    scores: dict[str, float]
    examples: dict[str, list[report.Example]]
    failures: list[Failure]
    images_per_s: float


@dataclass(frozen=True)
class EvaluateResult:
    """What `raysseg evaluate` prints."""

    name: str
    metrics: dict[str, float]
    num_samples: int
    absent: list[str]
    skipped: int
    bundle: str | None
    report: str | None
    run: str | None


@dataclass(frozen=True)
class _Shared:
    """What every task needs."""

    job: EvaluateJob
    classes: ClassMap
    truth: SampleIndex
    predictions: SampleIndex | None
    num_shares: int


@dataclass(frozen=True)
class _Partial:
    """One batch's counts."""

    state: State
    failures: list[Failure]


def evaluate(job: EvaluateJob) -> EvaluateResult:
    """Runs an evaluate job; the report and the numbers go to <storage>/<name> where the job names a storage.

    Raises:
        InputError: the two sides don't fit each other, or a sample can't be used and the source does not skip.
        StorageError: a source can't be reached.
    """
    classes = _class_map(job)
    found = measure(job, classes)
    run_uri = storage.join(job.storage, job.name) if job.storage is not None else None
    report_uri = storage.join(run_uri, "report.html") if run_uri is not None else None
    result = EvaluateResult(
        job.name, found.metrics, len(found.scores), found.absent, len(found.failures), job.bundle, report_uri, run_uri
    )
    if run_uri is not None and report_uri is not None:
        page = report.ReportPage(
            title=job.name,
            task=job.task,
            classes=classes,
            job=job.model_dump(mode="json"),
            metrics=found.metrics,
            absent=found.absent,
            confusion=found.confusion,
            history=[],
            splits=[],
            examples=found.examples,
            facts={"samples": str(len(found.scores)), "images per second": f"{found.images_per_s:.1f}"},
            notes=describe_failures(found.failures),
        )
        write_failures(run_uri, {"data": found.failures})
        storage.write_text(storage.join(run_uri, "metrics.json"), json.dumps(asdict(result), indent=2))
        storage.write_text(report_uri, report.render(page))
    return result


def measure(job: EvaluateJob, classes: ClassMap) -> Evaluation:
    """The numbers of an evaluate job and its telling examples; writes nothing.

    Batches are fixed by the index, and counts are whole numbers: they are the same for any number of workers.
    """
    shared = _share(job, classes)
    metrics, failures, images_per_s = _score(shared)
    scores = metrics.scores()
    picks = _pick(scores)
    examples = list(spread(_draw_examples, shared, [list(chain(*picks.values()))], job.scaling))
    by_id = {example.sample_id: replace(example, score=scores[example.sample_id]) for example in examples}
    confusion = metrics.confusion()
    return Evaluation(
        metrics=metrics.compute(shared.truth.ranking),
        absent=metrics.absent(),
        confusion=confusion[:, :-1] if confusion is not None else None,
        scores=scores,
        examples={kind: [by_id[i] for i in ids] for kind, ids in picks.items()},
        failures=failures,
        images_per_s=images_per_s,
    )


def score(job: EvaluateJob, classes: ClassMap) -> dict[str, float]:
    """The numbers of an evaluate job alone."""
    shared = _share(job, classes)
    metrics, _, _ = _score(shared)
    return metrics.compute(shared.truth.ranking)


def _share(job: EvaluateJob, classes: ClassMap) -> _Shared:
    if job.bundle is not None:
        inference = resolve_inference(bundles.read(job.bundle), job.inference)
        job = job.model_copy(update={"inference": inference})
    return _Shared(job, classes, *_matched(job, classes), num_shares=num_shares(job.scaling))


def _score(shared: _Shared) -> tuple[Metrics, list[Failure], float]:
    """Counts all samples, over the cluster; and how many came a second."""
    job = shared.job
    metrics = Metrics(job.task, shared.classes, job.metrics)
    failures = list(shared.truth.failures)
    started, reported = None, time.monotonic()
    for part in spread(_score_share, shared, range(shared.num_shares), job.scaling):
        started = started or time.monotonic()
        metrics.merge(part.state)
        failures += part.failures
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            logger.info("evaluate: %d of %d samples", len(metrics), len(shared.truth))
    elapsed = time.monotonic() - (started or 0.0)
    if not len(metrics):
        reasons = "; ".join(failure.reason for failure in failures[:3])
        raise InputError(f"evaluate: none of the {len(shared.truth)} samples could be used: {reasons}")
    return metrics, failures, len(metrics) / max(elapsed, 1e-9)


def describe_failures(failures: Sequence[Failure]) -> list[str]:
    """A sentence for the report, where samples were skipped."""
    return [f"{len(failures)} samples were skipped; skipped.json lists them with their reasons"] if failures else []


def _class_map(job: EvaluateJob) -> ClassMap:
    if job.bundle is None:
        return read_class_map(job.classes, job.data)
    bundle = bundles.read(job.bundle)
    if bundle.task != job.task:
        raise InputError(f"task: the bundle {job.bundle} segments for {bundle.task!r}, the job says {job.task!r}")
    if job.classes is None:
        return bundle.classes
    classes = read_class_map(job.classes, job.data)
    if classes.names != bundle.classes.names:
        raise InputError(
            f"classes: the job names {list(classes.names)}, the bundle was trained on {list(bundle.classes.names)}; "
            "leave `classes` out to take the bundle's"
        )
    return classes


def _matched(job: EvaluateJob, classes: ClassMap) -> tuple[SampleIndex, SampleIndex | None]:
    """The truth, and the predictions in the same order."""
    truth = read_index(job.data)
    if job.predictions is None:
        return truth, None
    predictions = read_predictions(job.predictions, truth, classes)
    place = {sample_id: row for row, sample_id in enumerate(predictions.sample_ids)}
    truth_ids = truth.sample_ids
    missing = [sample_id for sample_id in truth_ids if sample_id not in place]
    surplus = sorted(place.keys() - set(truth_ids))
    if surplus:
        raise InputError(
            f"predictions: {len(surplus)} of {len(place)} have no ground truth of the same stem, "
            f"such as {surplus[:3]}; remove them, or add their ground truth to `data`"
        )
    if missing and not truth.source.is_skipping:
        raise InputError(
            f"predictions: {len(missing)} of {len(truth_ids)} samples of `data` have none, such as {missing[:3]}; "
            "predict them too, or set data.on_error=skip to score the others alone and list these"
        )
    rows = np.array([row for row, sample_id in enumerate(truth_ids) if sample_id in place], dtype=np.int64)
    failures = tuple(Failure(sample_id, f"{sample_id}: has no prediction") for sample_id in missing)
    truth = replace(truth.take(rows), failures=(*truth.failures, *failures))
    return truth, predictions.take(np.array([place[truth_ids[row]] for row in rows], dtype=np.int64))


def _score_share(shared: _Shared, share: int) -> Iterator[_Partial]:
    """Scores every so-manieth batch of the index."""
    for batch in _iter_predicted(shared, share, with_images=shared.predictions is None):
        metrics = Metrics(shared.job.task, shared.classes, shared.job.metrics)
        failures: list[Failure] = []
        for item in batch:
            if isinstance(item, Failure):
                failures.append(item)
            else:
                metrics.update(item.pair.sample_id, item.prediction, item.pair.truth)
        yield _Partial(metrics.state(), failures)


def _draw_examples(shared: _Shared, sample_ids: list[str]) -> Iterator[report.Example]:
    """Some samples with their predictions, as the report shows them."""
    place = {sample_id: row for row, sample_id in enumerate(shared.truth.sample_ids)}
    rows = np.array(sorted(place[sample_id] for sample_id in set(sample_ids)), dtype=np.int64)
    predictions = shared.predictions.take(rows) if shared.predictions is not None else None
    few = replace(shared, truth=shared.truth.take(rows), predictions=predictions, num_shares=1)
    for item in chain.from_iterable(_iter_predicted(few, 0, with_images=True)):
        if not isinstance(item, Failure):
            pair, prediction = item
            yield report.Example(pair.sample_id, pair.image, pair.truth, prediction, 0.0)


def _iter_predicted(shared: _Shared, share: int, *, with_images: bool) -> Iterator[list[Predicted | Failure]]:
    """One share's batches of truth beside their predictions, made by the bundle or read."""
    rows, truth = shared.job.batch.per_worker, shared.truth
    truths = iter_pairs(
        truth,
        shared.classes,
        shared.job.task,
        rows=rows,
        share=share,
        num_shares=shared.num_shares,
        with_images=with_images,
    )
    if shared.predictions is None:
        assert shared.job.bundle is not None, "the job's validator asks for one of them"
        predictor = kept_predictor(shared.job.bundle, shared.job.precision, shared.job.inference)
        yield from predict_pairs(predictor.predict, truths)
        return
    for start, pairs in zip(range(share * rows, len(truth), shared.num_shares * rows), truths, strict=True):
        part = shared.predictions.take(np.arange(start, start + len(pairs)))
        stored = read_samples(part, with_images=False)
        yield [_beside(pair, sample, shared) for pair, sample in zip(pairs, stored, strict=True)]


def _beside(pair: Pair | Failure, sample: Sample | Failure, shared: _Shared) -> Predicted | Failure:
    """A stored prediction beside its truth; a bad one raises InputError, or comes back as a Failure."""
    if isinstance(pair, Failure):
        return pair
    try:
        if isinstance(sample, Failure):
            raise InputError(sample.reason)
        prediction = masks.to_view(sample, shared.classes, shared.job.task)
        (height, width), (true_height, true_width) = masks.size_of(prediction), masks.size_of(pair.truth)
        if isinstance(prediction, masks.MaskSet) and prediction.scores is None and len(prediction):
            raise InputError(f"{pair.sample_id}: its annotations lack a `score`, which ranks them; give each one")
        if (height, width) != (true_height, true_width):
            raise InputError(
                f"{pair.sample_id}: the prediction is {width}x{height}, the truth {true_width}x{true_height} "
                "(width x height); scale it to the truth's size"
            )
    except InputError as error:
        if not shared.truth.source.is_skipping:
            raise InputError(f"predictions: {error}") from error
        return Failure(pair.sample_id, f"predictions: {error}")
    return Predicted(pair, prediction)


def _pick(scores: dict[str, float]) -> dict[str, list[str]]:
    """The ids of the worst, the median and the best samples, none of them twice."""
    ranked = sorted((score, sample_id) for sample_id, score in scores.items() if score == score)
    ids = [sample_id for _, sample_id in ranked]
    number = min(_EXAMPLES, len(ids) // 3 or len(ids))
    middle = max(number, len(ids) // 2 - number // 2)
    return {
        "worst": ids[:number],
        "median": ids[middle : middle + number],
        "best": ids[max(middle + number, len(ids) - number) :][::-1],
    }
