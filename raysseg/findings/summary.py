"""Facts of all samples -> what a split holds: counts, sizes, classes, instances, balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt

from raysseg.config import ClassWeightScheme
from raysseg.findings.facts import Labels, SampleFacts
from raysseg.findings.fingerprint import COCO_SIDES, ClassFacts, SplitFacts
from raysseg.findings.rules import count_modes
from raysseg.findings.shapes import THIN
from raysseg.losses import ClassPixels, balance
from raysseg.schema import ClassMap

PERCENTILES = (5, 25, 50, 75, 95)
TINY = 0.005  # of the labelled pixels
_BETA = 0.999999  # the job's default of loss.effective_beta
_MOST_SIZES = 10  # that are listed


def summarise(name: str, facts: Collection[SampleFacts], classes: ClassMap) -> SplitFacts:
    """What a split holds."""
    index_of = classes.index_of
    counts, cooccurrence = ClassPixels.none(len(classes)), np.zeros((len(classes), len(classes)), np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    table, num_usable = bytearray(), 0
    widths: list[bytearray] = [bytearray() for _ in range(len(classes))]
    for sample in facts:
        num_usable += _is_usable(sample)
        if size := sample.size or (sample.labels and sample.labels.size):
            sizes[size] += 1
        if sample.labels is None:
            continue
        own = _class_pixels(sample.labels, classes)
        counts += own
        is_present = own.images.astype(np.int64)
        cooccurrence += is_present[:, None] * is_present
        table += sample.labels.components.tobytes()
        for region in sample.labels.regions:
            if region["area"] and (index := index_of.get(int(region["class_id"]))) is not None:
                widths[index] += region["width"].tobytes()
    components = np.frombuffer(table, np.int64).reshape(-1, 2)
    owners = np.array([index_of.get(i, -1) for i in components[:, 0].tolist()], np.int64)
    areas = components[owners >= 0, 1]
    is_seen = areas > 0
    total = int(counts.pixels.sum())
    dominant = int(counts.pixels.argmax()) if total else None
    typical = [_rounded(float(np.median(np.frombuffer(found, np.float32)))) if found else None for found in widths]
    return SplitFacts(
        name=name,
        num_samples=len(facts),
        num_usable=num_usable,
        sizes=[(*size, number) for size, number in _most_common(sizes)],
        height=_range(sizes, 0),
        width=_range(sizes, 1),
        modes=count_modes(facts),
        labelled_pixels=total,
        ignored_pixels=counts.ignored,
        classes=_class_facts(counts, components[:, 1], owners, typical, classes),
        instance_areas={f"p{p}": float(np.percentile(areas[is_seen], p)) for p in PERCENTILES} if is_seen.any() else {},
        area_histogram=np.bincount(np.log2(areas[is_seen]).astype(np.int64)).tolist() if is_seen.any() else [],
        cooccurrence=cooccurrence.tolist(),
        dominant=None if dominant is None else classes.names[dominant],
        dominant_share=0.0 if dominant is None else _rounded(counts.pixels[dominant] / total),
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


def _class_pixels(labels: Labels, classes: ClassMap) -> ClassPixels:
    """One sample's counts; what no segment covers has the class that the source's background names."""
    pixels = np.zeros(len(classes), np.int64)
    index_of = classes.index_of
    for class_id, number in zip(labels.ids.tolist(), labels.pixels.tolist(), strict=True):
        if class_id in index_of:
            pixels[index_of[class_id]] += number
    if classes.uncovered is not None:
        pixels[classes.uncovered] += labels.unlabelled
    is_present, total = pixels > 0, int(pixels.sum())
    return ClassPixels(
        pixels, is_present * total, is_present.astype(np.int64), labels.size[0] * labels.size[1] - total, 1
    )


def _is_usable(sample: SampleFacts) -> bool:
    return sample.size is not None and sample.labels is not None and sample.labels.size == sample.size


def _most_common(sizes: Counter[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_MOST_SIZES]


def _range(sizes: Counter[tuple[int, int]], axis: int) -> tuple[int, int, int]:
    """The smallest, the median and the largest side."""
    if not sizes:
        return 0, 0, 0
    sides = np.repeat([size[axis] for size in sizes], list(sizes.values()))
    return int(sides.min()), int(np.median(sides)), int(sides.max())


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
