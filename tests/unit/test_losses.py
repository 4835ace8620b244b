from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysseg.config import Loss
from raysseg.losses import LOSSES, ClassPixels, Settings, balance, count_normalisers, count_pixels, dice

IGNORE = 255
SETTINGS = Settings(ignore=IGNORE)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)


def example(batch: int = 3, num_classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, C, 5, 6) that want a gradient, labels with a quarter ignored, and row weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, num_classes, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, num_classes, (batch, 5, 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.25] = IGNORE
    return logits, labels, torch.ones(batch, dtype=torch.float64)


def term(name: str, settings: Settings, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """A term over its normaliser."""
    function, normaliser = LOSSES[name]
    return function(logits, labels, weights, settings) / count_normalisers(labels, weights, settings)[normaliser]


# ---- each term


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_cross_entropy_is_torchs(class_weights: Tensor | None) -> None:
    logits, labels, weights = example()
    found = term("cross_entropy", Settings(IGNORE, class_weights), logits, labels, weights)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE))


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_focal_with_gamma_0_is_cross_entropy(class_weights: Tensor | None) -> None:
    logits, labels, weights = example()
    settings = Settings(IGNORE, class_weights, Loss(focal_gamma=0))
    losses = [LOSSES[name][0](logits, labels, weights, settings) for name in ("focal", "cross_entropy")]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_focal_is_the_papers_formula() -> None:
    logits, labels, weights = example()
    found = LOSSES["focal"][0](logits, labels, weights, Settings(IGNORE, CLASS_WEIGHTS))
    p = logits.softmax(1)
    expected = torch.zeros((), dtype=torch.float64)
    for b, y, x in (labels != IGNORE).nonzero().tolist():
        label = int(labels[b, y, x])
        likely = p[b, label, y, x]
        expected = expected - CLASS_WEIGHTS[label] * (1 - likely) ** 2 * likely.log()
    torch.testing.assert_close(found, expected)


def test_dice_is_the_formula_per_image_and_class_that_is_present() -> None:
    logits, labels, weights = example()
    labels[1][labels[1] == 2] = IGNORE  # class 2 is absent from the second image
    expected = 0.0
    for b in range(3):
        valid = labels[b] != IGNORE
        p = logits.detach().softmax(1)[b][:, valid]
        losses = []
        for c in range(4):
            truth = (labels[b][valid] == c).double()
            if truth.any():
                losses.append(1 - 2 * (p[c] * truth).sum() / (p[c].sum() + truth.sum()))
        assert len(losses) == (3 if b == 1 else 4)
        expected += float(torch.stack(losses).mean())
    assert float(dice(logits.detach(), labels, weights, SETTINGS)) == pytest.approx(expected, abs=1e-12)


def test_dice_of_a_perfect_prediction_is_0_and_of_a_wrong_one_is_1() -> None:
    labels = torch.tensor([[[0, 0, 1], [1, 0, IGNORE]]])
    right = F.one_hot(labels.clamp(max=1), 3).movedim(-1, 1) * 100.0
    assert float(dice(right, labels, torch.ones(1), SETTINGS)) == pytest.approx(0, abs=1e-6)
    wrong = F.one_hot(torch.full_like(labels, 2), 3).movedim(-1, 1) * 100.0
    assert float(dice(wrong, labels, torch.ones(1), SETTINGS)) == pytest.approx(1, abs=1e-6)


def test_dice_leaves_out_rows_of_weight_0() -> None:
    logits, labels, weights = example()
    weights[1] = 0
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(
        dice(logits, labels, weights, SETTINGS), dice(logits[kept], labels[kept], weights[kept], SETTINGS)
    )


