from __future__ import annotations

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from raysseg.config import LOSS_TERMS, Loss
from raysseg.losses import (
    LOSSES,
    ClassPixels,
    Settings,
    balance,
    boundary,
    count_normalisers,
    count_pixels,
    dice,
    lovasz,
    ohem,
    squared_distances,
    tversky,
)
from raysseg.models.base import Targets
from raysseg.models.dense import DenseLoss
from raysseg.schema import ClassMap

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


def test_tversky_is_smps() -> None:
    logits, labels, weights = example(batch=1)
    peer = smp.losses.TverskyLoss("multiclass", ignore_index=IGNORE, alpha=0.3, beta=0.7)
    assert len(labels.unique()) == 5  # smp averages over classes that are absent too: here none is
    torch.testing.assert_close(tversky(logits, labels, weights, SETTINGS), peer(logits, labels), rtol=1e-6, atol=0)


def test_tversky_of_halves_is_dice() -> None:
    logits, labels, weights = example()
    settings = Settings(IGNORE, loss=Loss(tversky_alpha=0.5, tversky_beta=0.5))
    torch.testing.assert_close(tversky(logits, labels, weights, settings), dice(logits, labels, weights, SETTINGS))


def test_tversky_by_hand() -> None:
    """Two pixels of class 0, one of class 1, nothing of class 2: 0.9, 0.2 and 0.3 for class 0, the rest for class 1."""
    labels = torch.tensor([[[0, 0, 1, IGNORE]]])
    p = torch.tensor([0.9, 0.2, 0.3, 0.5], dtype=torch.float64)
    logits = torch.stack([p, 1 - p, torch.zeros_like(p)]).log().clamp(min=-1e3)[None, :, None]
    settings = Settings(IGNORE, loss=Loss(tversky_alpha=0.1, tversky_beta=2.0, tversky_gamma=0.75))
    index_0 = 1.1 / (1.1 + 0.1 * 0.3 + 2.0 * 0.9)
    index_1 = 0.7 / (0.7 + 0.1 * 0.9 + 2.0 * 0.3)
    expected = ((1 - index_0) ** 0.75 + (1 - index_1) ** 0.75) / 2
    assert float(tversky(logits, labels, torch.ones(1), settings)) == pytest.approx(expected, rel=1e-12)


def test_lovasz_is_smps() -> None:
    logits, labels, weights = example()
    labels[1][labels[1] == 2] = IGNORE  # class 2 is absent from the second image
    peer = smp.losses.LovaszLoss("multiclass", per_image=True, ignore_index=IGNORE)
    losses = [term("lovasz", SETTINGS, logits, labels, weights), peer(logits.float(), labels).double()]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses), rtol=1e-4, atol=1e-7)


def test_lovasz_of_certain_predictions_is_1_minus_iou() -> None:
    _, labels, weights = example()
    predicted = labels.roll(1, 2).clamp(max=3)
    logits = F.one_hot(predicted, 4).movedim(-1, 1) * 100.0
    expected = 0.0
    for truth, guess in zip(labels, predicted, strict=True):
        valid = truth != IGNORE
        pairs = [((truth == c) & valid, (guess == c) & valid) for c in truth[valid].unique()]
        expected += float(np.mean([1 - float((a & b).sum() / (a | b).sum()) for a, b in pairs]))
    assert float(lovasz(logits, labels, weights, SETTINGS)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.1, 0.3), (0.4, 0.1), (1.0, 0.1), (0.01, 1.0)])
def test_ohem_is_a_plain_loop(threshold: float, min_kept: float, class_weights: Tensor | None) -> None:
    logits, labels, weights = example()
    expected, num_kept = 0.0, 0
    for p, truth in zip(logits.detach().softmax(1), labels, strict=True):
        places = [(int(c), y, x) for (y, x), c in np.ndenumerate(truth.numpy()) if c != IGNORE]
        share = {c: 1.0 if class_weights is None else float(class_weights[c]) for c in range(4)}
        pixels = sorted((float(p[place]), share[place[0]]) for place in places if share[place[0]] > 0)
        at_least = math.ceil(min_kept * len(pixels))
        kept = [pixel for i, pixel in enumerate(pixels) if pixel[0] < threshold or i < at_least]
        expected += sum(-math.log(p) * w for p, w in kept) / sum(w for _, w in kept)
        num_kept += len(kept)
    settings = Settings(IGNORE, class_weights, Loss(ohem_threshold=threshold, ohem_min_kept=min_kept))
    assert float(ohem(logits.detach(), labels, weights, settings)) == pytest.approx(expected, rel=1e-12)
    assert 0 < num_kept <= (labels != IGNORE).sum()


