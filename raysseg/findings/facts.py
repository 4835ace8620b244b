"""One sample -> its facts: a compact record of sizes, class pixels, shapes and hashes, with what is wrong in it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from raysseg import masks, rle
from raysseg.data.decode import Pixels, decode_image
from raysseg.data.files import decode_head
from raysseg.findings.shapes import REGION, Bits, Regions, component_areas, measure_region, measure_shift
from raysseg.schema import ClassMap, InputError, Sample, Segment

_HASH_SIDE = 16  # of the square of DCT coefficients whose signs are the perceptual hash
HASH_BITS = _HASH_SIDE**2
_BOX_SLACK = 3.0  # pixels by which a box's side may miss its mask: polygons round, and some tools count from 1
_BOX_SHARE = 0.05  # of the mask's larger side, likewise


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one sample: the kind of finding, what exactly, and the segment that is meant, if any."""

    kind: str
    detail: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class Labels:
    """What a sample's annotation holds, by data-set ids.

    Attributes:
        size: (height, width).
        ids: (K,) int32, ascending, the ids that occur; of segments, those that are no crowd.
        pixels: (K,) int64 pixels of each; of overlapping segments the smaller one wins.
        unlabelled: pixels of no id: between segments, or of crowds.
        num_crowds: segments that are crowds.
        regions: a row a segment, or a row an id of a label image.
        components: (M, 2) int64 rows of (id, pixels): the segments, or the connected parts of a label image.
        shift: (down, across, gain) of the place where the boundaries lie on stronger edges of the image.
    """

    size: tuple[int, int]
    ids: npt.NDArray[np.int32]
    pixels: npt.NDArray[np.int64]
    unlabelled: int
    num_crowds: int
    regions: Regions
    components: npt.NDArray[np.int64]
    shift: tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """All that is kept of a sample; its image is not.

    Attributes:
        split: of the data set.
        row: in the split's index.
        sample_id: within the split.
        size: (height, width) of the upright image; None where there is none, or it can't be decoded.
        mode: Pillow's name of the image's pixels, such as RGB or L.
        labels: None where the annotation can't be used.
        digest: of the decoded pixels; empty without them.
        look: the perceptual hash, HASH_BITS / 8 bytes; empty without pixels.
        problems: what is wrong with this sample alone.
    """

    split: str
    row: int
    sample_id: str
    size: tuple[int, int] | None = None
    mode: str = ""
    labels: Labels | None = None
    digest: bytes = b""
    look: bytes = b""
    problems: tuple[Problem, ...] = field(default=())


def to_facts(
    sample: Sample, split: str, row: int, classes: ClassMap | None, earlier: Sequence[Problem] = ()
) -> SampleFacts:
    """Looks at one sample.

    Args:
        sample: as read.
        split: its split.
        row: its place in the split's index.
        classes: the class list, which masks of colours need; None: label images are ids.
        earlier: what reading it has brought up.
    """
    problems = list(earlier)
    image, mode, orientation = None, "", 1
    if sample.image is not None:
        try:
            _, mode, orientation = decode_head(sample.image)
            image = decode_image(sample.image)
        except InputError as error:
            problems.append(Problem("unreadable", str(error)))
    labels, ids = None, None
    try:
        ids = to_id_map(sample, classes)
    except InputError as error:
        problems.append(_mask_problem(sample, error))
    if ids is not None:
        if image is not None:
            problems += _size_problems(image.shape[:2], ids.shape[:2], orientation)
        labels = _to_labels(sample, ids, image, classes)
        problems += _box_problems(labels.regions, sample.segments or ())
    return SampleFacts(
        split,
        row,
        sample.sample_id,
        None if image is None else (image.shape[0], image.shape[1]),
        mode,
        labels,
        b"" if image is None else hashlib.blake2b(image.tobytes(), digest_size=12).digest(),
        b"" if image is None else perceptual_hash(image),
        tuple(problems),
    )


def perceptual_hash(image: Pixels) -> bytes:
    """The signs of an image's lowest frequencies: recompressing, scaling or brightening it turns few of them.

    A hash of 256 bits of the discrete cosine transform (Zauner 2010, with more bits), from an image (H, W, 3).
    """
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    waves = cv2.dct(grey.astype(np.float32))[: _HASH_SIDE + 1, : _HASH_SIDE + 1]
    coefficients = waves[1:, 1:]  # the first row and column hold the light's slope, which brightening changes
    return np.packbits(coefficients > np.median(coefficients)).tobytes()


# --- image and sizes ----------------------------------------------------------------------------------------------


def _size_problems(image: tuple[int, ...], mask: tuple[int, ...], orientation: int) -> Iterator[Problem]:
    shown = f"the image is {image[1]}x{image[0]}, its labels {mask[1]}x{mask[0]} (width x height)"
    if orientation not in (0, 1):
        turned = f"the image's EXIF tag turns it (orientation {orientation})"
        fits = "the labels have the size of the turned image: see whether they follow it"
        yield Problem("exif_rotation", f"{turned}; {fits if image == mask else shown}")
    elif image != mask:
        yield Problem("size_mismatch", shown)


def _box_problems(regions: Regions, segments: Sequence[Segment]) -> Iterator[Problem]:
    for region, segment in zip(regions, segments, strict=bool(segments)):
        if not region["area"] or segment.box is None:
            continue
        x, y, width, height = segment.box
        true = region["box"].astype(np.float64)  # x0, y0, x1, y1
        off = float(np.abs(np.array([x, y, x + width, y + height]) - true).max())
        larger = max(true[2] - true[0], true[3] - true[1])
        if off > max(_BOX_SLACK, _BOX_SHARE * larger):
            number = int(region["number"])
            yield Problem("box_mismatch", f"segment {number}: its box is {off:.0f} pixels off its mask", number)


# --- labels -------------------------------------------------------------------------------------------------------


def to_id_map(sample: Sample, classes: ClassMap | None) -> masks.IdMap | None:
    """Data-set ids, or numbers of segments; None where the sample has no labels."""
    if sample.segments is not None:
        return masks.to_numbers(sample)[0]
    return None if sample.id_map is None else masks.decode_id_map(sample.id_map, classes)


def _mask_problem(sample: Sample, error: InputError) -> Problem:
    """A mask that can't be decoded, or whole one of which the content is wrong."""
    try:
        with Image.open(io.BytesIO(sample.id_map or b"")) as file:
            file.load()
    except masks.IMAGE_ERRORS:
        return Problem("unreadable" if sample.segments is None or sample.id_map else "invalid_segmentation", str(error))
    return Problem("id_out_of_range", str(error))


def _to_labels(sample: Sample, ids: masks.IdMap, image: Pixels | None, classes: ClassMap | None) -> Labels:
    size = (ids.shape[0], ids.shape[1])
    counts = np.bincount(ids.ravel())
    boundaries = image if image is not None and image.shape[:2] == size else None
    ignored = 0
    if sample.segments is None:
        present = np.flatnonzero(counts)
        ignored = classes.ignore_index if classes is not None else 255
        shapes = [(int(i), (ids == i).view(np.uint8)) for i in present if i != ignored]
        regions = np.array([measure_region(mask, i, 0, False) for i, mask in shapes], REGION)
        parts = [(i, area) for i, mask in shapes for area in component_areas(mask)]
        pixels, unlabelled, num_crowds = counts[present], 0, 0
    else:
        counts = np.pad(counts, (0, len(sample.segments) + 1 - len(counts)))
        regions = np.array(list(_measure_segments(sample, ids)), REGION)
        class_ids, is_crowd = regions["class_id"], regions["is_crowd"]
        parts = [(int(r["class_id"]), int(r["area"])) for r in regions if not r["is_crowd"]]
        present = np.unique(class_ids[~is_crowd & (regions["area"] > 0)])
        visible = counts[1:] * ~is_crowd
        pixels = np.array([visible[class_ids == i].sum() for i in present], np.int64)
        unlabelled, num_crowds = int(ids.size - pixels.sum()), int(is_crowd.sum())
    return Labels(
        size,
        present.astype(np.int32),
        pixels.astype(np.int64),
        unlabelled,
        num_crowds,
        regions,
        np.array(parts, np.int64).reshape(-1, 2),
        (0, 0, 0.0) if boundaries is None else measure_shift(boundaries, ids, ignored),
    )


def _measure_segments(sample: Sample, numbers: masks.IdMap) -> Iterator[tuple[object, ...]]:
    assert sample.segments is not None, "label images are measured by id"
    size = (numbers.shape[0], numbers.shape[1])
    for number, segment in enumerate(sample.segments, 1):
        mask: Bits = (
            (numbers == number).view(np.uint8)
            if segment.rle is None
            else np.ascontiguousarray(rle.to_mask(rle.to_runs(segment.rle, size), size)).view(np.uint8)
        )
        yield measure_region(mask, segment.class_id, number, segment.is_crowd, numbers)
