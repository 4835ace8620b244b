"""The `masks` format: a folder of images and a folder of label images, paired by path less suffix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from raysseg import storage
from raysseg.config import MasksSource
from raysseg.data.index import Failure, SampleIndex
from raysseg.schema import InputError, Sample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
MASK_SUFFIXES = frozenset({".png", ".npy", ".npz"})
_READERS = 8  # threads a call; reading waits on storage, not on the CPU


def read_index(source: MasksSource) -> SampleIndex:
    """Pairs images with masks; every sample is its own group, since every one is its own object.

    Raises:
        InputError: an empty folder, an image without its mask or the reverse (unless the source skips), a stem twice.
    """
    images = _files_by_stem(source.images, IMAGE_SUFFIXES) if source.images is not None else None
    masks = _files_by_stem(source.masks, MASK_SUFFIXES) if source.masks is not None else None
    failures: list[Failure] = []
    if images is None or masks is None:
        stems = sorted((images if masks is None else masks) or {})
    else:
        stems = sorted(images.keys() & masks.keys())
        failures += [
            Failure(s, f"{s}: {images[s]} has no mask in {source.masks}") for s in sorted(images.keys() - masks)
        ]
        failures += [
            Failure(s, f"{s}: {masks[s]} has no image in {source.images}") for s in sorted(masks.keys() - images)
        ]
    if failures and not source.is_skipping:
        raise InputError(_unpaired(source, failures, len(stems)))
    if not stems:
        raise InputError(_unpaired(source, failures, 0))
    references = pa.table(
        {
            "sample_id": pa.array(stems, pa.string()),
            "image": pa.array([images[s] if images else None for s in stems], pa.string()),
            "mask": pa.array([masks[s] if masks else None for s in stems], pa.string()),
        }
    )
    return SampleIndex(source, references, np.arange(len(stems), dtype=np.int64), tuple(failures))


def read_samples(source: MasksSource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
    """Reads the files of some samples, several at a time."""

    def read(row: dict[str, str | None]) -> Sample | Failure:
        sample_id = str(row["sample_id"])
        try:
            image = _read_file(source.images, row["image"]) if with_images else None
            mask = _read_file(source.masks, row["mask"])
        except storage.StorageError as error:
            return Failure(sample_id, str(error))
        return Sample(sample_id, image, 0, 0, mask)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, references.to_pylist()))


def _read_file(folder: str | None, name: str | None) -> bytes | None:
    return None if folder is None or name is None else storage.read_bytes(storage.join(folder, name))


def _files_by_stem(folder: str, suffixes: frozenset[str]) -> dict[str, str]:
    """Paths below a folder by their path less the suffix; files of other kinds are left alone."""
    by_stem: dict[str, str] = {}
    for entry in storage.list_files(folder):
        path = PurePosixPath(entry.path)
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        stem = str(path.with_suffix(""))
        if stem in by_stem:
            raise InputError(
                f"{folder}: {by_stem[stem]} and {path} share one stem, so neither can be paired; rename one"
            )
        by_stem[stem] = str(path)
    if not by_stem:
        raise InputError(
            f"{folder}: the folder holds no file ending in {', '.join(sorted(suffixes))}; is it the right one?"
        )
    return by_stem


def _unpaired(source: MasksSource, failures: list[Failure], num_pairs: int) -> str:
    shown = "\n  ".join(failure.reason for failure in failures[:5])
    more = f"\n  and {len(failures) - 5} more" if len(failures) > 5 else ""
    return (
        f"{source.images} and {source.masks}: {num_pairs} pairs, "
        f"but {len(failures)} files have no partner of the same stem:\n"
        f"  {shown}{more}\nAdd what is missing, or set on_error: skip to leave them out and list them"
    )
