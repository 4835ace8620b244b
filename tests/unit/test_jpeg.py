from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raysseg.data import jpeg
from raysseg.data.decode import decode_image, open_image
from raysseg.schema import InputError

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "with EXIF": {"exif": Image.Exif()},
}


def encoded(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def noise(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def whole_by_pillow(data: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture
def library() -> None:
    if jpeg.open_jpeg(encoded(noise(8, 8))) is None:
        pytest.skip("there is no libjpeg-turbo 3 here: whole images are decoded")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_every_window_is_that_of_the_whole_image(kind: str) -> None:
    data = encoded(noise(101, 187)) if kind == "grey" else encoded(noise(101, 187, 3), **KINDS[kind])
    whole = whole_by_pillow(data)
    image = open_image(data)
    assert isinstance(image, jpeg.Jpeg)
    assert image.shape == (101, 187, 3)
    rng = np.random.default_rng(1)
    windows = [(0, 101, 0, 187), (0, 1, 0, 1), (100, 101, 186, 187), (16, 48, 32, 64), (15, 49, 31, 65)]
    for _ in range(60):
        top, left = rng.integers(0, (101, 187))
        windows.append((top, rng.integers(top, 101) + 1, left, rng.integers(left, 187) + 1))
    for top, bottom, left, right in windows:
        assert np.array_equal(image[top:bottom, left:right], whole[top:bottom, left:right])


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_library_the_pixels_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(33, 47, 3), **KINDS[kind])
    with_it = decode_image(data)
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert isinstance(open_image(data), np.ndarray)
    assert np.array_equal(with_it, decode_image(data))


@pytest.mark.usefixtures("library")
def test_turned_and_cmyk_images_are_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise(33, 47, 3), exif=exif)
    assert open_image(turned).shape == (47, 33, 3)
    out = io.BytesIO()
    Image.fromarray(noise(33, 47, 4), "CMYK").save(out, "JPEG")
    for data in (turned, out.getvalue()):
        assert isinstance(open_image(data), np.ndarray)


@pytest.mark.usefixtures("library")
def test_damage_is_an_error_of_the_user() -> None:
    data = encoded(noise(33, 47, 3))
    with pytest.raises(InputError, match="can't be decoded"):
        decode_image(data[:-2])  # ends early
    with pytest.raises(InputError, match="can't be decoded"):
        decode_image(data[:40] + b"\xff\xd9")
    with pytest.raises(InputError, match="can't be decoded"):
        decode_image(b"\xff\xd8\xff\xd9")
    start = data.index(b"\xff\xda")
    assert decode_image(data[: start + 40] + b"\xff\xd9").shape == (33, 47, 3)  # as Pillow: grey where it is lost
