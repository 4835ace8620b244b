"""Each family learns eight images by heart, from scratch, at its tiny size; docs/results.md has the curve's end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_by_heart import CASES, NUM_IMAGES, iter_scores, load_case
from raysseg.catalogue import MODELS

SOON = ("unet-tiny",)
"""In a minute or so; the others take longer."""


def test_every_family_has_a_case() -> None:
    families = [MODELS[name].family for name in CASES]
    assert set(families) == {entry.family for entry in MODELS.values()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in CASES])
def test_eight_images_are_learnt_by_heart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE", str(tmp_path))
    job = load_case(name, tmp_path)
    *_, (steps, metrics) = iter_scores(job, NUM_IMAGES, every=10**9)
    assert steps == CASES[name].steps
    assert metrics[CASES[name].metric] >= CASES[name].bar
