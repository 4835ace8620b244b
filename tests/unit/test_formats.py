from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from raysseg import masks, storage
from raysseg.config import (
    AnySource,
    CocoPanopticSource,
    CocoSource,
    HuggingFaceSource,
    MasksSource,
    ShardJob,
    ShardsSource,
    YoloSource,
    parse,
)
from raysseg.data import FORMATS, decode, read_class_map, read_images, read_index, read_samples, shards
from raysseg.data.index import Failure
from raysseg.schema import InputError, Sample
from raysseg.shard import shard

CLASSES = ["road", "sky", "car"]
RNG = np.random.default_rng(0)
PIXELS: npt.NDArray[np.uint8] = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def smooth(height: int = 16, width: int = 24) -> npt.NDArray[np.uint8]:
    """An image that JPEG keeps within a few levels."""
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([down * 8, across * 8, 128 + down * 2 - across], axis=2).astype(np.uint8)


# ---- images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth()), file_format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    found = decode.decode_image(data)
    assert found.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    assert np.array_equal(found, upright)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_lossless_rgb_is_kept_to_the_bit(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    found = decode.decode_image(encoded(Image.fromarray(PIXELS), file_format, **options))
    assert found.dtype == np.uint8
    assert np.array_equal(found, PIXELS)


def test_transparency_is_dropped() -> None:
    alpha = Image.fromarray(PIXELS[..., 0].copy())
    image = Image.fromarray(PIXELS)
    image.putalpha(alpha)
    assert np.array_equal(decode.decode_image(encoded(image)), PIXELS)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_becomes_rgb(mode: str) -> None:
    grey = PIXELS[..., 0].copy()
    found = decode.decode_image(encoded(Image.fromarray(grey).convert(mode)))
    assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_cut_to_8(file_format: str) -> None:
    grey = np.array([[0, 255, 256], [4660, 65280, 65535]], np.uint16)
    found = decode.decode_image(encoded(Image.fromarray(grey), file_format))
    assert found.dtype == np.uint8
    assert np.array_equal(found[..., 1], [[0, 0, 1], [18, 255, 255]])
    assert (found == found[..., :1]).all()


def test_palette_becomes_its_colours() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[(10, 20, 30), (40, 50, 60)], [(70, 80, 90), (10, 20, 30)]]
    assert np.array_equal(decode.decode_image(encoded(image)), expected)
    assert np.array_equal(decode.decode_image(encoded(image, transparency=1)), expected)


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
    assert np.abs(decode.decode_image(data).astype(int) - smooth()).mean() < 4


def test_1_bit_image() -> None:
    found = decode.decode_image(encoded(Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")))
    assert np.array_equal(found[..., 0], [[0, 255], [255, 0]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.fromarray(np.ones((3, 4), np.float32)), "TIFF"), "the image has floating-point pixels"),
        (encoded(Image.fromarray(np.full((3, 4), 70000, np.int32)), "TIFF"), "has 70000 to 70000 in 32 bits"),
        (
            encoded(Image.fromarray(PIXELS), "TIFF", save_all=True, append_images=[Image.fromarray(PIXELS)]),
            "the TIFF holds 2 pages; store one image a file",
        ),
        (encoded(Image.fromarray(smooth(64, 64)), "JPEG")[:700], "can't be decoded .*truncated.*allowed: whole JPEG"),
        (encoded(Image.fromarray(PIXELS))[:60], "the image can't be decoded"),
        (b"", "the image can't be decoded"),
        (b"<!doctype html><html><body>404</body></html>", "the image can't be decoded"),
        (encoded(Image.fromarray(PIXELS), "GIF"), "the image can't be decoded"),
    ],
    ids=["float", "32 bit", "pages", "truncated jpeg", "truncated png", "empty", "html", "gif"],
)
def test_image_that_can_not_be_used(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode.decode_image(data)


def pair(image: npt.NDArray[np.uint8], mask_size: tuple[int, int]) -> Sample:
    ids = np.zeros(mask_size, np.uint8)
    return Sample("a/b", encoded(Image.fromarray(image)), 0, 0, masks.encode_id_map(ids))


def test_pair_of_two_sizes() -> None:
    classes = read_class_map(CLASSES)
    with pytest.raises(InputError, match=r"^a/b: the image is 9x6, its mask 9x7 \(width x height\); resize the mask"):
        decode.decode_pair(pair(PIXELS, (7, 9)), classes)
    with pytest.raises(InputError, match=r"^a/b: the image is 9x6, its mask 6x9 .*EXIF rotation.*turn the mask"):
        decode.decode_pair(pair(PIXELS, (9, 6)), classes)
    image, truth = decode.decode_pair(pair(PIXELS, (6, 9)), classes)
    assert (image.shape, truth.labels.shape) == ((6, 9, 3), (6, 9))


def test_pair_error_names_the_sample() -> None:
    classes = read_class_map(CLASSES)
    mask = masks.encode_id_map(np.zeros((6, 9), np.uint8))
    with pytest.raises(InputError, match=r"^a/b: the image can't be decoded"):
        decode.decode_pair(Sample("a/b", b"", 0, 0, mask), classes)
    with pytest.raises(InputError, match=r"^a/b: has no image"):
        decode.decode_pair(Sample("a/b", None, 0, 0, mask), classes)


# ---- folders of images and masks


def put(root: str, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        storage.write_bytes(storage.join(root, path), data)


def source(root: str, **more: str) -> MasksSource:
    return MasksSource.model_validate({"images": f"{root}/images", "masks": f"{root}/masks", **more})


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on this machine and in object storage."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3_bucket"))


