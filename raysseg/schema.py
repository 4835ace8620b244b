"""The shared nouns: tasks, classes, segments and samples. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

Task = Literal["semantic", "instance", "panoptic"]


class InputError(ValueError):
    """Something the user can mend: a key, a file, a class list, a storage; the message says what, where and how."""


@dataclass(frozen=True)
class ClassMap:
    """The classes of a data set: its ids at rest on one side, contiguous indices for tensors on the other.

    Index ``i`` stands for the class with data-set id ``ids[i]``, which is what is written; where classes are merged, it
    is read from ``sources[i]``. Only readers and writers convert between the two.

    Attributes:
        ids: data-set ids, as files hold them; any non-negative integers, distinct.
        names: one name a class, distinct.
        colours: one (red, green, blue) a class, each 0 to 255.
        things: whether each class is countable (a thing) or not (stuff).
        ignore_index: the data-set id that stands for "not labelled".
        sources: data-set ids that are read as each class; empty where that is its own id throughout.
        dropped: data-set ids that are read as if nothing were labelled there.
        uncovered: index of the class of pixels that no instance covers, where instances are seen as semantic labels;
            None: they are ignored.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    things: tuple[bool, ...]
    ignore_index: int = 255
    sources: tuple[tuple[int, ...], ...] = ()
    dropped: tuple[int, ...] = ()
    uncovered: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The type of index maps: uint8, or uint16 from 255 classes on."""
        return np.uint8 if len(self) < 255 else np.uint16

    @property
    def ignore(self) -> int:
        """The value of ignored pixels in index maps: 255, or 65535 from 255 classes on."""
        return int(np.iinfo(self.dtype).max)

    @property
    def nothing(self) -> int:
        """The value of pixels in index maps that are known to be of no class, such as between instances."""
        return self.ignore - 1

    @cached_property
    def index_of(self) -> dict[int, int]:
        """The index of each data-set id that is read as a class."""
        sources = self.sources or tuple((class_id,) for class_id in self.ids)
        return {class_id: index for index, ids in enumerate(sources) for class_id in ids}

    @property
    def at_rest(self) -> ClassMap:
        """The class list of what is written by this one: each class is its own id, and nothing is dropped any more."""
        return replace(self, sources=(), dropped=())

    @cached_property
    def palette(self) -> npt.NDArray[np.uint8]:
        """Colours by index, (C, 3)."""
        return np.array(self.colours, dtype=np.uint8).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class Segment:
    """One labelled region of a sample: an instance, a stuff region or a crowd.

    Attributes:
        class_id: data-set id of its class.
        is_crowd: a group that is not told apart; neither right nor wrong to predict.
        score: confidence in [0, 1] of a prediction; None for ground truth.
        rle: COCO's compressed RLE over the sample's (height, width); None where the sample's id map holds the region.
        area: pixels, where the data set states them itself; COCO's size classes go by that.
        box: x, y, width, height in pixels, where the data set states it itself.
    """

    class_id: int
    is_crowd: bool
    score: float | None
    rle: bytes | None
    area: float | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and what is known about it; a prediction is a sample whose segments carry scores.

    Attributes:
        sample_id: stable name within its data set.
        image: the encoded image file (JPEG, PNG, ...); None where only labels are at hand.
        height: pixels, after EXIF orientation; 0 where not known before decoding.
        width: likewise.
        id_map: encoded label image: class ids where ``segments`` is None, else 1 + position in ``segments`` with 0 for
            void. None where the segments carry their own RLE, or nothing is labelled.
        segments: instances and stuff regions; None for semantic label images and unlabelled images.
    """

    sample_id: str
    image: bytes | None
    height: int
    width: int
    id_map: bytes | None
    segments: tuple[Segment, ...] | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What points to one object of an image; points, box and mask go together.

    Attributes:
        points: x, y in pixels of the image.
        labels: one a point: 1 on the object, 0 on the background.
        box: x0, y0, x1, y1 in pixels, around the object.
        mask: a first guess of the object; COCO's compressed RLE over the image.
        is_multimask: three masks, for a prompt that may mean a part as well as the whole; else one.

    Raises:
        InputError: nothing is given, or what is given can't be of any image.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: bytes | None = None
    is_multimask: bool = True

    def __post_init__(self) -> None:
        if not self.points and self.box is None and self.mask is None:
            raise InputError("prompt: has no points, no box and no mask; give at least one of them")
        if len(self.labels) != len(self.points):
            raise InputError(
                f"prompt.labels: {len(self.labels)} for {len(self.points)} points; give one a point: "
                "1 on the object, 0 on the background"
            )
        if unknown := [label for label in self.labels if label not in (0, 1)]:
            raise InputError(f"prompt.labels: {unknown[0]}; allowed: 1 on the object, 0 on the background")
        for point in self.points:
            if len(point) != 2 or not all(map(math.isfinite, point)):
                raise InputError(f"prompt.points: {list(point)}; give x, y in pixels")
        if self.box is not None:
            if len(self.box) != 4 or not all(map(math.isfinite, self.box)):
                raise InputError(f"prompt.box: {list(self.box)}; give x0, y0, x1, y1 in pixels")
            if not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
                raise InputError(
                    f"prompt.box: {list(self.box)} has no area; give x0, y0, x1, y1 with x0 < x1 and y0 < y1"
                )

    def check(self, size: tuple[int, int]) -> None:
        """Raises InputError where a point or the box lies outside of an image of this (height, width)."""
        height, width = size
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(
                    f"prompt.points: {[x, y]} lies outside of the image; allowed: x from 0 to below {width}, "
                    f"y from 0 to below {height}"
                )
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
                raise InputError(
                    f"prompt.box: {list(self.box)} goes beyond the image; allowed: x from 0 to {width}, "
                    f"y from 0 to {height}"
                )


class RunStopped(Exception):  # noqa: N818 - like KeyboardInterrupt
    """A run ended because a signal asked for it; what it has come to is saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.message, self.signal = message, signal


class JobEnded(Exception):  # noqa: N818 - the job's failure, of which its own log says all
    """A job on a cluster failed or was stopped.

    Attributes:
        exit_code: its own.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.message, self.exit_code = message, exit_code
