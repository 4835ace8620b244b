"""Data sets: what formats there are, the class list, and the index of a source. Free of Ray and of torch."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from typing import Any

from raysseg import storage
from raysseg.config import AnySource
from raysseg.data import masks, shards
from raysseg.data.index import Failure, Format, SampleIndex
from raysseg.schema import ClassMap, InputError, Sample

FORMATS: dict[str, Format] = {"masks": masks, "shards": shards}  # type: ignore[dict-item]


def read_index(source: AnySource) -> SampleIndex:
    """Lists the samples of a source.

    Raises:
        InputError: the source is empty, or its parts don't fit each other.
        StorageError: it can't be reached.
    """
    return FORMATS[source.format].read_index(source)


def read_samples(index: SampleIndex, *, with_images: bool = True) -> list[Sample | Failure]:
    """Reads all samples of an index (`SampleIndex.take` makes a small one), in its order."""
    return FORMATS[index.source.format].read_samples(index.source, index.references, with_images=with_images)


def read_class_map(classes: str | Sequence[str]) -> ClassMap:
    """The class list of a job: a list of names with ids 0, 1, 2, ..., or the URI of a JSON file.

    Raises:
        InputError: the list is empty or malformed, an id or a name stands twice, or an id is the ignore index.
    """
    if not isinstance(classes, str):
        ignore_index = 255 if len(classes) <= 255 else 65535  # an id that no class has
        return _class_map([{"id": i, "name": name} for i, name in enumerate(classes)], ignore_index, "classes")
    try:
        content = json.loads(storage.read_bytes(classes))
        entries, ignore_index = list(content["classes"]), int(content.get("ignore_index", 255))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        shape = '{"classes": [{"id": 0, "name": "road", "colour": [128, 64, 128]}, ...], "ignore_index": 255}'
        raise InputError(f"classes: {classes} is no class list ({error!r}); it should look like {shape}") from error
    return _class_map(entries, ignore_index, classes)


def _class_map(entries: list[dict[str, Any]], ignore_index: int, where: str) -> ClassMap:
    try:
        ids = tuple(int(entry["id"]) for entry in entries)
        names = tuple(str(entry["name"]) for entry in entries)
        given = [entry.get("colour", entry.get("color")) for entry in entries]
        things = tuple(bool(entry.get("isthing", False)) for entry in entries)
        if any(isinstance(entry["id"], float) and entry["id"] != int(entry["id"]) for entry in entries):
            raise TypeError("an id is no whole number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: each class needs an integer `id` and a `name` ({error!r})") from error
    if not ids:
        raise InputError(f"{where}: the class list is empty; name at least one class")
    for label, values in (("id", ids), ("name", names)):
        twice = sorted({value for value in values if values.count(value) > 1}, key=str)
        if twice:
            raise InputError(
                f"{where}: {label} {twice[0]!r} stands twice in the class list; each {label} stands for one class"
            )
    if min(ids) < 0 or max(ids) > 65535:
        raise InputError(f"{where}: class ids are 0 to 65535; received {min(ids)} to {max(ids)}")
    if ignore_index in ids:
        name = names[ids.index(ignore_index)]
        raise InputError(
            f"{where}: id {ignore_index} is both the class {name!r} and the ignore_index; "
            "give the class list an ignore_index that no class has"
        )
    if not 0 <= ignore_index <= 65535:
        raise InputError(f"{where}: ignore_index is 0 to 65535; received {ignore_index}")
    for name, colour in zip(names, given, strict=True):
        if colour is not None and not _is_colour(colour):
            raise InputError(f"{where}: the colour of {name!r} is {colour!r}; write [red, green, blue], 0 to 255 each")
    spread = _spread_colours(len(ids))
    colours = tuple(tuple(colour) if colour is not None else spread[i] for i, colour in enumerate(given))
    return ClassMap(ids, names, colours, things, ignore_index)


def _is_colour(colour: object) -> bool:
    return isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)


def _spread_colours(number: int) -> list[tuple[int, int, int]]:
    """Distinct colours: hues by the golden ratio, three lightnesses in turn."""
    colours = []
    for i in range(number):
        red, green, blue = colorsys.hls_to_rgb(i * 0.618034 % 1, (0.5, 0.38, 0.66)[i % 3], 0.65)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours
