"""Facts of all samples -> flags: what only shows beside the class list, the other samples or the other split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysseg.findings.facts import HASH_BITS, SampleFacts
from raysseg.findings.kinds import Flag
from raysseg.findings.shapes import THIN, Regions
from raysseg.schema import ClassMap

Split = Sequence[SampleFacts]

_CUSTOMARY_IGNORE = frozenset({0, 254, 255, 65535})
_NEAR_BITS = 22  # of HASH_BITS that may differ between two versions of an image; others differ in half of them
_BLOCK = 2048  # images compared with as many others at once
_SINGLE_SHARE = 0.1  # where more of the masks hold a single class, that is how the data are
_SHIFT_GAIN = 1.4  # in spreads of the edges' strength over all places
_SHIFT_LEAST = 3  # pixels; annotators are not more exact than that
_OF_THINGS = frozenset({"merged_instances", "scattered_instance"})  # stuff lies in pieces as it likes
_LEAST_AREA = 200  # pixels: shapes of smaller regions are too coarse to judge
_ROUGH_LEAST = 0.5
_HOLES_LEAST = 4  # in an instance
_HOLES_LEAST_OF_CLASS = 15  # in all that a label image holds of a class
_FAR_LEAST = 0.45
_CLUSTERS_LEAST = 3
_FEWEST = 12  # regions of a class from which its own manner can be told
_COMPACT = 0.9  # typical solidity of a class whose instances have no necks
_LOBE_SLACK = 0.03  # of solidity, by which parts may fall short of their class
_LOBE_GAIN = 0.06  # of solidity, by which parts are rounder than the whole


def flag_all(splits: Mapping[str, Split], classes: ClassMap) -> Iterator[Flag]:
    """Everything that is wrong with a data set, in no order.

    Args:
        splits: facts by split; leaks and missing classes are looked for in all but the first.
        classes: what ids mean.
    """
    for name, facts in splits.items():
        for sample in facts:
            yield from (
                Flag(problem.kind, name, sample.sample_id, problem.detail, problem.number)
                for problem in sample.problems
            )
        yield from flag_ids(facts, classes)
        yield from flag_empty(facts, classes)
        yield from flag_duplicates(facts)
        yield from flag_shifts(facts)
    yield from flag_shapes(list(chain.from_iterable(splits.values())), classes)
    (_, train), *others = splits.items()
    for _, facts in others:
        yield from flag_leaks(train, facts)
        yield from flag_missing_classes(train, facts, classes)


def known_ids(classes: ClassMap) -> frozenset[int]:
    """All ids that the class list has a meaning for."""
    return frozenset([*classes.index_of, *classes.dropped, classes.ignore_index])


# --- ids ----------------------------------------------------------------------------------------------------------


def flag_ids(facts: Split, classes: ClassMap) -> Iterator[Flag]:
    """Ids that the class list lacks: binary masks, another ignore index, or plainly wrong."""
    known, index_of = known_ids(classes), classes.index_of
    all_ids = set(chain.from_iterable(sample.labels.ids.tolist() for sample in facts if sample.labels))
    is_binary = {0, 255} == all_ids and not {0, 255} <= index_of.keys()
    for sample in facts:
        if sample.labels is None:
            continue
        present = set(sample.labels.ids.tolist())
        unknown = sorted(present - known)
        if present == {0, 255} and (unknown or is_binary):
            yield Flag("binary_0_255", sample.split, sample.sample_id, "holds the ids 0 and 255 alone")
        elif unknown:
            kind = "wrong_ignore_index" if _CUSTOMARY_IGNORE.issuperset(unknown) else "id_out_of_range"
            shares = sample.labels.pixels[np.isin(sample.labels.ids, unknown)] / np.prod(sample.labels.size)
            shown = ", ".join(
                f"{i} ({share:.2%} of the pixels)" for i, share in zip(unknown[:4], shares[:4], strict=True)
            )
            yield Flag(kind, sample.split, sample.sample_id, f"unknown: {shown}; ignored: {classes.ignore_index}")


def flag_empty(facts: Split, classes: ClassMap) -> Iterator[Flag]:
    """Samples without a labelled pixel, without content, or of a single class where others hold several."""
    index_of, known = classes.index_of, known_ids(classes)
    labelled = [sample for sample in facts if sample.labels]
    singles = []
    for sample in labelled:
        assert sample.labels is not None
        present = set(sample.labels.ids.tolist())
        is_dense = not len(sample.labels.regions) or not sample.labels.regions["number"].any()
        hollow = sample.labels.regions["number"][sample.labels.regions["area"] == 0].tolist()
        if hollow:
            text = f"segments {', '.join(map(str, hollow[:5]))} cover no pixel"
            yield Flag("empty_annotation", sample.split, sample.sample_id, text)
        if not present and not sample.labels.num_crowds and not hollow:
            yield Flag("empty_annotation", sample.split, sample.sample_id, "has no segment")
        elif present <= known and not present & index_of.keys() and (present or sample.labels.num_crowds):
            yield Flag("all_ignored", sample.split, sample.sample_id, "no pixel belongs to a class")
        elif is_dense and len(present - {classes.ignore_index}) == 1 and present <= known:
            singles.append(sample)
    if len(singles) <= max(1, _SINGLE_SHARE * len(labelled)) < len(labelled):
        for sample in singles:
            yield Flag("empty_annotation", sample.split, sample.sample_id, f"is {_names(sample, classes)} all over")


def flag_missing_classes(train: Split, other: Split, classes: ClassMap) -> Iterator[Flag]:
    """Samples of classes of which train has none."""
    index_of = classes.index_of
    have = {index_of.get(i) for sample in train if sample.labels for i in sample.labels.ids.tolist()}
    for sample in other:
        lacked = (
            sorted({index_of[i] for i in sample.labels.ids.tolist() if i in index_of} - have) if sample.labels else []
        )
        for index in lacked:
            yield Flag("missing_class", sample.split, sample.sample_id, f"holds {classes.names[index]}")


def _names(sample: SampleFacts, classes: ClassMap) -> str:
    index_of = classes.index_of
    assert sample.labels is not None
    return ", ".join(classes.names[index_of[i]] for i in sample.labels.ids.tolist() if i in index_of) or "ignored"


# --- images -------------------------------------------------------------------------------------------------------


def flag_duplicates(facts: Split) -> Iterator[Flag]:
    """Samples of one split that show the image of an earlier one, exactly or nearly."""
    groups = _by_digest(facts)
    for group in groups.values():
        for sample in group[1:]:
            yield Flag("duplicate_image", sample.split, sample.sample_id, f"the same pixels as {group[0].sample_id}")
    different = [group[0] for group in groups.values()]
    for sample, near in zip(different, _nearest(different, different, only_earlier=True), strict=True):
        if near.bits <= _NEAR_BITS:
            text = f"nearly {different[near.place].sample_id} ({near.bits} of {HASH_BITS} bits differ)"
            yield Flag("near_duplicate", sample.split, sample.sample_id, text)


def flag_leaks(train: Split, other: Split) -> Iterator[Flag]:
    """Samples of another split that show an image of train, exactly or nearly."""
    same = _by_digest(train)
    rest = []
    for sample in other:
        if sample.digest in same:
            text = f"the same pixels as {same[sample.digest][0].split}/{same[sample.digest][0].sample_id}"
            yield Flag("leak", sample.split, sample.sample_id, text)
        elif sample.look:
            rest.append(sample)
    known = [sample for sample in train if sample.look]
    for sample, near in zip(rest, _nearest(rest, known), strict=True):
        if near.bits <= _NEAR_BITS:
            origin = known[near.place]
            text = f"nearly {origin.split}/{origin.sample_id} ({near.bits} of {HASH_BITS} bits differ)"
            yield Flag("leak", sample.split, sample.sample_id, text)


def _by_digest(facts: Split) -> dict[bytes, list[SampleFacts]]:
    groups: dict[bytes, list[SampleFacts]] = defaultdict(list)
    for sample in facts:
        if sample.digest:
            groups[sample.digest].append(sample)
    return groups


class _Near(NamedTuple):
    """The place of the sample with the nearest hash, and how many bits differ; HASH_BITS where there is none."""

    place: int
    bits: int


def _nearest(queries: Split, known: Split, *, only_earlier: bool = False) -> Iterator[_Near]:
    """The nearest of the known for each sample; `only_earlier`: both are the same, and it lies before the sample."""
    for start in range(0, len(queries), _BLOCK):
        signs = _signs(queries[start : start + _BLOCK])
        places, best = np.zeros(len(signs), np.int64), np.full(len(signs), -HASH_BITS, np.float32)
        for low in range(0, start + 1 if only_earlier else len(known), _BLOCK):
            agreement = signs @ _signs(known[low : low + _BLOCK]).T  # bits alike less bits that differ
            if only_earlier and low == start:
                agreement[np.triu_indices_from(agreement)] = -HASH_BITS
            values = agreement.max(axis=1)
            is_nearer = values > best
            places[is_nearer], best[is_nearer] = agreement.argmax(axis=1)[is_nearer] + low, values[is_nearer]
        yield from map(_Near, places.tolist(), ((HASH_BITS - best) / 2).astype(int).tolist())


def _signs(facts: Split) -> npt.NDArray[np.float32]:
    """Hashes as rows of +1 and -1, so that a matrix product counts bits."""
    bits = np.unpackbits(np.frombuffer(b"".join(sample.look for sample in facts), np.uint8)).reshape(-1, HASH_BITS)
    return bits.astype(np.float32) * 2 - 1


# --- shapes -------------------------------------------------------------------------------------------------------


def flag_shifts(facts: Split) -> Iterator[Flag]:
    """Labels that would lie on stronger edges if they were moved."""
    for sample in facts:
        if sample.labels is None or any(problem.kind == "exif_rotation" for problem in sample.problems):
            continue  # turned images are named as such
        down, across, gain = sample.labels.shift
        if gain >= _SHIFT_GAIN and max(abs(down), abs(across)) >= _SHIFT_LEAST:
            vertical = f"{abs(down)} pixels {'down' if down > 0 else 'up'}"
            level = f"{abs(across)} {'right' if across > 0 else 'left'}"
            yield Flag("shifted_mask", sample.split, sample.sample_id, f"fits better {vertical} and {level}")


def flag_shapes(facts: Split, classes: ClassMap) -> Iterator[Flag]:
    """Regions that are unlike the others of their class: rough, holed, merged or scattered."""
    index_of = classes.index_of
    owners = [sample for sample in facts if sample.labels is not None and len(sample.labels.regions)]
    if not owners:
        return
    regions = np.concatenate([sample.labels.regions for sample in owners if sample.labels])
    owner = np.repeat(np.arange(len(owners)), [len(sample.labels.regions) for sample in owners if sample.labels])
    usable = ~regions["is_crowd"] & (regions["area"] > 0)
    for class_id in np.unique(regions["class_id"][usable]).tolist():
        rows = np.flatnonzero(usable & (regions["class_id"] == class_id))
        name = classes.names[index_of[class_id]] if class_id in index_of else f"id {class_id}"
        manner = regions[rows if len(rows) >= _FEWEST else usable]  # a few don't show how their class looks
        is_thing = class_id in index_of and classes.things[index_of[class_id]]
        for kind, hits, text in _outliers(regions[rows], manner):
            if kind in _OF_THINGS and not is_thing:
                continue
            for row in rows[hits]:
                sample, number = owners[owner[row]], int(regions["number"][row])
                what = f"segment {number} ({name})" if number else name
                yield Flag(kind, sample.split, sample.sample_id, f"{what} {text}", number)


def _outliers(regions: Regions, manner: Regions) -> Iterator[tuple[str, npt.NDArray[np.int64], str]]:
    """Places of the regions, all of one class, that each kind means; `manner` is what they are held against."""
    is_large = regions["area"] >= _LEAST_AREA
    is_wide = regions["width"] >= THIN  # smoothing leaves little of thinner strokes, however well drawn
    rough = is_large & is_wide & (regions["rough"] > _limit(manner["rough"], 2, _ROUGH_LEAST))
    yield "holes_or_jagged", np.flatnonzero(rough), "has a far rougher outline than its class has elsewhere"
    least = _HOLES_LEAST if regions["number"].any() else _HOLES_LEAST_OF_CLASS
    holed = is_large & ~rough & (regions["holes"] > _limit(manner["holes"], 3, least))
    yield "holes_or_jagged", np.flatnonzero(holed), "has far more small holes than its class has elsewhere"
    scattered = is_large & (regions["clusters"] >= _CLUSTERS_LEAST) & (regions["far"] >= _FAR_LEAST)
    yield "scattered_instance", np.flatnonzero(scattered), "lies in pieces far apart"
    typical = float(np.median(regions["solidity"]))
    if typical >= _COMPACT and len(regions) >= _FEWEST:  # else necks are how the class looks
        parts_are_typical = regions["lobes"] > typical - _LOBE_SLACK
        parts_are_rounder = regions["lobes"] - regions["solidity"] > _LOBE_GAIN
        merged = is_large & (regions["neck"] < 1) & parts_are_typical & parts_are_rounder
        yield "merged_instances", np.flatnonzero(merged), "falls into two parts at a neck, each as round as its class"


def _limit(values: npt.NDArray[np.floating | np.integer], factor: float, least: float) -> float:
    """So many times what all but a tenth of the regions keep to: up to that tenth may be spoilt."""
    return max(least, factor * float(np.quantile(values, 0.9)))


def count_modes(facts: Split) -> dict[str, int]:
    """Images of each mode of pixels, by name."""
    return dict(sorted(Counter(sample.mode for sample in facts if sample.mode).items()))
