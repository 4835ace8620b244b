from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_for_object_detection import ForSegmentationLoss, generalized_box_iou
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import (
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
)

from raysseg.config import Inference
from raysseg.models import queries
from raysseg.models.base import Regions, Targets
from raysseg.models.queries import Factors, Queries, SetLoss, Settings
from raysseg.schema import ClassMap

COLOURS = tuple((i, i, i) for i in range(4))
CLASSES = ClassMap((1, 2, 3, 4), ("car", "dog", "sky", "grass"), COLOURS, (True, True, False, False))
DETR = Settings(Factors(1, l1=5, giou=2), Factors(1, 1, 1, 5, 2), "focal")
MASK2FORMER = Settings(Factors(2, 5, 5), Factors(2, 5, 5), "cross_entropy", num_points=64)
RFDETR = Settings(Factors(2, 5, 5, 5, 2), Factors(1, 5, 5, 5, 2), "cross_entropy", 64, class_loss="iou_aware")
WEIGHTS = [0.5, 2.0, 1.0, 1.5]
SIZE = (12, 16)
NUM_QUERIES = 6


def regions_of(labels: Tensor, seed: int, most: int) -> Regions:
    """Up to so many rectangles, cut to where there are labels; they may overlap."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(most):
        y, x = rng.integers(0, 8, 2)
        mask = torch.zeros(SIZE, dtype=torch.bool)
        mask[y : y + rng.integers(2, 5), x : x + rng.integers(2, 9)] = True
        mask &= labels != CLASSES.ignore
        if mask.any():
            masks.append(mask)
    stacked = torch.stack(masks) if masks else torch.zeros(0, *SIZE, dtype=torch.bool)
    return Regions(stacked, torch.from_numpy(rng.integers(0, 4, len(masks))))


def make_targets(num: int = 5) -> Targets:
    """Images of 3, 0, 8, 2 and 4 regions; a third of the first is ignored, and the last does not count."""
    labels = torch.full((num, *SIZE), CLASSES.nothing)
    labels[0, :, 11:] = CLASSES.ignore
    regions = tuple(regions_of(labels[i], i, most) for i, most in zip(range(num), (3, 0, 8, 2, 4), strict=False))
    weights = torch.ones(num)
    weights[4:] = 0
    return Targets(labels, weights, torch.arange(num) + 7, regions)


def make_layers(num: int = 5, num_layers: int = 2, seed: int = 0, num_queries: int = NUM_QUERIES) -> list[Queries]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num, num_queries, *shape, generator=generator, dtype=torch.float64)

    return [Queries(2 * draw(5), 2 * draw(6, 8), (draw(4) / 2).sigmoid()) for _ in range(num_layers)]


def rows_of(targets: Targets, rows: slice) -> Targets:
    assert targets.regions is not None
    return Targets(targets.labels[rows], targets.weights[rows], targets.seeds[rows], targets.regions[rows])


def criterion(settings: Settings, class_weights: list[float] | None = None, num_queries: int = NUM_QUERIES) -> SetLoss:
    return SetLoss(CLASSES, num_queries, settings, class_weights).double()


def leaves(layers: list[Queries]) -> list[Tensor]:
    """The tensors of all layers, wanting gradients."""
    found = [x for layer in layers for x in (layer.class_logits, layer.mask_logits, layer.boxes) if x is not None]
    return [x.requires_grad_() for x in found]


def to_float(layer: Queries) -> Queries:
    assert layer.mask_logits is not None
    assert layer.boxes is not None
    return Queries(layer.class_logits.float(), layer.mask_logits.float(), layer.boxes.float())


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# ---- targets


def test_labels_alone_give_a_region_a_class() -> None:
    labels = torch.full((2, 3, 4), CLASSES.ignore)
    labels[0, 0], labels[0, 1] = 2, 0
    first, second = queries.to_regions(Targets(labels, torch.ones(2), torch.zeros(2)), CLASSES)
    assert first.class_ids.tolist() == [0, 2]
    assert (first.masks == torch.stack([labels[0] == 0, labels[0] == 2])).all()
    assert len(second.class_ids) == 0
    assert second.masks.shape == (0, 3, 4)


def test_boxes_end_beyond_the_last_pixel() -> None:
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    assert Regions(masks, torch.arange(len(masks))).boxes.tolist() == [[2, 1, 6, 3], [0, 4, 1, 5]]


def test_too_many_regions_lose_the_smallest() -> None:
    masks = torch.zeros(4, 3, 4, dtype=torch.bool)
    for i, area in enumerate((2, 5, 1, 5)):
        masks[i].view(-1)[:area] = True
    kept = queries.largest(Regions(masks, torch.arange(4)), 3)
    assert kept.class_ids.tolist() == [0, 1, 3]
    assert (kept.masks == masks[[0, 1, 3]]).all()


# ---- the loss


def test_normalisers_are_counted_by_hand() -> None:
    targets = make_targets()
    assert targets.regions is not None
    numbers = [len(regions.class_ids) for regions in targets.regions]
    assert numbers[1] == 0
    assert numbers[2] > NUM_QUERIES
    found = criterion(DETR, WEIGHTS).normalisers(targets)
    expected_queries = 0.0
    for regions in targets.regions[:4]:
        order = sorted(range(len(regions.class_ids)), key=lambda i: -int(regions.masks[i].sum()))[:NUM_QUERIES]
        matched = [WEIGHTS[int(regions.class_ids[i])] for i in order]
        expected_queries += sum(matched) + 0.1 * (NUM_QUERIES - len(matched))
    assert float(found["regions"]) == numbers[0] + NUM_QUERIES + numbers[3]
    assert float(found["queries"]) == pytest.approx(expected_queries, rel=1e-6)
    assert all(value.dtype == torch.float64 for value in found.values())


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("settings", [DETR, MASK2FORMER, RFDETR])
def test_parts_of_a_batch_add_up_to_the_whole(settings: Settings, class_weights: list[float] | None) -> None:
    num_groups = 2 if settings is RFDETR else 1
    targets, layers = make_targets(), make_layers(num_queries=num_groups * NUM_QUERIES)
    loss, inputs = criterion(settings, class_weights), leaves(layers)
    whole = loss(layers, targets, None)
    expected = torch.autograd.grad(total(whole), inputs, allow_unused=True, materialize_grads=True)
    normalisers = loss.normalisers(targets)
    counted = [loss.normalisers(rows_of(targets, rows)) for rows in (slice(0, 1), slice(1, 4), slice(4, 5))]
    for name, value in normalisers.items():
        torch.testing.assert_close(sum(part[name] for part in counted), value)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        some = [Queries(x.class_logits[rows], x.mask_logits[rows], x.boxes[rows]) for x in layers]
        parts.append(loss(some, rows_of(targets, rows), normalisers))
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(), value, rtol=1e-12, atol=1e-15)
    split = torch.stack([total(part) for part in parts]).sum()
    found = torch.autograd.grad(split, inputs, allow_unused=True, materialize_grads=True)
    assert max(float(x.abs().max()) for x in expected) > 1e-3
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("settings", [DETR, MASK2FORMER, RFDETR])
def test_ignored_pixels_have_no_part(settings: Settings) -> None:
    """The right third of the first image; its masks there are as good as any."""
    targets, layers = rows_of(make_targets(), slice(0, 1)), make_layers(num=1, num_layers=1)
    masks = F.interpolate(layers[0].mask_logits, SIZE).requires_grad_()  # type: ignore[arg-type]
    layers = [replace(layers[0], mask_logits=masks)]
    losses = criterion(settings)(layers, targets, None)
    (gradient,) = torch.autograd.grad(losses["masks"] + losses["dice"], masks)
    assert not gradient[..., 11:].any()
    assert gradient[..., :11].any()
    changed = masks.detach().clone()
    changed[..., 11:] = 9.0
    again = criterion(settings)([replace(layers[0], mask_logits=changed)], targets, None)
    torch.testing.assert_close(again, {name: value.detach() for name, value in losses.items()}, rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", [DETR, MASK2FORMER, RFDETR])
def test_images_without_labels_or_weight_have_no_part(settings: Settings) -> None:
    targets = make_targets(1)
    unlabelled = replace(targets, labels=torch.full_like(targets.labels, CLASSES.ignore))
    for empty in (replace(targets, weights=torch.zeros(1)), unlabelled):
        layers = make_layers(1)
        inputs = leaves(layers)
        losses = criterion(settings)(layers, empty, None)
        assert all(float(value.detach()) == 0 for value in losses.values())
        gradients = torch.autograd.grad(total(losses), inputs, allow_unused=True, materialize_grads=True)
        assert not any(x.any() for x in gradients)
        assert all(float(value) == 0 for value in criterion(settings).normalisers(empty).values())


def test_no_region_at_all_still_reaches_every_output() -> None:
    """So that no parameter is left without a gradient."""
    layers = make_layers(1, num_layers=1)
    inputs = leaves(layers)
    losses = criterion(DETR)(layers, rows_of(make_targets(), slice(1, 2)), None)
    classes, masks, boxes = torch.autograd.grad(total(losses), inputs)
    assert classes.any()
    assert not masks.any()
    assert not boxes.any()
    assert [name for name, value in losses.items() if value != 0] == ["classes"]


def test_layers_add_up() -> None:
    targets, (first, second) = make_targets(), make_layers()
    loss = criterion(MASK2FORMER)
    both, one, other = (loss(layers, targets, None) for layers in ([first, second], [first], [second]))
    torch.testing.assert_close(both, {name: one[name] + other[name] for name in both})


def test_points_follow_from_the_seed() -> None:
    targets, layers = make_targets(), make_layers()
    loss = criterion(MASK2FORMER)
    first, again = (loss(layers, targets, None)["masks"] for _ in range(2))
    others = loss(layers, replace(targets, seeds=targets.seeds + 1), None)["masks"]
    assert first == again != others


def test_a_model_that_gives_nan_is_named() -> None:
    layers = make_layers()
    layers[0].class_logits[0, 0, 0] = torch.nan
    with pytest.raises(AssertionError, match="NaN or infinity"):
        criterion(DETR)(layers, make_targets(), None)


def test_detr_terms_are_those_of_transformers() -> None:
    """Where every pixel counts and no class has a weight of its own, with auxiliary layers; theirs takes fp32 alone."""
    targets = make_targets(4)
    targets.labels[:] = CLASSES.nothing
    layers = [to_float(layer) for layer in make_layers(4, num_layers=3, num_queries=9)]
    layers[:2] = [replace(layer, mask_logits=None) for layer in layers[:2]]
    found = SetLoss(CLASSES, 9, DETR)(layers, targets, None)
    assert targets.regions is not None
    width_height = torch.tensor([16.0, 12.0, 16.0, 12.0])
    labels = []
    for regions in targets.regions:
        corners = regions.boxes / width_height
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        labels.append({"class_labels": regions.class_ids, "masks": regions.masks, "boxes": boxes})
    config = SimpleNamespace(
        class_cost=1, bbox_cost=5, giou_cost=2, num_labels=4, eos_coefficient=0.1, auxiliary_loss=True, decoder_layers=3
    )
    for term, factor in (("bbox", 5), ("giou", 2), ("mask", 1), ("dice", 1)):
        setattr(config, f"{term}_loss_coefficient", factor)
    last = layers[-1]
    outputs = [torch.stack([getattr(layer, name) for layer in layers]) for name in ("class_logits", "boxes")]
    expected, terms, _ = ForSegmentationLoss(
        last.class_logits, labels, "cpu", last.boxes, last.mask_logits, config, *outputs
    )
    torch.testing.assert_close(total(found), expected, check_dtype=False)
    torch.testing.assert_close(found["masks"], terms["loss_mask"], check_dtype=False)
    torch.testing.assert_close(found["dice"], terms["loss_dice"], check_dtype=False)
    boxes = 5 * sum(terms[f"loss_bbox{end}"] for end in ("", "_0", "_1"))
    torch.testing.assert_close(found["l1"], boxes, check_dtype=False)


def test_giou_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(n, 2, 2, generator=generator).sort(1).values.flatten(1) for n in (5, 7))
    torch.testing.assert_close(queries.giou(first[:, None], second), generalized_box_iou(first, second))
    boxes = torch.tensor([[0.3, 0.3, 0.3, 0.3]])
    assert queries.giou(boxes, boxes).isfinite().all()


def test_matching_is_the_best_of_all_permutations() -> None:
    """Class, cross-entropy and Dice at the points, which here are all pixels' centres; against transformers' costs."""
    layer = make_layers(1, num_layers=1, num_queries=5)[0]
    assert layer.mask_logits is not None
    layer = replace(layer, mask_logits=F.interpolate(layer.mask_logits, SIZE, mode="bilinear"))
    targets = make_targets()
    assert targets.regions is not None
    regions = targets.regions[0]
    loss = criterion(MASK2FORMER, num_queries=5)
    truths = loss._truths(rows_of(targets, slice(0, 1)))
    grid = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(12), indexing="xy"), -1).view(-1, 2)
    points = ((grid + 0.5) / torch.tensor([16, 12])).double()
    settings = replace(MASK2FORMER, num_points=len(points))
    ((pairs,),) = queries.match([layer], truths, points[None], settings, 5)
    is_valid = targets.labels[0] != CLASSES.ignore
    logits, masks = layer.mask_logits[0][:, is_valid], regions.masks[:, is_valid].double()
    costs = -2 * layer.class_logits[0].softmax(-1)[:, regions.class_ids]
    costs += 5 * pair_wise_sigmoid_cross_entropy_loss(logits, masks) + 5 * pair_wise_dice_loss(logits, masks)
    num = len(regions.class_ids)
    best = min(permutations(range(5), num), key=lambda chosen: float(costs[list(chosen), range(num)].sum()))
    assert dict(zip(pairs.regions.tolist(), pairs.queries.tolist(), strict=True)) == dict(enumerate(best))


def test_groups_are_matched_for_themselves_at_the_focal_cost() -> None:
    """Against transformers' matching of LW-DETR, which looks at no masks."""
    layer = make_layers(4, num_layers=1, num_queries=18)[0]
    targets = make_targets(4)
    settings = replace(RFDETR, costs=Factors(2, l1=5, giou=2))
    truths = criterion(settings, num_queries=9)._truths(targets)
    (pairs,) = queries.match([layer], truths, torch.zeros(4, 0, 2), settings, 9)
    labels = [{"class_labels": truth.class_ids, "boxes": truth.boxes} for truth in truths]
    matcher = LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    expected = matcher({"logits": layer.class_logits, "pred_boxes": layer.boxes}, labels, group_detr=2)
    assert [len(pair.queries) for pair in pairs] == [6, 0, 16, 4]
    for pair, (chosen, regions) in zip(pairs, expected, strict=True):
        assert pair.queries.tolist() == chosen.tolist()
        assert pair.regions.tolist() == regions.tolist()


