"""Draws the example data set: little landscapes, labelled for all three tasks. Seeded; nothing is downloaded.

Made so that learning shows: sky and water share their blues, grass and trees their greens, and light and season change
from scene to scene, so that colour alone does not tell the classes. A sign is rare and small, a pole thin; flocks and
woods are crowds; a balloon, and a seam around some things, are left unlabelled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from raysseg import rle
from raysseg.data.classes import to_categories, to_class_list
from raysseg.masks import encode_id_map
from raysseg.schema import ClassMap, InputError, Segment

Split = Literal["train", "val"]
Rng = np.random.Generator
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Shapes = Iterator[tuple[Floats | Sequence[tuple[float, float]], Floats]]

COLOURS = "70b8f0 98d058 80648c 2054c8 e07040 c81838 186c30 f8e8c8 483418 ffd000"
EXAMPLE_CLASSES = ClassMap(
    ids=tuple(range(1, 11)),
    names=("sky", "grass", "road", "water", "house", "car", "tree", "sheep", "pole", "sign"),
    colours=tuple((red, green, blue) for red, green, blue in map(bytes.fromhex, COLOURS.split())),
    things=(False,) * 4 + (True,) * 6,
)
SKY, GRASS, ROAD, WATER, HOUSE, CAR, TREE, SHEEP, POLE, SIGN = EXAMPLE_CLASSES.ids
VOID = 0
ZOOM = 3  # scenes are drawn this much larger; labels are read off at the centres of pixels, where no colours mix
MIN_AREA = 12  # pixels; less than this of a thing behind others is not labelled


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn picture and its labels.

    Attributes:
        image: RGB, (H, W, 3).
        ids: 1 + position in ``segments``, 0 where nothing is labelled, (H, W).
        segments: stuff, then things in the order of painting, the farthest first; what is hidden is left out.
    """

    image: Bytes
    ids: Bytes
    segments: tuple[Segment, ...]


# ---- shapes and colours


def _palette(colours: str) -> Floats:
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], dtype=np.float64)


def _pick(rng: Rng, palette: Floats) -> Floats:
    colour: Floats = rng.choice(palette) + rng.normal(0, 6) + rng.normal(0, 6, 3)
    return colour


CIRCLE = np.array([(np.cos(angle), np.sin(angle)) for angle in np.arange(24) * np.pi / 12])
WALLS = _palette("e8dcc0 c8705a b8ccd8 e4c46c a8b890 f0ece4 8c94a0")
ROOFS = _palette("a04830 5c6470 7c5440 3c5068 b46840")
PAINTS = _palette("c82c28 2c5cb4 e8b020 e8e8e4 38403c 3c8c64 8c94a0")
LEAVES = _palette("4a7c32 6e963a 306240 c48634 ac5828 88a04c")
FLEECES = _palette("ece8dc e0dccc 78746c")
IRONS = _palette("50545a 7c8088 6c5844 a4a8ac")
SIGNS = _palette("d42c2c 2458b8 f0c020")
FACE, BARK, GLASS, LAMP, WHITE, TYRE, HUB = _palette("34302c 644a34 56707c ffe08c f4f4f4 222222 aaaaaa")


def _box(x0: float, y0: float, x1: float, y1: float) -> Floats:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _disc(x: float, y: float, rx: float, ry: float) -> Floats:
    return CIRCLE * (rx, ry) + (x, y)


def _paint(image: Bytes, points: Floats, colour: Floats | int) -> None:
    cv2.fillPoly(image, [np.rint(points).astype(np.int32)], colour)  # which clips the colour


# ---- things: polygons and their colours, standing on (0, 0), y up, about one unit high or wide; `pixel` in these units


