"""What models that predict a set of queries share: matching, losses, decoding (Carion et al. 2020; Cheng et al. 2022).

A query is a class, a mask and, in some models, a box; most queries stand for nothing. Each region of the truth is
matched with one query, which learns from it; in models that train several groups of queries side by side, with one of
each group (Group DETR, Chen et al. 2023). Losses are sums over regions or queries, divided by what the whole global
batch holds of them, so that the gradient does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysseg import rle
from raysseg.config import Inference
from raysseg.masks import IdMap, LabelMap, MaskSet, SegmentMap, View
from raysseg.models.base import Outputs, Regions, Targets
from raysseg.schema import ClassMap, Task

CHUNK = 8  # masks that are scaled to full size at once
WIDE_CHUNK = 64  # full-size targets that are looked at in floating point at once


@dataclass(frozen=True)
class Queries:
    """What one decoder layer predicts.

    Attributes:
        class_logits: (B, Q, C + 1), the last of which means no object; (B, Q, C) where each class is for itself. Of G
            groups of queries there are G * Q, one group after the other.
        mask_logits: (B, Q, h, w); None where the layer has no masks.
        boxes: (B, Q, 4) centre x, centre y, width, height in [0, 1]; None where the model has no boxes.
    """

    class_logits: Tensor
    mask_logits: Tensor | None = None
    boxes: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """What each term counts for; 0 leaves it out."""

    classes: float = 1.0
    masks: float = 0.0
    dice: float = 0.0
    l1: float = 0.0
    giou: float = 0.0


@dataclass(frozen=True)
class Settings:
    """How a family matches and learns.

    Attributes:
        costs: of matching; those of masks are cross-entropy and Dice at points.
        factors: of the loss.
        mask_loss: sigmoid focal (alpha 0.25, gamma 2) or cross-entropy.
        num_points: points at which matching and the mask losses look (Cheng et al. 2022, section 3.3); None: matching
            looks at no masks, and the losses at every pixel, to which the masks are scaled.
        no_object: weight of the class "no object".
        class_loss: cross-entropy over the classes and "no object"; or "iou_aware", a binary cross-entropy for each
            class by itself, whose positive targets follow from the boxes (Cai et al. 2023, as in LW-DETR, Chen et al.
            2024): it divides by regions, matches at the focal cost, and needs boxes.
    """

    costs: Factors
    factors: Factors
    mask_loss: Literal["focal", "cross_entropy"]
    num_points: int | None = None
    no_object: float = 0.1
    class_loss: Literal["cross_entropy", "iou_aware"] = "cross_entropy"


OVERSAMPLING = 3  # points are chosen among so many times as many
IMPORTANCE = 0.75  # this share of them where the mask is least certain


# --- targets ------------------------------------------------------------------------------------------------------


def to_regions(targets: Targets, classes: ClassMap) -> tuple[Regions, ...]:
    """The regions of each image; where there are labels alone, each class that they hold is one."""
    if targets.regions is not None:
        return targets.regions
    return tuple(_class_regions(labels, len(classes)) for labels in targets.labels)


def _class_regions(labels: Tensor, num_classes: int) -> Regions:
    found = torch.unique(labels)
    found = found[found < num_classes]
    return Regions(labels == found[:, None, None], found)


@dataclass(frozen=True)
class _Truth:
    """One image's targets, ready for matching.

    Attributes:
        class_ids: (N,).
        masks: (N, H, W) bool.
        is_valid: (H, W) bool, pixels that count.
        boxes: (N, 4) centre x, centre y, width, height in [0, 1].
    """

    class_ids: Tensor
    masks: Tensor
    is_valid: Tensor
    boxes: Tensor


def largest(regions: Regions, most: int) -> Regions:
    """The regions, or the largest so many of them, in their order."""
    if len(regions.class_ids) <= most:
        return regions
    areas = regions.masks.flatten(1).sum(1)
    kept = areas.argsort(descending=True, stable=True)[:most].sort().values
    return Regions(regions.masks[kept], regions.class_ids[kept])


# --- the loss -----------------------------------------------------------------------------------------------------


class SetLoss(nn.Module):
    """The terms over matched queries, of all layers together.

    Where an image has more regions than there are queries, its smallest ones are left out. An image that is not
    labelled at all, or whose weight is 0, has no part in any term; elsewhere, pixels that are ignored have none in the
    terms of masks.

    Args:
        classes: of the targets.
        num_queries: of each layer; of each of its groups, where it has several.
        settings: see Settings.
        class_weights: (C,) for the class term, where that is cross-entropy.
    """

    def __init__(
        self, classes: ClassMap, num_queries: int, settings: Settings, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self._classes = classes
        self._num_queries = num_queries
        self._settings = settings
        weights = [1.0] * len(classes) if class_weights is None else list(class_weights)
        self.class_weights: Tensor  # (C + 1,)
        self.register_buffer("class_weights", torch.tensor([*weights, settings.no_object]), persistent=False)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Target regions; for cross-entropy, also queries by the weight of their class; float64 scalars."""
        truths = self._truths(targets)
        by_class = self.class_weights.double()
        num_regions = torch.stack([torch.as_tensor(len(truth.class_ids)) for truth in truths])
        if self._settings.class_loss == "iou_aware":
            return {"regions": num_regions.sum().double().to(by_class.device)}
        matched = torch.stack([by_class[truth.class_ids].sum() for truth in truths])
        rows = _row_weights(targets, self._classes).double()
        num_free = (self._num_queries - num_regions).to(rows.device)
        return {
            "regions": num_regions.sum().double().to(rows.device),
            "queries": (rows * (matched + by_class[-1] * num_free)).sum(),
        }

    def forward(
        self, layers: Sequence[Queries], targets: Targets, normalisers: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """The terms, weighted and divided by their normalisers: `classes`, `masks`, `dice`, `l1`, `giou`.

        Args:
            layers: (B, Q) queries each; each layer is matched for itself, and so is each group of its queries, over
                which the terms are averaged.
            targets: of B images.
            normalisers: of the whole global batch; of these targets if left out.
        """
        normalisers = normalisers or self.normalisers(targets)
        num_regions = normalisers["regions"].clamp(min=1)
        divisors = {"classes": normalisers["queries"].clamp(min=1e-12)} if "queries" in normalisers else {}
        losses: dict[str, Tensor] = {}
        device = targets.labels.device
        with torch.autocast(device.type, enabled=False):
            layers = [_in_full_precision(layer) for layer in layers]
            truths = self._truths(targets)
            points = _draw_points(targets.seeds, self._settings.num_points or 0).to(device)
            weights = _row_weights(targets, self._classes)
            matched = match(layers, truths, points, self._settings, self._num_queries)
            for layer, pairs in zip(layers, matched, strict=True):
                num_groups = layer.class_logits.shape[1] // self._num_queries
                for name, term in self._terms(layer, truths, pairs, points, weights).items():
                    divisor = num_groups * divisors.get(name, num_regions)
                    value = getattr(self._settings.factors, name) * term / divisor
                    losses[name] = losses[name] + value if name in losses else value
        return losses

    def _truths(self, targets: Targets) -> list[_Truth]:
        is_counted = _row_weights(targets, self._classes) > 0
        size = targets.labels.shape[1:]
        scale = torch.tensor([size[1], size[0]] * 2, device=targets.labels.device)
        found = []
        for labels, regions, counts in zip(
            targets.labels, to_regions(targets, self._classes), is_counted.tolist(), strict=True
        ):
            kept = largest(regions, self._num_queries if counts else 0)
            boxes = kept.boxes.to(self.class_weights.dtype) / scale
            found.append(_Truth(kept.class_ids, kept.masks, labels != self._classes.ignore, _to_centres(boxes)))
        return found

    def _terms(
        self, layer: Queries, truths: Sequence[_Truth], pairs: Sequence[Pairs], points: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """One layer's terms as sums."""
        settings = self._settings
        if settings.class_loss == "iou_aware":
            terms = {"classes": _iou_aware_term(layer, truths, pairs, weights)}
        else:
            terms = {"classes": _class_term(layer.class_logits, truths, pairs, weights, self.class_weights)}
        if layer.boxes is not None:
            found = torch.cat([boxes[pair.queries] for boxes, pair in zip(layer.boxes, pairs, strict=True)])
            wanted = torch.cat([truth.boxes[pair.regions] for truth, pair in zip(truths, pairs, strict=True)])
            terms["l1"] = (found - wanted).abs().sum()
            terms["giou"] = (1 - giou(_to_corners(found), _to_corners(wanted))).sum()
        if layer.mask_logits is not None:
            nothing = layer.mask_logits[:, :0].sum()  # keeps the masks in the graph where no region is
            parts = [torch.stack([nothing, nothing])]
            for i, (truth, pair) in enumerate(zip(truths, pairs, strict=True)):
                logits = layer.mask_logits[i, pair.queries]
                if settings.num_points is None:
                    parts += _dense_mask_terms(logits, truth.masks[pair.regions], truth.is_valid, settings.mask_loss)
                elif len(logits):
                    parts.append(_point_mask_terms(logits, truth, pair.regions, points[i], settings))
            terms["masks"], terms["dice"] = torch.stack(parts).sum(0)
        return {name: term for name, term in terms.items() if getattr(settings.factors, name)}


def _row_weights(targets: Targets, classes: ClassMap) -> Tensor:
    """(B,), 0 where an image says nothing."""
    return targets.weights * (targets.labels != classes.ignore).flatten(1).any(1)


def _in_full_precision(layer: Queries) -> Queries:
    """In fp32, or fp64 where it is in that."""
    parts = (layer.class_logits, layer.mask_logits, layer.boxes)
    return Queries(*(x if x is None or x.dtype == torch.float64 else x.float() for x in parts))  # type: ignore[arg-type]


def _class_term(
    logits: Tensor, truths: Sequence[_Truth], pairs: Sequence[Pairs], weights: Tensor, class_weights: Tensor
) -> Tensor:
    """Weighted cross-entropy, summed over all queries of the images that count."""
    wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)
    for row, truth, pair in zip(wanted, truths, pairs, strict=True):
        row[pair.queries] = truth.class_ids[pair.regions]
    losses = F.cross_entropy(logits.transpose(1, 2), wanted, class_weights.to(logits.dtype), reduction="none")  # (B, Q)
    return (losses.sum(1) * weights.to(logits.dtype)).sum()


def _iou_aware_term(layer: Queries, truths: Sequence[_Truth], pairs: Sequence[Pairs], weights: Tensor) -> Tensor:
    """Binary cross-entropy of each class, summed over all queries of the images that count.

    A matched query's class should be as likely as p^0.25 * IoU^0.75 of now; what else is likely counts for p^2.
    """
    assert layer.boxes is not None
    logits = layer.class_logits
    probabilities = logits.sigmoid()
    wanted = torch.zeros_like(logits)
    for i, (truth, pair) in enumerate(zip(truths, pairs, strict=True)):
        chosen = (i, pair.queries, truth.class_ids[pair.regions])
        found = layer.boxes[i, pair.queries].detach()
        overlaps = iou(_to_corners(found), _to_corners(truth.boxes[pair.regions]))
        wanted[chosen] = (probabilities[chosen].detach() ** 0.25 * overlaps**0.75).clamp(min=0.01)
    unwanted = torch.where(wanted > 0, 1 - wanted, probabilities**2)
    losses = -wanted * F.logsigmoid(logits) - unwanted * F.logsigmoid(-logits)
    return (losses.sum((1, 2)) * weights.to(logits.dtype)).sum()


def _dense_mask_terms(
    logits: Tensor, masks: Tensor, is_valid: Tensor, mask_loss: Literal["focal", "cross_entropy"]
) -> Iterator[Tensor]:
    """The mask loss and Dice of an image's pairs, (2,) a chunk of them; full-size maps are made anew for backward."""
    for some, wanted in zip(torch.split(logits, CHUNK), torch.split(masks, CHUNK), strict=True):
        if len(some):
            yield checkpoint(
                _scaled_mask_terms, some, wanted, is_valid, mask_loss, use_reentrant=False, preserve_rng_state=False
            )


def _scaled_mask_terms(
    logits: Tensor, masks: Tensor, is_valid: Tensor, mask_loss: Literal["focal", "cross_entropy"]
) -> Tensor:
    scaled = _resize(logits, (masks.shape[1], masks.shape[2]))[:, is_valid]  # (N, P)
    return _mask_terms(scaled, masks[:, is_valid].to(logits.dtype), torch.ones_like(scaled), mask_loss)


def _point_mask_terms(logits: Tensor, truth: _Truth, regions: Tensor, points: Tensor, settings: Settings) -> Tensor:
    """The mask loss and Dice of an image's pairs at points where the masks are least certain, and at some others, (2,).

    PointRend's choice (Kirillov et al. 2020) as in Mask2Former, but that the regions of an image share the points that
    are chosen from.
    """
    assert settings.num_points is not None
    num_certain = int(IMPORTANCE * settings.num_points)
    with torch.no_grad():
        candidates = points[: OVERSAMPLING * settings.num_points].to(logits.dtype)
        uncertainty = (-sample(logits, candidates).abs()).masked_fill(
            ~_sample_valid(truth.is_valid, candidates), -torch.inf
        )
        chosen = candidates[uncertainty.topk(num_certain, dim=1).indices]  # (N, P, 2)
        others = points[OVERSAMPLING * settings.num_points :].to(logits.dtype)
        chosen = torch.cat([chosen, others.expand(len(logits), -1, -1)], 1)
        parts = zip(torch.split(regions, WIDE_CHUNK), torch.split(chosen, WIDE_CHUNK), strict=True)
        wanted = torch.cat([sample(truth.masks[some].to(logits.dtype), there) for some, there in parts])
        counts = _sample_valid(truth.is_valid, chosen.flatten(0, 1)).view(chosen.shape[:2]).to(logits.dtype)
    return _mask_terms(sample(logits, chosen), wanted, counts, settings.mask_loss)


def _mask_terms(logits: Tensor, wanted: Tensor, counts: Tensor, mask_loss: Literal["focal", "cross_entropy"]) -> Tensor:
    """The mask loss, averaged over the places that count, and the Dice loss, both summed over pairs, (2,).

    Args:
        logits: (N, P).
        wanted: (N, P) in [0, 1].
        counts: (N, P), 0 for places that don't count, else 1.
        mask_loss: see Settings.
    """
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probabilities = logits.sigmoid()
    if mask_loss == "focal":  # Lin et al. 2017
        likely = probabilities * wanted + (1 - probabilities) * (1 - wanted)
        losses = (0.25 * wanted + 0.75 * (1 - wanted)) * (1 - likely) ** 2 * losses
    mean = (losses * counts).sum(1) / counts.sum(1).clamp(min=1)
    overlap = (probabilities * wanted * counts).sum(1)
    total = ((probabilities + wanted) * counts).sum(1)
    return torch.stack([mean.sum(), (1 - (2 * overlap + 1) / (total + 1)).sum()])


# --- matching -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Which query of an image stands for which of its regions, (N,) each."""

    queries: Tensor
    regions: Tensor


@torch.no_grad()
def match(
    layers: Sequence[Queries], truths: Sequence[_Truth], points: Tensor, settings: Settings, num_queries: int
) -> list[list[Pairs]]:
    """Pairs queries with regions at the least cost in all (Kuhn 1955), for each layer and image.

    Args:
        layers: in full precision.
        truths: no more regions in any than there are queries.
        points: (B, P, 2) in [0, 1], x and y, of which matching takes the first `num_points`.
        settings: its costs.
        num_queries: of a group; so many after the other are matched for themselves.
    """
    num_points = settings.num_points or 0
    points = points[:, :num_points].to(layers[0].class_logits.dtype)
    looks = [_look(truth, some) for truth, some in zip(truths, points, strict=True)]
    costs = [
        _costs(layer, i, truth, *looks[i], settings) for layer in layers for i, truth in enumerate(truths)
    ]  # (Q, N) each
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()  # one copy for all, since each waits for the device
    assert flat.isfinite().all(), "the costs of matching are not finite: the model gives NaN or infinity"
    parts = torch.split(flat, [cost.numel() for cost in costs])
    pairs = []
    for part, cost in zip(parts, costs, strict=True):
        groups = [linear_sum_assignment(group.numpy()) for group in torch.split(part.view(cost.shape), num_queries)]
        queries = np.concatenate([first * num_queries + chosen for first, (chosen, _) in enumerate(groups)])
        regions = np.concatenate([matched for _, matched in groups])
        pairs.append(Pairs(*(torch.from_numpy(x).to(cost.device) for x in (queries, regions))))
    return [pairs[i : i + len(truths)] for i in range(0, len(pairs), len(truths))]


def _look(truth: _Truth, points: Tensor) -> tuple[Tensor, Tensor]:
    """The points of an image that count, (P, 2), and its regions there, (N, P)."""
    if not len(points):
        return points, points.new_zeros((len(truth.class_ids), 0))
    kept = points[_sample_valid(truth.is_valid, points)]
    return kept, torch.cat([sample(some.to(points.dtype), kept) for some in torch.split(truth.masks, WIDE_CHUNK)])


def _costs(layer: Queries, i: int, truth: _Truth, points: Tensor, wanted: Tensor, settings: Settings) -> Tensor:
    """What each pair of a query and a region of image i costs, (Q, N).

    Args:
        layer: of all images.
        i: the image.
        truth: its regions.
        points: (P, 2) that count.
        wanted: (N, P), the regions there.
        settings: the costs of each term.
    """
    costs = settings.costs
    gain = _focal_gain if settings.class_loss == "iou_aware" else partial(torch.softmax, dim=-1)
    total = -costs.classes * gain(layer.class_logits[i])[:, truth.class_ids]
    if layer.boxes is not None and (costs.l1 or costs.giou):
        boxes = layer.boxes[i]
        total = total + costs.l1 * (boxes[:, None] - truth.boxes).abs().sum(-1)
        total = total - costs.giou * giou(_to_corners(boxes)[:, None], _to_corners(truth.boxes))
    if layer.mask_logits is not None and (costs.masks or costs.dice):
        logits = sample(layer.mask_logits[i], points)  # (Q, P)
        positive, negative = F.softplus(-logits), F.softplus(logits)
        total = total + costs.masks * (positive @ wanted.T + negative @ (1 - wanted).T) / max(1, len(points))
        probabilities = logits.sigmoid()
        sums = probabilities.sum(1)[:, None] + wanted.sum(1)
        total = total + costs.dice * (1 - (2 * probabilities @ wanted.T + 1) / (sums + 1))
    return total


def _focal_gain(logits: Tensor) -> Tensor:
    """What a class wins in focal loss (alpha 0.25, gamma 2) where it is wanted (Deformable DETR, Zhu et al. 2021)."""
    probabilities = logits.sigmoid()
    return 0.75 * probabilities**2 * F.softplus(logits) - 0.25 * (1 - probabilities) ** 2 * F.softplus(-logits)


# --- points and boxes ---------------------------------------------------------------------------------------------


def _draw_points(seeds: Tensor, num_points: int) -> Tensor:
    """Points of each image, (B, P, 2) x and y in [0, 1], from its seed alone; the same on every device.

    The first `OVERSAMPLING * num_points` are to choose from, the rest are taken as they are.
    """
    total = OVERSAMPLING * num_points + num_points - int(IMPORTANCE * num_points)
    return torch.stack([torch.rand(total, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()])


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps, (N, P).

    Args:
        maps: (N, h, w) floating.
        points: (P, 2), or (N, P, 2) for points of each map's own: x and y in [0, 1].
    """
    if not (maps.numel() and points.numel()):
        return maps.new_zeros((len(maps), points.shape[-2]))  # cuDNN takes no empty grids
    grid = 2 * points.to(maps.dtype) - 1
    if points.ndim == 2:
        return F.grid_sample(maps[None], grid[None, :, None], align_corners=False)[0, :, :, 0]
    return F.grid_sample(maps[:, None], grid[:, :, None], align_corners=False)[:, 0, :, 0]


def _sample_valid(is_valid: Tensor, points: Tensor) -> Tensor:
    """Whether all pixels around each point count, (P,) bool."""
    grid = (2 * points - 1)[None, :, None]
    around = F.grid_sample(
        (~is_valid).to(points.dtype)[None, None], grid, padding_mode="border", align_corners=False
    )  # (1, 1, P, 1)
    return around[0, 0, :, 0] == 0


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of boxes (..., 4) x0, y0, x1, y1, which broadcast."""
    outer = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = outer.prod(-1)
    overlap, union = _overlap(first, second)
    tiny = torch.finfo(hull.dtype).tiny  # boxes of no area
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes (..., 4) x0, y0, x1, y1, which broadcast; 0 where neither has an area."""
    overlap, union = _overlap(first, second)
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The areas that two boxes share, and cover."""
    lower, upper = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    overlap = (upper - lower).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    return overlap, areas[0] + areas[1] - overlap


def _to_corners(boxes: Tensor) -> Tensor:
    centres, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centres - sides / 2, centres + sides / 2], -1)