def test_pairs_by_path_less_suffix(root: str) -> None:
    put(
        root,
        {
            "images/b.jpg": b"1",
            "images/day/a.JPEG": b"2",
            "images/day/a.b.png": b"3",
            "images/notes.txt": b"4",
            "images/.hidden.png": b"5",
            "masks/b.npz": b"6",
            "masks/day/a.png": b"7",
            "masks/day/a.b.npy": b"8",
        },
    )
    index = read_index(source(root))
    assert index.sample_ids == ["b", "day/a", "day/a.b"]
    assert index.groups.tolist() == [0, 1, 2]
    assert index.failures == ()
    found = [(s.image, s.id_map) for s in read_samples(index) if isinstance(s, Sample)]
    assert found == [(b"1", b"6"), (b"2", b"7"), (b"3", b"8")]


def test_missing_partners_are_named(root: str) -> None:
    put(root, {"images/a.png": b"", "images/b.png": b"", "masks/b.png": b"", "masks/c.png": b""})
    with pytest.raises(InputError, match="1 pairs, but 2 files have no partner") as caught:
        read_index(source(root))
    text = str(caught.value)
    assert f"a: a.png has no mask in {root}/masks" in text
    assert f"c: c.png has no image in {root}/images" in text
    assert "on_error: skip" in text
    index = read_index(source(root, on_error="skip"))
    assert index.sample_ids == ["b"]
    assert [failure.sample_id for failure in index.failures] == ["a", "c"]
    assert f"has no mask in {root}/masks" in index.failures[0].reason


def test_many_missing_partners_are_counted(tmp_path: Path) -> None:
    put(str(tmp_path), {f"images/{i}.png": b"" for i in range(9)} | {"masks/0.png": b""})
    with pytest.raises(InputError, match=r"1 pairs, but 8 files [\s\S]*and 3 more") as caught:
        read_index(source(str(tmp_path)))
    assert str(caught.value).count("has no mask") == 5


def test_stem_that_stands_twice(tmp_path: Path) -> None:
    put(str(tmp_path), {"images/x/a.png": b"", "images/x/a.jpg": b"", "masks/x/a.png": b""})
    with pytest.raises(InputError, match=r"images: x/a\.jpg and x/a\.png share one stem"):
        read_index(source(str(tmp_path)))


def test_folder_without_images(root: str) -> None:
    put(root, {"images/readme.txt": b"", "masks/a.png": b""})
    with pytest.raises(InputError, match=r"/images: the folder holds no file ending in \.jpeg.*is it the right one\?"):
        read_index(source(root))


def test_missing_local_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file or folder"):
        read_index(source(str(tmp_path)))