def _house(rng: Rng, pixel: float) -> Shapes:
    wall, roof, pane = _pick(rng, WALLS), _pick(rng, ROOFS), GLASS if rng.random() < 0.5 else LAMP
    height, top, corner = rng.uniform(0.34, 0.52), rng.uniform(0.66, 0.8), rng.uniform(-0.14, 0.0)
    middle, eaves = (corner - 0.5) / 2, height - 0.04
    yield _box(0.2, height, 0.3, top + 0.1), roof * 0.8  # chimney
    yield _box(corner, 0, 0.5, height), wall * 0.8  # the long side, in shade
    yield [(-0.5, 0), (corner, 0), (corner, height), (middle, top), (-0.5, height)], wall
    for y in np.arange(0.06, height, 0.06):
        yield _box(-0.5, y, 0.5, y + 0.006), wall * 0.7  # boards
    yield [(corner, eaves), (0.54, eaves), (0.4, top), (middle, top)], roof
    for k in (0.25, 0.5, 0.75):  # rows of tiles
        y = eaves + k * (top - eaves)
        yield _box(corner + k * (middle - corner), y, 0.54 - k * 0.14, y + 0.008), roof * 0.75
    yield [(-0.54, eaves), (middle, top + 0.02), (middle, top - 0.04), (-0.48, eaves)], roof * 0.8
    yield _box(middle - 0.06, 0, middle + 0.06, 0.24), roof * 0.6  # door
    for x in np.linspace(corner + 0.08, 0.34, 3):
        yield _box(x - 0.015, height * 0.38, x + 0.105, height * 0.82), WHITE
        yield _box(x, height * 0.42, x + 0.09, height * 0.78), pane


def _car(rng: Rng, pixel: float) -> Shapes:
    paint, roof, back = _pick(rng, PAINTS), *((0.42, -0.3) if rng.random() < 0.7 else (0.5, -0.46))
    yield [(back - 0.1, 0.22), (back, roof), (0.14, roof), (0.32, 0.26)], paint
    yield [(-0.5, 0.09), (0.5, 0.09), (0.5, 0.2), (0.44, 0.26), (-0.47, 0.28), (-0.5, 0.24)], paint
    yield _box(-0.5, 0.07, 0.5, 0.12), paint * 0.6
    yield [(-0.04, 0.27), (-0.04, roof - 0.04), (0.12, roof - 0.04), (0.25, 0.27)], GLASS
    yield [(back - 0.03, 0.27), (back + 0.03, roof - 0.04), (-0.08, roof - 0.04), (-0.08, 0.27)], GLASS
    yield _box(0.45, 0.16, 0.5, 0.22), LAMP
    for x, size, colour in ((-0.29, 0.095, TYRE), (-0.29, 0.045, HUB), (0.29, 0.095, TYRE), (0.29, 0.045, HUB)):
        yield _disc(x, 0.09, size, size), colour


def _car_from_behind(rng: Rng, pixel: float) -> Shapes:
    paint = _pick(rng, PAINTS)
    for x in (-0.24, 0.12):
        yield _box(x, 0, x + 0.12, 0.14), TYRE
    yield [(-0.24, 0.3), (-0.18, 0.54), (0.18, 0.54), (0.24, 0.3)], paint * 0.92
    yield [(-0.28, 0.1), (0.28, 0.1), (0.29, 0.28), (0.25, 0.34), (-0.25, 0.34), (-0.29, 0.28)], paint
    yield [(-0.19, 0.34), (-0.15, 0.5), (0.15, 0.5), (0.19, 0.34)], GLASS
    yield _box(-0.28, 0.07, 0.28, 0.13), paint * 0.6
    for x, y, half, colour in ((-0.22, 0.26, 0.035, SIGNS[0]), (0.22, 0.26, 0.035, SIGNS[0]), (0, 0.19, 0.07, WHITE)):
        yield _box(x - half, y - 0.03, x + half, y + 0.03), colour


def _tree(rng: Rng, pixel: float) -> Shapes:
    yield [(-0.05, 0), (0.06, 0), (0.03, 0.5), (-0.03, 0.5)], BARK
    if rng.random() < 0.35:  # a fir
        leaf = _pick(rng, LEAVES[:3]) * 0.85
        for y, half in zip(np.linspace(0.12, 0.66, 5), np.linspace(0.27, 0.12, 5), strict=True):
            yield [(-half, y), (half, y), (0, y + 0.36)], leaf * 0.78
            yield [(-half, y), (-half * 0.1, y + 0.03), (0, y + 0.36)], leaf * 1.12
        return
    leaf, width, middle = _pick(rng, LEAVES), rng.uniform(0.24, 0.36), rng.uniform(0.6, 0.7)
    for k in range(26):  # clumps of leaves, the lit ones last
        x, y = CIRCLE[rng.integers(24)] * np.sqrt(rng.random())
        size = width * rng.uniform(0.22, 0.42) * (1 - k / 60)
        shade = leaf * (0.68 + 0.016 * k + 0.1 * (y - x)) + rng.normal(0, 5)
        yield _disc(x * width * 0.75, middle + 0.28 * y, size, size), shade


def _sheep(rng: Rng, pixel: float) -> Shapes:
    fleece = _pick(rng, FLEECES)
    for x in (-0.26, -0.14, 0.14, 0.26):
        yield _box(x - 0.04, 0, x + 0.04, 0.3), FACE
    for k in range(14):
        x, y = (0.3, 0.15) * CIRCLE[9 * k % 24] * np.sqrt(k / 14)
        yield _disc(x, 0.42 + y, 0.16, 0.16), fleece * (0.94 + 0.5 * y) + rng.normal(0, 4)
    yield _disc(0.46, 0.5, 0.12, 0.15), FACE
    yield _disc(0.38, 0.6, 0.08, 0.05), FACE  # an ear
    yield _disc(0.38, 0.66, 0.1, 0.06), fleece


def _pole(rng: Rng, pixel: float) -> Shapes:
    iron, half = _pick(rng, IRONS), rng.uniform(1.0, 1.25) * pixel  # 2 to 3 pixels wide at any distance
    yield _box(-half, 0, half, 1), iron
    if rng.random() < 0.5:
        yield _box(0, 1 - 1.6 * half, 0.16, 1), iron
        yield _box(0.12, 1 - 2.6 * half, 0.2, 1 - half), LAMP
    else:
        for y in (0.84, 0.94):
            yield _box(-0.1, y, 0.1, y + 1.6 * half), iron


def _sign(rng: Rng, pixel: float) -> Shapes:
    kind = int(rng.integers(3))
    outline = (CIRCLE[1::3], CIRCLE, CIRCLE[::6])[kind]  # stop, no entry, priority
    yield outline * 0.5, WHITE
    yield outline * 0.4, SIGNS[kind]
    yield _box(-0.24, -0.08, 0.24, 0.08), FACE if kind == 2 else WHITE


def _balloon(rng: Rng, pixel: float) -> Shapes:
    paint = _pick(rng, PAINTS[:3])
    for x in (-0.1, 0.08):
        yield _box(x, -0.4, x + 0.02, -0.2), FACE
    yield _box(-0.1, -0.5, 0.1, -0.36), BARK
    yield [(-0.1, -0.26), (0.1, -0.26), (0.34, 0.05), (-0.34, 0.05)], paint
    for half, colour in ((0.38, paint), (0.24, WHITE), (0.1, paint)):
        yield _disc(0, 0.16, half, 0.36), colour


# ---- stuff: textures the size of the picture, laid where they belong