def _to_centres(boxes: Tensor) -> Tensor:
    lower, upper = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(lower + upper) / 2, upper - lower], -1)


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(
    outputs: Outputs, sizes: Sequence[tuple[int, int]], classes: ClassMap, task: Task, inference: Inference
) -> list[View]:
    """What each image shows, of values `class_logits` (B, Q, C + 1) and `mask_logits` (B, Q, h, w)."""
    rows = zip(outputs.values["class_logits"], outputs.values["mask_logits"], sizes, strict=True)
    if task == "semantic":
        return [decode_semantic(*row, classes) for row in rows]
    to_view = decode_instances if task == "instance" else decode_panoptic
    return [to_view(*row, classes, inference) for row in rows]


def class_scores(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The classes at each pixel of one image: their probabilities times the masks', summed over queries, (C, H, W).

    They are not negative and do not add up to 1 (Cheng et al. 2021, section 3.4).

    Args:
        class_logits: (Q, C + 1).
        mask_logits: (Q, h, w).
        size: (H, W).
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        probabilities = _probabilities(class_logits)
        total = probabilities.new_zeros((probabilities.shape[1], *size))
        for places, masks in _iter_masks(mask_logits, torch.arange(len(mask_logits)), size):
            total += torch.einsum("qc,qhw->chw", probabilities[places], masks)
    return total


def decode_semantic(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], classes: ClassMap) -> LabelMap:
    """The class with the highest score at each pixel; see class_scores."""
    indices = class_scores(class_logits, mask_logits, size).argmax(0)
    labels: IdMap = indices.cpu().numpy().astype(classes.dtype)
    return LabelMap(labels, classes.ignore)


