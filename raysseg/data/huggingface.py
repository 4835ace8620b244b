"""The `huggingface` format: a folder of one split, as `datasets` saves it, or of its Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysseg import storage
from raysseg.config import HuggingFaceSource
from raysseg.data.classes import Vocabulary
from raysseg.data.files import read_rows
from raysseg.data.index import Failure, SampleIndex
from raysseg.schema import InputError, Sample

_STATE = "state.json"


def read_vocabulary(source: HuggingFaceSource) -> Vocabulary | None:
    """None: features of images don't name classes."""
    return None


def read_index(source: HuggingFaceSource) -> SampleIndex:
    """Lists the rows of the folder's files; the rows of one record batch or row group are one group.

    Sample ids are the paths that the images had, less their suffix, where each has one of its own, else row numbers.

    Raises:
        InputError: the folder holds no such files, or they lack a column.
    """
    places: list[tuple[int, int, int]] = []  # number of the file, place of the group, row
    paths: list[str | None] = []
    names = _files(source)
    for number, name in enumerate(names):
        groups, found = _survey(source, name)
        places += [(number, place, row) for place, rows in groups for row in range(rows)]
        paths += found
    if not places:
        raise InputError(f"{source.uri}: the data set has no rows")
    stems = [str(PurePosixPath(path).with_suffix("")) for path in paths if path]
    if len(set(stems)) < len(places):
        stems = [f"{row:08d}" for row in range(len(places))]
    files, group, row = np.array(places, np.int64).T
    references = pa.table(
        {
            "sample_id": pa.array(stems, pa.string()),
            "file": pa.array([names[number] for number in files], pa.string()),
            "group": group,
            "row": row,
        }
    )
    is_next = np.diff(files, prepend=files[0]).astype(bool) | np.diff(group, prepend=group[0]).astype(bool)
    return SampleIndex(source, references, is_next.cumsum())


def read_samples(source: HuggingFaceSource, references: pa.Table, *, with_images: bool) -> list[Sample | Failure]:
    """Reads samples, each group once, in the order of the references."""
    rows = references.to_pylist()
    keys = dict.fromkeys((row["file"], row["group"]) for row in rows)
    groups = {(name, place): _read_group(storage.join(source.uri, name), place) for name, place in keys}

    def read(row: dict[str, Any]) -> Sample:
        group, place = groups[row["file"], row["group"]], row["row"]
        image = _to_bytes(group[source.image][place].as_py()) if with_images else None
        mask = _to_bytes(group[source.mask][place].as_py()) if source.mask is not None else None
        return Sample(row["sample_id"], image, 0, 0, mask)

    return read_rows(read, references)


def _to_bytes(value: Any) -> bytes | None:
    """What `datasets` stores of an image: its bytes, or the path of a file that is not in the data set."""
    if value is None:
        return None
    data: bytes | None = value["bytes"] if isinstance(value, dict) else value
    return data if data is not None else storage.read_bytes(value["path"])


def _files(source: HuggingFaceSource) -> list[str]:
    """The data files, in their order."""
    state = storage.join(source.uri, _STATE)
    if storage.exists(state):
        return [entry["filename"] for entry in json.loads(storage.read_bytes(state))["_data_files"]]
    names = sorted(entry.path for entry in storage.list_files(source.uri) if entry.path.endswith(".parquet"))
    if not names:
        raise InputError(
            f"{source.uri}: holds neither {_STATE} nor .parquet files, so this is no split of a data set; "
            "name the folder of one split, such as <data set>/train"
        )
    return names


@storage.persistent
def _survey(source: HuggingFaceSource, name: str) -> tuple[list[tuple[int, int]], list[str | None]]:
    """Of a file its groups, as (place, rows), and the paths of its images, None where it has none."""
    uri = storage.join(source.uri, name)
    groups: list[tuple[int, int]] = []
    paths: list[str | None] = []
    for place, batch in _iter_groups(uri):
        for wanted in (source.image, source.mask):
            if wanted is not None and wanted not in batch.schema.names:
                raise InputError(f"{uri}: has no column {wanted!r}; its columns: {', '.join(batch.schema.names)}")
        images = batch.column(source.image)
        has_paths = pa.types.is_struct(images.type) and "path" in images.type.names
        groups.append((place, batch.num_rows))
        paths += images.field("path").to_pylist() if has_paths else [None] * batch.num_rows
    return groups, paths


def _iter_groups(uri: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The groups of a file: row groups by number, record batches of a stream by their place in bytes."""
    with storage.open_input(uri) as file:
        if uri.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                (batch,) = parquet.read_row_group(group, use_threads=False).combine_chunks().to_batches()
                yield group, batch
            return
        schema = pa.ipc.read_schema(file)
        while True:
            place = file.tell()
            try:
                message = pa.ipc.read_message(file)
            except EOFError:
                return
            yield place, pa.ipc.read_record_batch(message, schema)


@storage.persistent
def _read_group(uri: str, place: int) -> pa.Table:
    with storage.open_input(uri) as file:
        if uri.endswith(".parquet"):
            return pq.ParquetFile(file).read_row_group(place, use_threads=False)
        schema = pa.ipc.read_schema(file)
        file.seek(place)
        return pa.Table.from_batches([pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)])
