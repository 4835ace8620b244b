"""A bundle's way of predicting: tiles and views reach the model from Python and from jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysseg import bundle as bundles
from raysseg import config
from raysseg.bundle import Bundle, Preprocessing
from raysseg.config import EvaluateJob, Inference, Model
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import iter_pairs
from raysseg.data.decode import decode_image, open_image
from raysseg.data.index import Failure
from raysseg.evaluate import evaluate
from raysseg.masks import LabelMap
from raysseg.metrics import Metrics
from raysseg.models import build_model
from raysseg.predictor import Predictor, class_scores
from raysseg.schema import InputError

DATA = Path(os.environ.get("RAYSSEG_DATA", "../shared/data"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def bundle(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny SegFormer that knows nothing, validated with tiles."""
    classes = read_class_map(str(example / "classes.json"))
    torch.manual_seed(0)
    model = build_model(Model(name="segformer-tiny", weights=None), classes).eval()
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # so that pixels differ
    made = Bundle(
        uri=str(tmp_path_factory.mktemp("bundle")),
        task="semantic",
        classes=classes,
        model="segformer-tiny",
        preprocessing=Preprocessing(None),
        metrics={},
        job={},
        fingerprint={},
        inference=Inference(tile=(64, 64)),
        versions={},
    )
    bundles.write(made, model)
    return made


def evaluate_job(bundle: Bundle, example: Path, inference: dict[str, object]) -> EvaluateJob:
    raw = {
        "kind": "evaluate",
        "name": "check",
        "task": "semantic",
        "data": {"format": "masks", "images": str(example / "val/images"), "masks": str(example / "val/masks")},
        "bundle": bundle.uri,
        "inference": inference,
        "scaling": {"workers": 0},
    }
    return config.parse_as(EvaluateJob, raw)


def test_evaluate_predicts_as_its_keys_and_the_bundle_say(bundle: Bundle, example: Path) -> None:
    jobs = [
        (evaluate_job(bundle, example, {}), Inference(tile=(64, 64))),
        (evaluate_job(bundle, example, {"flip": True}), Inference(tile=(64, 64), flip=True)),
        (evaluate_job(bundle, example, {"tile": None}), Inference()),
    ]
    found = [evaluate(job).metrics for job, _ in jobs]
    assert len({metrics["miou"] for metrics in found}) == 3
    model = bundles.load(bundle)
    for (job, inference), metrics in zip(jobs, found, strict=True):
        predictor, expected = Predictor(bundle.uri, inference=inference), Metrics("semantic", bundle.classes)
        for (pair,) in iter_pairs(read_index(job.data), bundle.classes, "semantic", rows=1):
            assert not isinstance(pair, Failure)
            if inference == Inference():
                scores = class_scores(model, pair.image, None, torch.float32, inference).numpy()
                prediction = LabelMap(scores.argmax(0).astype(np.uint8), bundle.classes.ignore)
            else:
                (view,) = predictor.predict([pair.image])
                assert isinstance(view, LabelMap)
                prediction = view
            expected.update(pair.sample_id, prediction, pair.truth)
        assert metrics["miou"] == pytest.approx(expected.compute()["miou"], abs=1e-5)


def test_keys_that_do_not_fit_the_bundle_are_refused(bundle: Bundle, example: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inference.overlap: has no effect without `inference.tile`"):
        evaluate(evaluate_job(bundle, example, {"tile": None, "overlap": 0.5}))
    with pytest.raises(InputError, match=r"inference.mask_threshold: has no effect where the task is semantic"):
        Predictor(bundle.uri, inference=Inference(mask_threshold=0.3))
    fixed = replace(bundle, uri=str(tmp_path / "fixed"), preprocessing=Preprocessing((64, 96)), inference=Inference())
    bundles.write(fixed, bundles.load(bundle))
    with pytest.raises(InputError, match=r"inference.tile: tiles are cut from images as they are.*\[64, 96\]"):
        Predictor(fixed.uri, inference=Inference(tile=(64, 64)))


def test_a_real_jpeg_by_windows_and_by_blocks(bundle: Bundle) -> None:
    paths = sorted((DATA / "hrf_av").glob("*/images/*"))
    if not paths:
        pytest.skip(f"{DATA / 'hrf_av'} is absent")
    data = paths[0].read_bytes()
    whole, jpeg = decode_image(data), open_image(data)
    assert whole.shape == (2336, 3504, 3)
    predictor = Predictor(bundle.uri, inference=Inference(tile=(1024, 1024), overlap=0.1))
    (found,) = predictor.predict([whole])
    assert isinstance(found, LabelMap)
    assert len(np.unique(found.labels)) > 1
    blocks = predictor.grid((2336, 3504)).blocks(1, 2)
    for block in blocks[-2:]:
        for rows, columns, labels in predictor.iter_labels(jpeg, block):
            assert np.array_equal(labels, found.labels[rows, columns])
    window = np.s_[1000:1100, 1200:1300]
    covering = predictor.grid((2336, 3504))
    scores = np.zeros((len(bundle.classes), 100, 100))
    model = bundles.load(bundle)
    for top in covering.tops:
        for left in covering.lefts:
            inside = np.zeros((2336, 3504), bool)
            inside[top : top + 1024, left : left + 1024] = True
            if not inside[window].any():
                continue
            tile = class_scores(model, whole[top : top + 1024, left : left + 1024], None, torch.float32, Inference())
            rows, columns = np.arange(1000, 1100) - top, np.arange(1200, 1300) - left
            weights = np.outer(*(np.exp(-0.5 * ((places - 511.5) / 128) ** 2) for places in (rows, columns)))
            is_in = np.outer((rows >= 0) & (rows < 1024), (columns >= 0) & (columns < 1024))
            part = tile.numpy()[:, rows.clip(0, 1023)][:, :, columns.clip(0, 1023)]
            scores += part * weights * is_in
    assert (scores.argmax(0) == found.labels[window]).mean() > 0.999