def decode_instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], classes: ClassMap, inference: Inference
) -> MaskSet:
    """The best pairs of a query and a thing's class; masks may overlap, empty ones are left out.

    A score is the class's probability times the mask's mean probability within itself (Mask2Former's).
    """
    return to_mask_set(_probabilities(class_logits), mask_logits, size, classes, inference, weigh_masks=True)


def to_mask_set(
    scores: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    classes: ClassMap,
    inference: Inference,
    *,
    weigh_masks: bool,
) -> MaskSet:
    """The best pairs of a query and a thing's class, by scores (Q, C); masks (Q, h, w) may overlap.

    Empty masks are left out. With `weigh_masks` a score is multiplied by the mean probability within its mask.
    """
    scores = scores * torch.tensor(classes.things, device=scores.device)
    best = scores.flatten().topk(min(inference.max_instances, scores.numel()))
    is_kept = (best.values > 0) & (best.values >= inference.score_threshold)  # masks only lower them
    queries = best.indices[is_kept].div(len(classes), rounding_mode="floor")
    encoded: dict[int, tuple[bytes, float]] = {}  # by query: its mask and what that one counts for
    for places, masks in _iter_masks(mask_logits, torch.unique(queries), size):
        are_inside = masks >= inference.mask_threshold
        areas = are_inside.flatten(1).sum(1)
        means = (masks * are_inside).flatten(1).sum(1) / areas.clamp(min=1) if weigh_masks else areas.clamp(max=1)
        drawn = zip(rle.from_masks(are_inside.cpu().numpy()), means.tolist(), strict=True)
        encoded |= {query: mask for query, mask in zip(places.tolist(), drawn, strict=True) if mask[1] > 0}
    found = [
        (score * encoded[query][1], index, encoded[query][0])
        for score, index, query in zip(
            best.values[is_kept].tolist(),
            (best.indices[is_kept] % len(classes)).tolist(),
            queries.tolist(),
            strict=True,
        )
        if query in encoded
    ]
    found = sorted((row for row in found if row[0] >= inference.score_threshold), key=lambda row: -row[0])
    return MaskSet(
        size=size,
        rles=tuple(mask for _, _, mask in found),
        class_ids=np.array([index for _, index, _ in found], np.int64),
        is_crowd=np.zeros(len(found), np.bool_),
        scores=np.array([score for score, _, _ in found], np.float64),
    )