SKIES = _palette("4c90d8 6ea4dc 98a4b0 6478b0 4c689c")  # by mood: noon, morning, overcast, sunset, dusk
HAZES = _palette("c8e0f0 dce8ec d4d4d0 f8c490 b4bcd4")
LIGHTS = np.array([(1.0, 1.0, 0.98), (1.06, 1.04, 1.0), (0.88, 0.9, 0.92), (1.02, 0.88, 0.76), (0.74, 0.78, 0.96)])
MEADOWS = _palette("6c9c3c 8cac4c 54884c b0a050 7c9048")
PAVINGS = _palette("74767a 5c5e66 94908a 9c8464")
TUFT = np.array([(-0.6, -0.8), (-0.1, -0.4), (0, -1.4), (0.1, -0.4), (0.6, -0.8), (0.12, 0), (-0.12, 0)])
SEAS = _palette("3c7cb0 4c90a8 5c8c98 2c6498")


def _noise(rng: Rng, shape: tuple[int, int], cell: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Smooth noise with features of about ``cell`` (height, width) pixels, (H, W)."""
    grid = rng.standard_normal([max(2, round(n / c)) for n, c in zip(shape, cell, strict=True)], dtype=np.float32)
    smooth: npt.NDArray[np.float32] = cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return smooth


def _tint(colour: Floats, shade: npt.NDArray[np.float32]) -> Bytes:
    """A colour at a brightness of ``1 + shade`` at each pixel, (H, W, 3)."""
    ramp = (colour * np.linspace(0, 2, 256)[:, None, None]).clip(0, 255).astype(np.uint8)
    tinted: Bytes = cv2.applyColorMap(cv2.convertScaleAbs(shade, alpha=127.5, beta=127.5), ramp)
    return tinted


def _sky(rng: Rng, shape: tuple[int, int], zenith: Floats, haze: Floats) -> Bytes:
    height, width = shape
    column = zenith + (haze - zenith) * np.linspace(0, 1.6, height).clip(0, 1)[:, None]
    sky = np.repeat(column.clip(0, 255).astype(np.uint8)[:, None], width, axis=1)
    for _ in range(rng.integers(0, 5)):  # clouds
        x, y, size = rng.uniform(0, width), rng.uniform(0, 0.3 * height), height * rng.uniform(0.025, 0.06)
        for k in rng.uniform(-1, 1, 9):
            thin = 1 - abs(k)
            puff = _disc(x + 3 * k * size, y - thin * size * rng.random(), 1.3 * size, size * (0.5 + 0.5 * thin))
            _paint(sky, puff, haze * 0.4 + 150)
    return sky


def _grass(rng: Rng, shape: tuple[int, int]) -> Bytes:
    height, width = shape
    colour, near = _pick(rng, MEADOWS), np.linspace(0.05, 0.13, height, dtype=np.float32)[:, None]
    grass = _tint(colour, 0.06 * _noise(rng, shape, (height / 8, width / 6)) + near * _noise(rng, shape, (9, 3)))
    for x, y in rng.uniform((0, 0.2 * height), (width, height), (120, 2)):  # tufts, half of them dark
        _paint(grass, (x, y) + 0.028 * y * TUFT, colour * (0.62 if x % 2 < 1 else 1.3))
    return grass


def _water(rng: Rng, shape: tuple[int, int], haze: Floats) -> Bytes:
    waves = 0.09 * _noise(rng, shape, (5, 70)) + 0.06 * _noise(rng, shape, (14, 160))
    return _tint(_pick(rng, SEAS) * 0.75 + haze * 0.25, waves)


def _paving(rng: Rng, shape: tuple[int, int]) -> Bytes:
    return _tint(_pick(rng, PAVINGS), 0.06 * _noise(rng, shape, (2, 3)) + 0.04 * _noise(rng, shape, (40, 90)))


def _way(rng: Rng, shape: tuple[int, int], horizon: float, recedes: bool) -> tuple[Floats, Floats]:
    """A road or river, into the distance or across: its two banks, (41, 2) each."""
    height, width = shape
    t = np.linspace(0, 1, 41)
    bend = rng.normal(0, 0.1) * np.sin(np.pi * t * rng.uniform(1, 2))
    if recedes:
        t, bend = t**2, np.interp(t**2, t, bend)
        y, x = horizon + t * (1.02 * height - horizon), width * (rng.uniform(0.1, 0.9, 2) @ (1 - t, t) + bend)
        half = np.stack([width * (0.008 + rng.uniform(0.16, 0.26) * t), 0 * t], axis=1)
    else:
        x = width * (1.1 * t - 0.05)
        y = horizon + (height - horizon) * (rng.uniform(0.25, 0.75) + rng.normal(0, 0.12) * (t - 0.5) + 0.5 * bend)
        half = np.stack([0 * t, 0.012 * height + 0.16 * (y - horizon)], axis=1)
    middle = np.stack([x, y], axis=1)
    return middle - half, middle + half


def _between(left: Floats, right: Floats) -> Floats:
    return np.concatenate([left, right[::-1]])


def _draw_ground(rng: Rng, shape: tuple[int, int], horizon: float, mood: int) -> tuple[Bytes, Bytes, bool]:
    """The stuff of a scene: its picture, its class ids, and whether its road leads into the distance."""
    (height, width), haze, depth = shape, HAZES[mood], shape[0] - horizon
    image, ids = _sky(rng, shape, _pick(rng, SKIES[mood, None]), haze), np.full(shape, SKY, dtype=np.uint8)
    grass, across = _grass(rng, shape), np.linspace(0, width, 41)

    def lay(points: Floats, texture: Bytes, class_id: int) -> None:
        region = np.zeros_like(ids)
        _paint(region, points, 1)
        cv2.copyTo(texture, region, image)
        ids[region > 0] = class_id

    def wave(y: float, swell: float) -> Floats:
        return np.stack([across, y + swell * np.sin(across / width * rng.uniform(3, 9) + rng.uniform(0, 6))], axis=1)

    for k in range(int(rng.integers(0, 3)), 0, -1):  # hills, paler with distance
        pale = cv2.add(cv2.convertScaleAbs(grass, alpha=1 - 0.2 * k), (*haze * 0.2 * k, 0))
        lay(_between(wave(horizon - 0.03 * k * height, 0.035 * height), wave(height, 0)), pale, GRASS)
    lay(_box(0, horizon, width, height), grass, GRASS)
    kind = rng.choice(["dry", "sea", "lake", "river"], p=(0.1, 0.35, 0.25, 0.3))
    if kind == "sea":
        shore = wave(horizon + depth * rng.uniform(0.2, 0.55), 0.05 * depth)
        lay(_between(wave(horizon, 0), shore), _water(rng, shape, haze), WATER)
    elif kind == "lake":
        centre = rng.uniform((0.1 * width, horizon + 0.3 * depth), (0.9 * width, horizon + 0.8 * depth))
        lay(CIRCLE * rng.uniform(0.6, 1.1) * (0.38 * width, 0.24 * depth) + centre, _water(rng, shape, haze), WATER)
    elif kind == "river":
        lay(_between(*_way(rng, shape, horizon, bool(rng.random() < 0.5))), _water(rng, shape, haze), WATER)
    recedes = bool(rng.random() < 0.5)
    if rng.random() < 0.88:
        left, right = _way(rng, shape, horizon, recedes)
        lay(_between(left, right), _paving(rng, shape), ROAD)
        nearly_left, nearly_right = 0.53 * left + 0.47 * right, 0.47 * left + 0.53 * right
        for k in range(1, 40, 4):  # dashes along the middle
            _paint(image, _between(nearly_left[k : k + 3], nearly_right[k : k + 3]), WHITE)
    return image, ids, recedes


# ---- scenes


@dataclass(frozen=True)
class _Kind:
    """What stands in a scene: on which stuff, how many on average, and its scale in the foreground, of the height."""

    class_id: int
    shapes: Callable[[Rng, float], Shapes]
    on: int
    mean: float
    size: float
    shadow: float = 0.0


HOUSES = _Kind(HOUSE, _house, GRASS, 1.6, 0.6, 0.6)
TREES = _Kind(TREE, _tree, GRASS, 3.0, 0.66, 0.3)
FLOCK = _Kind(SHEEP, _sheep, GRASS, 2.0, 0.19, 0.45)
POLES = _Kind(POLE, _pole, GRASS, 2.2, 0.72)
PLATES = _Kind(SIGN, _sign, GRASS, 0.0, 0.05)
BALLOONS = _Kind(VOID, _balloon, SKY, 0.15, 1.0)
CARS = _Kind(CAR, _car, ROAD, 2.5, 0.4, 0.55)
CARS_AHEAD = _Kind(CAR, _car_from_behind, ROAD, 2.5, 0.4, 0.35)
Group = tuple[_Kind, list[tuple[float, float, float]]]  # a thing, or a crowd: (x, y, scale) of each member, in pixels


def _place(rng: Rng, ids: Bytes, horizon: float, kind: _Kind, num: int, is_crowd: bool = False) -> list[Group]:
    """Puts ``num`` things, or one crowd of as many, where they belong; nothing where there is no room."""
    height = len(ids)
    feet = np.argwhere(ids[::4, ::4] == kind.on)[:, ::-1] * 4.0
    if len(feet) < 200:
        return []
    if is_crowd:
        near = (feet - rng.choice(feet)) * (0.4, 1.6)
        feet = feet[np.hypot(near[:, 0], near[:, 1]) < height * 0.09]
    x, y = rng.choice(feet, num).T
    depth = ((y - horizon) / (height - horizon)).clip(0)
    scale = kind.size * height * (0.2 + 0.8 * depth) * rng.uniform(0.85, 1.15, num) * (0.5 if is_crowd else 1)
    members = sorted(zip(x, y, scale, strict=True), key=lambda member: member[1])
    return [(kind, members)] if is_crowd else [(kind, [member]) for member in members]


def _populate(rng: Rng, ids: Bytes, horizon: float, recedes: bool) -> list[Group]:
    """The things of a scene, the farthest first."""
    groups: list[Group] = []
    for kind in (BALLOONS, HOUSES, CARS_AHEAD if recedes else CARS, TREES, FLOCK, POLES):
        groups += _place(rng, ids, horizon, kind, int(rng.poisson(kind.mean)))
    if rng.random() < 0.15:
        kind = TREES if rng.random() < 0.4 else FLOCK
        groups += _place(rng, ids, horizon, kind, int(rng.integers(10, 19)), is_crowd=True)
    groups.sort(key=lambda group: group[1][-1][1])
    poles = [number for number, (kind, _) in enumerate(groups) if kind is POLES]
    if poles and rng.random() < 0.14:
        x, y, scale = groups[poles[-1]][1][0]
        groups.insert(poles[-1] + 1, (PLATES, [(x, y - 0.45 * scale, PLATES.size * len(ids))]))
    return groups


def _unlabel(rng: Rng, ids: Bytes, segments: list[Segment]) -> tuple[Bytes, tuple[Segment, ...]]:
    """Leaves a seam around some things and the remnants of hidden ones unlabelled, and numbers the rest anew."""
    labelled, kept, numbers = ids.copy(), [], np.zeros(256, dtype=np.uint8)
    for number, segment in enumerate(segments, 1):
        if segment.class_id in (HOUSE, CAR, TREE) and not segment.is_crowd and rng.random() < 0.3:
            mask = (ids == number).astype(np.uint8)
            seam = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
            labelled[seam & ((ids == number) | (ids <= WATER))] = VOID  # its own pixels and stuff; no other thing's
    areas = np.bincount(labelled.ravel(), minlength=len(segments) + 1)[1:]
    for number, (segment, area) in enumerate(zip(segments, areas, strict=True), 1):
        if segment.class_id != VOID and area >= (1 if segment.class_id == POLE else MIN_AREA):
            kept.append(segment)
            numbers[number] = len(kept)
    return numbers[labelled], tuple(kept)


def draw_scene(seed: int, split: Split, index: int, size: tuple[int, int] = (192, 256)) -> Scene:
    """Draws scene ``index`` of a split at (height, width); it depends on nothing else."""
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    shape = (size[0] * ZOOM, size[1] * ZOOM)
    mood, horizon = int(rng.integers(len(SKIES))), shape[0] * rng.uniform(0.22, 0.48)
    image, ids, recedes = _draw_ground(rng, shape, horizon, mood)
    groups = _populate(rng, ids, horizon, recedes)
    shadows = np.zeros(shape, dtype=np.uint8)
    for kind, members in groups:
        for x, y, scale in members:
            _paint(shadows, _disc(x + 0.08 * scale, y, kind.shadow * scale, 0.22 * kind.shadow * scale), 1)
    cv2.copyTo(cv2.convertScaleAbs(image, alpha=0.68), shadows, image)
    segments = [Segment(class_id, False, None, None) for class_id in (SKY, GRASS, ROAD, WATER)]  # so numbered in ids
    for kind, members in groups:
        segments.append(Segment(kind.class_id, len(members) > 1, None, None))
        for x, y, scale in members:
            flip = rng.choice((-1, 1))
            for points, colour in kind.shapes(rng, ZOOM / scale):
                pixels = np.asarray(points) * (flip * scale, -scale) + (x, y)
                _paint(image, pixels, colour)
                _paint(ids, pixels, len(segments))
    small = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    sideways = np.linspace(-1, 1, size[1])[:, None] * rng.uniform(-0.12, 0.12)
    light = (LIGHTS[mood] * rng.uniform(0.85, 1.1) * (1 + sideways)).astype(np.float32)  # (W, 3)
    lit = small * light + 3 * rng.standard_normal(small.shape, dtype=np.float32)
    labels, kept = _unlabel(rng, ids[ZOOM // 2 :: ZOOM, ZOOM // 2 :: ZOOM], segments)
    return Scene(lit.clip(0, 255).astype(np.uint8), labels, kept)


# ---- files


def _to_polygons(mask: Bytes) -> list[list[float]] | None:
    """COCO polygons that rasterise to exactly this mask; None where it has holes.

    Outlines are traced at twice the size, so that they run between the centres of the pixels inside and outside.
    """
    doubled = np.pad(mask.repeat(2, axis=0).repeat(2, axis=1), 1)
    outlines, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    is_whole = (tree[0, :, 3] < 0).all()
    return [((outline.ravel() - 0.5) / 2).tolist() for outline in outlines] if is_whole else None


Record = dict[str, object]


def _describe(scene: Scene) -> tuple[list[Record], list[Record], Bytes]:
    """A scene's COCO panoptic segments and their PNG, (H, W, 3), and its COCO annotations, but for their ids."""
    indices = [EXAMPLE_CLASSES.ids.index(segment.class_id) for segment in scene.segments]
    colours = np.concatenate([np.zeros((1, 3), np.uint8), EXAMPLE_CLASSES.palette[indices]])
    colours[1:, 0] += (41 * np.arange(len(indices))).astype(np.uint8)  # red tells segments of one class apart
    segments: list[Record] = []
    annotations: list[Record] = []
    for number, (segment, index) in enumerate(zip(scene.segments, indices, strict=True), 1):
        mask = (scene.ids == number).astype(np.uint8)
        encoded = rle.from_mask(mask)
        compressed = {"size": mask.shape, "counts": encoded}
        region: Record = {"category_id": segment.class_id, "iscrowd": int(segment.is_crowd)}
        region |= {"bbox": coco_mask.toBbox(compressed).tolist(), "area": int(mask.sum())}
        segments.append({"id": int(colours[number] @ (1, 256, 65536)), **region})
        if EXAMPLE_CLASSES.things[index]:
            counts = rle.to_runs(encoded, mask.shape).tolist() if segment.is_crowd else encoded.decode()
            polygons = None if segment.is_crowd else _to_polygons(mask)
            annotations.append({**region, "segmentation": polygons or {"size": list(mask.shape), "counts": counts}})
    return segments, annotations, colours[scene.ids]


def _to_json(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _draw_split(folder: Path, split: Split, num: int, size: tuple[int, int], seed: int) -> None:
    for name in ("images", "masks", "panoptic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).glob("[0-9]*.[jp][pn]g"):
            old.unlink()  # of an earlier example, which may have been larger
    images: list[Record] = []
    instances: list[Record] = []
    panoptic: list[Record] = []
    for index in range(num):
        scene, stem = draw_scene(seed, split, index, size), f"{index:04d}"
        segments, annotations, coloured = _describe(scene)
        to_class = [EXAMPLE_CLASSES.ignore_index, *(segment.class_id for segment in scene.segments)]
        mask = encode_id_map(np.array(to_class, dtype=np.uint8)[scene.ids], EXAMPLE_CLASSES)
        (folder / "masks" / f"{stem}.png").write_bytes(mask)
        Image.fromarray(scene.image).save(folder / "images" / f"{stem}.jpg", quality=92)
        Image.fromarray(coloured).save(folder / "panoptic" / f"{stem}.png")
        images.append({"id": index + 1, "file_name": f"{stem}.jpg", "height": size[0], "width": size[1]})
        panoptic.append({"image_id": index + 1, "file_name": f"{stem}.png", "segments_info": segments})
        for number, annotation in enumerate(annotations, len(instances) + 1):
            instances.append({"id": number, "image_id": index + 1, **annotation})
    categories = [
        {**c, "supercategory": "thing" if c["isthing"] else "stuff"} for c in to_categories(EXAMPLE_CLASSES, "color")
    ]
    things = [c for c in categories if c["isthing"]]
    info = {"description": f"raysseg example, {split}, seed {seed}"}
    head = {"info": info, "licenses": [], "images": images}
    (folder / "instances.json").write_bytes(_to_json({**head, "categories": things, "annotations": instances}))
    (folder / "panoptic.json").write_bytes(_to_json({**head, "categories": categories, "annotations": panoptic}))


def draw_example(
    out: str | Path, *, num_train: int = 160, num_val: int = 40, size: tuple[int, int] = (192, 256), seed: int = 0
) -> None:
    """Writes the example data set: pictures, and the same labels as masks, as COCO instances and as COCO panoptic.

        classes.json                           what the ids stand for, in all of these files
        {train,val}/images/NNNN.jpg
        {train,val}/masks/NNNN.png             class ids, 255 where nothing is labelled; a crowd has its class
        {train,val}/instances.json             things: polygons, RLE if they have holes, uncompressed RLE for crowds
        {train,val}/panoptic.json, panoptic/   things and stuff

    Args:
        out: a new or empty folder, or an earlier example, which is drawn over.
        num_train: number of scenes to train on.
        num_val: number of scenes to validate on.
        size: height and width of the pictures, in pixels.
        seed: the same seed draws the same files.

    Raises:
        InputError: ``out`` holds something else, or there is nothing to draw.
    """
    if min(num_train, num_val) < 1 or min(size) < 64:
        given = f"{num_train} and {num_val} scenes of {size[0]} x {size[1]}"
        raise InputError(f"{given}: an example has at least one scene a split, of 64 x 64 pixels or more")
    out = Path(out)
    marker = out / "classes.json"
    content = _to_json(to_class_list(EXAMPLE_CLASSES))
    is_ours = marker.is_file() and marker.read_bytes() == content
    if out.exists() and not is_ours and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out}: holds something other than an example data set; name a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_bytes(content)
    _draw_split(out / "train", "train", num_train, size, seed)
    _draw_split(out / "val", "val", num_val, size, seed)
