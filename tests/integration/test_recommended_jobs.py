"""The table that recommending goes by, against what the models take."""

from __future__ import annotations

import pytest

from benchmarks.bench_extents import CLASSES, predict_one
from raysseg.advice.costs import profile
from raysseg.advice.profiles import read_costs, read_extents
from raysseg.catalogue import MODELS


@pytest.mark.parametrize("name", ["segformer-b0", "maskrcnn-resnet50-fpn", "rfdetr-seg-nano"])
def test_table_of_extents_is_what_a_model_takes(name: str) -> None:
    assert read_extents().keys() == read_costs().keys()
    row = read_extents()[name]
    found = predict_one(name)
    assert found["prediction_flops"] == row.prediction_flops
    assert found["prediction_traffic"] == pytest.approx(row.prediction_traffic, rel=0.01)
    seen = profile(name, MODELS[name].tasks[0], len(CLASSES), (256, 256)).bytes_per_image
    assert row.bytes_per_image_256 == pytest.approx(seen, rel=0.01)
