from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raysseg import masks
from raysseg.data import read_class_map
from raysseg.schema import ClassMap, InputError, Sample

IDS = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)


def class_map(*ids: int, ignore_index: int = 255) -> ClassMap:
    names = tuple(f"class {i}" for i in ids)
    return ClassMap(ids, names, tuple((i % 256, 7, 9) for i in ids), (False,) * len(ids), ignore_index)


THREE = class_map(0, 1, 2)


def png(pixels: npt.NDArray[np.generic], mode: str | None = None) -> bytes:
    return saved(Image.fromarray(pixels), mode)


def saved(image: Image.Image, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, "PNG")
    return out.getvalue()


def grey_png(ids: npt.NDArray[np.uint8], bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write."""
    height, width = ids.shape
    unpacked = np.unpackbits(ids[..., None], axis=2)[..., -bits:].reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in unpacked)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def npy(array: npt.NDArray[np.generic], **more: npt.NDArray[np.generic]) -> bytes:
    out = io.BytesIO()
    if more:
        np.savez_compressed(out, first=array, **more)  # type: ignore[arg-type]
    else:
        np.save(out, array)
    return out.getvalue()


def npz(array: npt.NDArray[np.generic]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, array)
    return out.getvalue()


def decoded(data: bytes, classes: ClassMap = THREE) -> masks.IdMap:
    return masks.decode_id_map(data, classes)


def same(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found, expected)


# ---- files


def test_grey_8_bit() -> None:
    assert same(decoded(png(IDS)), IDS)


def test_palette_pixels_are_ids_whatever_their_colour() -> None:
    image = Image.fromarray(IDS)
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    assert same(decoded(saved(image)), IDS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_of_few_bits(bits: int) -> None:
    ids = np.array([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]], np.uint8) * ((1 << bits) - 1)
    image = Image.fromarray(ids)
    image.putpalette(bytes(range(48)))
    out = io.BytesIO()
    image.save(out, "PNG", bits=bits)
    assert same(decoded(out.getvalue()), ids)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_not_stretched(bits: int) -> None:
    ids = (np.arange(35, dtype=np.uint8).reshape(5, 7) * 3) % (1 << bits)
    assert same(decoded(grey_png(ids, bits)), ids)


def test_grey_with_alpha() -> None:
    grey = Image.fromarray(IDS)
    image = Image.merge("LA", (grey, Image.fromarray(IDS[:, ::-1].copy())))
    assert same(decoded(saved(image)), IDS)


def test_16_bit_ids() -> None:
    ids = np.array([[0, 300, 65535], [1, 256, 40000]], np.uint16)
    assert same(decoded(png(ids)), ids)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint32])
@pytest.mark.parametrize("write", [npy, npz])
def test_numpy_integers(dtype: type[np.integer], write: type) -> None:
    found = decoded(write(IDS.astype(dtype)))
    assert np.array_equal(found, IDS)
    assert found.dtype == (np.uint8 if dtype is np.uint8 else np.uint16)


def test_numpy_booleans_and_fortran_order() -> None:
    truth = np.array([[True, False, True], [False, False, True]])
    assert same(decoded(npy(truth)), truth.astype(np.uint8))
    assert same(decoded(npy(np.asfortranarray(IDS))), IDS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((2, 3, 1), np.uint8)), r"uint8 of shape \(2, 3, 1\); it should be integers of shape \(H, W\)"),
        (npy(np.zeros((2, 3))), r"float64 of shape \(2, 3\); it should be integers"),
        (npy(np.array([[-1, 2]])), "holds -1 to 2; ids are 0 to 65535"),
        (npy(np.array([[0, 65536]])), "holds 0 to 65536; ids are 0 to 65535"),
        (npy(np.array([[{}]], object)), "can't be read .*pickle.*without pickled objects"),
        (npy(IDS, second=IDS), r"holds 2 arrays \(first, second\); it should hold one"),
        (npy(IDS)[:-3], "the numpy mask can't be read"),
        (npy(IDS)[:20], "the numpy mask can't be read"),
        (npz(IDS)[:60], "the numpy mask can't be read"),
        (png(IDS)[:40], "the mask can't be decoded .*masks are PNG, .npy or .npz: write the file anew"),
        (b"", "the mask can't be decoded"),
        (b"<html></html>", "the mask can't be decoded"),
    ],
)
def test_file_that_is_no_mask(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoded(data)


def test_jpeg_is_no_mask() -> None:
    out = io.BytesIO()
    Image.fromarray(IDS).save(out, "JPEG")
    with pytest.raises(InputError, match="masks are PNG"):
        decoded(out.getvalue())


# ---- colours


def coloured(*rows: tuple[tuple[int, int, int], ...]) -> npt.NDArray[np.uint8]:
    return np.array(rows, np.uint8)


RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)
PAINTED = ClassMap((4, 9), ("red", "green"), (RED, GREEN), (False, False), 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_the_class_lists_and_black_is_ignored(mode: str) -> None:
    found = decoded(png(coloured((RED, GREEN, BLACK), (GREEN, GREEN, RED)), mode), PAINTED)
    assert same(found, np.array([[4, 9, 255], [9, 9, 4]], np.uint8))


def test_black_is_a_class_where_one_is_black() -> None:
    classes = ClassMap((0, 300), ("background", "red"), (BLACK, RED), (False, False), 255)
    assert np.array_equal(decoded(png(coloured((RED, BLACK))), classes), [[300, 0]])


def test_unknown_colour_is_named() -> None:
    with pytest.raises(InputError, match=r"holds the colour \(0, 0, 255\) \(25.0% of its pixels\).*each class its"):
        decoded(png(coloured((RED, GREEN), (RED, (0, 0, 255)))), PAINTED)


def test_two_classes_of_one_colour_can_not_be_told_apart() -> None:
    classes = ClassMap((0, 1), ("a", "b"), (RED, RED), (False, False), 255)
    with pytest.raises(InputError, match="two classes share a colour"):
        decoded(png(coloured((RED, RED))), classes)


# ---- ids and indices


@pytest.mark.parametrize(
    "classes",
    [
        class_map(0, 1, 2),
        class_map(7, 3, 200, ignore_index=0),
        class_map(0, 255, ignore_index=254),
        class_map(0, 1000, 65535, ignore_index=255),
        class_map(*range(254)),
        class_map(*range(1, 256), ignore_index=0),
        class_map(*range(300), ignore_index=65535),
    ],
    ids=["plain", "gaps", "0 and 255", "16 bit", "254", "255", "300"],
)
def test_ids_and_indices_are_each_others_inverse(classes: ClassMap) -> None:
    ids = np.array([*classes.ids, classes.ignore_index] * 2).reshape(2, -1)
    ids = ids.astype(np.uint8 if ids.max() < 256 else np.uint16)
    indices = masks.to_indices(ids, classes)
    expected = np.array([*range(len(classes)), classes.ignore] * 2).reshape(2, -1)
    assert same(indices, expected.astype(classes.dtype))
    assert same(masks.to_ids(indices, classes), ids)


def test_index_maps_are_8_bit_to_254_classes() -> None:
    assert (class_map(*range(254)).dtype, class_map(*range(254)).ignore) == (np.uint8, 255)
    assert (class_map(*range(255)).dtype, class_map(*range(255)).ignore) == (np.uint16, 65535)


@pytest.mark.parametrize("ids", [IDS, np.array([[0, 300]], np.uint16)])
def test_encoded_ids_come_back(ids: masks.IdMap) -> None:
    assert same(decoded(masks.encode_id_map(ids)), ids)
    assert same(decoded(masks.encode_id_map(ids, THREE)), ids)


def test_encoded_ids_carry_the_classes_colours() -> None:
    with Image.open(io.BytesIO(masks.encode_id_map(IDS, THREE))) as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image.convert("RGB"))[0], [(0, 7, 9), (1, 7, 9), (2, 7, 9)])


def test_binary_0_and_255_comes_with_its_mend() -> None:
    two = class_map(0, 1, ignore_index=254)
    with pytest.raises(InputError, match="class list lacks: 255; allowed: 0 to 1, ignored: 254") as caught:
        masks.to_indices(np.array([[0, 255]], np.uint8), two)
    assert masks.BINARY_MEND in str(caught.value)
    mend = json.loads(masks.BINARY_MEND[masks.BINARY_MEND.index("{") :])
    assert [entry["id"] for entry in mend["classes"]] == [0, 255]


def test_unknown_ids_are_listed() -> None:
    with pytest.raises(InputError, match=r"lacks: 3, 9; allowed: 0 to 2, ignored: 255. Add them"):
        masks.to_indices(np.array([[0, 9, 3, 255]], np.uint8), THREE)
    with pytest.raises(InputError, match=r"lacks: 10, 11, 12, 13, 14, 15, 16, 17, \.\.\.; allowed: 3, 7, ignored: 0"):
        masks.to_indices(np.arange(10, 30, dtype=np.uint8)[None], class_map(7, 3, ignore_index=0))


def test_dense_view_names_the_sample() -> None:
    found = masks.to_dense(Sample("a/b", None, 0, 0, png(IDS)), THREE)
    assert same(found.labels, IDS)
    assert found.ignore_index == 255
    with pytest.raises(InputError, match=r"^a/b: has no mask"):
        masks.to_dense(Sample("a/b", None, 0, 0, None), THREE)
    with pytest.raises(InputError, match=r"^a/b: the mask holds ids"):
        masks.to_dense(Sample("a/b", None, 0, 0, png(IDS + 5)), THREE)
    with pytest.raises(InputError, match=r"^a/b: the mask can't be decoded"):
        masks.to_dense(Sample("a/b", None, 0, 0, b"x"), THREE)


# ---- class lists


def listed(folder: Path, content: object) -> ClassMap:
    path = folder / "classes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_class_map(str(path))


def test_list_of_names() -> None:
    classes = read_class_map(["road", "sky"])
    assert (classes.ids, classes.names, classes.ignore_index) == ((0, 1), ("road", "sky"), 255)
    many = [read_class_map([str(i) for i in range(number)]) for number in (150, 255, 256)]
    assert len(set(many[0].colours)) == 150
    assert [classes.ignore_index for classes in many] == [255, 255, 65535], "an id that no class has"


def test_class_list_without_an_ignore_index_has_255(tmp_path: Path) -> None:
    for raw in ({}, {"ignore_index": None}):
        path = tmp_path / "classes.json"
        path.write_text(json.dumps({"classes": [entry(0, "a")], **raw}))
        assert read_class_map(str(path)).ignore_index == 255


def test_class_list_file(tmp_path: Path) -> None:
    entries = [
        {"id": 7, "name": "road", "colour": [128, 64, 128], "more": 1},
        {"id": 0, "name": "sky", "color": [0, 0, 0], "isthing": 0},
        {"id": 300, "name": "car", "isthing": 1},
    ]
    classes = listed(tmp_path, {"classes": entries, "ignore_index": 11, "dataset": "x"})
    assert (classes.ids, classes.names) == ((7, 0, 300), ("road", "sky", "car"))
    assert classes.colours[:2] == ((128, 64, 128), (0, 0, 0))
    assert (classes.things, classes.ignore_index) == ((False, False, True), 11)
    assert listed(tmp_path, {"classes": entries}).ignore_index == 255


def entry(number: object, name: str, **more: object) -> dict[str, object]:
    return {"id": number, "name": name, **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no class list .*it should look like"),
        ("[]", "is no class list"),
        ('{"names": []}', "is no class list .*'classes'"),
        ({"classes": []}, "the class list is empty"),
        ({"classes": [{"id": 0}]}, "each class needs an integer `id` and a `name`"),
        ({"classes": ["road"]}, "each class needs an integer `id` and a `name`"),
        ({"classes": [entry("x", "a")]}, "each class needs an integer `id`"),
        ({"classes": [entry(1.5, "a")]}, "each class needs an integer `id`"),
        ({"classes": [entry(0, "a"), entry(0, "b")]}, "id 0 stands twice"),
        ({"classes": [entry(0, "a"), entry(1, "a")]}, "name 'a' stands twice"),
        ({"classes": [entry(0, "a"), entry(255, "b")]}, "id 255 is both the class 'b' and the ignore_index"),
        ({"classes": [entry(-1, "a")]}, "class ids are 0 to 65535; received -1 to -1"),
        ({"classes": [entry(70000, "a")]}, "class ids are 0 to 65535"),
        ({"classes": [entry(0, "a")], "ignore_index": -1}, "ignore_index is 0 to 65535; received -1"),
        ({"classes": [entry(0, "a")], "ignore_index": 65536}, "ignore_index is 0 to 65535; received 65536"),
        ({"classes": [entry(0, "a")], "ignore_index": "none"}, "is no class list"),
        ({"classes": [entry(0, "a", colour="red")]}, "the colour of 'a' is 'red'; write \\[red, green, blue\\]"),
        ({"classes": [entry(0, "a", colour=[0, 0, 256])]}, "the colour of 'a' is \\[0, 0, 256\\]"),
        ({"classes": [entry(0, "a", colour=[0, 0])]}, "the colour of 'a'"),
    ],
)
def test_class_list_that_is_none(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        listed(tmp_path, content)
    assert "classes.json" in str(caught.value)


def test_names_in_a_job_that_stand_twice() -> None:
    with pytest.raises(InputError, match=r"^classes: name 'road' stands twice"):
        read_class_map(["road", "road"])
    with pytest.raises(InputError, match=r"^classes: the class list is empty"):
        read_class_map([])


@pytest.mark.parametrize("ignore_index", [255, 11, 3])
def test_ids_that_are_indices_are_told_from_unknown_ones(ignore_index: int) -> None:
    classes = class_map(0, 1, 2, ignore_index=ignore_index)
    ids = np.array([[0, 1, 2, ignore_index]], np.uint8)
    assert masks.to_indices(ids, classes).tolist() == [[0, 1, 2, 255]]
    for unknown in {3, 4, 254, 255} - {ignore_index}:
        with pytest.raises(InputError, match=f"lacks: {unknown};"):
            masks.to_indices(np.append(ids, np.array([[unknown]], np.uint8), axis=1), classes)
    assert masks.to_indices(ids[:, :0], classes).shape == (1, 0)
