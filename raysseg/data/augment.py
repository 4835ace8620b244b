"""Joint image and mask transforms for training; torchvision.transforms.v2 is the reference that tests hold them to.

A random view is drawn first (``draw_view``: window, angle, flips, colours) and then applied (``apply_view``), so that
the same view can be applied to several label maps of one image, such as classes and instance ids.

numpy and cv2 only, so that data workers start at once. cv2 brings threads of its own: a process that shares its cores
with other workers calls ``cv2.setNumThreads(1)`` once as it starts. That is a setting of the whole process, so nothing
here touches it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from raysseg.config import Augment
from raysseg.masks import IdMap

Image = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""


class Windowed(Protocol):
    """An image of which windows are read, such as one that is yet to be decoded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, 3)."""

    def __getitem__(self, window: tuple[slice, slice]) -> Image:
        """Some rows and columns."""


FILL = (124, 116, 104)
"""What stands where a view reaches beyond its image: ImageNet's mean colour."""

LUMA = np.array([0.2989, 0.587, 0.114])
"""Weights of red, green and blue in grey; torchvision's."""

STRIP = 1 << 14
"""Pixels that are converted to float at a time."""


@dataclass(frozen=True, slots=True)
class Colours:
    """A change of colours: three factors, of which 1 changes nothing, and a shift as a share of the colour circle."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """What one training sample shows of an image: the window, resized to ``size``, turned, flipped and recoloured.

    Attributes:
        size: (height, width) of the result.
        window: (top, left, height, width) of the upright crop in the image's pixels; may reach beyond the image.
        angle: degrees counter-clockwise about the crop's centre.
        is_flipped: left and right change places.
        is_upside_down: top and bottom change places, after the turn.
        colours: how the image, but not what is padded, is recoloured.
    """

    size: tuple[int, int]
    window: tuple[int, int, int, int]
    angle: float = 0.0
    is_flipped: bool = False
    is_upside_down: bool = False
    colours: Colours = Colours()


def seeded_rng(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The randomness of one sample: a function of its place in the training run, never of the worker that loads it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, position])))


def augment(
    image: Image | Windowed,
    labels: IdMap,
    *,
    crop: tuple[int, int],
    config: Augment | None,
    ignore: int,
    rng: np.random.Generator,
) -> tuple[Image, IdMap]:
    """One random training crop of an image and its labels.

    Args:
        image: (H, W, 3) RGB; only the window that the crop shows is asked for.
        labels: (H, W) class indices.
        crop: (height, width) of the result, whatever the image's size; what it does not cover is ``FILL`` and ignored.
        config: how much is varied; None: nothing, and the crop is the top left corner.
        ignore: the label of pixels that do not count.
        rng: see ``seeded_rng``.

    Returns:
        Image (h, w, 3) and labels (h, w), new and contiguous.
    """
    view = choose_view(labels, crop=crop, config=config, ignore=ignore, rng=rng)
    return apply_view(view, image, labels, ignore=ignore)


def choose_view(
    labels: IdMap, *, crop: tuple[int, int], config: Augment | None, ignore: int, rng: np.random.Generator
) -> View:
    """The view that ``augment`` shows: a drawn one, or the top left corner."""
    if config is None:
        return View(size=crop, window=(0, 0, *crop))
    return draw_view(labels, crop=crop, config=config, ignore=ignore, rng=rng)


def draw_view(labels: IdMap, *, crop: tuple[int, int], config: Augment, ignore: int, rng: np.random.Generator) -> View:
    """Draws a view of an image with these labels; a poor crop is drawn again, and the last of ``tries`` stands.

    Everything is drawn from ``rng`` whether switched on or not, so that one knob does not move another's luck. Crops
    are judged upright and at the image's own resolution. Where the image is smaller than the crop, the crop holds all
    of it at a random place. With probability ``class_crop`` the crop is placed around a pixel of a class instead, see
    ``_draw_pixel``, and not drawn again; nnU-Net oversamples foreground so (Isensee et al. 2021).
    """
    zoom, flip, upside_down, turn = rng.random(4)
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    brightness, contrast, saturation, hue = np.multiply(strengths, rng.uniform(-1, 1, 4)).tolist()
    places = rng.random((config.tries, 2))
    low, high = config.scale
    scale = low + zoom * (high - low)
    height, width = (max(1, round(side / scale)) for side in crop)
    free = (labels.shape[0] - height, labels.shape[1] - width)
    lows, highs = np.minimum(free, 0), np.maximum(free, 0)  # of the window's top left corner
    if max(free) <= 0:  # every such window holds the whole image: none is better than another
        places = places[:1]
    elif config.class_crop > 0:
        luck = rng.spawn(1)[0]  # its own, so that it moves no other draw, whatever `tries` is
        pixel = _draw_pixel(labels, ignore, luck) if luck.random() < config.class_crop else None
        if pixel is not None:
            lows, highs = np.maximum(lows, pixel - (height - 1, width - 1)), np.minimum(highs, pixel)
            places = places[:1]
    totals = _areas(labels, ignore) if config.min_object_share > 0 and len(places) > 1 else None
    for place in places:
        top, left = (lows + (place * (highs - lows + 1)).astype(int)).tolist()
        visible = labels[max(top, 0) : top + height, max(left, 0) : left + width]
        if len(places) == 1 or _is_good(visible, totals, config, ignore):
            break
    return View(
        size=crop,
        window=(top, left, height, width),
        angle=config.rotation * (2 * turn - 1),
        is_flipped=bool(flip < config.flip),
        is_upside_down=bool(upside_down < config.vertical_flip),
        colours=Colours(1 + brightness, 1 + contrast, 1 + saturation, hue),
    )


def _areas(labels: IdMap, ignore: int) -> npt.NDArray[np.int64]:
    """Pixels of each label; ``ignore`` counts as none."""
    bins = int(np.iinfo(labels.dtype).max) + 1
    areas: npt.NDArray[np.int64] = cv2.calcHist([labels], [0], None, [bins], [0, bins]).ravel().astype(np.int64)
    areas[ignore] = 0
    return areas


def _draw_pixel(labels: IdMap, ignore: int, rng: np.random.Generator) -> npt.NDArray[np.int64] | None:
    """(y, x) of an evenly drawn pixel of a class that is drawn evenly from those in the image; None without any."""
    flat = labels.reshape(-1)
    is_present = np.zeros(np.iinfo(labels.dtype).max + 1, np.bool_)
    is_present[flat[0]] = True
    is_present[flat[1:][flat[1:] != flat[:-1]]] = True  # where runs begin: few pixels, hence 3 x faster than counting
    is_present[ignore] = False
    if not is_present.any():
        return None
    is_label = (labels == rng.choice(np.flatnonzero(is_present))).view(np.uint8)
    ends = cv2.reduce(is_label, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel().cumsum()  # its pixels to each row's end
    nth = rng.integers(ends[-1])
    y = np.searchsorted(ends, nth, side="right")
    return np.array([y, np.flatnonzero(is_label[y])[nth - ends[y]]])  # counted from the row's end


def _is_good(visible: IdMap, totals: npt.NDArray[np.int64] | None, config: Augment, ignore: int) -> bool:
    """Whether no class fills too much of the crop, and one besides the image's largest keeps enough of its area."""
    if config.max_class_share >= 1 and totals is None:
        return True
    areas = _areas(visible, ignore)
    if not areas.any() or areas.max() > config.max_class_share * areas.sum():
        return False
    if totals is None or np.count_nonzero(totals) < 2:
        return True
    kept = areas / np.maximum(totals, 1)
    kept[totals.argmax()] = 0
    return bool(kept.max() >= config.min_object_share)


