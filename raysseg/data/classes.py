"""Class lists: from names, a file, or a data set's own categories, to a ClassMap."""

from __future__ import annotations

import colorsys
import difflib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypedDict

from raysseg import storage
from raysseg.schema import ClassMap, InputError

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Category:
    """A class as a data set names it.

    Attributes:
        id: as its annotations hold it.
        name: as its authors call it.
        colour: (red, green, blue), if they gave one.
        is_thing: whether it is countable.
    """

    id: int
    name: str
    colour: Colour | None = None
    is_thing: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a data set stand for, as it says itself.

    Attributes:
        categories: its classes.
        ignore_index: the id of pixels that are not labelled, if it has one.
        dropped: ids that mean nothing.
    """

    categories: tuple[Category, ...]
    ignore_index: int | None = None
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A class of a list, checked on its own."""

    id: int
    name: str
    colour: Colour | None
    is_thing: bool
    sources: tuple[int, ...]


def build_class_map(
    classes: str | Sequence[str] | None,
    vocabulary: Vocabulary | None,
    *,
    background: str | None = None,
    counts_from_one: bool = False,
) -> ClassMap:
    """The class list of a job.

    Args:
        classes: the URI of a JSON file `{classes: [{id, name, colour, isthing, from}], ignore_index, dropped}`; names,
            of the categories or with ids 0, 1, 2, ...; or None: the categories as they are.
        vocabulary: of the data set, if it has one; its categories that no class reads are dropped.
        background: name of the class of pixels that no instance covers; it needs no category.
        counts_from_one: names without categories have ids 1, 2, 3, ..., and 0 is ignored.

    Raises:
        InputError: the list is empty or malformed, names what is not there, or an id or a name stands twice.
    """
    if isinstance(classes, str):
        content, own = _read(classes), vocabulary or Vocabulary((), 255)
        entries = [_entry(raw, own.categories, classes, background) for raw in content["classes"]]
        ignore_index = content.get("ignore_index", own.ignore_index)
        merged = Vocabulary(own.categories, ignore_index, (*content.get("dropped", ()), *own.dropped))
        return _checked(entries, merged, background, classes)
    if vocabulary is not None:
        names = [category.name for category in vocabulary.categories] if classes is None else list(classes)
        if classes is None and background is not None and background not in names:
            names = [background, *names]
        return _checked(list(_named(names, vocabulary.categories, background)), vocabulary, background, "classes")
    if classes is None:
        raise InputError("classes: missing; this data set does not name its classes, so list them or name a file")
    entries = [_Entry(i, name, None, False, (i,)) for i, name in enumerate(classes, int(counts_from_one))]
    return _checked(entries, Vocabulary((), 0 if counts_from_one else None), background, "classes")


def read_class_list(uri: str) -> Vocabulary:
    """A class list as the data set's own words."""
    content = _read(uri)
    entries = [_entry(raw, (), uri, None) for raw in content["classes"]]
    categories = tuple(Category(entry.id, entry.name, entry.colour, entry.is_thing) for entry in entries)
    return Vocabulary(categories, content.get("ignore_index"), tuple(content.get("dropped", ())))


def to_categories(classes: ClassMap, colour: str = "colour") -> list[dict[str, Any]]:
    """A class list as files have it, with the spelling of "colour" that a format wants."""
    return [
        {"id": class_id, "name": name, colour: list(rgb), "isthing": int(is_thing)}
        for class_id, name, rgb, is_thing in zip(
            classes.ids, classes.names, classes.colours, classes.things, strict=True
        )
    ]


def to_class_list(classes: ClassMap) -> dict[str, Any]:
    """What a file holds that `classes` may name."""
    return {"classes": to_categories(classes), "ignore_index": classes.ignore_index}


def preset_uri(name: str) -> str:
    """Where a class list that is shipped lies."""
    return str(resources.files("raysseg.data").joinpath(f"class_lists/{name}.json"))


class _Content(TypedDict, total=False):
    classes: list[Any]
    ignore_index: int
    dropped: list[int]


