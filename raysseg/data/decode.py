"""One sample's bytes to pixels: its image, whole or by window, and its ground truth beside it."""

from __future__ import annotations

import io

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from raysseg import masks
from raysseg.data.files import IMAGE_FORMATS, read_head
from raysseg.data.jpeg import Jpeg, open_jpeg
from raysseg.masks import IMAGE_ERRORS, explain, naming
from raysseg.schema import ClassMap, InputError, Sample, Task

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""


def decode_image(data: bytes) -> Pixels:
    """Decodes a JPEG, PNG, TIFF or WebP file to RGB, (H, W, 3) uint8.

    EXIF orientation is applied; grey, palette and CMYK become RGB, transparency is dropped, 16 bits are cut to 8.

    Raises:
        InputError: the file is damaged, of another kind, has several pages, or floating-point pixels.
    """
    return open_image(data)[:, :]


def open_image(data: bytes) -> Pixels | Jpeg:
    """As `decode_image`, but what can be decoded by window waits until ``image[rows, columns]`` asks for one."""
    if _is_whole_jpeg(data) and b"Exif\0" not in data and b"MPF\0" not in data and (jpeg := open_jpeg(data)):
        return jpeg
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            if (pages := getattr(file, "n_frames", 1)) > 1:
                raise InputError(f"the {file.format} holds {pages} pages; store one image a file")
            is_plain = file.format == "JPEG" and file.mode in ("RGB", "L") and read_head(file).orientation == 1
            if is_plain and _is_whole_jpeg(data):
                return open_jpeg(data) or _decode_jpeg(data)
            file.load()
            image = ImageOps.exif_transpose(file)
    except IMAGE_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the image can't be decoded ({explain(error)}); allowed: whole {', '.join(IMAGE_FORMATS)} files"
        ) from error
    return _to_rgb(image)


def _is_whole_jpeg(data: bytes) -> bool:
    """Whether a JPEG ends where it should; libjpeg takes a truncated one for whole."""
    return data.startswith(b"\xff\xd8") and data.rstrip(b"\0").endswith(b"\xff\xd9")


def _decode_jpeg(data: bytes) -> Pixels:
    if (pixels := decode_rgb(data)) is None:
        raise ValueError("the JPEG is damaged")
    return pixels


def decode_rgb(data: bytes) -> Pixels | None:
    """Pillow's pixels of an RGB file, as it is stored, in half of Pillow's time; None for what OpenCV refuses."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # more pixels than it takes
        return None


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        grey = np.array(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(
                f"the image has {grey.min()} to {grey.max()} in 32 bits; store it with 8 or 16 bits a channel"
            )
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise InputError("the image has floating-point pixels; store it with 8 or 16 bits a channel")
    if image.mode == "P":
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def decode_pair(sample: Sample, classes: ClassMap, task: Task = "semantic") -> tuple[Pixels, masks.View]:
    """A sample's image, (H, W, 3), and what its labels are to a task, of the same size.

    Raises:
        InputError: either is damaged, their sizes differ, or the mask holds unknown ids.
    """
    image, truth = open_pair(sample, classes, task)
    with naming(sample):
        return image[:, :], truth


def open_pair(sample: Sample, classes: ClassMap, task: Task = "semantic") -> tuple[Pixels | Jpeg, masks.View]:
    """As `decode_pair`, but the image may wait to be decoded by window."""
    with naming(sample):
        if sample.image is None:
            raise InputError("has no image")
        image = open_image(sample.image)
    truth = masks.to_view(sample, classes, task)
    (height, width), (mask_height, mask_width) = image.shape[:2], masks.size_of(truth)
    if (height, width) != (mask_height, mask_width):
        mend = "resize the mask without interpolation, or pair the right files"
        if (height, width) == (mask_width, mask_height):
            mend = "the image carries an EXIF rotation that the mask does not follow: turn the mask, or strip the tag"
        raise InputError(
            f"{sample.sample_id}: the image is {width}x{height}, its mask {mask_width}x{mask_height} (width x height); "
            f"{mend}"
        )
    return image, truth