def test_one_side_alone(tmp_path: Path) -> None:
    put(str(tmp_path), {"images/a.png": b"i", "masks/a.png": b"m", "masks/b.png": b"n"})
    index = read_index(MasksSource(masks=f"{tmp_path}/masks"))
    assert [(s.sample_id, s.image, s.id_map) for s in read_samples(index) if isinstance(s, Sample)] == [
        ("a", None, b"m"),
        ("b", None, b"n"),
    ]
    (sample,) = read_samples(read_index(MasksSource(images=f"{tmp_path}/images")))
    assert isinstance(sample, Sample)
    assert (sample.image, sample.id_map) == (b"i", None)


def test_file_that_vanishes_is_a_failure(tmp_path: Path) -> None:
    put(str(tmp_path), {f"{kind}/{name}.png": b"x" for kind in ("images", "masks") for name in "ab"})
    index = read_index(source(str(tmp_path)))
    (tmp_path / "images" / "a.png").unlink()
    failure, sample = read_samples(index)
    assert isinstance(failure, Failure)
    assert (failure.sample_id, sample.sample_id) == ("a", "b")
    assert "a.png" in failure.reason


# ---- all formats


NUM_SAMPLES = 7


def write_masks(root: str) -> None:
    """Samples of several sizes, kinds of image and kinds of mask."""
    rng = np.random.default_rng(1)
    files: dict[str, bytes] = {}
    for i in range(NUM_SAMPLES):
        size = (5 + i, 8)
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        ids = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        files[f"images/d{i % 2}/{i}.{'jpg' if i % 2 else 'png'}"] = encoded(image, "JPEG" if i % 2 else "PNG")
        files[f"masks/d{i % 2}/{i}.png"] = masks.encode_id_map(ids, read_class_map(CLASSES) if i % 3 else None)
    put(root, files)


def shard_job(root: str, **more: object) -> ShardJob:
    job = parse(
        {
            "kind": "shard",
            "name": "check",
            "task": "semantic",
            "classes": CLASSES,
            "data": {"format": "masks", "images": f"{root}/images", "masks": f"{root}/masks"},
            "output": {"uri": f"{root}/shards", "rows_per_file": 3, "rows_per_group": 2},
            "scaling": {"workers": 0},
            **more,
        }
    )
    assert isinstance(job, ShardJob)
    return job


