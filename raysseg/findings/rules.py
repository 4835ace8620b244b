"""Facts of all samples -> flags: what only shows beside the class list, the other samples or the other split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysseg.findings.facts import HASH_BITS, SampleFacts
from raysseg.findings.kinds import Flag
from raysseg.findings.shapes import REGION, THIN, Regions
from raysseg.schema import ClassMap

Split = Collection[SampleFacts]

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
    yield from flag_shapes(chain.from_iterable(splits.values()), classes)
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
    singles, num_labelled = [], 0
    for sample in facts:
        if sample.labels is None:
            continue
        num_labelled += 1
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
            text = f"is {_names(present, classes)} all over"
            singles.append(Flag("empty_annotation", sample.split, sample.sample_id, text))
    if len(singles) <= max(1, _SINGLE_SHARE * num_labelled) < num_labelled:
        yield from singles


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


def _names(ids: Iterable[int], classes: ClassMap) -> str:
    index_of = classes.index_of
    return ", ".join(classes.names[index_of[i]] for i in sorted(ids) if i in index_of) or "ignored"


# --- images -------------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """What is kept of a sample to find its image again."""

    split: str
    sample_id: str
    hash: bytes


class _Near(NamedTuple):
    """The place of the nearest image, and how many bits differ."""

    place: int
    bits: int


def flag_duplicates(facts: Split) -> Iterator[Flag]:
    """Samples of one split that show the image of an earlier one, exactly or nearly."""
    first = _distinct(facts)
    for sample in facts:
        if sample.digest and (same := first[sample.digest].sample_id) != sample.sample_id:
            yield Flag("duplicate_image", sample.split, sample.sample_id, f"the same pixels as {same}")
    looks = list(first.values())
    for look, near in zip(looks, _nearest(looks, looks, only_earlier=True), strict=True):
        if near is not None:
            text = f"nearly {looks[near.place].sample_id} ({near.bits} of {HASH_BITS} bits differ)"
            yield Flag("near_duplicate", look.split, look.sample_id, text)


def flag_leaks(train: Split, other: Split) -> Iterator[Flag]:
    """Samples of another split that show an image of train, exactly or nearly."""
    known = _distinct(train)
    rest = []
    for sample in other:
        if same := known.get(sample.digest):
            text = f"the same pixels as {same.split}/{same.sample_id}"
            yield Flag("leak", sample.split, sample.sample_id, text)
        elif sample.digest:
            rest.append(_Look(sample.split, sample.sample_id, sample.look))
    looks = list(known.values())
    for look, near in zip(rest, _nearest(rest, looks), strict=True):
        if near is not None:
            origin = looks[near.place]
            text = f"nearly {origin.split}/{origin.sample_id} ({near.bits} of {HASH_BITS} bits differ)"
            yield Flag("leak", look.split, look.sample_id, text)


def _distinct(facts: Split) -> dict[bytes, _Look]:
    """The first sample of each digest."""
    first: dict[bytes, _Look] = {}
    for sample in facts:
        if sample.digest and sample.digest not in first:
            first[sample.digest] = _Look(sample.split, sample.sample_id, sample.look)
    return first


def _nearest(queries: Sequence[_Look], known: Sequence[_Look], *, only_earlier: bool = False) -> Iterator[_Near | None]:
    """The nearest of the known for each query, None where none is near.

    Args:
        queries: what is looked for.
        known: among these.
        only_earlier: both are the same, and a query is compared with those before it.
    """
    for start in range(0, len(queries), _BLOCK):
        signs = _signs(queries[start : start + _BLOCK])
        found: list[_Near | None] = [None] * len(signs)
        best = np.full(len(signs), HASH_BITS - 2 * _NEAR_BITS - 1, np.float32)
        for low in range(0, start + 1 if only_earlier else len(known), _BLOCK):
            agreement = signs @ _signs(known[low : low + _BLOCK]).T  # bits alike less bits that differ
            if only_earlier and low == start:
                agreement[np.triu_indices_from(agreement)] = -HASH_BITS
            values = agreement.max(axis=1)
            for row in np.flatnonzero(values > best).tolist():
                best[row] = values[row]
                found[row] = _Near(low + int(agreement[row].argmax()), int(HASH_BITS - values[row]) // 2)
        yield from found


def _signs(looks: Sequence[_Look]) -> npt.NDArray[np.float32]:
    """Hashes as rows of +1 and -1, so that a matrix product counts bits."""
    bits = np.unpackbits(np.frombuffer(b"".join(look.hash for look in looks), np.uint8)).reshape(-1, HASH_BITS)
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


def flag_shapes(facts: Iterable[SampleFacts], classes: ClassMap) -> Iterator[Flag]:
    """Regions that are unlike the others of their class: rough, holed, merged or scattered."""
    index_of = classes.index_of
    owners, numbers, table = [], [], bytearray()
    for sample in facts:
        if sample.labels is not None and len(sample.labels.regions):
            owners.append((sample.split, sample.sample_id))
            numbers.append(len(sample.labels.regions))
            table += sample.labels.regions.tobytes()
    if not owners:
        return
    regions, owner = np.frombuffer(table, REGION), np.repeat(np.arange(len(owners)), numbers)
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
                number = int(regions["number"][row])
                what = f"segment {number} ({name})" if number else name
                split, sample_id = owners[owner[row]]
                yield Flag(kind, split, sample_id, f"{what} {text}", number)


def _outliers(regions: Regions, manner: Regions) -> Iterator[tuple[str, npt.NDArray[np.int64], str]]:
    """Places of the regions, all of one class, that each kind means; `manner` is what they are held against."""
    is_large = regions["area"] >= _LEAST_AREA
    is_wide = regions["width"] >= THIN  # smoothing leaves little of thinner strokes, however well drawn
    rough = is_large & is_wide & (regions["rough"] > _limit(manner["rough"], 2, _ROUGH_LEAST))
    yield "holes_or_jagged", np.flatnonzero(rough), "has a far rougher outline than its class has elsewhere"
    least = _HOLES_LEAST if regions["number"].any() else _HOLES_LEAST_OF_CLASS
    holed = is_large & ~rough & (regions["holes"] > _limit(manner["holes"], 3, least))
    yield "holes_or_jagged", np.flatnonzero(holed), "has far more small holes than its class has elsewhere"
    scattered = (regions["clusters"] >= _CLUSTERS_LEAST) & (regions["far"] >= _FAR_LEAST)
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
