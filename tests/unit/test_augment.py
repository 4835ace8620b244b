"""Transforms against torchvision.transforms.v2, image against labels, and what the random draw promises."""

import hashlib

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms.v2 import functional as F

from raysseg.config import Augment
from raysseg.data.augment import (
    FILL,
    Colours,
    View,
    adjust_colour,
    apply_view,
    augment,
    draw_view,
    resize,
    resize_image,
    resize_labels,
    seeded_rng,
)

IGNORE = 255
PLAIN = Augment(scale=(1, 1), max_class_share=1, flip=0, brightness=0, contrast=0, saturation=0, hue=0)
PALETTE = np.array(
    [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (10, 250, 250), (250, 10, 250)], np.uint8
)

Array = npt.NDArray[np.generic]


def draw_photo(height: int = 120, width: int = 160, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth regions, edges and a little noise, (H, W, 3)."""
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.uniform(0, 255, (height, width, 3)).astype(np.float32), (0, 0), 4)
    smooth = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX)
    edges = 60.0 * (draw_labels(height, width, seed)[..., None] % 3) - 60
    return np.clip(smooth + edges + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def draw_labels(height: int = 120, width: int = 160, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Blobs of six classes, (H, W)."""
    noise = np.random.default_rng(seed).uniform(0, 1, (6, height, width)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(layer, (0, 0), 6) for layer in noise]).argmax(0).astype(np.uint8)


def to_tensor(array: Array) -> torch.Tensor:
    """(H, W, 3) to (3, H, W), (H, W) to (1, H, W)."""
    wide = array.astype(np.int32) if array.dtype == np.uint16 else np.ascontiguousarray(array)
    return torch.from_numpy(wide)[None] if array.ndim == 2 else torch.from_numpy(wide).permute(2, 0, 1)


def to_array(tensor: torch.Tensor) -> Array:
    return tensor[0].numpy() if len(tensor) == 1 else tensor.permute(1, 2, 0).numpy()


def difference(ours: Array, reference: Array) -> npt.NDArray[np.float64]:
    assert ours.shape == reference.shape
    return np.abs(ours.astype(np.float64) - reference)


# --- against the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(240, 320), (173, 201), (119, 161), (90, 120), (77, 101), (60, 80), (31, 40), (150, 50)]
)
def test_resized_image_is_antialiased_as_the_reference(size: tuple[int, int]) -> None:
    image = draw_photo()
    reference = to_array(F.resize(to_tensor(image), list(size), antialias=True))
    error = difference(resize_image(image, size), reference)
    assert error.mean() < 2  # of the 19 levels that neighbours differ by
    assert np.percentile(error, 99) <= 12


def test_halving_noise_does_not_alias() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    reference = to_array(F.resize(to_tensor(noise), [60, 80], antialias=True))
    assert difference(resize_image(noise, (60, 80)), reference).mean() < 0.5  # plain bilinear sampling: 15


@pytest.mark.parametrize("size", [(240, 320), (180, 241), (119, 161), (90, 120), (77, 101), (60, 80), (31, 40), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resized_labels_are_the_references_nearest_exact(size: tuple[int, int], dtype: type) -> None:
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (120, 160), dtype=dtype)
    reference = F.resize(to_tensor(labels), list(size), interpolation=F.InterpolationMode.NEAREST_EXACT)
    ours = resize_labels(labels, size)
    assert ours.dtype == dtype
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, to_array(reference))


def test_resizes_a_pair() -> None:
    image, labels = resize(draw_photo(), draw_labels(), (50, 70))
    assert image.shape == (50, 70, 3)
    assert labels.shape == (50, 70)