def scenes(num_classes: int = 4, size: tuple[int, int] = (37, 52)) -> Tensor:
    """Labels of blocks: whole, strewn with ignored pixels, ignored but for a few, of one class."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, num_classes, (4, 5, 6)), np.ones((1, 8, 9), int))[:, : size[0], : size[1]]
    for i, share in enumerate((0.0, 0.3, 0.97)):
        blocks[i][rng.random(size) < share] = IGNORE
    blocks[3] = 1
    return torch.from_numpy(blocks)


def scipys_squares(truth: np.ndarray) -> np.ndarray:
    squares = np.full(truth.shape, np.inf)
    for c in np.unique(truth[truth != IGNORE]):
        others = (truth != c) & (truth != IGNORE)
        if others.any():
            squares[truth == c] = distance_transform_edt(~others)[truth == c] ** 2
    return squares


@pytest.mark.parametrize("reach", [1, 4, 15, 126])
def test_squared_distances_are_scipys(reach: int) -> None:
    labels = scenes()
    for found, truth in zip(squared_distances(labels, IGNORE, reach).numpy(), labels.numpy(), strict=True):
        expected, is_valid = scipys_squares(truth), truth != IGNORE
        is_near = is_valid & (expected <= reach**2)
        np.testing.assert_allclose(found[is_near], expected[is_near], atol=1e-9)
        assert (found[is_valid & ~is_near] > reach**2).all()


def test_squared_distances_tell_many_classes_apart() -> None:
    labels = torch.tensor([[[299, 299, 298, IGNORE, 44, 44]]])  # 44 is 300 in eight bits
    assert squared_distances(labels, IGNORE, 3)[0, 0, [0, 1, 2, 4, 5]].tolist() == [4, 1, 1, 4, 9]


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_boundary_is_cross_entropy_under_u_nets_map(class_weights: Tensor | None) -> None:
    labels, sigma = scenes(), 2.5
    logits = torch.randn(4, 4, *labels.shape[1:], dtype=torch.float64)
    squares = np.stack([scipys_squares(truth) for truth in labels.numpy()])
    nearness = torch.from_numpy(np.where(squares <= (3 * sigma) ** 2, np.exp(-squares / (2 * sigma**2)), 0))
    losses = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE, reduction="none")
    found = boundary(logits, labels, torch.ones(4), Settings(IGNORE, class_weights, Loss(boundary_sigma=sigma)))
    torch.testing.assert_close(found, (nearness * losses).sum())
    assert 0.05 < float((nearness > 0).double().mean()) < 0.9


# ---- all terms


def test_every_term_has_a_weight_in_the_job() -> None:
    assert LOSS_TERMS.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_matter_to_the_terms_that_take_them(name: str) -> None:
    logits, labels, weights = example()
    plain, weighted = (term(name, Settings(IGNORE, w), logits, labels, weights) for w in (None, CLASS_WEIGHTS))
    assert (plain != weighted) == LOSS_TERMS[name].takes_class_weights


@pytest.mark.parametrize("name", LOSSES)
def test_classes_in_another_order_give_the_same_loss(name: str) -> None:
    logits, labels, weights = example()
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.where(labels == IGNORE, IGNORE, order.argsort()[labels.clamp(max=3)])
    found = term(name, Settings(IGNORE, CLASS_WEIGHTS[order]), logits[:, order], renamed, weights)
    torch.testing.assert_close(found, term(name, Settings(IGNORE, CLASS_WEIGHTS), logits, labels, weights))


@pytest.mark.parametrize("name", [name for name, (_, normaliser) in LOSSES.items() if normaliser == "images"])
def test_rows_of_weight_0_are_left_out(name: str) -> None:
    logits, labels, weights = example()
    weights[1] = 0
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(
        term(name, SETTINGS, logits, labels, weights), term(name, SETTINGS, logits[kept], labels[kept], weights[kept])
    )


@pytest.mark.parametrize("loss", [Loss(), Loss(focal_gamma=0.5, tversky_gamma=0.5)])
@pytest.mark.parametrize("name", LOSSES)
def test_certainty_has_a_finite_gradient(name: str, loss: Loss) -> None:
    _, labels, weights = example()
    for answer in (labels, labels.roll(1, 2)):  # all right; mostly wrong
        logits = (F.one_hot(answer.clamp(max=3), 4).movedim(-1, 1) * 1e4).float().requires_grad_()
        value = term(name, Settings(IGNORE, loss=loss), logits, labels, weights.float())
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_class_leaves_nothing_to_learn(name: str) -> None:
    logits, labels, weights = example(num_classes=1)
    value = term(name, SETTINGS, logits, labels, weights)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert (torch.autograd.grad(value, logits)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_before_the_losses(dtype: torch.dtype) -> None:
    """In float16 the sum over these pixels would be infinite."""
    classes = ClassMap((0, 1, 2), ("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 99, 99)), (False,) * 3)
    criterion = DenseLoss(classes, Loss(**dict.fromkeys(LOSSES, 1.0)))  # type: ignore[arg-type]
    labels = torch.randint(0, 3, (2, 192, 192), generator=torch.Generator().manual_seed(0))
    targets = Targets(labels, torch.ones(2), torch.zeros(2, dtype=torch.int64))
    logits = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", dtype):
        found = criterion(logits, targets, None)
    expected = criterion(logits.float(), targets, None)
    assert found.keys() == LOSSES.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


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
    assert float(loss.detach()) == 0
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