def test_groups_are_averaged() -> None:
    targets, layers = make_targets(), make_layers()
    twice = [
        Queries(*(torch.cat([x, x], 1) for x in (layer.class_logits, layer.mask_logits, layer.boxes) if x is not None))
        for layer in layers
    ]
    loss = criterion(RFDETR)
    torch.testing.assert_close(total(loss(twice, targets, None)), total(loss(layers, targets, None)))


def test_points_are_where_masks_are_uncertain() -> None:
    """A mask that is sure but for one half: three quarters of the points lie there, and some of the rest."""
    logits = torch.full((1, 8, 8), 20.0)
    logits[..., 4:] = 0
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    truth = queries._Truth(torch.tensor([0]), nothing, ~nothing[0], torch.zeros(1, 4))
    points = queries._draw_points(torch.tensor([3]), 400)[0]
    assert len(points) == 3 * 400 + 100
    settings = replace(MASK2FORMER, num_points=400)
    mean, _ = queries._point_mask_terms(logits, truth, torch.tensor([0]), points, settings)
    uncertain = (0.75 + 0.25 / 2) * np.log(2)  # log 2 there, 20 elsewhere, something between at the edge
    assert float(mean) == pytest.approx(uncertain + 0.125 * 20, rel=0.25)


# ---- decoding


