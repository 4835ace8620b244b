"""Reading the files that samples consist of."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from raysseg import storage
from raysseg.data.index import Failure
from raysseg.masks import IMAGE_ERRORS, explain
from raysseg.schema import InputError, Sample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF's tag
_TURNED = (5, 6, 7, 8)  # its values that swap the sides
_MAGIC = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"II", ".tif"), (b"MM", ".tif"), (b"RIFF", ".webp"))
READERS = 16  # threads a call; reading waits on storage, not on the CPU


def files_by_stem(folder: str, suffixes: frozenset[str], end: str = "") -> dict[str, str]:
    """Paths below a folder by their path less the suffix; files of other kinds are left alone.

    Args:
        folder: local or remote.
        suffixes: of the files that are wanted, in lower case.
        end: stems must end in it, and it is left out of the key.

    Raises:
        InputError: there is no such file, or two share a stem.
    """
    by_stem: dict[str, str] = {}
    for entry in storage.list_tree(folder):
        path = entry.path
        stem, dot, suffix = path.rpartition(".")  # no Path: there may be millions
        name = stem.rpartition("/")[2]
        if dot + suffix.lower() not in suffixes or name.startswith(".") or not name or not name.endswith(end):
            continue
        stem = stem.removesuffix(end)
        if stem in by_stem:
            raise InputError(
                f"{folder}: {by_stem[stem]} and {path} share one stem, so neither can be paired; rename one"
            )
        by_stem[stem] = path
    if not by_stem:
        kinds = ", ".join(f"{end}{suffix}" for suffix in sorted(suffixes))
        raise InputError(f"{folder}: the folder holds no file ending in {kinds}; is it the right one?")
    return by_stem


def read_file(folder: str | None, name: str | None) -> bytes | None:
    """The bytes of a sample's file; None where there is none."""
    if folder is None or name is None:
        return None
    return storage.read_bytes(storage.join(folder, name), may_change=False)


class Head(NamedTuple):
    """An image file's upright (height, width), Pillow's mode of its pixels, and EXIF's orientation (1: upright)."""

    size: tuple[int, int]
    mode: str
    orientation: int


def read_head(file: Image.Image) -> Head:
    """The head of an opened image; no pixel is decoded."""
    orientation = file.getexif().get(_ORIENTATION, 1)
    width, height = file.size
    return Head((width, height) if orientation in _TURNED else (height, width), file.mode, orientation)


def decode_head(data: bytes) -> Head:
    """The head of an image file; raises InputError if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            return read_head(file)
    except IMAGE_ERRORS as error:
        raise InputError(f"the image can't be decoded ({explain(error)}); write the file anew") from error


def write_image(folder: str, sample: Sample) -> str:
    """Writes a sample's image as it is, with the suffix of its kind; returns its name below the folder."""
    assert sample.image is not None, "samples that are written have been decoded"
    name = f"{sample.sample_id}{suffix_of(sample.image)}"
    storage.write_bytes(storage.join(folder, name), sample.image)
    return name


def suffix_of(image: bytes) -> str:
    """The suffix of an image file of our formats."""
    return next(suffix for magic, suffix in _MAGIC if image.startswith(magic))


def read_rows(
    read: Callable[[dict[str, Any]], Sample], references: pa.Table, threads: int = READERS
) -> list[Sample | Failure]:
    """Reads samples, several at a time, in the order of their references.

    Args:
        read: makes a sample of a row of the references; raises InputError if it can't.
        references: of an index.
        threads: that read.

    Returns:
        What can't be read comes back as a Failure.

    Raises:
        StorageError: the storage does not answer, or breaks off, for reasons that may pass.
    """

    def try_to_read(row: dict[str, Any]) -> Sample | Failure:
        sample_id = str(row["sample_id"])
        try:
            return read(row)
        except storage.StorageError as error:
            if error.is_transient:  # it says nothing about the sample, which must not be skipped for it
                raise
            return Failure(sample_id, str(error))
        except InputError as error:
            return Failure(sample_id, f"{sample_id}: {error}")

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(try_to_read, references.to_pylist()))
