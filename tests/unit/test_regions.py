"""From annotations to the regions of a training batch: overlaps, crowds, crops, and what lies between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from raysseg import rle
from raysseg.config import Augment, CocoPanopticSource, CocoSource
from raysseg.config import Batch as BatchConfig
from raysseg.data import batches, read_class_map, read_index, read_samples
from raysseg.data.augment import apply_view, choose_view, seeded_rng, view_labels
from raysseg.data.batches import Batch, Feed, Recipe
from raysseg.data.example import draw_example
from raysseg.data.index import Failure
from raysseg.ledger import Ledger
from raysseg.loop import to_device
from raysseg.masks import Layers, MaskSet, SegmentMap, encode_id_map, to_instances, to_layers, to_segment_map
from raysseg.schema import ClassMap, Sample, Segment, Task

SIZE = (40, 50)
CLASSES = ClassMap((7, 9, 11), ("ground", "car", "tree"), ((0, 0, 0), (9, 9, 9), (99, 9, 9)), (False, True, True))
IGNORE, NOTHING = 255, 254

Mask = npt.NDArray[np.bool_]


def box(top: int, left: int, bottom: int, right: int) -> Mask:
    mask = np.zeros(SIZE, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


CAR, TREE, SIGN, CROWD = box(5, 5, 25, 30), box(10, 20, 35, 40), box(12, 22, 18, 28), box(0, 35, 40, 50)


def instances() -> MaskSet:
    """Three that lie above each other, and a crowd."""
    segments = [(9, CAR, False), (11, TREE, False), (9, SIGN, False), (11, CROWD, True)]
    sample = Sample(
        "a", None, *SIZE, None, tuple(Segment(c, crowd, None, rle.from_mask(m)) for c, m, crowd in segments)
    )
    return to_instances(sample, CLASSES)


def decoded(layers: Layers) -> list[Mask]:
    return [(layers.numbers == number).any(0) for number in range(1, len(layers.class_ids) + 1)]


def test_overlapping_instances_lie_in_layers_from_which_each_comes_back() -> None:
    layers = to_layers(instances(), CLASSES)
    assert len(layers.numbers) == 3  # the sign lies on both
    assert all(np.array_equal(found, wanted) for found, wanted in zip(decoded(layers), (CAR, TREE, SIGN), strict=True))
    assert layers.class_ids.tolist() == [1, 2, 1]


def test_labels_of_instances_tell_nothing_from_ignored() -> None:
    expected = np.full(SIZE, NOTHING)
    expected[CROWD] = IGNORE
    expected[CAR], expected[TREE] = 1, 2  # of the two the smaller one wins: the car
    expected[CAR] = 1
    assert CAR.sum() == TREE.sum()
    expected[TREE & ~CAR], expected[SIGN] = 2, 1
    labels = to_layers(instances(), CLASSES).labels
    assert np.array_equal(labels[~(CAR & TREE)], expected[~(CAR & TREE)])
    assert set(np.unique(labels[CAR & TREE])) <= {1, 2}


def test_many_instances_need_wider_numbers() -> None:
    pixels = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
    encoded = tuple(rle.from_mask(pixels == i) for i in range(300))
    many = MaskSet(SIZE, encoded, np.ones(300, np.int64), np.zeros(300, np.bool_))
    layers = to_layers(many, CLASSES)
    assert (layers.numbers.dtype, len(layers.numbers)) == (np.uint16, 1)
    assert np.array_equal(layers.numbers[0].ravel()[:300], np.arange(1, 301))


def test_no_instance_at_all() -> None:
    nobody = MaskSet(SIZE, (), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    layers = to_layers(nobody, CLASSES)
    assert layers.numbers.shape == (1, *SIZE)
    assert not layers.numbers.any()
    assert (layers.labels == NOTHING).all()


def panoptic() -> SegmentMap:
    """Void above, ground in two pieces, a car, a crowd of trees, and a class that is dropped."""
    numbers = np.zeros(SIZE, np.uint8)
    for number, rows in enumerate((slice(4, 10), slice(10, 16), slice(16, 22), slice(22, 30), slice(30, 40)), 1):
        numbers[rows] = number
    segments = [(7, False), (9, False), (7, False), (11, True), (5, False)]
    listed = tuple(Segment(class_id, is_crowd, None, None) for class_id, is_crowd in segments)
    sample = Sample("a", None, *SIZE, encode_id_map(numbers), listed)
    dropping = ClassMap(CLASSES.ids, CLASSES.names, CLASSES.colours, CLASSES.things, dropped=(5,))
    return to_segment_map(sample, dropping)


def test_pieces_of_stuff_are_one_segment_and_dropped_classes_are_void() -> None:
    found = panoptic()
    assert found.class_ids.tolist() == [0, 1, 2]
    assert found.is_crowd.tolist() == [False, False, True]
    assert found.numbers[[0, 5, 12, 18, 25, 35], 0].tolist() == [0, 1, 2, 1, 3, 0]


def test_layers_of_segments_leave_void_and_crowds_out() -> None:
    layers = to_layers(panoptic(), CLASSES)
    assert layers.numbers[0, [0, 5, 12, 18, 25, 35], 0].tolist() == [0, 1, 2, 1, 0, 0]
    assert layers.labels[[0, 5, 12, 18, 25, 35], 0].tolist() == [IGNORE, 0, 1, 0, IGNORE, IGNORE]
    assert layers.class_ids.tolist() == [0, 1]


# ---- batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("example")
    draw_example(root, num_train=6, num_val=1, size=(96, 128))
    return root / "train"


def source_of(task: Task, folder: Path) -> CocoSource | CocoPanopticSource:
    images = str(folder / "images")
    if task == "instance":
        return CocoSource(format="coco", annotations=str(folder / "instances.json"), images=images)
    return CocoPanopticSource(
        format="coco_panoptic", annotations=str(folder / "panoptic.json"), masks=str(folder / "panoptic"), images=images
    )


AUGMENT = Augment(rotation=20, vertical_flip=0.5)


def whole_epoch(task: Task, folder: Path) -> tuple[Feed, list[Batch]]:
    source = source_of(task, folder)
    recipe = Recipe(read_class_map(None, source), task, None, (64, 80), AUGMENT, seed=5)
    batch = BatchConfig(global_size=4, per_worker=4)
    feed = Feed(read_index(source), recipe, batch, open_groups=1, epochs=1, start=Ledger())
    return feed, [one for step in batches.iter_batches(feed, batches.iter_chunks(feed)) for one in step]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_regions_of_a_batch_are_the_masks_moved_one_by_one(task: Task, folder: Path) -> None:
    feed, found = whole_epoch(task, folder)
    recipe, rows = feed.recipe, batches._order(feed, 0).rows
    seen = 0
    for batch in found:
        images, targets = to_device(batch, torch.device("cpu"), channels_last=False)
        assert targets.regions is not None
        for row, position in enumerate(batch.positions):
            (sample,) = read_samples(feed.index.take(rows[position : position + 1]))
            assert not isinstance(sample, Failure)
            truth = (
                to_instances(sample, recipe.classes) if task == "instance" else to_segment_map(sample, recipe.classes)
            )
            layers = to_layers(truth, recipe.classes)
            counted = np.where(layers.labels == NOTHING, IGNORE, layers.labels)
            rng = seeded_rng(recipe.seed, 0, int(position))
            view = choose_view(counted, crop=recipe.crop, config=AUGMENT, ignore=IGNORE, rng=rng)
            pixels, labels = apply_view(
                view, batches.decode_pair(sample, recipe.classes)[0], layers.labels, ignore=IGNORE
            )
            assert np.array_equal(images[row].permute(1, 2, 0).numpy(), pixels)
            assert np.array_equal(targets.labels[row].numpy(), labels)
            moved = [view_labels(view, mask.astype(np.uint8), fill=0) for mask in decoded(layers)]
            wanted = [(mask, int(c)) for mask, c in zip(moved, layers.class_ids, strict=True) if mask.any()]
            regions = targets.regions[row]
            ours = {(m.numpy().tobytes(), int(c)) for m, c in zip(regions.masks, regions.class_ids, strict=True)}
            assert ours == {(mask.astype(np.bool_).tobytes(), class_id) for mask, class_id in wanted}
            seen += len(ours)
    assert seen > 10


def test_seeds_follow_from_the_place_in_the_run(folder: Path) -> None:
    _, found = whole_epoch("panoptic", folder)
    (first, second) = (to_device(b, torch.device("cpu"), channels_last=False, seed=1, epoch=2)[1] for b in found)
    whole = torch.cat([first.seeds, second.seeds])
    assert len(set(whole.tolist())) == 6
    half = to_device(found[0].slice(2, 4), torch.device("cpu"), channels_last=False, seed=1, epoch=2)[1]
    assert torch.equal(half.seeds, first.seeds[2:])
    other = to_device(found[0], torch.device("cpu"), channels_last=False, seed=1, epoch=3)[1]
    assert not torch.equal(other.seeds, first.seeds)