def make_outputs(num_queries: int = 12, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Class logits (1, Q, C + 1) and blobs of mask logits (1, Q, 384, 384), the size that transformers works at."""
    generator = torch.Generator().manual_seed(5)
    class_logits = 3 * torch.randn(1, num_queries, num_classes + 1, generator=generator)
    coarse = 4 * torch.randn(1, num_queries, 5, 5, generator=generator)
    return class_logits, F.interpolate(coarse, (384, 384), mode="bilinear")


def processed(kind: str, class_logits: Tensor, mask_logits: Tensor, **options: object) -> object:
    outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
    return getattr(Mask2FormerImageProcessorPil(), f"post_process_{kind}_segmentation")(outputs, **options)[0]


def test_semantic_is_that_of_transformers() -> None:
    class_logits, mask_logits = make_outputs()
    found = queries.decode_semantic(class_logits[0], mask_logits[0], (384, 384), CLASSES)
    expected = processed("semantic", class_logits, mask_logits)
    assert (found.labels == np.asarray(expected)).mean() > 0.9999
    assert len(np.unique(found.labels)) > 2


def test_instances_are_those_of_transformers() -> None:
    things = replace(CLASSES, things=(True,) * 4)
    class_logits, mask_logits = make_outputs()
    found = queries.decode_instances(
        class_logits[0], mask_logits[0], (384, 384), things, Inference(score_threshold=0.1, max_instances=12)
    )
    expected = processed("instance", class_logits, mask_logits, threshold=0.1, return_binary_maps=True)
    rows = sorted(expected["segments_info"], key=lambda row: -row["score"])  # type: ignore[index]
    assert len(found) == len(rows) > 3
    assert found.scores == pytest.approx([row["score"] for row in rows], abs=2e-6)
    assert found.class_ids.tolist() == [row["label_id"] for row in rows]
    for mask, row in zip(found.masks, rows, strict=True):
        assert (mask == np.asarray(expected["segmentation"][row["id"]]).astype(bool)).mean() > 0.9999  # type: ignore[index]


def test_panoptic_is_that_of_transformers() -> None:
    """Where it does as the authors: every pixel within its mask, and things alone. It weighs masks before it cuts them,
    keeps pixels outside of them, and gives one number to two segments where stuff is merged."""
    things = replace(CLASSES, things=(True,) * 4)
    class_logits, mask_logits = make_outputs()
    inference = Inference(score_threshold=0.4, overlap_threshold=0, mask_threshold=0)
    found = queries.decode_panoptic(class_logits[0], mask_logits[0], (384, 384), things, inference)
    options = {"threshold": 0.4, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0, "label_ids_to_fuse": set()}
    expected = processed("panoptic", class_logits, mask_logits, **options)
    assert (found.numbers == np.asarray(expected["segmentation"])).mean() > 0.9999  # type: ignore[index]
    rows = expected["segments_info"]  # type: ignore[index]
    assert len(rows) > 3
    assert found.class_ids.tolist() == [row["label_id"] for row in rows]
    assert found.scores == pytest.approx([row["score"] for row in rows], abs=1e-6)


def maskformers(class_logits: Tensor, masks: Tensor, inference: Inference) -> tuple[Tensor, list[int]]:
    """The authors' panoptic inference, all masks (Q, H, W) at once."""
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != len(CLASSES)) & (scores > inference.score_threshold)
    scores, labels, masks = scores[kept], labels[kept], masks[kept].sigmoid()
    winners = (scores[:, None, None] * masks).argmax(0)
    numbers, found, stuff = torch.zeros(masks.shape[1:], dtype=torch.int64), [], {}
    for k, label in enumerate(labels.tolist()):
        won, inside = winners == k, masks[k] >= 0.5
        if (won & inside).any() and won.sum() / inside.sum() >= inference.overlap_threshold:
            if label not in stuff:
                found.append(label)
                if not CLASSES.things[label]:
                    stuff[label] = len(found)
            numbers[won & inside] = stuff.get(label, len(found))
    return numbers, found