def apply_view(view: View, image: Image | Windowed, labels: IdMap, *, ignore: int) -> tuple[Image, IdMap]:
    """The view of this image and of its labels; returns as ``augment`` does."""
    assert image.shape == (*labels.shape, 3), (image.shape, labels.shape)
    rows, columns, shown, borders = _frame(view, image.shape)
    pixels = image[rows, columns]
    is_growing = shown[0] * shown[1] > pixels.shape[0] * pixels.shape[1]
    if is_growing:  # recoloured where there are fewer pixels
        pixels = adjust_colour(pixels, view.colours)
    pixels = resize_image(pixels, shown)
    if not is_growing:
        pixels = adjust_colour(pixels, view.colours)
    pixels = cv2.copyMakeBorder(pixels, *borders, cv2.BORDER_CONSTANT, value=FILL)  # copies even where nothing is added
    if view.angle:
        pixels = _turn(pixels, view, cv2.INTER_LINEAR, FILL)
    return _flip(pixels, view), view_labels(view, labels, fill=ignore)


def view_labels(view: View, labels: IdMap, *, fill: int) -> IdMap:
    """The view of a label map alone, new and contiguous; ``fill`` stands where it reaches beyond."""
    rows, columns, shown, borders = _frame(view, labels.shape)
    labels = resize_labels(labels[rows, columns], shown)
    labels = cv2.copyMakeBorder(labels, *borders, cv2.BORDER_CONSTANT, value=fill)
    if view.angle:
        labels = _turn(labels, view, cv2.INTER_NEAREST, (fill,))
    return _flip(labels, view)


def _frame(view: View, shape: tuple[int, ...]) -> tuple[slice, slice, tuple[int, int], tuple[int, int, int, int]]:
    """The rows and columns that a view shows, their size in the result, and the borders around them.

    What a turn brings in from beyond the upright crop is cut and resized too.
    """
    reach_y, reach_x = _reach(view.size, view.angle)
    top, left, height, width = view.window
    rows, above, num_rows, below = _place(shape[0], top, height, view.size[0], reach_y)
    columns, before, num_columns, after = _place(shape[1], left, width, view.size[1], reach_x)
    return rows, columns, (num_rows, num_columns), (above, below, before, after)


