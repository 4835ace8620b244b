"""Labels as arrays: from the bytes of a sample to class indices or masks, and back."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from raysseg import rle
from raysseg.schema import ClassMap, InputError, Sample, Segment, Task

IdMap = npt.NDArray[np.uint8 | np.uint16]
"""(H, W), data-set ids or class indices."""


@dataclass(frozen=True)
class LabelMap:
    """One class a pixel.

    Attributes:
        labels: (H, W) class indices, uint8 or uint16.
        ignore_index: the value of pixels without a label.
    """

    labels: IdMap
    ignore_index: int


@dataclass(frozen=True)
class MaskSet:
    """Instances of one image; they may overlap, and lie encoded until they are asked for.

    Attributes:
        size: (height, width).
        rles: COCO's compressed RLE of each, N of them.
        class_ids: (N,) int64 class indices.
        is_crowd: (N,) bool, groups that are not told apart.
        scores: (N,) float64 in [0, 1]; None for ground truth.
        areas: (N,) float64 pixels, the data set's own where it states them; None: the masks'.
        boxes: (N, 4) float64 x, y, width, height, the data set's own where it states them; None: around the masks.
    """

    size: tuple[int, int]
    rles: tuple[bytes, ...]
    class_ids: npt.NDArray[np.int64]
    is_crowd: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64] | None = None
    areas: npt.NDArray[np.float64] | None = None
    boxes: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def masks(self) -> npt.NDArray[np.bool_]:
        """All masks decoded at once, (N, H, W)."""
        found = [rle.to_mask(rle.to_runs(encoded, self.size), self.size) for encoded in self.rles]
        return np.stack(found) if found else np.zeros((0, *self.size), np.bool_)


@dataclass(frozen=True)
class SegmentMap:
    """Segments of one image that don't overlap, things and stuff.

    Attributes:
        numbers: (H, W) uint8 or uint16, 1 + place of each pixel's segment; 0 for void.
        class_ids: (N,) int64 class indices.
        is_crowd: (N,) bool, groups that are not told apart.
        scores: (N,) float64 in [0, 1]; None for ground truth.
    """

    numbers: IdMap
    class_ids: npt.NDArray[np.int64]
    is_crowd: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.class_ids)


View = LabelMap | MaskSet | SegmentMap
"""What an image's labels are to a task: semantic, instance, panoptic."""


# --- views of a sample --------------------------------------------------------------------------------------------


@contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Errors name the sample."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{sample.sample_id}: {error}") from error


def to_dense(sample: Sample, classes: ClassMap) -> LabelMap:
    """The semantic view of a sample.

    Of overlapping instances the smaller one wins; crowds are ignored; what no instance covers is `classes.uncovered`.
    The regions of an id map have their class, and what lies between them is ignored.

    Raises:
        InputError: the sample is not labelled, a label can't be read, or holds ids or colours that the class list
            lacks.
    """
    with naming(sample):
        if sample.id_map is not None and sample.segments is not None:
            numbers, table = _numbers(sample, sample.segments), _class_of_number(sample.segments, classes)
            return LabelMap(table.take(numbers), classes.ignore)
        if sample.id_map is not None:
            return LabelMap(to_indices(decode_id_map(sample.id_map, classes), classes), classes.ignore)
        if sample.segments is not None:
            return LabelMap(_paint_classes(sample, sample.segments, classes), classes.ignore)
        raise InputError("has no mask")


def to_instances(sample: Sample, classes: ClassMap) -> MaskSet:
    """The instance view of a sample: its things, crowds among them, and empty masks, which scores count too.

    Raises:
        InputError: the sample has no instances to tell apart, a label can't be read, or holds unknown ids.
    """
    with naming(sample):
        if sample.segments is None:
            raise InputError("has labels of classes alone; instances need COCO, YOLO or panoptic annotations")
        things = [
            (number, segment, index)
            for number, segment in enumerate(sample.segments, 1)
            if (index := _index_of(segment.class_id, classes)) is not None and classes.things[index]
        ]
        if sample.id_map is not None:
            numbers = _numbers(sample, sample.segments)
            size = (numbers.shape[0], numbers.shape[1])
            found = [rle.from_mask(numbers == number) for number, _, _ in things]
        else:
            size = (sample.height, sample.width)
            found = [segment.rle or b"" for _, segment, _ in things]
            for encoded in found:
                rle.to_runs(encoded, size)  # whether it fits
    segments = [segment for _, segment, _ in things]
    return MaskSet(
        size=size,
        rles=tuple(found),
        class_ids=np.array([index for _, _, index in things], np.int64),
        is_crowd=np.array([segment.is_crowd for segment in segments], np.bool_),
        scores=_known([segment.score for segment in segments]),
        areas=_known([segment.area for segment in segments]),
        boxes=_known([segment.box for segment in segments]),
    )


def to_segment_map(sample: Sample, classes: ClassMap) -> SegmentMap:
    """The panoptic view of a sample: its segments, those of one stuff class as one; what has no class is void.

    Of overlapping segments the smaller one wins, and crowds lose.

    Raises:
        InputError: the sample's labels are of classes alone, a label can't be read, or holds unknown ids.
    """
    with naming(sample):
        if sample.segments is None:
            raise InputError("has labels of classes alone; panoptic segmentation needs COCO panoptic annotations")
        numbers, _ = to_numbers(sample)
        indices = [_index_of(segment.class_id, classes) for segment in sample.segments]
    place: dict[tuple[int, int], int] = {}  # of a segment in the view, by class and, of things and crowds, by number
    table: IdMap = np.zeros(len(indices) + 1, numbers.dtype)
    kept = []
    for number, (segment, index) in enumerate(zip(sample.segments, indices, strict=True), 1):
        if index is None:
            continue
        is_single = classes.things[index] or segment.is_crowd
        key = (index, number if is_single else 0)
        if key not in place:
            kept.append((segment, index))
            place[key] = len(kept)
        table[number] = place[key]
    return SegmentMap(
        numbers=numbers if np.array_equal(table, np.arange(len(table))) else table.take(numbers),
        class_ids=np.array([index for _, index in kept], np.int64),
        is_crowd=np.array([segment.is_crowd for segment, _ in kept], np.bool_),
        scores=_known([segment.score for segment, _ in kept]),
    )


@dataclass(frozen=True)
class Layers:
    """Regions of one image as few maps of numbers, which transforms of labels can move; what overlaps is in several.

    Attributes:
        labels: (H, W) class indices; `ignore` for void and crowds, `nothing` between instances.
        numbers: (L, H, W) uint8 or uint16, 1 + place of each pixel's region; each region is in one layer.
        class_ids: (N,) int64 class indices; crowds have no region.
    """

    labels: IdMap
    numbers: IdMap
    class_ids: npt.NDArray[np.int64]


def to_layers(view: MaskSet | SegmentMap, classes: ClassMap) -> Layers:
    """Regions that may overlap as layers; segment maps need one, instances as many as lie above each other."""
    kept = np.flatnonzero(~view.is_crowd)
    class_ids = view.class_ids[kept]
    dtype = np.uint8 if len(kept) < 256 else np.uint16
    if isinstance(view, SegmentMap):
        renumbered: IdMap = np.zeros(len(view) + 1, dtype)
        renumbered[kept + 1] = np.arange(1, len(kept) + 1)
        numbers: IdMap = renumbered.take(view.numbers)[None]
        table: IdMap = np.full(len(kept) + 1, classes.ignore, classes.dtype)
        table[1:] = class_ids
        return Layers(table.take(numbers[0]), numbers, class_ids)
    height, width = view.size
    runs = [rle.to_runs(encoded, view.size) for encoded in view.rles]
    values = np.where(view.is_crowd, classes.ignore, view.class_ids).tolist()
    labels = _paint(view.size, runs, values, view.is_crowd.tolist(), classes.nothing, classes.dtype)
    layers: list[IdMap] = [np.zeros(height * width, dtype)]  # down the columns
    for number, place in enumerate(kept, 1):
        free: IdMap | None = next((layer for layer in layers if not rle.is_painted(layer, runs[place])), None)
        if free is None:
            free = np.zeros(height * width, dtype)
            layers.append(free)
        rle.paint(free, runs[place], number)
    stacked: IdMap = np.ascontiguousarray(np.stack(layers).reshape(-1, width, height).transpose(0, 2, 1))
    return Layers(labels, stacked, class_ids)


def to_view(sample: Sample, classes: ClassMap, task: Task) -> View:
    """What a sample's labels are to a task."""
    if task == "semantic":
        return to_dense(sample, classes)
    return to_instances(sample, classes) if task == "instance" else to_segment_map(sample, classes)


def to_sample(sample_id: str, view: View, classes: ClassMap, image: bytes | None = None) -> Sample:
    """A view as a sample with the class list's ids: `to_view` turned round."""
    height, width = size_of(view)
    if isinstance(view, LabelMap):
        return Sample(sample_id, image, height, width, compress_id_map(to_ids(view.labels, classes)))
    unknown = [None] * len(view)
    class_ids = [classes.ids[index] for index in view.class_ids.tolist()]
    scores = unknown if view.scores is None else view.scores.tolist()
    if isinstance(view, SegmentMap):
        entries = zip(class_ids, view.is_crowd.tolist(), scores, unknown, strict=True)
        id_map = compress_id_map(view.numbers)
        return Sample(sample_id, image, height, width, id_map, tuple(Segment(*entry) for entry in entries))
    areas = unknown if view.areas is None else view.areas.tolist()
    boxes = unknown if view.boxes is None else map(tuple, view.boxes.tolist())
    columns = (class_ids, view.is_crowd.tolist(), scores, view.rles, areas, boxes)
    segments = tuple(Segment(*entry) for entry in zip(*columns, strict=True))
    return Sample(sample_id, image, height, width, None, segments)


def to_regions(view: LabelMap) -> SegmentMap:
    """Each class of a predicted label map as one segment of score 1."""
    indices = np.unique(view.labels[view.labels != view.ignore_index])
    table: IdMap = np.zeros(view.ignore_index + 1, view.labels.dtype)
    table[indices] = np.arange(1, len(indices) + 1)
    return SegmentMap(
        numbers=table.take(view.labels),
        class_ids=indices.astype(np.int64),
        is_crowd=np.zeros(len(indices), np.bool_),
        scores=np.ones(len(indices)),
    )


def size_of(view: View) -> tuple[int, int]:
    """(height, width) of the image."""
    if isinstance(view, MaskSet):
        return view.size
    array = view.labels if isinstance(view, LabelMap) else view.numbers
    return array.shape[0], array.shape[1]


def _known(values: Sequence[float | tuple[float, ...] | None]) -> npt.NDArray[np.float64] | None:
    """The values as an array, where there are any and none is missing."""
    return None if None in values or not values else np.array(values, np.float64)


def to_numbers(sample: Sample) -> tuple[IdMap, int]:
    """The disjoint view of a sample's segments: 1 + place of each pixel's segment, 0 for none, (H, W).

    Of overlapping segments the smaller one wins, and crowds lose; the second value is how many pixels were in several.

    Raises:
        InputError: a segment's RLE does not fit the sample.
    """
    assert sample.segments is not None, "label images have no segments"
    if sample.id_map is not None:
        return _numbers(sample, sample.segments), 0
    size = (sample.height, sample.width)
    runs = [_runs(segment, size) for segment in sample.segments]
    values = list(range(1, len(runs) + 1))
    numbers = _paint(size, runs, values, [segment.is_crowd for segment in sample.segments], 0, np.uint16)
    return numbers, sum(map(rle.area, runs)) - int(np.count_nonzero(numbers))


def _numbers(sample: Sample, segments: tuple[Segment, ...]) -> IdMap:
    """The id map of a sample with segments: 1 + place in them, 0 for void."""
    assert sample.id_map is not None
    numbers = decode_id_map(sample.id_map)
    if (most := int(numbers.max(initial=0))) > len(segments):
        raise InputError(f"the id map holds the number {most}, but there are {len(segments)} segments")
    return numbers


def _class_of_number(segments: tuple[Segment, ...], classes: ClassMap) -> IdMap:
    """For each number of an id map its class index; void and dropped classes are ignored."""
    indices = [_index_of(segment.class_id, classes) for segment in segments]
    return np.array([classes.ignore, *(classes.ignore if i is None else i for i in indices)], classes.dtype)


def _index_of(class_id: int, classes: ClassMap) -> int | None:
    """The index of a data-set id; None if it is dropped."""
    index = int(_index_table(classes)[class_id]) if 0 <= class_id <= 65535 else _unknown(classes)
    if index == _unknown(classes):
        raise InputError(
            f"has a segment of class id {class_id}, which the class list lacks; add it, or name it in `dropped`"
        )
    return None if index == classes.ignore else index


def _runs(segment: Segment, size: tuple[int, int]) -> rle.Runs:
    assert segment.rle is not None, "segments without an id map carry their own RLE"
    return rle.to_runs(segment.rle, size)


def _paint_classes(sample: Sample, segments: tuple[Segment, ...], classes: ClassMap) -> IdMap:
    size = (sample.height, sample.width)
    known = [(s, index) for s in segments if (index := _index_of(s.class_id, classes)) is not None]
    return _paint(
        size,
        [_runs(segment, size) for segment, _ in known],
        [classes.ignore if segment.is_crowd else index for segment, index in known],
        [segment.is_crowd for segment, _ in known],
        classes.ignore if classes.uncovered is None else classes.uncovered,
        classes.dtype,
    )


def _paint(
    size: tuple[int, int],
    runs: Sequence[rle.Runs],
    values: Sequence[int],
    is_crowd: Sequence[bool],
    base: int,
    dtype: type[np.uint8] | type[np.uint16],
) -> IdMap:
    """Regions that may overlap as one map, (H, W): crowds first, then from the largest to the smallest."""
    pixels: IdMap = np.full(size[0] * size[1], base, dtype)  # down the columns
    for i in sorted(range(len(runs)), key=lambda i: (not is_crowd[i], -rle.area(runs[i]))):
        rle.paint(pixels, runs[i], values[i])
    return np.ascontiguousarray(pixels.reshape(size[::-1]).T)


def with_classes(sample: Sample, classes: ClassMap) -> Sample:
    """A sample whose segments have the ids of the class list; dropped ones are gone."""
    assert sample.segments is not None, "label images have no segments"
    kept = [
        (number, replace(segment, class_id=classes.ids[index]))
        for number, segment in enumerate(sample.segments, 1)
        if (index := _index_of(segment.class_id, classes)) is not None
    ]
    id_map = sample.id_map
    if id_map is not None:
        table: IdMap = np.zeros(len(sample.segments) + 1, np.uint16 if len(kept) > 255 else np.uint8)
        table[[number for number, _ in kept]] = np.arange(1, len(kept) + 1)
        numbers: IdMap = table.take(_numbers(sample, sample.segments))
        id_map = compress_id_map(numbers)
    return replace(sample, id_map=id_map, segments=tuple(segment for _, segment in kept))


# --- label images -------------------------------------------------------------------------------------------------


def decode_id_map(data: bytes, classes: ClassMap | None = None) -> IdMap:
    """Reads a mask file into data-set ids, (H, W).

    PNG: palette and grey pixels (1 to 16 bit) are ids; RGB pixels are the class list's colours, and black is ignored
    where no class is black. numpy (.npy, or .npz with one array): integers or booleans, (H, W). And what shards hold.

    Raises:
        InputError: the file is damaged, of another kind, or holds unknown colours.
    """
    if data.startswith(_COMPRESSED):
        return _decompress_id_map(data)
    if data[:6] == b"\x93NUMPY" or data[:4] == b"PK\x03\x04":
        return _from_numpy(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode in ("P", "L", "1"):
                step = _GREY_STEPS.get(str(image.tile[0].args), 1) if image.mode == "L" else 1  # before it is decoded
                return np.array(image, dtype=np.uint8) // np.uint8(step)
            if image.mode.startswith("I"):
                return np.array(image).astype(np.uint16)
            if image.mode == "LA":
                return np.array(image.getchannel("L"))
            if image.mode in ("RGB", "RGBA") and classes is not None:
                return _from_colours(np.array(image.convert("RGB")), classes)
            mode = image.mode
    except IMAGE_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the mask can't be decoded ({explain(error)}); masks are PNG, .npy or .npz: write the file anew"
        ) from error
    raise InputError(f"the mask has PNG mode {mode}; allowed: palette, grey of 1, 8 or 16 bit, RGB colours")