@pytest.mark.parametrize(("is_flipped", "is_upside_down"), [(True, False), (False, True), (True, True)])
def test_flips_are_exact(is_flipped: bool, is_upside_down: bool) -> None:
    pair = draw_photo(), draw_labels()
    view = View((120, 160), (0, 0, 120, 160), is_flipped=is_flipped, is_upside_down=is_upside_down)
    for before, after in zip(pair, apply_view(view, *pair, ignore=IGNORE), strict=True):
        reference = to_tensor(before)
        reference = F.horizontal_flip(reference) if is_flipped else reference
        reference = F.vertical_flip(reference) if is_upside_down else reference
        np.testing.assert_array_equal(after, to_array(reference))


@pytest.mark.parametrize("window", [(7, 11, 60, 80), (-9, -4, 150, 200), (-20, 90, 100, 100), (0, 0, 120, 160)])
def test_crop_and_padding_are_exact(window: tuple[int, int, int, int]) -> None:
    pair = draw_photo(), draw_labels()
    top, left, height, width = window
    view = View((height, width), window)
    fills = (list(FILL), [IGNORE])
    for before, after, fill in zip(pair, apply_view(view, *pair, ignore=IGNORE), fills, strict=True):
        padded = F.pad(to_tensor(before), [50, 50, 50, 50], fill=fill)
        np.testing.assert_array_equal(after, to_array(F.crop(padded, top + 50, left + 50, height, width)))


@pytest.mark.parametrize("window", [(10, 20, 60, 80), (0, 0, 120, 160), (31, 7, 83, 111), (50, 60, 33, 47)])
def test_windows_are_resized_as_the_references_resized_crop(window: tuple[int, int, int, int]) -> None:
    image, labels = draw_photo(), draw_labels()
    ours, our_labels = apply_view(View((80, 100), window), image, labels, ignore=IGNORE)
    mode = F.InterpolationMode
    reference = F.resized_crop(to_tensor(image), *window, [80, 100], mode.BILINEAR, antialias=True)
    reference_labels = F.resized_crop(to_tensor(labels), *window, [80, 100], mode.NEAREST_EXACT)
    assert difference(ours, to_array(reference)).mean() < 1
    np.testing.assert_array_equal(our_labels, to_array(reference_labels))


@pytest.mark.parametrize("angle", [-170.0, -35.0, -3.0, 0.5, 10.0, 45.0, 90.0])
@pytest.mark.parametrize("factor", [1, 2])
def test_turns_as_the_reference(angle: float, factor: int) -> None:
    image, labels = draw_photo(300, 320), draw_labels(300, 320)
    top, left, height, width = window = (90, 101, 110, 96)
    size = [height * factor, width * factor]
    ours, our_labels = apply_view(View((size[0], size[1]), window, angle=angle), image, labels, ignore=IGNORE)

    def turn(tensor: torch.Tensor, mode: F.InterpolationMode, nearest_or_not: F.InterpolationMode) -> Array:
        tensor = F.resize(tensor, [300 * factor, 320 * factor], interpolation=nearest_or_not)
        centre = [(left + width / 2) * factor, (top + height / 2) * factor]
        return to_array(F.crop(F.rotate(tensor, angle, mode, center=centre), top * factor, left * factor, *size))

    mode = F.InterpolationMode
    assert difference(ours, turn(to_tensor(image), mode.BILINEAR, mode.BILINEAR)).mean() < 1
    assert (our_labels == turn(to_tensor(labels), mode.NEAREST, mode.NEAREST_EXACT)).mean() > 0.99


def test_a_turn_shows_the_image_in_its_corners_and_fill_only_beyond_it() -> None:
    image, labels = np.full((300, 300, 3), 7, np.uint8), np.zeros((300, 300), np.uint8)
    inner, inner_labels = apply_view(View((100, 140), (100, 80, 100, 140), angle=30), image, labels, ignore=IGNORE)
    assert (inner == 7).all()
    assert (inner_labels == 0).all()
    outer, outer_labels = apply_view(View((300, 300), (0, 0, 300, 300), angle=45), image, labels, ignore=IGNORE)
    assert (outer[0, 0] == FILL).all()
    assert outer_labels[0, 0] == IGNORE
    assert 0.8 < (outer_labels == 0).mean() < 0.85  # an octagon: 2 (sqrt 2 - 1)


