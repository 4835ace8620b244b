"""JPEG by region: libjpeg-turbo's own interface (TurboJPEG 3), which decodes the window that is wanted and no more.

The library is the system's, or the one that the package ``turbojpeg`` brings along. Where there is neither, whole
images are decoded instead: the same pixels, later.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

import numpy as np
import numpy.typing as npt

from raysseg.schema import InputError

_NAMES = {"linux": "libturbojpeg.so.0", "darwin": "libturbojpeg.0.dylib", "win32": "turbojpeg.dll"}
_DECOMPRESS, _RGB, _FATAL = 1, 0, 1
_WIDTH, _HEIGHT, _COLOURS = 5, 6, 8  # parameters of a header
_YCBCR, _GREY = 1, 2  # colours that become RGB
_ALIGN = 32  # every chroma subsampling's blocks begin at multiples of it
_MARGIN = 2  # pixels beside a window that its interpolated chroma takes into account


class _Region(ctypes.Structure):
    _fields_ = (("x", c_int), ("y", c_int), ("width", c_int), ("height", c_int))


@dataclass(frozen=True, slots=True)
class Jpeg:
    """An encoded image that is decoded window by window: ``jpeg[rows, columns]`` is (h, w, 3) uint8 RGB.

    Every window equals, to the bit, the same window of the whole image decoded.
    """

    data: bytes
    shape: tuple[int, int, int]

    def __getitem__(self, window: tuple[slice, slice]) -> npt.NDArray[np.uint8]:
        """Decodes a window; raises InputError if the file is damaged."""
        (top, bottom, _), (left, right, _) = (
            part.indices(side) for part, side in zip(window, self.shape, strict=False)
        )
        assert bottom > top, "a height of 0 means all of it to the library"
        start = max(0, left - _MARGIN) // _ALIGN * _ALIGN
        stop = min(self.shape[1], right + _MARGIN)
        pixels = np.empty((bottom - top, stop - start, 3), np.uint8)
        with _reading(self.data) as (library, handle):
            _check(library, handle, library.tj3SetCroppingRegion(handle, _Region(start, top, *pixels.shape[1::-1])))
            place = pixels.ctypes.data_as(c_void_p)
            _check(library, handle, library.tj3Decompress8(handle, self.data, len(self.data), place, 0, _RGB))
        return pixels[:, left - start : right - start]


def open_jpeg(data: bytes) -> Jpeg | None:
    """An image that can be decoded by window; None where it, or the library, does not allow it.

    Args:
        data: a JPEG file. EXIF orientation is not applied, and a file that ends early is taken for a whole one.

    Raises:
        InputError: the file's head is damaged.
    """
    if _library() is None:
        return None
    with _reading(data) as (library, handle):
        width, height, colours = (library.tj3Get(handle, key) for key in (_WIDTH, _HEIGHT, _COLOURS))
    has_pixels = min(width, height) > 0  # some files are tables alone
    return Jpeg(data, (height, width, 3)) if has_pixels and colours in (_YCBCR, _GREY) else None


@contextmanager
def _reading(data: bytes) -> Iterator[tuple[ctypes.CDLL, int]]:
    library = _library()
    assert library is not None
    handle = library.tj3Init(_DECOMPRESS)
    try:
        _check(library, handle, library.tj3DecompressHeader(handle, data, len(data)))
        yield library, handle
    finally:
        library.tj3Destroy(handle)


def _check(library: ctypes.CDLL, handle: int, code: int) -> None:
    """Warnings pass, as they do elsewhere: the pixels are there."""
    if code and library.tj3GetErrorCode(handle) == _FATAL:
        raise InputError(f"the JPEG can't be decoded ({library.tj3GetErrorStr(handle).decode()}); write the file anew")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    for path in _places():
        try:
            library = ctypes.CDLL(path)
            return _typed(library)
        except (OSError, AttributeError):  # not there, or older than 3
            continue
    return None


def _places() -> Iterator[str]:
    yield _NAMES.get(sys.platform, "")
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    signatures = {
        "tj3Init": (c_void_p, [c_int]),
        "tj3Destroy": (None, [c_void_p]),
        "tj3DecompressHeader": (c_int, [c_void_p, c_char_p, c_size_t]),
        "tj3Get": (c_int, [c_void_p, c_int]),
        "tj3SetCroppingRegion": (c_int, [c_void_p, _Region]),
        "tj3Decompress8": (c_int, [c_void_p, c_char_p, c_size_t, c_void_p, c_int, c_int]),
        "tj3GetErrorCode": (c_int, [c_void_p]),
        "tj3GetErrorStr": (c_char_p, [c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
