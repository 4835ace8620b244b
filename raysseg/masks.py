"""Label images: from the bytes of a file to class indices, and back."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from functools import lru_cache
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from PIL import Image

from raysseg.schema import ClassMap, InputError, Sample

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


def to_dense(sample: Sample, classes: ClassMap) -> LabelMap:
    """The semantic view of a sample.

    Raises:
        InputError: the label image can't be read, or holds ids or colours that the class list lacks.
    """
    if sample.id_map is None:
        raise InputError(f"{sample.sample_id}: has no mask")
    try:
        ids = decode_id_map(sample.id_map, classes)
        return LabelMap(to_indices(ids, classes), classes.ignore)
    except InputError as error:
        raise InputError(f"{sample.sample_id}: {error}") from error


def decode_id_map(data: bytes, classes: ClassMap) -> IdMap:
    """Reads a mask file into data-set ids, (H, W).

    PNG: palette and grey pixels (1 to 16 bit) are ids; RGB pixels are the class list's colours, and black is ignored
    where no class is black. numpy (.npy, or .npz with one array): integers or booleans, (H, W).

    Raises:
        InputError: the file is damaged, of another kind, or holds unknown colours.
    """
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
            if image.mode in ("RGB", "RGBA"):
                return _from_colours(np.array(image.convert("RGB")), classes)
            mode = image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the mask can't be decoded ({error}); masks are PNG, .npy or .npz: write the file anew"
        ) from error
    raise InputError(f"the mask has PNG mode {mode}; allowed: palette, grey of 1, 8 or 16 bit, RGB colours")


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


def to_indices(ids: IdMap, classes: ClassMap) -> IdMap:
    """Data-set ids to class indices, (H, W); the ignore index becomes ``classes.ignore``.

    Raises:
        InputError: ids that the class list lacks.
    """
    table, is_known = _index_table(classes)
    if not is_known.take(ids).all():
        raise InputError(_unknown_ids(np.unique(ids), classes))
    indices: IdMap = table.take(ids)
    return indices


def to_ids(labels: IdMap, classes: ClassMap) -> IdMap:
    """Class indices to data-set ids, (H, W); ignored pixels become the data set's ignore index."""
    largest = max(*classes.ids, classes.ignore_index)
    table: IdMap = np.full(classes.ignore + 1, classes.ignore_index, np.uint8 if largest < 256 else np.uint16)
    table[: len(classes)] = classes.ids
    ids: IdMap = table.take(labels)
    return ids


@lru_cache(maxsize=8)
def _index_table(classes: ClassMap) -> tuple[IdMap, npt.NDArray[np.bool_]]:
    """For each id 0 to 65535 its class index, and whether the class list knows it."""
    table = np.full(65536, classes.ignore, classes.dtype)
    table[list(classes.ids)] = np.arange(len(classes))
    is_known = np.zeros(65536, np.bool_)
    is_known[[*classes.ids, classes.ignore_index]] = True
    return table, is_known


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