# ---- all terms


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_have_no_part(name: str, class_weights: Tensor | None) -> None:
    logits, labels, weights = example()
    settings = Settings(IGNORE, class_weights)
    loss = LOSSES[name][0](logits, labels, weights, settings)
    (gradient,) = torch.autograd.grad(loss, logits)
    is_ignored = (labels == IGNORE)[:, None].expand_as(gradient)
    assert is_ignored.any()
    assert (gradient[is_ignored] == 0).all()
    assert (gradient[~is_ignored] != 0).any()
    changed = logits.detach().clone()
    changed[is_ignored] += 7
    torch.testing.assert_close(LOSSES[name][0](changed, labels, weights, settings), loss.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_image_without_labels_gives_0_and_no_gradient(name: str) -> None:
    logits, labels, weights = example()
    loss = LOSSES[name][0](logits, torch.full_like(labels, IGNORE), weights, SETTINGS)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss) == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_does_not_depend_on_how_a_batch_is_split(name: str, class_weights: Tensor | None) -> None:
    logits, labels, weights = example(batch=5)
    labels[3, :4] = IGNORE  # images of uneven numbers of labels: averages of averages would differ
    weights[4], labels[4] = 0, IGNORE
    settings = Settings(IGNORE, class_weights)
    function, normaliser = LOSSES[name]
    (whole,) = torch.autograd.grad(term(name, settings, logits, labels, weights), logits)
    total = count_normalisers(labels, weights, settings)[normaliser]
    assert total > 0
    parts = [
        function(logits[rows], labels[rows], weights[rows], settings) / total
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    (split,) = torch.autograd.grad(torch.stack(parts).sum(), logits)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_slope(name: str) -> None:
    logits, labels, weights = example(batch=1)
    settings = Settings(IGNORE, CLASS_WEIGHTS)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, labels, weights, settings), (logits,))


# ---- normalisers


def test_normalisers_count_labelled_pixels_and_images() -> None:
    labels = torch.tensor([[[0, 1, IGNORE]], [[3, 3, 2]], [[IGNORE, IGNORE, IGNORE]]])
    weights = torch.tensor([1.0, 1.0, 0.0])
    found = count_normalisers(labels, weights, SETTINGS)
    assert {name: float(value) for name, value in found.items()} == {"pixels": 5, "images": 2}
    assert all(value.dtype == torch.float64 for value in found.values())
    weighted = count_normalisers(labels, weights, Settings(IGNORE, CLASS_WEIGHTS.float()))
    assert float(weighted["pixels"]) == 0.5 + 2.0 + 1.5 + 1.5 + 0.0
    assert weighted["pixels"].dtype == torch.float64
    assert {normaliser for _, normaliser in LOSSES.values()} <= found.keys()


# ---- class weights


def test_pixels_are_counted_by_class() -> None:
    labels = np.array([[0, 0, 2], [255, 0, 2]], np.uint8)
    counts = count_pixels(labels, 3) + count_pixels(np.array([[1, 1, 65535]], np.uint16), 3)
    assert counts.pixels.tolist() == [3, 2, 2]
    assert counts.pixels_where_present.tolist() == [5, 2, 5]
    assert counts.images.tolist() == [1, 1, 1]
    assert (counts.ignored, counts.num_images) == (2, 2)


COUNTS = ClassPixels(
    pixels=np.array([600, 300, 100, 0]),
    pixels_where_present=np.array([1000, 1000, 400, 0]),
    images=np.array([2, 2, 1, 0]),
    ignored=7,
    num_images=2,
)


@pytest.mark.parametrize(
    ("scheme", "beta", "raw"),
    [
        ("inverse", 0.9, [1 / 600, 1 / 300, 1 / 100]),
        # frequencies 0.6, 0.3 and 0.25; their median is 0.3
        ("median_frequency", 0.9, [0.3 / 0.6, 1.0, 0.3 / 0.25]),
        ("effective_number", 0.99, [0.01 / (1 - 0.99**600), 0.01 / (1 - 0.99**300), 0.01 / (1 - 0.99**100)]),
        ("effective_number", 0.0, [1.0, 1.0, 1.0]),
    ],
)
def test_class_weights_by_hand(scheme: str, beta: float, raw: list[float]) -> None:
    weights = balance(scheme, COUNTS, beta)  # type: ignore[arg-type]
    expected = np.array([*raw, 0.0]) / np.mean(raw)
    assert weights == pytest.approx(expected, rel=1e-12)
    assert weights[:3].mean() == pytest.approx(1)


def test_effective_number_of_many_pixels_keeps_its_digits() -> None:
    counts = ClassPixels(np.array([10**9, 10]), np.array([10**9, 10]), np.array([1, 1]), 0, 1)
    weights = balance("effective_number", counts, 0.999999)
    # (1 - beta^n) for n = 10 and beta = 1 - 1e-6 is n * 1e-6 * (1 - 4.5e-6)
    assert weights[1] / weights[0] == pytest.approx(1 / (10 * 1e-6 * (1 - 4.5e-6)), rel=1e-6)
