"""Facts of all samples -> what a split holds: counts, sizes, classes, instances, balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from raysseg.config import ClassWeightScheme
from raysseg.findings.facts import Labels, SampleFacts
from raysseg.findings.rules import count_modes
from raysseg.findings.shapes import THIN
from raysseg.losses import ClassPixels, balance
from raysseg.schema import ClassMap

COCO_SIDES = (32, 96)  # pixels: up to 32 x 32 an instance is small, up to 96 x 96 medium
PERCENTILES = (5, 25, 50, 75, 95)
TINY = 0.005  # of the labelled pixels
_BETA = 0.999999  # the job's default of loss.effective_beta
_MOST_SIZES = 10  # that are listed


@dataclass(frozen=True)
class ClassFacts:
    """What a split holds of one class.

    Attributes:
        name: of the class.
        id: in the data set.
        pixels: labelled so.
        share: of the labelled pixels.
        images: that hold it.
        instances: segments, or connected parts of label images.
        median_area: of those, in pixels; None without any.
        small: of those, by COCO's bounds; likewise medium and large.
        width: of a typical stroke, in pixels; None without any.
        is_thin: whether that is so little that scaling down harms it.
        is_tiny: whether it has so small a share of the pixels that most crops miss it.
        weights: as each scheme of `loss.class_weights` would have it; 0 for a class that does not occur.
    """

    name: str
    id: int
    pixels: int
    share: float
    images: int
    instances: int
    median_area: float | None
    small: int
    medium: int
    large: int
    width: float | None
    is_thin: bool
    is_tiny: bool
    weights: dict[str, float]


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        name: of the split.
        num_samples: listed, unpaired ones among them.
        num_usable: with an image and labels that fit each other.
        sizes: the most frequent sizes of images: (height, width, images).
        height: (smallest, median, largest).
        width: likewise.
        modes: images by Pillow's mode.
        labelled_pixels: of all classes.
        ignored_pixels: without a class.
        classes: in the class list's order.
        instance_areas: percentiles of PERCENTILES, in pixels.
        area_histogram: instances by the power of two that their area reaches: the first bin holds area 1.
        cooccurrence: (C, C) images that hold both classes.
        dominant: name of the class of most pixels, None without any.
        dominant_share: of the labelled pixels.
        verdict: the number of samples against customary guidance.
    """

    name: str
    num_samples: int
    num_usable: int
    sizes: list[tuple[int, int, int]]
    height: tuple[int, int, int]
    width: tuple[int, int, int]
    modes: dict[str, int]
    labelled_pixels: int
    ignored_pixels: int
    classes: list[ClassFacts]
    instance_areas: dict[str, float]
    area_histogram: list[int]
    cooccurrence: list[list[int]]
    dominant: str | None
    dominant_share: float
    verdict: str


def summarise(name: str, facts: Sequence[SampleFacts], classes: ClassMap) -> SplitFacts:
    """What a split holds."""
    labels = [sample.labels for sample in facts if sample.labels is not None]
    sizes = [sample.size for sample in facts if sample.size is not None] or [part.size for part in labels]
    table = np.array([_class_pixels(part, classes) for part in labels], np.int64).reshape(-1, len(classes))
    ignored = sum(int(part.size[0] * part.size[1]) for part in labels) - int(table.sum())
    is_present = table > 0
    pixels = ClassPixels(
        table.sum(axis=0),
        (is_present * table.sum(axis=1, keepdims=True)).sum(axis=0),
        is_present.sum(axis=0),
        ignored,
        len(labels),
    )
    index_of = classes.index_of
    components = _concatenated([part.components for part in labels])
    owners = np.array([index_of.get(i, -1) for i in components[:, 0].tolist()], np.int64)
    areas = components[owners >= 0, 1]
    is_seen = areas > 0
    total = int(table.sum())
    dominant = int(pixels.pixels.argmax()) if total else None
    return SplitFacts(
        name=name,
        num_samples=len(facts),
        num_usable=sum(_is_usable(sample) for sample in facts),
        sizes=[(*size, number) for size, number in _most_common(sizes)],
        height=_range([size[0] for size in sizes]),
        width=_range([size[1] for size in sizes]),
        modes=count_modes(facts),
        labelled_pixels=total,
        ignored_pixels=ignored,
        classes=_class_facts(pixels, components[:, 1], owners, _widths(labels, index_of, len(classes)), classes),
        instance_areas={f"p{p}": float(np.percentile(areas[is_seen], p)) for p in PERCENTILES} if is_seen.any() else {},
        area_histogram=np.bincount(np.log2(areas[is_seen]).astype(np.int64)).tolist() if is_seen.any() else [],
        cooccurrence=(is_present.T.astype(np.int64) @ is_present.astype(np.int64)).tolist(),
        dominant=None if dominant is None else classes.names[dominant],
        dominant_share=0.0 if dominant is None else _rounded(pixels.pixels[dominant] / total),
        verdict=verdict(len(facts)),
    )


def verdict(num_samples: int) -> str:
    """How far a number of annotated images goes by customary guidance for fine-tuning."""
    if num_samples < 500:
        return f"{num_samples} images: fewer than the 500 that are the least; start from pretrained weights and augment"
    if num_samples < 2000:
        return f"{num_samples} images: enough to start (500 are the least); 2,000 to 5,000 are good"
    if num_samples < 10000:
        return f"{num_samples} images: good (2,000 to 5,000 are); 10,000 and more are excellent"
    return f"{num_samples} images: excellent (10,000 and more are)"


def _class_facts(
    counts: ClassPixels,
    areas: npt.NDArray[np.int64],
    owners: npt.NDArray[np.int64],
    widths: Sequence[float | None],
    classes: ClassMap,
) -> list[ClassFacts]:
    total = max(1, int(counts.pixels.sum()))
    has_any = bool(counts.pixels.any())
    schemes = get_args(ClassWeightScheme)
    weights = {s: balance(s, counts, _BETA) if has_any else np.zeros(len(classes)) for s in schemes}
    small, medium = (side * side for side in COCO_SIDES)
    found = []
    for i, name in enumerate(classes.names):
        own = areas[(owners == i) & (areas > 0)]
        width = widths[i]
        found.append(
            ClassFacts(
                name=name,
                id=classes.ids[i],
                pixels=int(counts.pixels[i]),
                share=_rounded(counts.pixels[i] / total),
                images=int(counts.images[i]),
                instances=len(own),
                median_area=float(np.median(own)) if len(own) else None,
                small=int((own < small).sum()),
                medium=int(((own >= small) & (own < medium)).sum()),
                large=int((own >= medium).sum()),
                width=width,
                is_thin=width is not None and width < THIN,
                is_tiny=bool(0 < counts.pixels[i] < TINY * total),
                weights={scheme: _rounded(values[i]) for scheme, values in weights.items()},
            )
        )
    return found


def _class_pixels(labels: Labels, classes: ClassMap) -> npt.NDArray[np.int64]:
    """(C,) pixels of each class; what no segment covers has the class that the source's background names."""
    pixels = np.zeros(len(classes), np.int64)
    index_of = classes.index_of
    for class_id, number in zip(labels.ids.tolist(), labels.pixels.tolist(), strict=True):
        if class_id in index_of:
            pixels[index_of[class_id]] += number
    if classes.uncovered is not None:
        pixels[classes.uncovered] += labels.unlabelled
    return pixels


def _widths(labels: Sequence[Labels], index_of: dict[int, int], num_classes: int) -> list[float | None]:
    """The median width of each class's regions."""
    rows = [
        (index_of.get(int(r["class_id"]), -1), float(r["width"])) for part in labels for r in part.regions if r["area"]
    ]
    table = np.array(rows, np.float64).reshape(-1, 2)
    groups = [table[table[:, 0] == i, 1] for i in range(num_classes)]
    return [_rounded(float(np.median(group))) if len(group) else None for group in groups]


def _concatenated(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros((0, 2), np.int64), *parts])


def _is_usable(sample: SampleFacts) -> bool:
    return sample.size is not None and sample.labels is not None and sample.labels.size == sample.size


def _most_common(sizes: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    return sorted(Counter(sizes).items(), key=lambda item: (-item[1], item[0]))[:_MOST_SIZES]


def _range(values: Sequence[int]) -> tuple[int, int, int]:
    return (min(values), int(np.median(values)), max(values)) if values else (0, 0, 0)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