def decode_panoptic(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], classes: ClassMap, inference: Inference
) -> SegmentMap:
    """Each pixel's best query by class probability times mask (Cheng et al. 2021, section 3.4), stuff merged by class.

    Queries that are likeliest nothing, score below the threshold, or whose mask is mostly taken by others are left out;
    the pixels that they had won are void.
    """
    scores, indices = class_logits.float().softmax(-1).max(-1)
    queries = ((indices < len(classes)) & (scores >= inference.score_threshold)).nonzero()[:, 0]
    best = scores.new_zeros(size)
    winner = torch.zeros(size, dtype=torch.int64, device=scores.device)  # 1 + its place in the kept queries
    is_within = torch.zeros(size, dtype=torch.bool, device=scores.device)  # whether the pixel lies in its winner's mask
    areas: list[int] = []
    for places, masks in _iter_masks(mask_logits, queries, size):
        are_inside = masks >= inference.mask_threshold
        weighted = masks * scores[places, None, None]
        for number, (score_map, is_inside) in enumerate(zip(weighted, are_inside, strict=True), len(areas) + 1):
            is_better = score_map > best
            best = torch.where(is_better, score_map, best)
            winner.masked_fill_(is_better, number)
            is_within = torch.where(is_better, is_inside, is_within)
        areas += are_inside.flatten(1).sum(1).tolist()
    won = torch.bincount(winner.flatten(), minlength=len(queries) + 1)[1:].tolist()
    kept = torch.bincount((winner * is_within).flatten(), minlength=len(queries) + 1)[1:].tolist()
    table: IdMap = np.zeros(len(queries) + 1, np.uint8 if len(queries) < 256 else np.uint16)  # from winners to segments
    found: list[tuple[int, float]] = []  # class and score of each segment
    stuff: dict[int, int] = {}
    candidates = zip(indices[queries].tolist(), scores[queries].tolist(), areas, won, kept, strict=True)
    for place, (index, score, area, num_won, num_kept) in enumerate(candidates, 1):
        if num_kept == 0 or num_won / area < inference.overlap_threshold:
            continue
        number = stuff.get(index, len(found) + 1)
        if number > len(found):
            found.append((index, score))
        elif score > found[number - 1][1]:
            found[number - 1] = (index, score)
        if not classes.things[index]:
            stuff[index] = number
        table[place] = number
    numbers: IdMap = table.take((winner * is_within).cpu().numpy())
    return SegmentMap(
        numbers=numbers,
        class_ids=np.array([index for index, _ in found], np.int64),
        is_crowd=np.zeros(len(found), np.bool_),
        scores=np.array([score for _, score in found], np.float64),
    )


def _probabilities(class_logits: Tensor) -> Tensor:
    """(Q, C), without that of no object."""
    return class_logits.float().softmax(-1)[:, :-1]


def _iter_masks(mask_logits: Tensor, queries: Tensor, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Probabilities of some queries' masks at a size, few at a time: their places, and (n, H, W)."""
    for places in torch.split(queries.to(mask_logits.device), CHUNK):
        if len(places):
            yield places, _resize(mask_logits[places].float(), size).sigmoid()


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) at a size, bilinear."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
