"""Sliding windows and views: as a full-size sum by hand, and the same for every cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from raysseg.config import Inference
from raysseg.data.augment import Windowed, resize_image
from raysseg.data.decode import Pixels
from raysseg.masks import IdMap, LabelMap, View
from raysseg.models import Images, Outputs, SegModel, Targets
from raysseg.models.base import to_label_map
from raysseg.predictor import class_scores, iter_labels, predict
from raysseg.schema import ClassMap
from raysseg.tiling import Block, Grid, importance

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small layers on several threads wait for each other."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def class_map(number: int) -> ClassMap:
    names = tuple(str(i) for i in range(number))
    return ClassMap(tuple(range(number)), names, ((0, 0, 0),) * number, (False,) * number, ignore_index=65535)


class Toy(SegModel):
    """One layer of logits at the images' own size."""

    def __init__(self, number: int, layer: nn.Module) -> None:
        super().__init__(class_map(number), "semantic", (0.5,) * 3, (0.25,) * 3)
        self.layer = layer
        self.seen: list[tuple[int, ...]] = []
        self.eval()

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        return {}

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        assert isinstance(images, Tensor)
        self.seen.append(tuple(images.shape))
        return Outputs({"logits": self.layer(self.normalise(images))})

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        pairs = zip(outputs.values["logits"], sizes, strict=True)
        return [to_label_map(logits, size, self.classes) for logits, size in pairs]

    def class_scores(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        return nn.functional.interpolate(outputs.values["logits"], size=size, mode="bilinear").softmax(1)

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        raise NotImplementedError


def conv(number: int, kernel: int = 5) -> Toy:
    torch.manual_seed(0)
    return Toy(number, nn.Conv2d(3, number, kernel, padding=kernel // 2))


def noise(height: int, width: int) -> Pixels:
    coarse = RNG.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).astype(np.uint8)
    return resize_image(coarse, (height, width))


def put_together(model: SegModel, image: Pixels | Windowed, inference: Inference, blocks: Iterable[Block]) -> IdMap:
    """The labels of some blocks; every pixel of the image must come once."""
    labels: IdMap = np.zeros(image.shape[:2], model.classes.dtype)
    times = np.zeros(image.shape[:2], np.int64)
    for rows, columns, part in iter_labels(model, image, None, torch.float32, inference, list(blocks)):
        labels[rows, columns] = part
        times[rows, columns] += 1
    assert (times == 1).all()
    return labels


def grid_of(image: Pixels | Windowed, inference: Inference) -> Grid:
    return Grid((image.shape[0], image.shape[1]), inference.tile, inference.overlap)


def summed_by_hand(model: SegModel, image: Pixels, inference: Inference) -> npt.NDArray[np.float64]:
    """(H, W, C) in float64 at full size: the scores of all tiles, weighted, over the weights."""
    grid = grid_of(image, inference)
    height, width = grid.tile_size
    across = [np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2) for side in (height, width)]
    weights = np.outer(*across) if inference.blend == "gaussian" else np.ones((height, width))
    total = np.zeros((*image.shape[:2], len(model.classes)))
    divisor = np.zeros(image.shape[:2])
    for top in grid.tops:
        for left in grid.lefts:
            place = np.s_[top : top + height, left : left + width]
            scores = class_scores(model, image[place], None, torch.float32, inference).numpy()
            total[place] += weights[..., None] * scores.transpose(1, 2, 0)
            divisor[place] += weights
    return total / divisor[..., None]


@pytest.mark.parametrize("side", [1, 64, 65, 100, 640, 641, 3504, 16384])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.25), (100, 0.5), (512, 0.0), (512, 0.9)])
def test_tiles_reach_from_edge_to_edge_and_overlap_by_the_share_at_least(side: int, tile: int, overlap: float) -> None:
    grid = Grid((side, 1), (tile, tile), overlap)
    starts = np.array(grid.tops)
    assert grid.tile_size == (min(side, tile), 1)
    assert (starts[0], starts[-1] + grid.tile_size[0]) == (0, side)
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= tile * (1 - overlap)).all()
    fewest = 1 if side <= tile else int(np.ceil((side - tile) / int(tile * (1 - overlap)))) + 1
    assert len(starts) == fewest


def test_the_gaussian_is_nnu_nets() -> None:
    weights = importance((64, 32), "gaussian").numpy()
    assert weights.min() > 0
    middle = weights[31:33, 15:17]
    assert (middle == weights.max()).all()
    assert weights[23, 15] / weights[31, 15] == pytest.approx(np.exp(-0.5 * (8.5**2 - 0.5**2) / 8**2))
    assert weights[31, 11] / weights[31, 15] == pytest.approx(np.exp(-0.5 * (4.5**2 - 0.5**2) / 4**2))


@pytest.mark.parametrize(
    ("size", "number", "inference"),
    [
        ((200, 333), 3, Inference(tile=(64, 96))),
        ((257, 129), 11, Inference(tile=(64, 64), overlap=0.5)),
        ((200, 150), 4, Inference(tile=(70, 64), overlap=0.8, blend="uniform")),
        ((150, 200), 300, Inference(tile=(64, 64))),  # uint16
        ((150, 200), 1, Inference(tile=(64, 64))),
        ((40, 200), 3, Inference(tile=(64, 64))),  # lower than a tile
        ((70, 90), 3, Inference(tile=(512, 512))),  # smaller than a tile
        ((100, 130), 3, Inference(tile=(64, 64), scales=(1.0, 1.5), flip=True)),
    ],
)
def test_labels_are_those_of_a_full_size_sum(size: tuple[int, int], number: int, inference: Inference) -> None:
    model, image = conv(number), noise(*size)
    (found,) = predict(model, [image], None, torch.float32, inference)
    assert isinstance(found, LabelMap)
    assert found.labels.dtype == (np.uint8 if number < 255 else np.uint16)
    expected = summed_by_hand(model, image, inference)
    best = expected.max(2)
    of_found = np.take_along_axis(expected, found.labels[..., None].astype(np.int64), 2)[..., 0]
    assert (best - of_found).max() < 1e-6
    assert (found.labels == expected.argmax(2)).mean() > 0.999, "but for ties"