def _read(uri: str) -> _Content:
    try:
        raw = json.loads(storage.read_bytes(uri))
        content: _Content = {"classes": list(raw["classes"])}
        if raw.get("ignore_index") is not None:
            content["ignore_index"] = int(raw["ignore_index"])
        content["dropped"] = [int(i) for i in raw.get("dropped", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        shape = '{"classes": [{"id": 0, "name": "road", "colour": [128, 64, 128]}, ...], "ignore_index": 255}'
        raise InputError(f"classes: {uri} is no class list ({error!r}); it should look like {shape}") from error
    return content


def _named(names: Sequence[str], known: Sequence[Category], background: str | None) -> Iterator[_Entry]:
    """Categories by name; the background gets the first id that none of them has."""
    taken = {category.id for category in known}
    for name in names:
        if name == background and name not in {category.name for category in known}:
            class_id = next(i for i in range(65536) if i not in taken)
            yield _Entry(class_id, name, None, False, (class_id,))
        else:
            category = _find(name, known, "classes")
            yield _Entry(category.id, name, category.colour, category.is_thing, (category.id,))


def _find(name: str, known: Sequence[Category], where: str) -> Category:
    by_name = {category.name: category for category in known}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
    listed = ", ".join(list(by_name)[:20]) + (", ..." if len(by_name) > 20 else "")
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{where}: the data set has no category {name!r}; its categories: {listed}{hint}")


def _entry(raw: Any, known: Sequence[Category], where: str, background: str | None) -> _Entry:
    try:
        class_id, name, colour = int(raw["id"]), str(raw["name"]), raw.get("colour", raw.get("color"))
        if isinstance(raw["id"], float) and raw["id"] != class_id:
            raise TypeError("an id is no whole number")
        given = list(raw["from"]) if "from" in raw else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: each class needs an integer `id` and a `name` ({error!r})") from error
    if colour is not None and not _is_colour(colour):
        raise InputError(f"{where}: the colour of {name!r} is {colour!r}; write [red, green, blue], 0 to 255 each")
    same = [category for category in known if category.name == name]
    has_merged = same and not any(item in (c.id, c.name) for item in given or () for c in known)
    found = (
        same
        if has_merged
        else list(_sources(given or [class_id], known, f"{where}: class {name!r}", name == background))
    )
    is_thing = bool(raw.get("isthing", any(category.is_thing for category in found)))
    own = tuple(colour) if colour is not None else next((c.colour for c in found if c.colour), None)
    return _Entry(class_id, name, own, is_thing, tuple(category.id for category in found))


def _sources(items: Sequence[Any], known: Sequence[Category], where: str, is_background: bool) -> Iterator[Category]:
    """The categories that a class is read from; where the data set names none, ids stand for themselves."""
    by_id = {category.id: category for category in known}
    for item in items:
        if isinstance(item, str):
            yield _find(item, known, where)
        elif isinstance(item, int) and (item in by_id or not known or is_background):
            yield by_id.get(item, Category(item, "", None, False))
        else:
            raise InputError(
                f"{where} is read from id {item!r}, which no category of the data set has; "
                "give `from` with the ids or names of the categories that it stands for"
            )


def _checked(entries: Sequence[_Entry], vocabulary: Vocabulary, background: str | None, where: str) -> ClassMap:
    if not entries:
        raise InputError(f"{where}: the class list is empty; name at least one class")
    ids, names = [entry.id for entry in entries], [entry.name for entry in entries]
    sources = [i for entry in entries for i in entry.sources]
    for label, values in (("id", Counter(ids)), ("id", Counter(sources)), ("name", Counter(names))):
        if twice := [value for value, times in values.items() if times > 1]:
            raise InputError(
                f"{where}: {label} {twice[0]!r} stands twice in the class list; each {label} stands for one class"
            )
    every_id = {*ids, *sources}
    if min(every_id) < 0 or max(every_id) > 65535:
        raise InputError(f"{where}: class ids are 0 to 65535; received {min(every_id)} to {max(every_id)}")
    ignore_index = vocabulary.ignore_index
    if ignore_index is None:
        ignore_index = next(i for i in (255, *range(65535, 0, -1)) if i not in every_id)
    if ignore_index in every_id:
        name = next(entry.name for entry in entries if ignore_index in (entry.id, *entry.sources))
        raise InputError(
            f"{where}: id {ignore_index} is both the class {name!r} and the ignore_index; "
            "give the class list an ignore_index that no class has"
        )
    if not 0 <= ignore_index <= 65535:
        raise InputError(f"{where}: ignore_index is 0 to 65535; received {ignore_index}")
    if both := sorted(set(vocabulary.dropped).intersection(sources)):
        raise InputError(f"{where}: id {both[0]} is both `dropped` and a class; remove one")
    if background is not None and background not in names:
        raise InputError(
            f"{where}: the source's background is {background!r}, which is no class; allowed: {', '.join(names)}"
        )
    unread = {category.id for category in vocabulary.categories}.difference(sources)
    spread = _spread_colours(len(entries))
    return ClassMap(
        ids=tuple(ids),
        names=tuple(names),
        colours=tuple(entry.colour or colour for entry, colour in zip(entries, spread, strict=True)),
        things=tuple(entry.is_thing for entry in entries),
        ignore_index=ignore_index,
        sources=tuple(e.sources for e in entries) if any(e.sources != (e.id,) for e in entries) else (),
        dropped=tuple(sorted(unread.union(vocabulary.dropped))),
        uncovered=names.index(background) if background is not None else None,
    )


def _is_colour(colour: object) -> bool:
    return isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)


def _spread_colours(number: int) -> list[Colour]:
    """Distinct colours: hues by the golden ratio, three lightnesses in turn."""
    colours = []
    for i in range(number):
        red, green, blue = colorsys.hls_to_rgb(i * 0.618034 % 1, (0.5, 0.38, 0.66)[i % 3], 0.65)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours
