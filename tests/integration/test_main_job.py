"""The main job for real: S3, Ray Data, Ray Train, and the same without Ray."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image

from raysseg import runtime, storage
from raysseg.bundle import read as read_bundle
from raysseg.config import Decode, EvaluateJob, Scaling, TrainJob, parse_as
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import Feed, build_feed, iter_batches, iter_chunks
from raysseg.evaluate import evaluate
from raysseg.ledger import Ledger
from raysseg.link import Alone, Signals
from raysseg.predictor import Predictor
from raysseg.saver import Saved
from raysseg.schema import InputError
from raysseg.train import TrainResult, train
from raysseg.worker import train_epochs
from tests.conftest import example_job, plan_of, rows


def put(folder: Path, uri: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{uri}/{path.relative_to(folder)}", path.read_bytes())
    return uri


@pytest.fixture(scope="module")
def trained(example: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Two epochs in this process."""
    runs = tmp_path_factory.mktemp("runs")
    return train(example_job(str(example), str(runs), "scaling.workers=0", "name=here"))


def test_run_has_what_it_promises(trained: TrainResult) -> None:
    for name in (
        "job.json",
        "metrics.jsonl",
        "best.json",
        "report.html",
        "bundle/bundle.json",
        "bundle/model.safetensors",
    ):
        assert storage.exists(f"{trained.run}/{name}"), name
    assert [row["epoch"] for row in rows(trained.run)] == [0, 1]
    best = json.loads(storage.read_text(f"{trained.run}/best.json"))
    assert best["value"] == max(row["val/miou"] for row in rows(trained.run)) == trained.metrics["val/miou"]


def test_loss_goes_down(trained: TrainResult) -> None:
    first, last = rows(trained.run)[0], rows(trained.run)[-1]
    assert last["train/loss"] < first["train/loss"]


def test_transformers_loads_the_bundle_and_gives_the_same_logits(trained: TrainResult, example: Path) -> None:
    from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

    image = Image.open(next((example / "val/images").glob("*.jpg")))
    processor = AutoImageProcessor.from_pretrained(trained.bundle)
    with torch.inference_mode():
        theirs = SegformerForSemanticSegmentation.from_pretrained(trained.bundle)(
            **processor(image, return_tensors="pt")
        )
    ours = Predictor(trained.bundle).logits(np.array(image.convert("RGB")))
    torch.testing.assert_close(ours, theirs.logits, rtol=1e-4, atol=1e-4)


def test_predictions_do_not_depend_on_their_company(trained: TrainResult) -> None:
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, size, dtype=np.uint8) for size in ((96, 128, 3), (50, 70, 3), (96, 128, 3), (33, 1, 3))
    ]
    predictor = Predictor(trained.bundle)
    together = predictor.predict(images)
    assert [m.labels.shape for m in together] == [i.shape[:2] for i in images]
    for image, found in zip(images, together, strict=True):
        (alone,) = predictor.predict([image])
        assert (alone.labels == found.labels).mean() > 0.999


def test_same_command_again_does_nothing_twice(trained: TrainResult, example: Path) -> None:
    before = storage.read_text(f"{trained.run}/metrics.jsonl")
    again = train(example_job(str(example), str(Path(trained.run).parent), "scaling.workers=0", "name=here"))
    assert again.metrics == trained.metrics
    assert storage.read_text(f"{trained.run}/metrics.jsonl") == before


def test_broken_off_run_ends_as_an_unbroken_one(
    trained: TrainResult, example: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Bit for bit: weights after one epoch, a stop, and one more equal those of two epochs at once."""
    job = example_job(str(example), str(tmp_path), "scaling.workers=0", "name=broken")
    epochs = train_epochs(plan_of(job), iter_chunks, torch.device("cpu"), Alone(Signals()))
    next(epochs)
    epochs.close()
    with caplog.at_level(logging.INFO, logger="raysseg"):
        resumed = train(job)
    assert "resumed from" in caplog.text
    assert "epoch 2, position 0" in caplog.text
    assert [r["train/loss"] for r in rows(resumed.run)] == [r["train/loss"] for r in rows(trained.run)]
    assert resumed.metrics == trained.metrics


def test_damaged_checkpoint_is_passed_over(example: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = example_job(str(example), str(tmp_path), "scaling.workers=0", "name=damaged", "schedule.epochs=3")
    epochs = train_epochs(plan_of(job), iter_chunks, torch.device("cpu"), Alone(Signals()))
    saved = [next(epochs) for _ in range(2)][-1]
    assert isinstance(saved, Saved)
    newest = saved.checkpoint_uri
    epochs.close()
    state = next(Path(newest).glob("state*.pt"))
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.INFO, logger="raysseg"):
        train(job)
    assert "checkpoint passed over" in caplog.text
    assert "epoch 2, position 0" in caplog.text


@pytest.fixture(scope="module")
def trained_on_ray(
    ray_cluster: None, example: Path, s3_server: str, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    """The main job: shards and folders in S3, two workers."""
    import boto3

    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="main-job")
    data = put(example, "s3://main-job/data")
    return train(example_job(data, "s3://main-job/runs", "scaling={workers: 2, cpus_per_worker: 0.5}", "name=on-ray"))


def test_ray_delivers_and_trains_as_this_process_does(trained_on_ray: TrainResult, trained: TrainResult) -> None:
    """The same samples in the same global batches: the losses differ by BatchNorm's share of a batch alone."""
    ours, theirs = rows(trained_on_ray.run), rows(trained.run)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    np.testing.assert_allclose([r["train/loss"] for r in ours], [r["train/loss"] for r in theirs], rtol=0.1)


def test_validation_beside_training_tells_what_the_workers_would(
    ray_cluster: None, example: Path, tmp_path: Path
) -> None:
    one = "scaling={workers: 1, cpus_per_worker: 0.5}"
    beside, inline = (
        train(
            example_job(str(example), str(tmp_path), one, f"validation={{where: {where}, cpus: 0.5}}", f"name={where}")
        )
        for where in ("beside", "inline")
    )
    assert len(list(Path(beside.run, "validations").iterdir())) == 2
    assert not Path(inline.run, "validations").exists()
    for ours, theirs in zip(rows(beside.run), rows(inline.run), strict=True):
        assert ours["train/loss"] == theirs["train/loss"]
        assert {k: v for k, v in ours.items() if k.startswith("val/")} == pytest.approx(
            {k: v for k, v in theirs.items() if k.startswith("val/")}, nan_ok=True
        )
    assert beside.metrics == pytest.approx(inline.metrics, nan_ok=True)
    assert read_bundle(beside.bundle).metrics["val/miou"] == beside.metrics["val/miou"]


def test_validation_without_room_is_refused(ray_cluster: None, example: Path, tmp_path: Path) -> None:
    one = "scaling={workers: 1, cpus_per_worker: 0.5}"
    job = example_job(str(example), str(tmp_path), one, "validation={where: beside, cpus: 64}")
    with pytest.raises(InputError, match=r"validation: a task of 64 CPUs and 0 GPUs has no room beside 1 workers"):
        train(job)


def test_validation_that_was_cut_off_is_made_up_for(trained: TrainResult, example: Path, tmp_path: Path) -> None:
    copytree(trained.run, tmp_path / Path(trained.run).name)
    run = tmp_path / Path(trained.run).name
    whole = rows(str(run))
    bare = [{key: value for key, value in row.items() if not key.startswith("val/")} for row in whole]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    for path in (run / "best.json", run / "report.html"):
        path.unlink()
    job = example_job(str(example), str(tmp_path), "scaling.workers=0", "name=here")
    (run / "job.json").write_text(json.dumps(job.model_dump(mode="json")))
    assert train(job).metrics == pytest.approx(trained.metrics, nan_ok=True)
    kept = {int(path.name) for path in (run / "bundles").iterdir()}
    for row, expected in zip(rows(str(run)), whole, strict=True):
        assert row["step"] not in kept or row == pytest.approx(expected, nan_ok=True)


def test_oversampled_epochs_are_as_long_here_and_on_ray(
    ray_cluster: None, example: Path, tmp_path: Path, trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysseg.inputs._COUNT", 10)  # more are counted over the cluster
    shared = ("data.oversample=1.0", "data.augment.class_crop=0.5", "schedule.epochs=1")
    here, there = (
        rows(train(example_job(str(example), str(tmp_path), *shared, f"scaling.workers={n}", f"name=x{n}")).run)[-1]
        for n in (0, 2)
    )
    assert here["step"] == there["step"] > rows(trained.run)[0]["step"]
    assert there["train/loss"] == pytest.approx(here["train/loss"], rel=0.1)


def test_ray_data_delivered_the_training_bytes(trained_on_ray: TrainResult) -> None:
    log = storage.read_text(f"{trained_on_ray.run}/data.log")
    assert "Operator" in log
    assert "_decode_blocks" in log
    assert read_bundle(trained_on_ray.bundle).metrics["val/miou"] == trained_on_ray.metrics["val/miou"]


def test_evaluation_is_the_same_for_any_number_of_workers(trained_on_ray: TrainResult, example: Path) -> None:
    data = {"format": "masks", "images": str(example / "val/images"), "masks": str(example / "val/masks")}
    job = parse_as(
        EvaluateJob,
        {"kind": "evaluate", "name": "check", "task": "semantic", "data": data, "bundle": trained_on_ray.bundle},
    )
    found = [
        evaluate(
            job.model_copy(update={"scaling": job.scaling.model_copy(update={"workers": n, "cpus_per_worker": 0.5})})
        )
        for n in (0, 1, 2, 3)
    ]
    assert found[0].num_samples == 21
    assert all(replace(other, name="check") == found[0] for other in found[1:])


def test_bad_sample_on_ray_is_the_users_error(ray_cluster: None, example: Path, s3_bucket: str) -> None:
    from raysseg.schema import InputError

    data = put(example, f"{s3_bucket}/data")
    names = [entry.path for entry in storage.list_files(f"{data}/train/images")]
    storage.write_bytes(f"{data}/train/images/{names[7]}", b"no image")
    job = example_job(data, f"{s3_bucket}/runs", "scaling={workers: 2, cpus_per_worker: 0.5}", "name=bad")
    with pytest.raises(InputError, match=f"{Path(names[7]).stem}: the image can't be decoded"):
        train(job)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("decode", "span"), [("cluster", 512), ("cluster", 1), ("trainer", 512), ("trainer", 1)])
def test_ray_data_delivers_what_this_process_would_read(
    decode: Decode, span: int, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysseg.data import stream
    from raysseg.schema import InputError

    monkeypatch.setattr(stream, "_SPAN", span)
    data = put(example, str(tmp_path))
    damaged = sorted((tmp_path / "train/images").iterdir())[7]
    damaged.write_bytes(b"no image")
    job = example_job(data, "unused", "schedule.epochs=2", "data.on_error=skip")

    def feed_of(job: TrainJob) -> Feed:
        return build_feed(job, read_index(job.data.train), read_class_map(job.classes), Ledger(), rank=0, num_workers=1)

    texts: list[str] = []
    feed = feed_of(job)
    here, there = (
        [batch for step in iter_batches(feed, chunks) for batch in step]
        for chunks in (iter_chunks(feed), stream.iter_chunks(feed, texts.append, decode=decode, threads=2))
    )
    assert len(here) == len(there)
    for ours, rays in zip(here, there, strict=True):
        for name in ("images", "labels", "weights", "positions"):
            assert np.array_equal(getattr(ours, name), getattr(rays, name))
    skipped = [[failure for batch in batches for failure in batch.failures] for batches in (here, there)]
    assert len(skipped[0]) == 2
    assert skipped[0] == skipped[1]
    assert "Operator" in texts[0]
    assert len(texts) == (1 if span > 1 else feed.num_chunks) >= 1
    assert feed.num_chunks > 1

    stopping = feed_of(example_job(data, "unused", "schedule.epochs=2"))
    with pytest.raises(InputError, match=f"{damaged.stem}: the image can't be decoded"):
        list(stream.iter_chunks(stopping, texts.append, decode=decode, threads=2))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("decode", ["cluster", "trainer"])
def test_ray_data_goes_on_in_the_middle_of_an_epoch(
    decode: Decode, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk ends at the start: one of the two ranks has no row in it."""
    from raysseg.data import stream

    job = example_job(str(example), "unused", "data.open_shards=3")
    index, classes = read_index(job.data.train), read_class_map(job.classes)
    index = replace(index.take(np.arange(160) % len(index)), groups=np.arange(160))
    monkeypatch.setattr(stream, "_SPAN", 1)
    whole = build_feed(job, index, classes, Ledger(1), rank=0, num_workers=2)
    edge = 3 * whole.windows_per_chunk  # files are groups of one, so a window is three
    assert 0 < edge < len(index)
    seen = []
    for rank in (0, 1):
        feed = build_feed(job, index, classes, Ledger(1, edge - 1), rank=rank, num_workers=2)
        chunks = stream.iter_chunks(feed, lambda _: None, decode=decode, threads=2)
        seen += [p for step in iter_batches(feed, chunks) for batch in step for p in batch.positions.tolist() if p >= 0]
    assert sorted(seen) == list(range(edge - 1, len(index)))


@pytest.mark.usefixtures("ray_cluster")
def test_more_pieces_than_ray_is_asked_for_at_once() -> None:
    def multiply(
        shared: int, piece: int
    ) -> Iterator[int]:  # here, so that it goes along: workers don't know this module
        yield shared * piece

    found = runtime.spread(multiply, 2, range(runtime._AT_ONCE + 50), Scaling(workers=2, gpus_per_worker=0))
    assert sorted(found) == list(range(0, 2 * runtime._AT_ONCE + 100, 2))


@pytest.mark.usefixtures("ray_cluster")
def test_data_that_wait_leave_the_processor_to_training(example: Path) -> None:
    from raysseg.data import stream

    job = example_job(str(example), "unused", "data.crop=[512, 512]", "schedule.epochs=50")
    index = read_index(job.data.train)
    feed = build_feed(job, index, read_class_map(job.classes), Ledger(), rank=0, num_workers=1)
    chunks = stream.iter_chunks(feed, report=lambda _: None, decode="cluster", threads=2)
    next(chunks)
    time.sleep(4)  # by then as much is ready as may wait
    before = time.process_time()
    time.sleep(2)
    spent = time.process_time() - before
    chunks.close()
    assert spent < 0.5
