"""The `masks` format: a folder of images and a folder of label images, paired by path less suffix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg import storage
from raysseg.config import MasksSource
from raysseg.data.classes import Vocabulary, preset_uri, read_class_list, to_class_list
from raysseg.data.files import IMAGE_SUFFIXES, files_by_stem, read_file, read_rows, write_image
from raysseg.data.index import Failure, SampleIndex, Written
from raysseg.masks import encode_id_map, to_dense, to_ids, to_numbers
from raysseg.schema import ClassMap, InputError, Sample

MANIFEST = "classes.json"  # of folders that we write
_WRITERS = 4  # threads
MASK_SUFFIXES = frozenset({".png", ".npy", ".npz"})


def read_vocabulary(source: MasksSource) -> Vocabulary | None:
    """That of the preset; folders themselves don't name their classes."""
    return read_class_list(preset_uri(source.preset)) if source.preset else None


def read_index(source: MasksSource) -> SampleIndex:
    """Pairs images with masks; every sample is its own group, since every one is its own object.

    Raises:
        InputError: an empty folder, an image without its mask or the reverse (unless the source skips), a stem twice.
    """

    def list_side(folder: str | None, suffixes: frozenset[str], end: str) -> dict[str, str] | None:
        return None if folder is None else files_by_stem(folder, suffixes, end)

    with ThreadPoolExecutor(2) as pool:
        sides = (source.images, source.masks), (IMAGE_SUFFIXES, MASK_SUFFIXES), (source.images_end, source.masks_end)
        images, masks = pool.map(list_side, *sides)
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

    def read(row: dict[str, Any]) -> Sample:
        image = read_file(source.images, row["image"]) if with_images else None
        return Sample(row["sample_id"], image, 0, 0, read_file(source.masks, row["mask"]))

    return read_rows(read, references)


def _unpaired(source: MasksSource, failures: list[Failure], num_pairs: int) -> str:
    shown = "\n  ".join(failure.reason for failure in failures[:5])
    more = f"\n  and {len(failures) - 5} more" if len(failures) > 5 else ""
    return (
        f"{source.images} and {source.masks}: {num_pairs} pairs, "
        f"but {len(failures)} files have no partner of the same stem:\n"
        f"  {shown}{more}\nAdd what is missing, or set on_error: skip to leave them out and list them"
    )


# --- writing ------------------------------------------------------------------------------------------------------


def write_part(
    uri: str,
    number: int,
    samples: Sequence[Sample],
    classes: ClassMap,
    *,
    rows_per_group: int,
    names: Sequence[str] | None = None,
) -> Written:
    """Writes images and masks, several at a time; instances become labels of their classes, which is noted."""

    def write(sample: Sample) -> None:
        mask = encode_id_map(to_ids(to_dense(sample, classes).labels, classes), classes)
        storage.write_bytes(storage.join(uri, "masks", f"{sample.sample_id}.png"), mask)
        if names is None:
            write_image(storage.join(uri, "images"), sample)

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, samples))
    lost = []
    for sample in samples:
        if sample.segments:
            reason = f"{len(sample.segments)} segments are labels of their classes now, and not told apart"
            if overlap := to_numbers(sample)[1]:
                reason += f"; {overlap} pixels of several instances belong to the smallest one"
            lost.append(Failure(sample.sample_id, reason))
    return Written(pa.table({"sample_id": [sample.sample_id for sample in samples]}), tuple(lost))


def finish(uri: str, parts: Iterable[pa.Table], classes: ClassMap) -> None:
    """Writes the class list."""
    storage.write_text(storage.join(uri, MANIFEST), json.dumps(to_class_list(classes), indent=2))
