"""Data sets: what formats there are, the class list, and the index of a source. Free of Ray and of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from raysseg.config import AnySource, CocoSource, HuggingFaceSource, MasksSource, ShardsSource
from raysseg.data import coco, coco_panoptic, huggingface, masks, shards, yolo
from raysseg.data.classes import build_class_map
from raysseg.data.files import read_file, read_rows
from raysseg.data.index import Failure, Format, SampleIndex, Writer
from raysseg.schema import ClassMap, Sample

FORMATS = cast(  # each module takes its own kind of source
    dict[str, Format],
    {
        "masks": masks,
        "coco": coco,
        "coco_panoptic": coco_panoptic,
        "yolo": yolo,
        "huggingface": huggingface,
        "shards": shards,
    },
)

WRITERS = cast(dict[str, Writer], {"shards": shards, "masks": masks, "coco": coco, "coco_panoptic": coco_panoptic})


def read_index(source: AnySource) -> SampleIndex:
    """Lists the samples of a source.

    Raises:
        InputError: the source is empty, or its parts don't fit each other.
        StorageError: it can't be reached.
    """
    return FORMATS[source.format].read_index(source).in_one_piece


def read_predictions(source: AnySource, truth: SampleIndex, classes: ClassMap) -> SampleIndex:
    """Lists stored predictions of a ground truth; COCO results take its samples over, see coco.read_predictions."""
    return coco.read_predictions(source, truth, classes) if isinstance(source, CocoSource) else read_index(source)


def read_samples(index: SampleIndex, *, with_images: bool = True) -> list[Sample | Failure]:
    """Reads all samples of an index (`SampleIndex.take` makes a small one), in its order."""
    return FORMATS[index.source.format].read_samples(index.source, index.references, with_images=with_images)


def read_images(index: SampleIndex) -> list[Sample | Failure]:
    """Reads the images of an index, in its order; labels that lie in other files are left alone."""
    source = index.source
    if isinstance(source, HuggingFaceSource | ShardsSource):
        return read_samples(index)
    folder = source.images
    return read_rows(
        lambda row: Sample(row["sample_id"], read_file(folder, row["image"]), 0, 0, None), index.references
    )


def read_class_map(classes: str | Sequence[str] | None, source: AnySource | None = None) -> ClassMap:
    """The class list of a job.

    Args:
        classes: the URI of a JSON file; names, of the source's categories or with ids 0, 1, 2, ... where it has none;
            or None: the source's categories, or its preset's list.
        source: the data set that is read by this list.

    Raises:
        InputError: the list is empty or malformed, names what is not there, or an id or a name stands twice.
    """
    if source is None:
        return build_class_map(classes, None)
    return build_class_map(
        classes,
        FORMATS[source.format].read_vocabulary(source),
        background=source.background,
        counts_from_one=isinstance(source, MasksSource) and source.reduce_zero_label,
    )
