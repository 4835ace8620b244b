"""fingerprint.json: what a data set is, what is wrong with it and what to do about it, as it is kept. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from raysseg import storage
from raysseg.findings.kinds import Finding
from raysseg.schema import InputError, Task

Value = str | float | int | bool | None | list[int] | list[float] | list[str]
Tree = Mapping[str, "Tree | Value"]

COCO_SIDES = (32, 96)  # pixels: up to 32 x 32 an instance is small, up to 96 x 96 medium


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


@dataclass(frozen=True)
class Choice:
    """A key of a train job, its value, and why."""

    key: str
    value: Value
    reason: str


@dataclass(frozen=True)
class Advice:
    """What to do about a data set.

    Attributes:
        choices: keys of a train job.
        remarks: what no key says.
    """

    choices: list[Choice]
    remarks: list[str]


@dataclass(frozen=True)
class Fingerprint:
    """What a data set is: fingerprint.json.

    Attributes:
        name: of the job.
        task: that it is looked at for.
        classes: its class list.
        ignore_index: the id of pixels without a class.
        data: the source of each split, as a job names it.
        listed: what a train job's `classes` is: a file, names, or None where the data set names its own.
        splits: what each holds, the one for training first.
        findings: what is wrong, the gravest first.
        advice: what to do about it.
    """

    name: str
    task: Task
    classes: list[dict[str, object]]
    ignore_index: int
    data: dict[str, dict[str, Value]]
    listed: str | list[str] | None
    splits: list[SplitFacts]
    findings: list[Finding]
    advice: Advice

    @property
    def train(self) -> SplitFacts:
        """The split for training."""
        return self.splits[0]

    @property
    def format(self) -> str:
        """Of its source."""
        return str(next(iter(self.data.values()))["format"])


def read_fingerprint(uri: str) -> Fingerprint:
    """Reads a fingerprint.json.

    Raises:
        InputError: the file is not one, or of another version.
        StorageError: it can't be reached.
    """
    text = storage.read_text(storage.absolute(uri))
    try:
        return _FINGERPRINT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key}: {first['msg']}" if key else first["msg"]
        raise InputError(
            f"{uri}: not a fingerprint of this version ({reason}); `raysseg inspect` writes fingerprint.json"
        ) from error


_FINGERPRINT = TypeAdapter(Fingerprint)
