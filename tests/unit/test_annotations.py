"""Annotation files: COCO, COCO panoptic and YOLO; the views of a sample; class lists; conversion between formats."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from raysseg import masks, rle
from raysseg.config import AnySource, CocoPanopticSource, CocoSource, MasksSource, ShardJob, ShardsSource, YoloSource
from raysseg.config import parse as parse_job
from raysseg.data import read_class_map, read_index, read_samples
from raysseg.data.example import EXAMPLE_CLASSES, draw_example
from raysseg.data.index import Failure
from raysseg.schema import ClassMap, InputError, Sample, Segment
from raysseg.shard import ShardResult, shard

DATA = Path(os.environ.get("RAYSSEG_DATA", "../shared/data"))
SIZE = (20, 30)
RNG = np.random.default_rng(0)


def is_missing(name: str) -> bool:
    return not (DATA / name).exists()


def samples_of(source: AnySource, *, with_images: bool = False) -> list[Sample]:
    found = read_samples(read_index(source), with_images=with_images)
    assert not [sample for sample in found if isinstance(sample, Failure)]
    return [sample for sample in found if isinstance(sample, Sample)]


def encode(mask: np.ndarray[Any, Any]) -> bytes:
    return rle.from_mask(mask.astype(bool))


# ---- run-length encoding


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (37, 41), (480, 640)])
def test_runs_are_pycocotools(size: tuple[int, int], share: float) -> None:
    for smooth in (False, True):
        mask = RNG.random(size) < share
        if smooth:
            mask = mask.cumsum(0) % 3 == 1
        encoded = encode(mask)
        runs = rle.to_runs(encoded, size)
        assert np.array_equal(rle.to_mask(runs, size), mask)
        assert rle.area(runs) == mask.sum() == coco_mask.area({"size": list(size), "counts": encoded})
        assert rle.from_counts(runs.tolist(), size) == encoded
        assert coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"] == encoded
        painted = np.full(mask.size, 7, np.uint8)
        rle.paint(painted, runs, 9)
        assert np.array_equal(painted.reshape(size[::-1]).T, np.where(mask, 9, 7))


def test_masks_encoded_together_are_encoded_alike() -> None:
    masks = RNG.random((9, 67, 43)) < np.linspace(0, 1, 9)[:, None, None]
    assert rle.from_masks(masks) == [encode(mask) for mask in masks]
    assert rle.from_masks(masks.transpose(0, 2, 1)) == [encode(mask.T) for mask in masks]
    assert rle.from_masks(masks[:0]) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "can't be decoded"),
        (b"zz", "can't be decoded"),
        (b"\x01", "can't be decoded"),
        (encode(np.ones((3, 4))), r"RLE of 12 pixels, but its image has 30x20 \(width x height\)"),
        (encode(np.ones((50, 40))), "RLE of 2000 pixels"),
        (b"PPPPPPPPPPPP4" * 2, "a number that no image has"),  # 2**62: their sum would wrap
        (b"PPPPPP1" * 3, "RLE of 3221225472 pixels"),
    ],
)
def test_bad_rle_is_refused_before_it_is_decoded(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rle.to_runs(data, SIZE)


# ---- COCO instances

POLYGON = [2.5, 2.5, 12.0, 3.0, 11.0, 14.5, 3.0, 12.25]
FAR = [-9.0, -9.0, 40.0, -3.0, 15.5, 30.0]  # reaches beyond the image
FLAT = [4.0, 4.0, 9.0, 4.0, 4.0, 4.0]  # no area
SECOND = [20.0, 2.0, 28.0, 2.0, 28.0, 9.0]
GAP_IDS = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 90, "name": "bird"}]


def write_coco(folder: Path, annotations: Sequence[dict[str, Any]], **more: Any) -> CocoSource:
    height, width = SIZE
    images = [{"id": 5 + i, "file_name": f"d/{i}.png", "height": height, "width": width} for i in range(2)]
    content = {"images": images, "categories": GAP_IDS, "annotations": annotations, "info": {"x": 1}} | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "images/d").mkdir(parents=True, exist_ok=True)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"images/d/{i}.png")
    return CocoSource(format="coco", annotations=str(folder / "instances.json"), images=str(folder / "images"))


def annotation(number: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 5, "category_id": 17, "segmentation": segmentation, "iscrowd": 0} | more


CROWD = np.zeros(SIZE, bool)
CROWD[5:18, 3:25] = True
EVERY_KIND = [
    annotation(1, [POLYGON]),
    annotation(2, [POLYGON, SECOND], category_id=3),
    annotation(3, [FAR], category_id=90),
    annotation(4, [FLAT]),
    annotation(5, {"size": list(SIZE), "counts": rle.to_runs(encode(CROWD), SIZE).tolist()}, iscrowd=1),
    annotation(6, {"size": list(SIZE), "counts": encode(~CROWD).decode()}, category_id=3),
]


def test_every_kind_of_segmentation_is_pycocotools(tmp_path: Path) -> None:
    source = write_coco(tmp_path, EVERY_KIND)
    first, second = samples_of(source, with_images=True)
    assert (first.sample_id, second.sample_id) == ("d/0", "d/1")
    assert second.segments == ()
    assert first.image == (tmp_path / "images/d/0.png").read_bytes()
    assert (first.height, first.width) == SIZE
    assert first.segments is not None
    peer = COCO(source.annotations)
    for segment, number in zip(first.segments, range(1, 7), strict=True):
        theirs = peer.anns[number]
        assert segment.class_id == theirs["category_id"]
        assert segment.is_crowd == bool(theirs["iscrowd"])
        assert segment.rle is not None
        assert np.array_equal(rle.to_mask(rle.to_runs(segment.rle, SIZE), SIZE), peer.annToMask(theirs))


@pytest.mark.skipif(is_missing("coco_instances"), reason="needs the data set coco_instances")
@pytest.mark.parametrize("split", ["train", "val"])
def test_polygons_of_real_data_are_pycocotools_to_the_pixel(split: str) -> None:
    path = f"{DATA}/coco_instances/annotations_{split}.json"
    peer = COCO(path)
    by_file = {Path(image["file_name"]).stem: image["id"] for image in peer.dataset["images"]}
    number = 0
    for sample in samples_of(CocoSource(format="coco", annotations=path)):
        theirs = peer.imgToAnns[by_file[sample.sample_id]]
        assert sample.segments is not None
        assert len(sample.segments) == len(theirs)
        for segment, entry in zip(sample.segments, theirs, strict=True):
            assert segment.rle == coco_mask.encode(np.asfortranarray(peer.annToMask(entry)))["counts"]
            number += 1
    assert number == {"train": 1444, "val": 576}[split]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (annotation(7, []), r"^d/0: annotation 7 has no polygon"),
        (annotation(7, [[1, 2, 3, 4]]), "annotation 7 has a polygon of 4 numbers; allowed: x, y of three points"),
        (annotation(7, [[1, 2, 3, 4, 5, 6, 7]]), "annotation 7 has a polygon of 7 numbers"),
        (annotation(7, POLYGON), "annotation 7 has a segmentation that can't be read"),
        (annotation(7, {"size": [3, 4], "counts": "04"}), "annotation 7 has an RLE of 4x3, but its image has 30x20"),
        (annotation(7, {"size": list(SIZE), "counts": [10, 5]}), "annotation 7 has an RLE of 15 pixels"),
        (annotation(7, {"size": list(SIZE), "counts": [-1, 601]}), "annotation 7 has an RLE of 600 pixels"),
        (annotation(7, {"size": list(SIZE), "counts": "zzz"}), "annotation 7 has an RLE that can't be decoded"),
        (annotation(7, {"counts": "zzz"}), "annotation 7 has a segmentation that can't be read"),
    ],
)
def test_bad_segmentation_names_its_annotation(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    (failure, good) = read_samples(read_index(write_coco(tmp_path, [bad])))
    assert isinstance(good, Sample)
    assert isinstance(failure, Failure)
    with pytest.raises(InputError, match=message):
        raise InputError(failure.reason)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [annotation(1, [POLYGON], image_id=99)]}, "an annotation has image_id 99, which is none of"),
        (
            {"annotations": [annotation(8, [POLYGON], category_id=4)]},
            "annotation 8 has category_id 4, which is none of",
        ),
        ({"images": []}, "`images` is empty"),
        ({"categories": None}, r"not the COCO file that it should be: Expected `array`.*categories"),
        ({"annotations": [{"id": 1}]}, r"not the COCO file .*missing required field `image_id`"),
        (
            {
                "images": [
                    {"id": i, "file_name": f"a.{s}", "height": 1, "width": 1} for i, s in enumerate(("jpg", "png"))
                ]
            },
            r"the images 'a\.jpg' and 'a\.png' share one stem",
        ),
        (
            {"images": [{"id": 5, "file_name": f"{s}.jpg", "height": 1, "width": 1} for s in "ab"]},
            "two images share one `id`",
        ),
    ],
)
def test_bad_annotations_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    annotations = changes.pop("annotations", [])
    source = write_coco(tmp_path, annotations, **changes)
    with pytest.raises(InputError, match=message):
        read_index(source)


def test_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: not the COCO file that it should be"):
        read_index(CocoSource(format="coco", annotations=f"{tmp_path}/x.json"))


# ---- views


def classes_of(source: AnySource, classes: Any = None) -> ClassMap:
    return read_class_map(classes, source)


def test_instances_seen_as_semantic(tmp_path: Path) -> None:
    """The smaller of two wins, crowds are ignored, the rest is background if the source says so."""
    big, small, crowd = (np.zeros(SIZE, bool) for _ in range(3))
    big[2:12, 2:20], small[5:9, 6:10], crowd[8:18, 8:28] = True, True, True
    segments = tuple(
        Segment(class_id, is_crowd, None, encode(mask))
        for class_id, is_crowd, mask in ((17, False, small), (3, False, big), (90, True, crowd))
    )
    sample = Sample("a", None, *SIZE, None, segments)
    source = write_coco(tmp_path, [])
    plain = classes_of(source)
    expected = np.full(SIZE, 255)
    expected[big], expected[small] = plain.ids.index(3), plain.ids.index(17)
    assert np.array_equal(masks.to_dense(sample, plain).labels, expected)
    with_background = classes_of(source.model_copy(update={"background": "ground"}))
    assert (with_background.names[0], with_background.ids[0]) == ("ground", 0)
    expected = np.zeros(SIZE, int)
    expected[crowd] = 255
    expected[big], expected[small] = with_background.ids.index(3), with_background.ids.index(17)
    assert np.array_equal(masks.to_dense(sample, with_background).labels, expected)
    few = classes_of(source.model_copy(update={"background": "ground"}), ["ground", "cat"])
    assert few.dropped == (17, 90)
    assert np.array_equal(masks.to_dense(sample, few).labels, np.where(big, 1, 0))


def test_instance_view_keeps_overlaps_crowds_scores_and_empty_masks(tmp_path: Path) -> None:
    source = write_coco(tmp_path, EVERY_KIND)
    classes = classes_of(source)
    (sample, empty) = samples_of(source)
    found = masks.to_instances(sample, classes)
    peer = COCO(source.annotations)
    expected = [peer.annToMask(entry).astype(bool) for entry in EVERY_KIND]
    assert np.array_equal(found.masks, np.stack(expected))
    assert found.class_ids.tolist() == [classes.ids.index(e["category_id"]) for e in EVERY_KIND]
    assert found.is_crowd.tolist() == [False, False, False, False, True, False]
    assert found.scores is None
    assert masks.to_instances(empty, classes).masks.shape == (0, *SIZE)
    scored = Sample("a", None, *SIZE, None, (Segment(17, False, 0.25, encode(CROWD)),))
    assert masks.to_instances(scored, classes).scores == pytest.approx([0.25])
    with pytest.raises(InputError, match=r"^a: has labels of classes alone; instances need COCO"):
        masks.to_instances(Sample("a", None, 0, 0, masks.encode_id_map(np.zeros(SIZE, np.uint8))), classes)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    draw_example(folder, num_train=6, num_val=1, size=(96, 128))
    return folder / "train"


def panoptic_source(folder: Path, **more: Any) -> CocoPanopticSource:
    places = {"annotations": folder / "panoptic.json", "masks": folder / "panoptic", "images": folder / "images"}
    return CocoPanopticSource(format="coco_panoptic", **{k: str(v) for k, v in places.items()}, **more)


def test_the_tasks_are_views_of_one_sample(example: Path) -> None:
    panoptic = panoptic_source(example)
    instances = CocoSource(format="coco", annotations=str(example / "instances.json"))
    plain = MasksSource(masks=str(example / "masks"))
    classes = classes_of(panoptic)
    assert (classes.ids, classes.names, classes.things) == (
        EXAMPLE_CLASSES.ids,
        EXAMPLE_CLASSES.names,
        EXAMPLE_CLASSES.things,
    )
    number = 0
    for one, two, three in zip(samples_of(panoptic), samples_of(instances), samples_of(plain), strict=True):
        assert one.sample_id == two.sample_id == three.sample_id
        assert np.array_equal(masks.to_dense(one, classes).labels, masks.to_dense(three, classes).labels)
        seen, given = masks.to_instances(one, classes), masks.to_instances(two, classes)
        assert np.array_equal(seen.masks, given.masks)
        assert np.array_equal(seen.class_ids, given.class_ids)
        assert np.array_equal(seen.is_crowd, given.is_crowd)
        number += len(seen.masks)
    assert number > 10


@pytest.mark.skipif(is_missing("coco_panoptic"), reason="needs the data set coco_panoptic")
def test_real_panoptic_data() -> None:
    folder = DATA / "coco_panoptic"
    source = CocoPanopticSource(
        format="coco_panoptic", annotations=f"{folder}/annotations_val.json", masks=f"{folder}/val/panoptic"
    )
    content = json.loads(Path(source.annotations).read_text())
    classes = classes_of(source)
    by_name = {Path(a["file_name"]).stem: a for a in content["annotations"]}
    for sample in samples_of(source):
        labels = masks.to_dense(sample, classes).labels
        expected = np.zeros(len(classes) + 1, int)
        for entry in by_name[sample.sample_id]["segments_info"]:
            expected[classes.ids.index(entry["category_id"])] += entry["area"]
        counts = np.bincount(np.minimum(labels, len(classes)).ravel(), minlength=len(classes) + 1)
        assert counts[:-1].tolist() == expected[:-1].tolist()


def with_size(png: Path, side: int) -> bytes:
    """A PNG whose header says another size."""
    data = png.read_bytes()
    head = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda entry, mask: entry["segments_info"].pop(),
            "^0000: the panoptic PNG holds segment .*`segments_info` lacks",
        ),
        (
            lambda entry, mask: entry["segments_info"].append({**entry["segments_info"][0], "id": 5}),
            "^0000: the panoptic PNG has no pixel of segment 5",
        ),
        (lambda entry, mask: mask.write_bytes(b"\x89PNG"), "^0000: the panoptic PNG can't be decoded"),
        (lambda entry, mask: mask.write_bytes(with_size(mask, 40000)), "^0000: the panoptic PNG can't be decoded"),
        (lambda entry, mask: mask.write_bytes(mask.read_bytes()[:-200]), "^0000: the panoptic PNG can't be decoded"),
        (
            lambda entry, mask: Image.new("RGB", (3, 4)).save(mask),
            r"^0000: the panoptic PNG is 3x4, the annotations file says 128x96",
        ),
    ],
    ids=["lacks", "no pixel", "damaged", "huge", "truncated", "size"],
)
def test_bad_panoptic_png(break_it: Any, message: str, tmp_path: Path) -> None:
    draw_example(tmp_path, num_train=1, num_val=1, size=(96, 128))
    file = tmp_path / "train/panoptic.json"
    content = json.loads(file.read_text())
    break_it(content["annotations"][0], tmp_path / "train/panoptic/0000.png")
    file.write_text(json.dumps(content))
    (failure,) = read_samples(read_index(panoptic_source(tmp_path / "train")))
    assert isinstance(failure, Failure)
    with pytest.raises(InputError, match=message):
        raise InputError(failure.reason)


@pytest.mark.parametrize(("times", "message"), [(0, "has 0 annotations"), (2, "has 2 annotations")])
def test_every_panoptic_image_has_one_annotation(times: int, message: str, example: Path, tmp_path: Path) -> None:
    content = json.loads((example / "panoptic.json").read_text())
    content["annotations"] = content["annotations"][1:] + times * content["annotations"][:1]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"the image '0000\.jpg' {message}"):
        read_index(panoptic_source(example).model_copy(update={"annotations": str(tmp_path / "x.json")}))


# ---- class lists over categories


def write_list(folder: Path, **content: Any) -> str:
    (folder / "classes.json").write_text(json.dumps(content))
    return str(folder / "classes.json")


def test_classes_merge_rename_and_drop(tmp_path: Path) -> None:
    source = write_coco(tmp_path, EVERY_KIND)
    pets = {"id": 1, "name": "pet", "from": ["cat", 17]}
    classes = classes_of(source, write_list(tmp_path, classes=[pets]))
    assert (classes.ids, classes.sources, classes.dropped, classes.things) == ((1,), ((3, 17),), (90,), (True,))
    assert masks.to_instances(samples_of(source)[0], classes).class_ids.tolist() == [0, 0, 0, 0, 0]
    named = classes_of(source, ["dog", "cat"])
    assert (named.ids, named.names, named.dropped) == ((17, 3), ("dog", "cat"), (90,))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["dgo"], r"classes: the data set has no category 'dgo'; its categories: cat, dog, bird; did you mean 'dog'\?"),
        (
            {"classes": [{"id": 1, "name": "pet", "from": ["cow"]}]},
            "class 'pet': the data set has no category 'cow'",
        ),
        (
            {"classes": [{"id": 1, "name": "pet"}]},
            "class 'pet' is read from id 1, which no category of the data set has",
        ),
        (
            {"classes": [{"id": 1, "name": "a", "from": [3]}, {"id": 2, "name": "b", "from": ["cat"]}]},
            "id 3 stands twice in the class list",
        ),
        ({"classes": [{"id": 3, "name": "cat"}], "dropped": [3]}, "id 3 is both `dropped` and a class"),
    ],
)
def test_class_list_that_does_not_fit_the_categories(classes: Any, message: str, tmp_path: Path) -> None:
    source = write_coco(tmp_path, [])
    with pytest.raises(InputError, match=message):
        classes_of(source, write_list(tmp_path, **classes) if isinstance(classes, dict) else classes)


def test_label_images_merge_and_drop_too(tmp_path: Path) -> None:
    classes = read_class_map(
        write_list(tmp_path, classes=[{"id": 0, "name": "a", "from": [0, 4]}, {"id": 1, "name": "b"}], dropped=[7])
    )
    sample = Sample("x", None, 0, 0, masks.encode_id_map(np.array([[0, 4, 1, 7, 255]], np.uint8)))
    assert masks.to_dense(sample, classes).labels.tolist() == [[0, 0, 1, 255, 255]]
    with pytest.raises(InputError, match="ids that the class list lacks: 5"):
        masks.to_dense(Sample("x", None, 0, 0, masks.encode_id_map(np.array([[5]], np.uint8))), classes)


def test_background_that_is_no_class(tmp_path: Path) -> None:
    source = write_coco(tmp_path, []).model_copy(update={"background": "ground"})
    with pytest.raises(InputError, match="the source's background is 'ground', which is no class; allowed: cat"):
        classes_of(source, ["cat"])


# ---- presets of mask folders


def test_cityscapes_layout(tmp_path: Path) -> None:
    stem = "train/aachen/aachen_000000_000019"
    for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"), ("gtFine", "gtFine_color")):
        path = tmp_path / kind / f"{stem}_{suffix}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.array([[7, 26, 0, 4], [33, 11, 255, 29]], np.uint8)
        Image.fromarray(np.repeat(ids[..., None], 3, 2) if suffix != "gtFine_labelIds" else ids).save(path)
    source = MasksSource(
        preset="cityscapes", images=str(tmp_path / "leftImg8bit"), masks=str(tmp_path / "gtFine")
    ).model_copy()
    source = MasksSource.model_validate(source.model_dump())
    (sample,) = samples_of(source, with_images=True)
    assert sample.sample_id == stem
    classes = classes_of(source)
    assert (len(classes), classes.names[0], classes.names[-1]) == (19, "road", "bicycle")
    assert masks.to_dense(sample, classes).labels.tolist() == [[0, 13, 255, 255], [18, 2, 255, 255]]
    some = classes_of(source, ["car", "road"])
    assert masks.to_dense(sample, some).labels.tolist() == [[1, 0, 255, 255], [255, 255, 255, 255]]


def test_ade20k_and_reduce_zero_label(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 150]], np.uint8)).save(tmp_path / "a.png")
    source = MasksSource(preset="ade20k", masks=str(tmp_path))
    classes = classes_of(source)
    assert (len(classes), classes.names[0], classes.names[149]) == (150, "wall", "flag")
    assert masks.to_dense(samples_of(source)[0], classes).labels.tolist() == [[255, 0, 149]]
    plain = MasksSource(masks=str(tmp_path), reduce_zero_label=True)
    names = [f"class {i}" for i in range(150)]
    assert masks.to_dense(samples_of(plain)[0], classes_of(plain, names)).labels.tolist() == [[255, 0, 149]]


# ---- YOLO


def write_yolo(folder: Path, text: str) -> YoloSource:
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)
    for stem in "ab":
        Image.new("RGB", SIZE[::-1]).save(folder / f"images/{stem}.jpg")
    (folder / "labels/a.txt").write_text(text)
    (folder / "data.yaml").write_text("path: .\nnames: {0: cat, 3: dog}\n")
    return YoloSource(format="yolo", images=f"{folder}/images", labels=f"{folder}/labels", names=f"{folder}/data.yaml")


def test_yolo_polygons_are_pycocotools(tmp_path: Path) -> None:
    shares = (np.array(POLYGON).reshape(-1, 2) / SIZE[::-1]).ravel()
    source = write_yolo(tmp_path, f"3 {' '.join(map(str, shares))}\n\n0 0 0 1 0 1 1\n")
    first, second = samples_of(source)
    assert first.segments is not None
    assert [segment.class_id for segment in first.segments] == [3, 0]
    pixels = (shares.reshape(-1, 2) * SIZE[::-1]).ravel().tolist()
    for segment, polygon in zip(first.segments, (pixels, [0, 0, 30, 0, 30, 20]), strict=True):
        assert segment.rle == coco_mask.merge(coco_mask.frPyObjects([polygon], *SIZE))["counts"]
    assert second.segments == ()
    assert classes_of(source).names == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "^a: line 1 of the labels holds a box"),
        ("0 0 0 1 0 1 1\n0 0 0 1 0 1", "^a: line 2 of the labels has 5 coordinates"),
        ("cat 0 0 1 0 1 1", "^a: line 1 of the labels can't be read"),
        ("0 0 0 1 0 1 nan", "^a: line 1 of the labels has 6 coordinates"),
    ],
)
def test_bad_yolo_line(text: str, message: str, tmp_path: Path) -> None:
    failure = read_samples(read_index(write_yolo(tmp_path, text)))[0]
    assert isinstance(failure, Failure)
    with pytest.raises(InputError, match=message):
        raise InputError(failure.reason)


def test_yolo_labels_without_an_image(tmp_path: Path) -> None:
    source = write_yolo(tmp_path, "")
    (tmp_path / "labels/c.txt").write_text("")
    with pytest.raises(InputError, match=r"1 of 2 label files have no image of the same stem in .*such as c\.txt"):
        read_index(source)
    index = read_index(source.model_copy(update={"on_error": "skip"}))
    assert (index.sample_ids, [failure.sample_id for failure in index.failures]) == (["a", "b"], ["c"])


# ---- conversion


def convert(source: AnySource, out: Path, to: str, **more: Any) -> ShardResult:
    raw = {"kind": "shard", "name": "check", "task": "instance", "data": source.model_dump(), "scaling": {"workers": 0}}
    job = parse_job({**raw, "output": {"format": to, "uri": str(out), "rows_per_file": 2}, **more})
    assert isinstance(job, ShardJob)
    return shard(job)


def coco_source(folder: Path) -> CocoSource:
    return CocoSource(format="coco", annotations=f"{folder}/annotations.json", images=f"{folder}/images")


def test_instances_come_through_shards_and_back_to_the_bit(tmp_path: Path) -> None:
    own = {"area": 80.1, "bbox": [2.5, 2.5, 9.5, 12.1], "score": 0.1}  # none of them is a float32
    source = write_coco(tmp_path / "in", [EVERY_KIND[0] | own, *EVERY_KIND[1:]])
    shards = ShardsSource(format="shards", uri=f"{tmp_path}/shards")
    assert convert(source, tmp_path / "shards", "shards").lost == 0
    assert convert(shards, tmp_path / "coco", "coco").lost == 0
    back = coco_source(tmp_path / "coco")
    before = samples_of(source, with_images=True)
    assert samples_of(shards, with_images=True) == before
    assert before[0].segments is not None
    assert before[0].segments[0].area == 80.1
    assert before[0].segments[0].box == (2.5, 2.5, 9.5, 12.1)
    after = samples_of(back, with_images=True)
    assert [(s.sample_id, s.image, s.height, s.width) for s in after] == [
        (s.sample_id, s.image, s.height, s.width) for s in before
    ]
    assert classes_of(back) == classes_of(source)
    peer = COCO(back.annotations)
    for number, entry in peer.anns.items():
        mask = peer.annToMask(entry)
        assert np.array_equal(mask, COCO(source.annotations).annToMask(EVERY_KIND[number - 1]))
        stated = own if number == 1 else {"area": mask.sum(), "bbox": coco_mask.toBbox(peer.annToRLE(entry)).tolist()}
        assert {key: entry[key] for key in stated} == stated


def test_shards_without_areas_and_boxes_are_still_read(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "in", EVERY_KIND)
    uri = convert(source, tmp_path / "shards", "shards").uri
    (path,) = Path(uri).glob("shard-*.parquet")
    table = pq.read_table(path)
    old = table.schema.field("segments").type.value_type
    fields = [f for f in old if f.name in ("class_id", "is_crowd", "rle")] + [pa.field("score", pa.float32())]
    rows = table.to_pylist()
    segments = [[{f.name: entry[f.name] for f in fields} for entry in row["segments"]] for row in rows]
    column = pa.array(segments, pa.list_(pa.struct(fields)))
    pq.write_table(table.set_column(table.schema.get_field_index("segments"), "segments", column), path)
    assert samples_of(ShardsSource(format="shards", uri=uri), with_images=True) == samples_of(source, with_images=True)


def test_panoptic_comes_through_shards_and_back_to_the_bit(example: Path, tmp_path: Path) -> None:
    source = panoptic_source(example)
    convert(source, tmp_path / "shards", "shards")
    shards = ShardsSource(format="shards", uri=f"{tmp_path}/shards")
    assert convert(shards, tmp_path / "out", "coco_panoptic").lost == 0
    places = {"annotations": "annotations.json", "masks": "panoptic", "images": "images"}
    back = CocoPanopticSource(format="coco_panoptic", **{k: f"{tmp_path}/out/{v}" for k, v in places.items()})
    assert samples_of(back, with_images=True) == samples_of(source, with_images=True)
    assert classes_of(back) == classes_of(source) == classes_of(shards)
    before, after = (
        json.loads(Path(path).read_text())["annotations"] for path in (source.annotations, back.annotations)
    )
    for one, two in zip(before, after, strict=True):
        drop_id = [[{k: v for k, v in s.items() if k != "id"} for s in entry["segments_info"]] for entry in (one, two)]
        assert drop_id[0] == drop_id[1]


def test_what_masks_can_not_hold_is_reported(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "in", EVERY_KIND)
    result = convert(source, tmp_path / "out", "masks")
    assert result.lost == 1
    (lost,) = json.loads((tmp_path / "out/lost.json").read_text())
    assert lost["sample_id"] == "d/0"
    assert "6 segments are labels of their classes now" in lost["reason"]
    assert "pixels of several instances belong to the smallest one" in lost["reason"]
    plain = MasksSource(masks=f"{tmp_path}/out/masks", images=f"{tmp_path}/out/images")
    classes = read_class_map(f"{tmp_path}/out/classes.json")
    for one, two in zip(samples_of(plain), samples_of(source), strict=True):
        assert np.array_equal(masks.to_dense(one, classes).labels, masks.to_dense(two, classes_of(source)).labels)


def test_overlaps_in_panoptic_are_reported(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "in", EVERY_KIND)
    assert convert(source, tmp_path / "out", "coco_panoptic").lost == 1
    (lost,) = json.loads((tmp_path / "out/lost.json").read_text())
    assert "pixels of several instances belong to the smallest one; 1 segments without a pixel" in lost["reason"]


def test_label_images_can_not_be_instances(example: Path, tmp_path: Path) -> None:
    source = MasksSource(masks=str(example / "masks"), images=str(example / "images"))
    with pytest.raises(InputError, match=r"^0000: has labels of classes alone, which COCO instances can't hold"):
        convert(source, tmp_path / "out", "coco", classes=str(example.parent / "classes.json"))


def test_classes_apply_when_converting(tmp_path: Path) -> None:
    source = write_coco(tmp_path / "in", EVERY_KIND)
    classes = write_list(tmp_path, classes=[{"id": 1, "name": "pet", "from": ["cat", "dog"]}])
    convert(source, tmp_path / "out", "coco", classes=classes)
    content = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["pet"]
    assert [entry["category_id"] for entry in content["annotations"]] == [1] * 5
    assert classes_of(coco_source(tmp_path / "out"), classes).names == ("pet",)


@pytest.mark.parametrize("to", ["masks", "coco_panoptic"])
def test_merged_classes_are_written_by_their_own_ids(to: str, example: Path, tmp_path: Path) -> None:
    """Ids that are read and the id that is written may differ; so may those of another class."""
    whole = EXAMPLE_CLASSES
    merged = [{"id": whole.ids[1], "name": "any", "from": list(whole.ids[2:])}, {"id": 77, "name": whole.names[0]}]
    for source in (MasksSource(masks=str(example / "masks"), images=str(example / "images")), panoptic_source(example)):
        given = [{**merged[1], "from": [whole.ids[0]]}, merged[0]]
        classes = write_list(tmp_path, classes=given, dropped=[whole.ids[1]])
        out = tmp_path / source.format
        convert(source, out, to, classes=classes)
        written: AnySource = MasksSource(masks=f"{out}/masks")
        listed = f"{out}/classes.json"
        if to == "coco_panoptic":
            written = panoptic_source(out).model_copy(update={"annotations": f"{out}/annotations.json"})
        at_rest = classes_of(written, listed if to == "masks" else None)
        assert at_rest.ids == (77, whole.ids[1])
        for one, two in zip(samples_of(written), samples_of(source), strict=True):
            truth = masks.to_dense(two, classes_of(source, classes)).labels
            assert np.array_equal(masks.to_dense(one, at_rest).labels, truth)
            assert {0, 1, 255} == set(np.unique(truth))


def test_conversion_goes_on_where_it_stopped(example: Path, tmp_path: Path) -> None:
    source, out = panoptic_source(example), tmp_path / "out"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (example / "images").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "0005.jpg").write_bytes(b"")
    broken = source.model_copy(update={"images": str(damaged)})
    with pytest.raises(InputError, match=r"^0005: the image can't be decoded"):
        convert(broken, out, "shards")
    written = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert len(written) == 2
    assert not (out / "shards.json").exists()
    (damaged / "0005.jpg").write_bytes((example / "images/0005.jpg").read_bytes())
    assert convert(broken, out, "shards").num_samples == 6
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not (out / "parts").exists()
    assert samples_of(ShardsSource(format="shards", uri=str(out)), with_images=True)[5].image is not None