def _flip(array: npt.NDArray[Any], view: View) -> npt.NDArray[Any]:
    for is_wanted, axis in ((view.is_flipped, 1), (view.is_upside_down, 0)):
        if is_wanted:
            array = cv2.flip(array, axis)
    return array


def _reach(size: tuple[int, int], angle: float) -> tuple[float, float]:
    """How far the corners of a turned crop reach beyond the upright one on each side, (vertically, horizontally)."""
    if not angle:
        return 0.0, 0.0
    height, width = size
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    outer_height, outer_width = height * cosine + width * sine, width * cosine + height * sine
    return max(0.0, (outer_height - height) / 2) + 1, max(0.0, (outer_width - width) / 2) + 1  # 1: to interpolate


def _place(extent: int, start: int, length: int, out: int, reach: float) -> tuple[slice, int, int, int]:
    """Along one axis: the pixels that a window shows, and how much of the result lies before, in and after them.

    The window is ``length`` pixels from ``start``, resized to ``out``; both grow on each side to cover ``reach``.
    """
    zoom = out / length
    grow = math.ceil(reach / zoom)
    start, length, out = start - grow, length + 2 * grow, out + 2 * round(grow * zoom)
    first, last = max(start, 0), min(start + length, extent)
    begin = min(round((first - start) * zoom), out - 1)
    end = min(max(round((last - start) * zoom), begin + 1), out)
    return slice(first, last), begin, end - begin, out - end


def _turn(array: npt.NDArray[np.generic], view: View, interpolation: int, fill: tuple[int, ...]) -> npt.NDArray[Any]:
    height, width = array.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), view.angle, 1.0)
    matrix[:, 2] += (view.size[1] - width) / 2, (view.size[0] - height) / 2
    turned: npt.NDArray[Any] = cv2.warpAffine(array, matrix, view.size[::-1], flags=interpolation, borderValue=fill)
    return turned


def resize(image: Image, labels: IdMap, size: tuple[int, int]) -> tuple[Image, IdMap]:
    """Both at this (height, width); see ``resize_image`` and ``resize_labels``."""
    return resize_image(image, size), resize_labels(labels, size)


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Bilinear with antialiasing, as torchvision's; the image itself where it has the (height, width) already.

    Shrinking blurs first with the three taps that give bilinear sampling the variance of the reference's triangular
    filter, factor² / 6; far cheaper than INTER_AREA and as close to the reference. Beyond a half it goes in steps.
    """
    while image.shape[:2] != size:
        step = (max(size[0], math.ceil(image.shape[0] / 2)), max(size[1], math.ceil(image.shape[1] / 2)))
        taps = [max(0.0, (old / new) ** 2 - 1) / 12 for old, new in zip(image.shape, step, strict=False)]
        if any(taps):
            down, across = (np.array([tap, 1 - 2 * tap, tap]) for tap in taps)
            image = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
        image = cv2.resize(image, step[::-1], interpolation=cv2.INTER_LINEAR)
    return image


def resize_labels(labels: IdMap, size: tuple[int, int]) -> IdMap:
    """Nearest by pixel centres, in whole numbers, as torchvision's NEAREST_EXACT; itself where it has the size."""
    if labels.shape == size:
        return labels
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, size, strict=True))
    resized: IdMap = labels[:, columns][rows]
    return resized


def adjust_colour(image: Image, colours: Colours) -> Image:
    """transforms.v2's adjust_brightness, _contrast, _saturation and _hue, in this order; itself if nothing changes."""
    if colours.brightness != 1:
        image = cv2.transform(image, colours.brightness * np.eye(3))
    if (factor := colours.contrast) != 1:
        grey = float(LUMA @ cv2.mean(image)[:3])
        image = cv2.transform(image, np.column_stack([factor * np.eye(3), np.full(3, (1 - factor) * grey)]))
    if (factor := colours.saturation) != 1:
        image = cv2.transform(image, factor * np.eye(3) + (1 - factor) * LUMA)
    return _shift_hue(image, colours.hue) if colours.hue % 1 else image


def _shift_hue(image: Image, hue: float) -> Image:
    """In float32, as 8-bit HSV knows but 256 hues and strays by 10 levels; in strips, which stay in the cache."""
    shifted: Image = np.empty(image.shape, np.uint8)
    num_rows = max(1, STRIP // image.shape[1])
    for rows in (slice(top, top + num_rows) for top in range(0, len(image), num_rows)):
        hsv = cv2.cvtColor(image[rows].astype(np.float32), cv2.COLOR_RGB2HSV)
        hsv[..., 0] += 360 * (hue % 1)  # cv2 wraps what lies beyond the circle, but not what lies below it
        cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dst=shifted[rows])
    return shifted
