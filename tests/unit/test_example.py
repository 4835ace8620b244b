"""The example data set: seeded, the same in all formats, and hard enough that learning shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from raysseg.data.example import EXAMPLE_CLASSES, draw_example, draw_scene
from raysseg.masks import decode_id_map
from raysseg.schema import InputError

NUM_TRAIN, NUM_VAL = 60, 2
IGNORE = EXAMPLE_CLASSES.ignore_index
THINGS = {i for i, is_thing in zip(EXAMPLE_CLASSES.ids, EXAMPLE_CLASSES.things, strict=True) if is_thing}
ID_OF = dict(zip(EXAMPLE_CLASSES.names, EXAMPLE_CLASSES.ids, strict=True))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "example"
    draw_example(out, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return out


@pytest.fixture(scope="module")
def masks(example: Path) -> np.ndarray:
    """(N, H, W)."""
    return np.stack([np.array(Image.open(path)) for path in sorted((example / "train/masks").iterdir())])


@pytest.fixture(scope="module")
def panoptic(example: Path) -> list[tuple[list[dict[str, Any]], np.ndarray]]:
    """Segments and their (H, W) id image, a training scene."""
    annotations = json.loads((example / "train/panoptic.json").read_text())["annotations"]
    images = [np.array(Image.open(example / "train/panoptic" / a["file_name"])).astype(np.int64) for a in annotations]
    return [(a["segments_info"], image @ (1, 256, 65536)) for a, image in zip(annotations, images, strict=True)]


@pytest.fixture(scope="module")
def instances(example: Path) -> COCO:
    return COCO(str(example / "train/instances.json"))


def test_same_seed_draws_the_same_files_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_example(tmp_path / name, num_train=3, num_val=2, size=(64, 96), seed=seed)
    files = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    }
    assert len(files["a"]) == 1 + 2 * 2 + 5 * 3
    assert files["a"] == files["b"]
    same = {path for path in files["a"] if files["a"][path] == files["c"][path]}
    assert same == {Path("classes.json")}


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    scene, again = (draw_scene(0, "train", 5, (64, 96)) for _ in range(2))
    assert np.array_equal(scene.image, again.image)
    assert np.array_equal(scene.ids, again.ids)
    assert scene.segments == again.segments
    for other in (
        draw_scene(1, "train", 5, (64, 96)),
        draw_scene(0, "val", 5, (64, 96)),
        draw_scene(0, "train", 6, (64, 96)),
    ):
        assert not np.array_equal(scene.image, other.image)


@pytest.mark.parametrize("size", [(64, 64), (100, 300), (400, 320)])
def test_scenes_of_any_size(size: tuple[int, int]) -> None:
    for index in range(3):
        scene = draw_scene(0, "val", index, size)
        assert scene.image.shape == (*size, 3)
        assert scene.ids.shape == size
        assert set(np.unique(scene.ids)) | {0} == set(range(len(scene.segments) + 1))


def test_files(example: Path) -> None:
    classes = json.loads((example / "classes.json").read_text())
    assert [entry["id"] for entry in classes["classes"]] == list(range(1, len(EXAMPLE_CLASSES) + 1))
    assert {entry["id"] for entry in classes["classes"] if entry["isthing"]} == THINGS
    assert classes["ignore_index"] == IGNORE
    for split, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        stems = [f"{index:04d}" for index in range(num)]
        for folder, suffix in (("images", ".jpg"), ("masks", ".png"), ("panoptic", ".png")):
            assert sorted(p.name for p in (example / split / folder).iterdir()) == [stem + suffix for stem in stems]
    image, mask = Image.open(example / "train/images/0000.jpg"), Image.open(example / "train/masks/0000.png")
    assert image.format == "JPEG"
    assert image.size == mask.size == (256, 192)
    assert mask.mode == "P"
    for class_id, colour in zip(EXAMPLE_CLASSES.ids, EXAMPLE_CLASSES.colours, strict=True):
        assert tuple(mask.getpalette()[3 * class_id : 3 * class_id + 3]) == colour
    decoded = decode_id_map((example / "train/masks/0000.png").read_bytes(), EXAMPLE_CLASSES)
    assert np.array_equal(decoded, np.array(mask))


def test_panoptic_agrees_with_masks(
    panoptic: list[tuple[list[dict[str, Any]], np.ndarray]], masks: np.ndarray, example: Path
) -> None:
    content = json.loads((example / "train/panoptic.json").read_text())
    assert {c["id"] for c in content["categories"] if c["isthing"]} == THINGS
    assert all(len(c["color"]) == 3 for c in content["categories"])
    for (segments, ids), mask in zip(panoptic, masks, strict=True):
        semantic = np.full_like(mask, IGNORE)
        for segment in segments:
            region = ids == segment["id"]
            ys, xs = np.nonzero(region)
            assert segment["area"] == region.sum() > 0
            assert segment["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            semantic[region] = segment["category_id"]
        assert len({segment["id"] for segment in segments}) == len(segments)
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in segments}
        assert np.array_equal(semantic, mask)


def test_instances_agree_with_panoptic(
    panoptic: list[tuple[list[dict[str, Any]], np.ndarray]], instances: COCO
) -> None:
    assert set(instances.getCatIds()) == THINGS
    kinds = set()
    for image_id, (segments, ids) in enumerate(panoptic, 1):
        things = [segment for segment in segments if segment["category_id"] in THINGS]
        annotations = instances.loadAnns(instances.getAnnIds(imgIds=image_id))
        for thing, annotation in zip(things, annotations, strict=True):
            assert all(annotation[key] == thing[key] for key in ("category_id", "iscrowd", "area", "bbox"))
            outline = annotation["segmentation"]
            kinds.add("polygons" if isinstance(outline, list) else type(outline["counts"]).__name__)
            assert annotation["iscrowd"] == (isinstance(outline, dict) and isinstance(outline["counts"], list))
            assert np.array_equal(instances.annToMask(annotation), ids == thing["id"])  # polygons too, to the pixel
    assert kinds == {"polygons", "str", "list"}


def test_no_remnants_are_labelled(instances: COCO) -> None:
    areas = [a["area"] for a in instances.loadAnns(instances.getAnnIds()) if a["category_id"] != ID_OF["pole"]]
    assert min(areas) >= 12


def test_background_alone_scores_badly(masks: np.ndarray) -> None:
    pixels = np.bincount(masks.ravel(), minlength=256)
    labelled = pixels[list(EXAMPLE_CLASSES.ids)]
    assert pixels[IGNORE] + labelled.sum() == masks.size
    assert 0.002 < pixels[IGNORE] / masks.size < 0.06
    assert labelled.min() > 0
    assert labelled.max() / masks.size < 0.35
    assert labelled.max() / labelled.sum() / len(EXAMPLE_CLASSES) < 0.08  # mIoU of the most frequent class everywhere


def test_rare_thin_and_crowded(masks: np.ndarray, instances: COCO) -> None:
    signs = (masks == ID_OF["sign"]).sum(axis=(1, 2))
    assert 0.08 < (signs > 0).mean() < 0.2
    assert 20 < np.median(signs[signs > 0]) < 120
    poles = [a for a in instances.loadAnns(instances.getAnnIds(catIds=[ID_OF["pole"]])) if a["bbox"][3] > 40]
    widths = [np.median(rows[rows > 0]) for rows in (instances.annToMask(pole).sum(axis=1) for pole in poles)]
    assert len(poles) > 20
    assert 2 <= np.median(widths) <= 3
    crowds = instances.loadAnns(instances.getAnnIds(iscrowd=True))
    assert 0.05 < len({crowd["image_id"] for crowd in crowds}) / len(masks) < 0.25
    assert {crowd["category_id"] for crowd in crowds} == {ID_OF["tree"], ID_OF["sheep"]}
    for crowd in crowds[:3]:
        assert sum(crowd["segmentation"]["counts"]) == masks[0].size
        assert coco_mask.area(instances.annToRLE(crowd)) == crowd["area"]


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="something other than an example"):
            draw_example(out, num_train=1, num_val=1)
    (tmp_path / "classes.json").write_text('{"classes": [{"id": 0, "name": "mine"}]}')
    with pytest.raises(InputError, match="something other than an example"):
        draw_example(tmp_path, num_train=1, num_val=1)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "classes.json"}


def test_an_earlier_example_is_drawn_over(tmp_path: Path) -> None:
    draw_example(tmp_path, num_train=3, num_val=1, size=(64, 64))
    draw_example(tmp_path, num_train=1, num_val=1, size=(64, 64))
    assert [path.name for path in (tmp_path / "train/images").iterdir()] == ["0000.jpg"]


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": 0}, {"size": (32, 256)}])
def test_nothing_to_draw(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least one scene"):
        draw_example(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