@pytest.mark.parametrize(("overlap", "num_segments"), [(0.0, 10), (0.4, 5)])
def test_panoptic_is_the_authors(overlap: float, num_segments: int) -> None:
    class_logits, mask_logits = make_outputs(20)
    mask_logits = mask_logits[0] - 3  # fewer that overlap
    inference = Inference(score_threshold=0.4, overlap_threshold=overlap)
    found = queries.decode_panoptic(class_logits[0], mask_logits, (384, 384), CLASSES, inference)
    numbers, class_ids = maskformers(class_logits[0], mask_logits, inference)
    assert (found.numbers == numbers.numpy()).mean() > 0.9999
    assert found.class_ids.tolist() == class_ids
    assert len(class_ids) == num_segments


def test_stuff_is_merged() -> None:
    """Two queries of sky, left and right, a car between their rows, and grass that is wholly covered."""
    class_logits = torch.full((4, 5), -20.0)
    class_logits[[0, 1, 2, 3], [2, 2, 0, 3]] = torch.tensor([10.0, 20.0, 20.0, -19.0])
    mask_logits = torch.full((4, 6, 6), -9.0)
    mask_logits[0, :3, :3] = mask_logits[1, :3, 3:] = mask_logits[2, 4:] = mask_logits[3, 4:] = 9.0
    inference = Inference(score_threshold=0.1)
    found = queries.decode_panoptic(class_logits, mask_logits, (6, 6), CLASSES, inference)
    assert found.class_ids.tolist() == [2, 0]
    assert found.numbers.tolist() == [[1] * 6] * 3 + [[0] * 6] + [[2] * 6] * 2
    assert found.scores == pytest.approx([1, 1], abs=1e-6)


def test_instances_are_things_alone_and_a_query_may_be_of_two_classes() -> None:
    class_logits = torch.tensor([[2.0, 1.9, -9, -9, -9], [-9, -9, 5.0, -9, -9]])
    mask_logits = torch.full((2, 4, 4), -5.0)
    mask_logits[:, :2] = 5.0
    found = queries.decode_instances(class_logits, mask_logits, (4, 4), CLASSES, Inference(score_threshold=0.1))
    assert found.class_ids.tolist() == [0, 1]
    first, second = found.masks
    assert (first == second).all()
    assert first[:2].all()
    assert not first[2:].any()
    assert found.scores == pytest.approx(class_logits[0].softmax(0)[:2].numpy() * 1 / (1 + np.exp(-5)), abs=1e-6)


def test_nothing_found_gives_empty_views() -> None:
    class_logits = torch.tensor([[0.0, 0, 0, 0, 50]])
    empty_mask = torch.full((1, 4, 4), -50.0)
    inference = Inference(score_threshold=0.3)
    segments = queries.decode_panoptic(class_logits, -empty_mask, (6, 5), CLASSES, inference)
    assert (len(segments), segments.numbers.shape, segments.numbers.any()) == (0, (6, 5), False)
    sure = torch.tensor([[50.0, 0, 0, 0, 0]])
    for logits, mask in ((class_logits, -empty_mask), (sure, empty_mask)):
        assert len(queries.decode_instances(logits, mask, (6, 5), CLASSES, inference)) == 0
    assert len(queries.decode_panoptic(sure, empty_mask, (6, 5), CLASSES, inference)) == 0