IMAGE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that it can't decode; damaged tags raise TypeError and struct.error."""


def explain(error: Exception) -> str:
    """What is wrong with such a file; Pillow itself would name an object of its own."""
    return "it is none" if isinstance(error, UnidentifiedImageError) else str(error)


_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow spreads grey of 2 and 4 bits to 0 ... 255; one level is so far from the next."""


def encode_id_map(ids: IdMap, classes: ClassMap | None = None) -> bytes:
    """Writes ids as PNG: 8 bit (with the classes' colours as palette, if given) or, beyond 255, 16-bit grey."""
    image = Image.fromarray(np.ascontiguousarray(ids))
    if classes is not None and ids.dtype == np.uint8:
        palette = np.zeros((256, 3), np.uint8)
        known = [i for i, class_id in enumerate(classes.ids) if class_id < 256]
        palette[[classes.ids[i] for i in known]] = classes.palette[known]
        image.putpalette(palette.tobytes())
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pack_id_map(ids: IdMap) -> bytes:
    """Writes ids as a numpy file: large, and far faster than PNG, for what is read again at once."""
    out = io.BytesIO()
    np.save(out, ids)
    return out.getvalue()


_COMPRESSED = b"RSGMAP01"


def compress_id_map(ids: IdMap) -> bytes:
    """Writes ids for shards, as small as PNG and read four times as fast: magic, height, width, bytes a pixel, zstd."""
    head = struct.pack("<IIB", *ids.shape, ids.itemsize)
    pixels = np.ascontiguousarray(ids, ids.dtype.newbyteorder("<"))
    body: bytes = pa.compress(pixels, codec="zstd", asbytes=True)
    return _COMPRESSED + head + body


def _decompress_id_map(data: bytes) -> IdMap:
    height, width, size = struct.unpack_from("<IIB", data, len(_COMPRESSED))
    body = memoryview(data)[len(_COMPRESSED) + 9 :]
    try:
        pixels = pa.decompress(body, height * width * size, codec="zstd")
    except OSError as error:
        raise InputError(f"the id map of a shard is damaged ({error}); write the shards anew") from error
    ids: IdMap = np.frombuffer(pixels, f"<u{size}").reshape(height, width)
    return ids


def to_indices(ids: IdMap, classes: ClassMap) -> IdMap:
    """Data-set ids to class indices, (H, W); the ignore index becomes ``classes.ignore``.

    Raises:
        InputError: ids that the class list lacks.
    """
    if ids.dtype == np.uint8 and _are_indices(classes) and (labels := _with_ignored(ids, classes)) is not None:
        return labels
    indices: IdMap = _index_table(classes).take(ids)
    if (indices == _unknown(classes)).any():
        raise InputError(_unknown_ids(np.unique(ids), classes))
    return indices


def to_ids(labels: IdMap, classes: ClassMap) -> IdMap:
    """Class indices to data-set ids, (H, W); ignored pixels become the data set's ignore index."""
    largest = max(*classes.ids, classes.ignore_index)
    table: IdMap = np.full(classes.ignore + 1, classes.ignore_index, np.uint8 if largest < 256 else np.uint16)
    table[: len(classes)] = classes.ids
    ids: IdMap = table.take(labels)
    return ids


@lru_cache(maxsize=8)
def _are_indices(classes: ClassMap) -> bool:
    """Whether the data set's ids are class indices, but for the ignored one."""
    has_rest = bool(classes.dropped) or classes.ignore_index in classes.index_of
    return classes.ignore == 255 and not has_rest and all(i == index for i, index in classes.index_of.items())


def _with_ignored(ids: IdMap, classes: ClassMap) -> IdMap | None:
    """Ids that are class indices but for the ignored one; None if some are unknown. Six times as fast as a table."""
    labels = ids
    if classes.ignore_index != 255:
        if ids.max(initial=0) == 255:
            return None
        labels = ids | ((ids == classes.ignore_index).view(np.uint8) * np.uint8(255))
    beyond = (labels + np.uint8(1)).max(initial=0)  # 255 becomes 0
    return labels if beyond <= len(classes) else None


@lru_cache(maxsize=8)
def _index_table(classes: ClassMap) -> IdMap:
    """For each id 0 to 65535 its class index, or that of what the class list does not know."""
    table: IdMap = np.full(65536, _unknown(classes), classes.dtype)
    table[[*classes.dropped, classes.ignore_index]] = classes.ignore
    table[list(classes.index_of)] = list(classes.index_of.values())
    return table


def _unknown(classes: ClassMap) -> int:
    """No index of a class, and not the ignored one."""
    return classes.ignore - 1


def _unknown_ids(present: npt.NDArray[np.integer], classes: ClassMap) -> str:
    unknown = sorted(set(present.tolist()) - {*classes.ids, classes.ignore_index})
    shown = ", ".join(str(i) for i in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
    listed = sorted(classes.ids)
    dense = listed == list(range(listed[0], listed[0] + len(listed)))
    allowed = f"{listed[0]} to {listed[-1]}" if dense else ", ".join(map(str, listed[:20]))
    message = (
        f"the mask holds ids that the class list lacks: {shown}; allowed: {allowed}, ignored: {classes.ignore_index}"
    )
    if set(present.tolist()) <= {0, 255} and len(classes) == 2:
        return f"{message}. {BINARY_MEND}"
    return f"{message}. Add them to the class list, or set its ignore_index to an id that means 'not labelled'"


BINARY_MEND = (
    "These look like binary masks stored as 0 and 255. Either store them as 0 and 1, or say so in the class list: "
    '{"classes": [{"id": 0, "name": "background"}, {"id": 255, "name": "foreground"}], "ignore_index": 254}'
)


def _from_numpy(data: bytes) -> IdMap:
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            if len(loaded.files) != 1:
                raise InputError(
                    f"the .npz holds {len(loaded.files)} arrays ({', '.join(loaded.files)}); it should hold one"
                )
            loaded = loaded[loaded.files[0]]
    except (OSError, ValueError, EOFError, RuntimeError, BadZipFile, TokenError, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the numpy mask can't be read ({error}); write the file anew, without pickled objects"
        ) from error
    array = np.asarray(loaded)
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise InputError(
            f"the numpy mask is {array.dtype} of shape {array.shape}; it should be integers of shape (H, W)"
        )
    if array.size and (array.min() < 0 or array.max() > 65535):
        raise InputError(f"the numpy mask holds {array.min()} to {array.max()}; ids are 0 to 65535")
    return array.astype(np.uint8) if array.dtype in (np.bool_, np.uint8) else array.astype(np.uint16)


def _from_colours(pixels: npt.NDArray[np.uint8], classes: ClassMap) -> IdMap:
    """(H, W, 3) colours to ids."""
    weights = np.array([65536, 256, 1])
    codes = classes.palette.astype(np.int64) @ weights
    if len(np.unique(codes)) < len(codes):
        raise InputError("the mask is RGB, but two classes share a colour; give each class its own in the class list")
    if 0 not in codes:
        codes = np.append(codes, 0)
    ids = np.array([*classes.ids, classes.ignore_index])[: len(codes)]
    order = np.argsort(codes)
    found = pixels.astype(np.int64) @ weights
    place = np.minimum(np.searchsorted(codes[order], found), len(codes) - 1)
    unknown = codes[order][place] != found
    if unknown.any():
        colour = tuple(int(c) for c in pixels[unknown][0])
        raise InputError(
            f"the mask is RGB and holds the colour {colour} ({unknown.mean():.1%} of its pixels), which no class has; "
            "give each class its `colour` in the class list, or store the masks as palette or grey PNG of class ids"
        )
    found_ids: IdMap = ids[order][place].astype(np.uint8 if ids.max() < 256 else np.uint16)
    return found_ids