def test_a_tile_larger_than_the_image_changes_nothing() -> None:
    model, image = conv(5), noise(100, 131)
    plain, tiled = (
        predict(model, [image], None, torch.float32, inference)[0]
        for inference in (Inference(), Inference(tile=(128, 131)))
    )
    assert isinstance(plain, LabelMap)
    assert isinstance(tiled, LabelMap)
    assert np.array_equal(plain.labels, tiled.labels)


def test_the_same_bits_for_any_cut_into_blocks_and_any_number_of_workers() -> None:
    model, image = conv(7), noise(200, 350)
    inference = Inference(tile=(96, 64), overlap=0.4)
    grid = grid_of(image, inference)
    whole = put_together(model, image, inference, [Block(range(len(grid.tops)), range(len(grid.lefts)))])
    for rows, columns in [(None, 8), (1, 1), (2, 3), (3, 100)]:
        blocks = grid.blocks(rows, columns)
        assert np.array_equal(whole, put_together(model, image, inference, blocks[::-1]))
        for number in (2, 3):  # each worker takes every so-manieth block
            dealt = [block for worker in range(number) for block in blocks[worker::number]]
            assert np.array_equal(whole, put_together(model, image, inference, dealt))


def test_tiles_are_scored_one_by_one_and_few_twice() -> None:
    model, image = conv(2), noise(64, 64 * 40)
    inference = Inference(tile=(64, 64))
    grid = grid_of(image, inference)
    put_together(model, image, inference, grid.blocks())
    assert set(model.seen) == {(1, 3, 64, 64)}
    assert len(model.seen) == sum(map(grid.num_scored, grid.blocks()))
    assert len(model.seen) == len(grid.lefts) + len(grid.blocks()) - 1
    assert len(grid.blocks()) == 7


def test_only_windows_of_a_tiles_height_and_a_blocks_width_are_read() -> None:
    image = noise(400, 1500)
    windows = []

    class Spy:
        shape = image.shape

        def __getitem__(self, window: tuple[slice, slice]) -> Pixels:
            windows.append(image[window].shape)
            return image[window]

    model, inference = conv(2), Inference(tile=(64, 64))
    blocks = grid_of(image, inference).blocks()
    assert np.array_equal(put_together(model, Spy(), inference, blocks), put_together(model, image, inference, blocks))
    assert max(height for height, _, _ in windows) == 64
    assert max(width for _, width, _ in windows) <= 64 * 9


def test_flipping_changes_nothing_where_the_model_is_symmetric() -> None:
    model, image = conv(4), noise(90, 121)
    assert isinstance(model.layer, nn.Conv2d)
    plain = class_scores(model, image, None, torch.float32, Inference(flip=False))
    lopsided = class_scores(model, image, None, torch.float32, Inference(flip=True))
    assert (plain - lopsided).abs().max() > 0.01
    with torch.no_grad():
        model.layer.weight.add_(model.layer.weight.flip(-1))
    plain = class_scores(model, image, None, torch.float32, Inference(flip=False))
    flipped = class_scores(model, image, None, torch.float32, Inference(flip=True))
    assert (plain - flipped).abs().max() < 1e-6


class Area(nn.Module):
    """Two classes, of which the second is (pixels of the input / 10,000) times as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        odds = torch.tensor([1.0, images.shape[2] * images.shape[3] / 10_000])
        return odds.log().view(1, 2, 1, 1).expand(1, 2, *images.shape[2:]).contiguous()


def test_scales_are_of_the_image_and_probabilities_are_averaged() -> None:
    scores = class_scores(
        Toy(2, Area()), noise(100, 200), None, torch.float32, Inference(scales=(1.0, 1.5, 2.0), flip=True)
    )
    assert scores.shape == (2, 100, 200)
    expected = np.mean([odds / (1 + odds) for odds in (2.0, 2.0 * 1.5**2, 2.0 * 2**2)])
    np.testing.assert_allclose(scores[1], expected, rtol=1e-6)
    resized_first = class_scores(Toy(2, Area()), noise(50, 60), (100, 300), torch.float32, Inference(scales=(2.0,)))
    np.testing.assert_allclose(resized_first[1], 12 / 13, rtol=1e-6)


def test_views_equal_a_loop_by_hand() -> None:
    model, image = conv(3), noise(111, 97)
    scores = class_scores(model, image, None, torch.float32, Inference(scales=(0.75, 1.0, 1.25), flip=True))
    views = []
    with torch.no_grad():
        for size in ((83, 73), (111, 97), (139, 121)):
            for step in (1, -1):
                pixels = resize_image(image, size)[:, ::step]
                logits = model.layer((torch.tensor(pixels.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25)
                logits = nn.functional.interpolate(logits, image.shape[:2], mode="bilinear")
                views.append(logits.softmax(1)[0].numpy()[:, :, ::step])
    np.testing.assert_allclose(scores, np.mean(views, 0), atol=1e-5)