ADJUSTMENTS = [
    *[(name, factor, 1) for name in ("brightness", "contrast", "saturation") for factor in (0.0, 0.8, 1.1, 1.2, 2.0)],
    *[("hue", shift, 1) for shift in (-0.5, -0.3, -0.02, 0.003, 0.02, 0.3)],
]


@pytest.mark.parametrize(("name", "amount", "tolerance"), ADJUSTMENTS)
def test_colours_are_within_a_level_of_the_reference(name: str, amount: float, tolerance: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    noise[:5] = noise[:5, :, :1]  # grey, without a hue
    noise[5:7] = np.array([[[0]], [[255]]])
    for image in (draw_photo(), noise):
        reference = getattr(F, f"adjust_{name}")(to_tensor(image), amount)
        ours = adjust_colour(image, Colours(**{name: amount}))
        assert difference(ours, to_array(reference)).max() <= tolerance


def test_colours_follow_one_another_as_in_the_reference() -> None:
    image = draw_photo()
    reference = to_tensor(image)
    for name, amount in (("brightness", 1.2), ("contrast", 0.85), ("saturation", 1.15), ("hue", -0.02)):
        reference = getattr(F, f"adjust_{name}")(reference, amount)
    error = difference(adjust_colour(image, Colours(1.2, 0.85, 1.15, -0.02)), to_array(reference))
    assert error.mean() < 1.5  # the reference rounds down in every step, this to the nearest
    assert error.max() <= 6


def test_only_the_image_is_recoloured_never_the_padding() -> None:
    view = View((100, 100), (-20, -20, 100, 100), colours=Colours(brightness=0.5))
    image, labels = apply_view(view, np.full((60, 60, 3), 200, np.uint8), np.ones((60, 60), np.uint8), ignore=IGNORE)
    assert (image[labels == 1] == 100).all()
    assert (image[labels == IGNORE] == FILL).all()


# --- image and labels together ------------------------------------------------------------------------------------


VARIED = {**PLAIN.model_dump(), "scale": (0.5, 2.0), "flip": 0.5, "vertical_flip": 0.5}


@pytest.mark.parametrize("rotation", [0.0, 15.0, 180.0])
@pytest.mark.parametrize("shape", [(120, 160), (250, 230), (41, 230)])
def test_image_and_labels_stay_aligned(rotation: float, shape: tuple[int, int]) -> None:
    config = Augment(**{**VARIED, "rotation": rotation, "class_crop": 0.5})
    labels = draw_labels(*shape)
    colours = np.vstack([PALETTE, FILL]).astype(np.int32)
    for position in range(40):
        image, shown = augment(
            PALETTE[labels], labels, crop=(96, 128), config=config, ignore=6, rng=seeded_rng(0, 0, position)
        )
        decoded = np.square(image[:, :, None].astype(np.int32) - colours).sum(-1).argmin(-1)
        is_inner = cv2.erode(shown, np.ones((5, 5))) == cv2.dilate(shown, np.ones((5, 5)))
        assert is_inner.mean() > 0.15
        assert (decoded != shown)[is_inner].mean() < 1e-3  # slivers that only one of bilinear and nearest sampling sees


@pytest.mark.parametrize("rotation", [0.0, 15.0, 180.0])
def test_image_and_labels_are_aligned_to_a_tenth_of_a_pixel(rotation: float) -> None:
    """Image and labels both tell each pixel's place in the source; colours round and labels snap, without a bias."""
    config = Augment(**{**VARIED, "rotation": rotation})
    y, x = np.mgrid[:120, :125]
    image, labels = np.stack([2 * y, 2 * x, x], axis=-1).astype(np.uint8), (125 * y + x).astype(np.uint16)
    biases = []
    for position in range(40):
        rng = seeded_rng(0, 0, position)
        ours, shown = augment(image, labels, crop=(48, 64), config=config, ignore=65535, rng=rng)
        is_image = (shown != 65535).astype(np.uint8)
        is_inner = cv2.erode(is_image, np.ones((7, 7)), borderType=cv2.BORDER_CONSTANT, borderValue=0) == 1
        for colours, places in ((ours[..., 0], shown // 125), (ours[..., 1], shown % 125)):
            error = colours[is_inner] / 2.0 - places[is_inner]
            assert np.abs(error).max() <= 2
            biases.append(abs(error.mean()))
    assert np.mean(biases) < 0.1
    assert max(biases) < 0.3  # a ratio such as 1 : 2 snaps to one side throughout


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 4), (64, 64), (500, 30)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_image_gives_a_crop_of_the_size(shape: tuple[int, int], dtype: type) -> None:
    ignore = int(np.iinfo(dtype).max)
    image, labels = np.full((*shape, 3), 50, np.uint8), np.full(shape, ignore - 1, dtype)
    config = Augment(rotation=20, vertical_flip=0.5, min_object_share=0.5, class_crop=0.5)
    for position in range(20):
        ours, shown = augment(
            image, labels, crop=(64, 48), config=config, ignore=ignore, rng=seeded_rng(1, 2, position)
        )
        assert (ours.shape, ours.dtype) == ((64, 48, 3), np.uint8)
        assert (shown.shape, shown.dtype) == ((64, 48), dtype)
        assert set(np.unique(shown)) <= {ignore - 1, ignore}


def test_sixteen_bit_labels_keep_their_values() -> None:
    labels = np.arange(120 * 160, dtype=np.uint16).reshape(120, 160) + 40000
    image = draw_photo()
    _, shown = apply_view(View((60, 50), (13, 17, 60, 50)), image, labels, ignore=65535)
    np.testing.assert_array_equal(shown, labels[13:73, 17:67])
    for view in (View((120, 160), (0, 0, 120, 160), angle=20), View((90, 90), (5, 5, 60, 60))):
        _, shown = apply_view(view, image, labels, ignore=65535)
        assert set(np.unique(shown)) <= {*np.unique(labels), 65535}


@pytest.mark.parametrize("config", [None, PLAIN, Augment(), Augment(rotation=10), Augment(class_crop=1)])
def test_results_are_new_contiguous_arrays_and_inputs_stay(config: Augment | None) -> None:
    image, labels = draw_photo(), draw_labels()
    for source, target in ((image, labels), (image[::-1, ::-1], labels[::-1, ::-1]), (image[:, ::2], labels[:, ::2])):
        before = source.copy(), target.copy()
        source.flags.writeable = target.flags.writeable = False
        for position in range(6):
            results = augment(
                source, target, crop=target.shape, config=config, ignore=IGNORE, rng=seeded_rng(0, 0, position)
            )
            for result, given in zip(results, (source, target), strict=True):
                assert result.flags.c_contiguous
                assert result.flags.writeable
                assert not np.shares_memory(result, given)
        np.testing.assert_array_equal(source, before[0])
        np.testing.assert_array_equal(target, before[1])


def test_without_a_config_the_crop_is_the_top_left_corner() -> None:
    image, labels = draw_photo(), draw_labels()
    ours, shown = augment(image, labels, crop=(50, 200), config=None, ignore=IGNORE, rng=seeded_rng(0, 0, 0))
    np.testing.assert_array_equal(ours[:, :160], image[:50])
    np.testing.assert_array_equal(shown[:, :160], labels[:50])
    assert (shown[:, 160:] == IGNORE).all()


# --- the draw -----------------------------------------------------------------------------------------------------


def test_the_same_place_in_training_draws_the_same_and_any_other_another() -> None:
    pair = draw_photo(), draw_labels()
    config = Augment(rotation=10)

    def show(*place: int) -> bytes:
        image, labels = augment(*pair, crop=(64, 64), config=config, ignore=IGNORE, rng=seeded_rng(*place))
        return image.tobytes() + labels.tobytes()

    assert show(3, 1, 7) == show(3, 1, 7)
    assert len({show(3, 1, 7), show(4, 1, 7), show(3, 2, 7), show(3, 1, 8), show(7, 1, 3), show(0, 0, 0)}) == 6


def draw_many(labels: npt.NDArray[np.uint8], config: Augment, crop: tuple[int, int] = (64, 64)) -> list[View]:
    return [draw_view(labels, crop=crop, config=config, ignore=IGNORE, rng=seeded_rng(0, 0, i)) for i in range(1000)]


def test_draws_cover_their_ranges_evenly() -> None:
    config = Augment(max_class_share=1, rotation=30, vertical_flip=0.2, brightness=0.4, hue=0.1)
    views = draw_many(draw_labels(400, 500), config)
    zooms = np.array([64 / view.window[2] for view in views])
    ranges = [
        (zooms - 1.25, 0.75),
        (np.array([view.angle for view in views]), 30),
        (np.array([view.colours.brightness - 1 for view in views]), 0.4),
        (np.array([view.colours.contrast - 1 for view in views]), 0.2),
        (np.array([view.colours.saturation - 1 for view in views]), 0.2),
        (np.array([view.colours.hue for view in views]), 0.1),
    ]
    for values, limit in ranges:
        assert 0.98 * limit < values.max() <= limit * 1.001
        assert -1.001 * limit <= values.min() < -0.98 * limit
        assert abs(values.mean()) < 0.08 * limit
        assert abs(values.std() - limit / 3**0.5) < 0.04 * limit
    assert abs(np.mean([view.is_flipped for view in views]) - 0.5) < 0.05
    assert abs(np.mean([view.is_upside_down for view in views]) - 0.2) < 0.04


def test_windows_reach_every_edge_and_smaller_images_lie_anywhere() -> None:
    views = draw_many(np.zeros((68, 60), np.uint8), PLAIN)
    assert {view.window[0] for view in views} == set(range(5))
    assert {view.window[1] for view in views} == set(range(-4, 1))


def test_one_knob_does_not_move_the_draws_of_another() -> None:
    labels = draw_labels()
    for knobs in ({"rotation": 10}, {"hue": 0}, {"brightness": 0}, {"flip": 0}, {"tries": 3}):
        config = Augment(max_class_share=1, **knobs)
        for one, other in zip(
            draw_many(labels, Augment(max_class_share=1))[:50], draw_many(labels, config), strict=False
        ):
            assert one.window == other.window
            assert one.colours.contrast == other.colours.contrast


def test_draws_without_crops_around_classes_stay_as_they_were() -> None:
    digest = hashlib.sha256()
    for config in (Augment(), Augment(rotation=10, min_object_share=0.3, vertical_flip=0.5)):
        for view in draw_many(draw_labels(), config)[:200]:
            digest.update(repr((view.window, view.is_flipped, round(view.angle, 9))).encode())
    assert digest.hexdigest()[:16] == "0a49b37a4be70d02"


def test_crops_around_classes_move_nothing_but_their_own_windows() -> None:
    labels = draw_labels()
    for tries in (1, 10):
        plain, some, all_ = (draw_many(labels, Augment(class_crop=share, tries=tries)) for share in (0, 0.3, 1))
        for one, two, three in zip(plain, some, all_, strict=True):
            assert one.colours == two.colours == three.colours
            assert one.is_flipped == two.is_flipped == three.is_flipped
            assert one.window[2:] == two.window[2:] == three.window[2:]
            assert two.window in (one.window, three.window)
        assert 0.2 < np.mean([one.window != two.window for one, two in zip(plain, some, strict=True)]) <= 0.35


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_class_and_pixel_of_a_crop_are_drawn_evenly(dtype: type) -> None:
    """A crop of one pixel is the pixel that was drawn."""
    labels = np.full((40, 50), IGNORE, dtype)
    labels[5:35] = 3
    labels[10:14, 20:25] = 7
    labels[39, 49] = 0
    views = draw_many(labels, Augment(**{**PLAIN.model_dump(), "class_crop": 1}), crop=(1, 1))
    places = np.array([view.window[:2] for view in views])
    drawn = labels[tuple(places.T)]
    assert chisquare([(drawn == label).sum() for label in (0, 3, 7)]).pvalue > 0.01
    (y, x) = places[drawn == 7].T
    assert chisquare(np.bincount(5 * (y - 10) + x - 20, minlength=20)).pvalue > 0.01
    assert chisquare(np.bincount(places[drawn == 3][:, 0] // 5, minlength=7)[1:7]).pvalue > 0.01


@pytest.mark.parametrize(
    ("pixel", "rows", "columns"),
    [((30, 40), range(23, 31), range(31, 41)), ((1, 2), range(2), range(3)), ((58, 74), range(51, 53), range(65, 71))],
)
def test_the_pixel_lies_anywhere_in_the_crop_and_the_crop_in_the_image(
    pixel: tuple[int, int], rows: range, columns: range
) -> None:
    labels = np.full((60, 80), IGNORE, np.uint8)
    labels[pixel] = 1
    views = draw_many(labels, Augment(**{**PLAIN.model_dump(), "class_crop": 1}), crop=(8, 10))
    for drawn, allowed in zip(np.array([view.window[:2] for view in views]).T, (rows, columns), strict=True):
        assert set(drawn.tolist()) == set(allowed)
        assert chisquare(np.bincount(drawn - allowed[0])).pvalue > 0.01


def test_a_smaller_image_lies_whole_in_a_crop_around_a_pixel() -> None:
    labels = np.zeros((50, 90), np.uint8)
    labels[3, 80] = 1
    views = draw_many(labels, Augment(**{**PLAIN.model_dump(), "class_crop": 1}))
    assert {view.window[0] for view in views} == set(range(-14, 1))
    assert {view.window[1] for view in views} == set(range(27))


def test_no_class_fills_a_crop_where_that_can_be_had() -> None:
    labels = np.zeros((200, 200), np.uint8)
    labels[:, 120:] = 1
    labels[:60] = IGNORE  # not labelled: counts for no class
    shares = {}
    for cap in (1.0, 0.75):
        config = Augment(**{**PLAIN.model_dump(), "max_class_share": cap, "tries": 100})
        shares[cap] = []
        for view in draw_many(labels, config)[:200]:
            _, shown = apply_view(view, PALETTE[labels % 6], labels, ignore=IGNORE)
            areas = np.bincount(shown.ravel(), minlength=256)[:IGNORE]
            shares[cap].append(areas.max() / max(areas.sum(), 1))
    assert max(shares[0.75]) <= 0.75
    assert max(shares[1.0]) == 1


def test_a_crop_keeps_its_share_of_an_object_where_that_can_be_had() -> None:
    labels = np.zeros((200, 200), np.uint8)
    labels[150:180, 20:60] = 1
    kept = {}
    for share in (0.0, 0.8):
        config = Augment(**{**PLAIN.model_dump(), "min_object_share": share, "tries": 200})
        views = draw_many(labels, config)[:200]
        crops = [apply_view(view, PALETTE[labels], labels, ignore=IGNORE)[1] for view in views]
        kept[share] = [(crop == 1).sum() / (30 * 40) for crop in crops]
    assert min(kept[0.8]) >= 0.8
    assert min(kept[0.0]) == 0


def test_what_cannot_be_had_does_not_fail() -> None:
    config = Augment(max_class_share=0.1, min_object_share=1, class_crop=0.5)
    for labels in (np.zeros((90, 90), np.uint8), np.full((90, 90), IGNORE, np.uint8), draw_labels()):
        assert len(draw_many(labels, config)) == 1000
