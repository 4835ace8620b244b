"""The job files of all tasks, from data to report, in this process; and their regions through Ray Data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysseg import config
from raysseg.config import EvaluateJob, TrainJob
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import build_feed, iter_batches, iter_chunks
from raysseg.evaluate import evaluate
from raysseg.ledger import Ledger
from raysseg.masks import MaskSet, SegmentMap
from raysseg.predictor import Predictor
from raysseg.train import TrainResult, train

JOBS = {"instance": "jobs/example-maskrcnn-instance.yaml", "panoptic": "jobs/example-mask2former-panoptic.yaml"}
SMALL = ("scaling.workers=0", "schedule.epochs=1", "data.crop=[64, 64]", "batch={global_size: 8, per_worker: 4}")


def job_of(task: str, example: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    monkeypatch.setenv("EXAMPLE", str(example))
    monkeypatch.setenv("RUNS", str(runs))
    job = config.load(JOBS[task], SMALL)
    assert isinstance(job, TrainJob)
    return job


@pytest.mark.parametrize(
    ("task", "headline", "view"), [("instance", "mask_ap", MaskSet), ("panoptic", "pq", SegmentMap)]
)
def test_a_job_runs_from_data_to_report(
    task: str, headline: str, view: type, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(task, example, tmp_path, monkeypatch)
    assert job.checkpoint.metric == f"val/{headline}"
    result = train(job)
    check_report(result, headline)
    predictor = Predictor(result.bundle)
    assert predictor.bundle.task == task
    (found,) = predictor.predict([np.zeros((70, 90, 3), np.uint8)])
    assert isinstance(found, view)
    again = evaluate(
        EvaluateJob(
            kind="evaluate",
            name="again",
            task=job.task,
            data=job.data.val,
            bundle=result.bundle,
            batch=job.batch,
            scaling=config.Scaling(workers=0),
        )
    )
    assert {f"val/{name}": value for name, value in again.metrics.items()} == pytest.approx(result.metrics, nan_ok=True)


def check_report(result: TrainResult, headline: str) -> None:
    page = Path(result.report).read_text()
    assert result.metrics.keys() >= {f"val/{headline}", f"val/{headline}/house"}
    assert "Ground truth" in page
    assert "data:image/webp" in page


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("task", JOBS)
def test_regions_through_ray_data_are_those_of_this_process(
    task: str, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysseg.data import stream

    job = job_of(task, example, tmp_path, monkeypatch)
    classes = read_class_map(None, job.data.train)
    feed = build_feed(job, read_index(job.data.train), classes, Ledger(), rank=0, num_workers=1)
    through_ray = stream.iter_chunks(feed, lambda _: None, decode="cluster", threads=2)
    here, there = (
        [batch for step in iter_batches(feed, chunks) for batch in step] for chunks in (iter_chunks(feed), through_ray)
    )
    assert len(here) == len(there) > 1
    number = 0
    for ours, rays in zip(here, there, strict=True):
        assert np.array_equal(ours.images, rays.images)
        assert np.array_equal(ours.labels, rays.labels)
        for one, other in zip(ours.regions, rays.regions, strict=True):
            assert np.array_equal(one.numbers, other.numbers)
            assert np.array_equal(one.class_ids, other.class_ids)
            number += len(one.class_ids)
    assert number > 20
