"""The `shards` format: canonical Parquet files of samples, an index of their rows, and a manifest written last."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysseg import storage
from raysseg.config import ShardsSource
from raysseg.data.classes import Vocabulary, read_class_list, to_class_list
from raysseg.data.index import Failure, SampleIndex, Written
from raysseg.schema import ClassMap, InputError, Sample, Segment

MANIFEST = "shards.json"
INDEX = "index.parquet"
GROUP_BYTES = 8 * 2**20  # of a row group of several rows, at most
_READERS = 8  # row groups that are read at a time

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.large_binary()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("id_map", pa.large_binary()),
        pa.field(
            "segments",
            pa.list_(
                pa.struct(
                    [
                        ("class_id", pa.int32()),
                        ("is_crowd", pa.bool_()),
                        ("score", pa.float64()),
                        ("rle", pa.binary()),
                        ("area", pa.float64()),
                        ("box", pa.list_(pa.float64())),
                    ]
                )
            ),
        ),
    ]
)


def read_vocabulary(source: ShardsSource) -> Vocabulary:
    """The classes of the data set that was sharded."""
    _require_manifest(source)
    return read_class_list(storage.join(source.uri, MANIFEST))


def read_index(source: ShardsSource) -> SampleIndex:
    """Reads the index; the samples of one row group are one group, since they are read at once.

    Raises:
        InputError: the folder holds no finished shards.
    """
    _require_manifest(source)
    references = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(source.uri, INDEX))))
    key = references["file_number"].to_numpy().astype(np.int64) * 2**32 + references["row_group"].to_numpy()
    return SampleIndex(source, references, np.unique(key, return_inverse=True)[1].astype(np.int64))


def _require_manifest(source: ShardsSource) -> None:
    if not storage.exists(storage.join(source.uri, MANIFEST)):
        raise InputError(
            f"{source.uri}: there is no {MANIFEST} in it, so these are no finished shards; "
            "write them with `raysseg shard JOB`, or finish a broken-off one by running it again"
        )


def read_samples(source: ShardsSource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
    """Reads samples, each row group once, in the order of the references."""
    columns = [name for name in SAMPLE_SCHEMA.names if with_images or name != "image"]
    places = list(zip(references["file_number"].to_pylist(), references["row_group"].to_pylist(), strict=True))
    keys = list(dict.fromkeys(places))
    with ThreadPoolExecutor(_READERS) as pool:
        tables = pool.map(lambda key: _read_row_group(source.uri, key[0], key[1], columns), keys)
        groups = dict(zip(keys, tables, strict=True))
    rows = references["row"].to_pylist()
    return [to_sample(groups[place], row) for place, row in zip(places, rows, strict=True)]


def to_sample(table: pa.Table, row: int) -> Sample:
    """One row of a table of SAMPLE_SCHEMA; shards that are older than a segment's `area` and `box` lack these."""
    values = table.slice(row, 1).to_pylist()[0]
    if values["segments"] is not None:
        values["segments"] = tuple(_to_segment(segment) for segment in values["segments"])
    return Sample(**{"image": None, **values})


def _to_segment(values: dict[str, Any]) -> Segment:
    box = values.get("box")
    return Segment(**{**values, "box": tuple(box) if box is not None else None})


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Samples as a table of SAMPLE_SCHEMA."""
    rows = [
        {
            "sample_id": sample.sample_id,
            "image": sample.image,
            "height": sample.height,
            "width": sample.width,
            "id_map": sample.id_map,
            "segments": None if sample.segments is None else [asdict(segment) for segment in sample.segments],
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def write_part(
    uri: str,
    number: int,
    samples: Sequence[Sample],
    classes: ClassMap,
    *,
    rows_per_group: int,
    names: Sequence[str] | None = None,
) -> Written:
    """Writes one Parquet file; its rows go into the index."""
    sink = io.BytesIO()
    table = to_table(samples)
    groups = _to_groups(table, rows_per_group)
    # images and id maps are compressed already: no codec, and no dictionaries or statistics of their bytes
    with pq.ParquetWriter(
        sink, SAMPLE_SCHEMA, compression="none", use_dictionary=False, write_statistics=False
    ) as writer:
        for group in groups:
            writer.write_table(group)
    storage.write_bytes(storage.join(uri, file_name(number)), sink.getvalue())
    sizes = [len(group) for group in groups]
    return Written(
        pa.table(
            {
                "sample_id": table["sample_id"],
                "file_number": np.full(len(samples), number, dtype=np.int32),
                "row_group": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
                "row": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
                "height": table["height"],
                "width": table["width"],
            }
        )
    )


def _to_groups(table: pa.Table, most_rows: int) -> list[pa.Table]:
    """Cuts a table into row groups; those of several rows keep to GROUP_BYTES, as many are in memory at a time."""
    groups: list[pa.Table] = []
    start = num_bytes = 0
    sizes = pc.add(pc.binary_length(table["image"]), pc.coalesce(pc.binary_length(table["id_map"]), 0))
    for row, size in enumerate(sizes.to_pylist()):
        if row > start and (row - start == most_rows or num_bytes + size > GROUP_BYTES):
            groups.append(table.slice(start, row - start))
            start, num_bytes = row, 0
        num_bytes += size
    return [*groups, table.slice(start)]


def finish(uri: str, parts: Iterable[pa.Table], classes: ClassMap) -> None:
    """Writes the index, and then the manifest."""
    rows = pa.concat_tables(parts)
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    storage.write_bytes(storage.join(uri, INDEX), sink.getvalue())
    manifest = {"version": 1, "num_samples": len(rows), **to_class_list(classes)}
    storage.write_text(storage.join(uri, MANIFEST), json.dumps(manifest, indent=2))


def file_name(number: int) -> str:
    """Name of a Parquet file of shards."""
    return f"shard-{number:05d}.parquet"


@storage.persistent
def _read_row_group(uri: str, file_number: int, row_group: int, columns: list[str]) -> pa.Table:
    path = storage.join(uri, file_name(file_number))
    with storage.open_input(path) as file:
        return pq.ParquetFile(file, metadata=_metadata(path)).read_row_group(row_group, columns, use_threads=False)


@lru_cache(maxsize=256)
def _metadata(path: str) -> pq.FileMetaData:
    """A file's footer, kept: it holds the places of all row groups."""
    with storage.open_input(path) as file:
        return pq.read_metadata(file)