def test_row_groups_of_large_samples_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_shards` of them are in memory at a time."""
    write_masks(str(tmp_path))
    monkeypatch.setattr(shards, "GROUP_BYTES", 1)
    shard(shard_job(str(tmp_path)))
    index = read_index(ShardsSource(format="shards", uri=f"{tmp_path}/shards"))
    assert index.references["row"].to_pylist() == [0] * len(index)
    assert len(set(index.groups)) == len(index)
    folders = read_samples(read_index(source(str(tmp_path))))
    assert [sample.image for sample in read_samples(index)] == [sample.image for sample in folders]


def write_as(output: str, root: str) -> None:
    write_masks(root)
    shard(
        shard_job(root, output={"format": output, "uri": f"{root}/{output}", "rows_per_file": 3, "rows_per_group": 2})
    )


def write_coco(root: str) -> None:
    write_as("coco_panoptic", root)
    data = {"format": "coco_panoptic", "images": f"{root}/images"}
    data |= {
        name: f"{root}/coco_panoptic/{path}"
        for name, path in (("annotations", "annotations.json"), ("masks", "panoptic"))
    }
    shard(shard_job(root, data=data, output={"format": "coco", "uri": f"{root}/coco"}))


def write_yolo(root: str) -> None:
    """Every pixel is a polygon."""
    write_masks(root)
    classes = read_class_map(CLASSES)
    for sample in read_samples(read_index(source(root))):
        assert isinstance(sample, Sample)
        labels = masks.to_dense(sample, classes).labels
        height, width = labels.shape
        lines = []
        for y, x in zip(*np.nonzero(labels != 255), strict=True):
            corners = [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
            lines.append(" ".join([str(labels[y, x]), *(f"{a / width!s} {b / height!s}" for a, b in corners)]))
        put(root, {f"labels/{sample.sample_id}.txt": "\n".join(lines).encode()})


def write_huggingface(root: str) -> None:
    datasets = pytest.importorskip("datasets")
    write_masks(root)
    local = Path(tempfile.mkdtemp(prefix="raysseg-test-"))
    rows = [(s.sample_id, s.image, s.id_map) for s in read_samples(read_index(source(root))) if isinstance(s, Sample)]
    images = [{"bytes": image, "path": f"{name}.png"} for name, image, _ in rows]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    labels = [{"bytes": mask, "path": None} for _, _, mask in rows]
    data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    data.save_to_disk(str(local), num_shards=2)
    put(root, {f"hf/{path.name}": path.read_bytes() for path in local.iterdir()})
    shutil.rmtree(local)


def coco_panoptic(root: str) -> CocoPanopticSource:
    folder = f"{root}/coco_panoptic"
    return CocoPanopticSource(
        format="coco_panoptic",
        annotations=f"{folder}/annotations.json",
        masks=f"{folder}/panoptic",
        images=f"{folder}/images",
    )


# Writes the same NUM_SAMPLES samples below a folder, and returns nothing; each format's source for them.
WRITERS: dict[str, tuple[Callable[[str], None], Callable[[str], AnySource]]] = {
    "masks": (write_masks, source),
    "coco": (
        write_coco,
        lambda root: CocoSource(
            format="coco", annotations=f"{root}/coco/annotations.json", images=f"{root}/coco/images"
        ),
    ),
    "coco_panoptic": (partial(write_as, "coco_panoptic"), coco_panoptic),
    "yolo": (write_yolo, lambda root: YoloSource(format="yolo", images=f"{root}/images", labels=f"{root}/labels")),
    "huggingface": (write_huggingface, lambda root: HuggingFaceSource(format="huggingface", uri=f"{root}/hf")),
    "shards": (partial(write_as, "shards"), lambda root: ShardsSource(format="shards", uri=f"{root}/shards")),
}


def test_every_format_is_under_contract() -> None:
    assert WRITERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_format_holds_what_was_written(name: str, root: str) -> None:
    write, build_source = WRITERS[name]
    write(root)
    classes = read_class_map(CLASSES)
    index = read_index(build_source(root))
    plain = read_index(source(root))
    assert len(index) == NUM_SAMPLES
    sample_ids = plain.sample_ids
    if name == "huggingface":  # keeps the names of files, not their folders
        sample_ids = [PurePosixPath(sample_id).name for sample_id in sample_ids]
    assert index.sample_ids == sample_ids
    assert index.groups[0] == 0
    assert set(np.diff(index.groups).tolist()) <= {0, 1}
    expected = [s for s in read_samples(plain) if isinstance(s, Sample)]
    found = [s for s in read_samples(index) if isinstance(s, Sample)]
    assert [s.sample_id for s in found] == sample_ids
    assert [s.image for s in found] == [s.image for s in expected]
    for sample, truth in zip(found, expected, strict=True):
        labels = masks.to_dense(sample, classes).labels
        assert np.array_equal(labels, masks.to_dense(truth, classes).labels)
        assert np.array_equal(decode.decode_pair(sample, classes)[1].labels, labels)
        assert (sample.height, sample.width) in ((0, 0), labels.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_format_reads_in_the_order_asked_for_and_without_images(name: str, tmp_path: Path) -> None:
    write, build_source = WRITERS[name]
    write(str(tmp_path))
    index = read_index(build_source(str(tmp_path)))
    everything = dict(zip(index.sample_ids, read_samples(index), strict=True))
    some = index.take(np.array([6, 0, 3, 3]))
    assert [s.sample_id for s in read_samples(some)] == [index.sample_ids[i] for i in (6, 0, 3, 3)]
    for sample in read_samples(some, with_images=False):
        whole = everything[sample.sample_id]
        assert isinstance(sample, Sample)
        assert isinstance(whole, Sample)
        assert sample.image is None
        assert sample.id_map == whole.id_map
        assert sample.segments == whole.segments
        assert whole.image is not None
    images = read_images(some)
    assert [s.sample_id for s in images] == [index.sample_ids[i] for i in (6, 0, 3, 3)]
    assert all(isinstance(s, Sample) and s.image == everything[s.sample_id].image for s in images)


@pytest.mark.parametrize("name", FORMATS)
def test_fingerprint_follows_the_samples(name: str, tmp_path: Path) -> None:
    write, build_source = WRITERS[name]
    write(str(tmp_path))
    index = read_index(build_source(str(tmp_path)))
    assert index.fingerprint == read_index(build_source(str(tmp_path))).fingerprint
    others = [index.take(np.arange(6)), index.take(np.array([1, 0, 2, 3, 4, 5, 6]))]
    assert len({index.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_huggingface_without_labels(tmp_path: Path) -> None:
    write_huggingface(str(tmp_path))
    there = HuggingFaceSource(format="huggingface", uri=f"{tmp_path}/hf", mask=None)
    labelled = read_samples(read_index(there.model_copy(update={"mask": "label"})))
    for sample, whole in zip(read_samples(read_index(there)), labelled, strict=True):
        assert isinstance(sample, Sample)
        assert isinstance(whole, Sample)
        assert (sample.image, sample.id_map) == (whole.image, None)


# ---- shards


def test_shards_are_cut_as_asked(tmp_path: Path) -> None:
    write_masks(str(tmp_path))
    result = shard(shard_job(str(tmp_path)))
    assert (result.num_samples, result.skipped, result.lost) == (7, 0, 0)
    assert len(list((tmp_path / "shards").glob("shard-*.parquet"))) == 3
    assert not (tmp_path / "shards/parts").exists()
    index = read_index(ShardsSource(format="shards", uri=result.uri))
    assert index.groups.tolist() == [0, 0, 1, 2, 2, 3, 4]
    manifest = json.loads((tmp_path / "shards" / "shards.json").read_text())
    assert (manifest["num_samples"], manifest["ignore_index"]) == (7, 255)
    assert [entry["name"] for entry in manifest["classes"]] == CLASSES
    assert not (tmp_path / "shards" / "skipped.json").exists()


def test_shards_without_a_manifest_are_refused(root: str) -> None:
    uri = f"{root}/shards"
    put(root, {"shards/index.parquet": b"x"})
    with pytest.raises(InputError, match=r"there is no shards\.json in it, so these are no finished shards"):
        read_index(ShardsSource(format="shards", uri=uri))


def test_finished_shards_are_not_written_over(tmp_path: Path) -> None:
    write_as("shards", str(tmp_path))
    with pytest.raises(InputError, match=r"^output\.uri: .*holds a finished data set; name another folder"):
        shard(shard_job(str(tmp_path)))


def test_bad_sample_stops_sharding_and_leaves_no_manifest(tmp_path: Path) -> None:
    write_masks(str(tmp_path))
    put(str(tmp_path), {"images/d0/2.png": b"<html>"})
    with pytest.raises(InputError, match=r"^d0/2: the image can't be decoded"):
        shard(shard_job(str(tmp_path)))
    assert not (tmp_path / "shards" / "shards.json").exists()


def test_bad_samples_are_skipped_and_listed(tmp_path: Path) -> None:
    write_masks(str(tmp_path))
    put(str(tmp_path), {"images/d0/2.png": b"<html>", "images/d0/99.png": b"", "masks/d1/1.png": b""})
    job = shard_job(
        str(tmp_path),
        data={"format": "masks", "images": f"{tmp_path}/images", "masks": f"{tmp_path}/masks", "on_error": "skip"},
    )
    result = shard(job)
    assert (result.num_samples, result.skipped) == (5, 3)
    index = read_index(ShardsSource(format="shards", uri=result.uri))
    assert index.sample_ids == ["d0/0", "d0/4", "d0/6", "d1/3", "d1/5"]
    assert [s.sample_id for s in read_samples(index)] == index.sample_ids
    skipped = json.loads((tmp_path / "shards" / "skipped.json").read_text())["data"]
    assert sorted(failure["sample_id"] for failure in skipped) == ["d0/2", "d0/99", "d1/1"]
    assert all(failure["sample_id"] in failure["reason"] for failure in skipped)


def test_nothing_usable_is_an_error_even_where_bad_samples_are_skipped(tmp_path: Path) -> None:
    put(str(tmp_path), {"images/a.png": b"", "masks/b.png": b""})
    with pytest.raises(InputError, match="0 pairs, but 2 files"):
        read_index(source(str(tmp_path), on_error="skip"))
    put(str(tmp_path), {"images/b.png": b""})
    data = {"format": "masks", "images": f"{tmp_path}/images", "masks": f"{tmp_path}/masks", "on_error": "skip"}
    with pytest.raises(InputError, match=r"^data: none of the 2 samples can be used, such as a: a\.png has no mask"):
        shard(shard_job(str(tmp_path), data=data))
    assert not (tmp_path / "shards" / "shards.json").exists()
