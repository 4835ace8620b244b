"""The shared nouns: tasks, classes, segments and samples. numpy only."""

from __future__ import annotations

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


class RunStopped(Exception):  # noqa: N818 - like KeyboardInterrupt
    """A run ended because a signal asked for it; what it has come to is saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, signal)
        self.message, self.signal = message, signal
