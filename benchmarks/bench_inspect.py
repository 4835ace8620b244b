"""Faults planted by seed into clean data, 20 of each kind: which of them `raysseg inspect` finds, and what else."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.results import device_name, write_result
from raysseg import rle
from raysseg.config import InspectJob
from raysseg.data.coco import to_rle
from raysseg.data.example import draw_example
from raysseg.findings.kinds import KINDS
from raysseg.fingerprint import inspect

SETS = ["example-masks", "example-coco", "camvid", "coco_instances", "nuclei_dsb2018"]
VISUAL = frozenset({"merged_instances", "scattered_instance", "holes_or_jagged", "shifted_mask"})
NEW_CLASS: dict[str, Any] = {"id": 99, "name": "planted"}
Rng = np.random.Generator
Ids = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Annotation = dict[str, Any]
Row = dict[str, str | float]
Flags = dict[str, set[str]]
"""Samples, as split/id, by kind."""


@dataclass
class Copy:
    """A data set that may be spoilt; `planted` holds, for each kind, the samples of which one must be flagged."""

    root: Path
    classes: dict[str, Any]
    annotations: dict[str, dict[str, Any]] = field(default_factory=dict)
    planted: dict[str, list[set[str]]] = field(default_factory=dict)

    @property
    def ignore_index(self) -> int:
        return int(self.classes.get("ignore_index", 255))

    def image(self, split: str, stem: str) -> Path:
        return next((self.root / split / "images").glob(f"{stem}.*"))

    def mask(self, stem: str) -> Path:
        return self.root / "train/masks" / f"{stem}.png"

    def stems(self, split: str) -> list[str]:
        return sorted(path.stem for path in (self.root / split / "images").iterdir())

    def record(self, stem: str) -> dict[str, Any]:
        return next(i for i in self.annotations["train"]["images"] if Path(i["file_name"]).stem == stem)

    def own(self, stem: str) -> list[Annotation]:
        image_id = self.record(stem)["id"]
        return [a for a in self.annotations["train"]["annotations"] if a["image_id"] == image_id]

    def save(self) -> None:
        if self.classes:
            (self.root / "classes.json").write_text(json.dumps(self.classes))
        for split, content in self.annotations.items():
            (self.root / split / "instances.json").write_text(json.dumps(content))

    def job(self) -> InspectJob:
        is_coco = bool(self.annotations)
        raw = {
            split: {"format": "coco", "images": f"{folder}/images", "annotations": f"{folder}/instances.json"}
            if is_coco
            else {"format": "masks", "images": f"{folder}/images", "masks": f"{folder}/masks"}
            for split, folder in ((split, self.root / split) for split in ("train", "val"))
        }
        classes = None if is_coco else str(self.root / "classes.json")
        task = "instance" if is_coco else "semantic"
        job = {"kind": "inspect", "name": "planted", "task": task, "classes": classes, "data": raw}
        return InspectJob.model_validate({**job, "storage": str(self.root / "runs"), "scaling": {"workers": 0}})


# --- faults of files: both formats --------------------------------------------------------------------------------


def cut_file(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    """Truncates the image or the mask."""
    path = copy.image("train", stem)
    if not copy.annotations and rng.random() < 0.5:
        path = copy.mask(stem)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * rng.uniform(0.1, 0.9))])
    return {f"train/{stem}"}


def turn_by_exif(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    image = Image.open(copy.image("train", stem))
    exif = Image.Exif()
    exif[0x0112] = int(rng.choice([3, 6, 8]))
    image.convert("RGB").save(copy.image("train", stem), exif=exif, quality=92)
    return {f"train/{stem}"}


def resize_image(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    path = copy.image("train", stem)
    image = Image.open(path)
    size = (round(image.width * rng.uniform(0.5, 0.95)), image.height)
    image.resize(size).save(path)
    return {f"train/{stem}"}


def remove_file(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    path = copy.mask(stem) if not copy.annotations and rng.random() < 0.5 else copy.image("train", stem)
    path.unlink()
    return {f"train/{stem}"}


def add_copy(copy: Copy, stem: str, split: str, new: str, change: Callable[[Image.Image], Image.Image] | None) -> None:
    path = copy.image("train", stem)
    target = copy.root / split / "images" / f"{new}{path.suffix}"
    if change is None:
        shutil.copy(path, target)
    else:
        change(Image.open(path).convert("RGB")).save(target, quality=70)
    if not copy.annotations:
        mask = Image.open(copy.mask(stem))
        mask.resize(Image.open(target).size, Image.Resampling.NEAREST).save(copy.root / split / "masks" / f"{new}.png")
        return
    content, record = copy.annotations[split], dict(copy.record(stem))
    sizes = Image.open(target).size
    record |= {"id": 10**7 + len(content["images"]), "file_name": target.name, "width": sizes[0], "height": sizes[1]}
    own = [dict(a) for a in copy.own(stem)] if change is None else []
    content["images"].append(record)
    boxed = {"bbox": [10, 10, 20, 20], "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]], "iscrowd": 0}
    category = copy.annotations["train"]["categories"][0]["id"]
    for number, annotation in enumerate(own or [{**boxed, "category_id": category}]):
        content["annotations"].append(
            {**annotation, "id": 10**8 + len(content["annotations"]), "image_id": record["id"]}
        )
        assert number >= 0


def duplicate(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    new = f"{rng.integers(10**9)}"
    add_copy(copy, stem, "train", new, None)
    return {f"train/{stem}", f"train/{new}"}


def look_alike(image: Image.Image, rng: Rng) -> Image.Image:
    """The image in another size and light."""
    factor, light = rng.uniform(0.7, 1.3), rng.uniform(0.8, 1.2)
    scaled = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return scaled.point(lambda value: min(255, int(value * light)))


def nearly_duplicate(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    new = f"{rng.integers(10**9)}"
    add_copy(copy, stem, "train", new, lambda image: look_alike(image, rng))
    return {f"train/{stem}", f"train/{new}"}


def leak(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    new = f"{rng.integers(10**9)}"
    add_copy(copy, stem, "val", new, None if rng.random() < 0.4 else lambda image: look_alike(image, rng))
    return {f"val/{new}"}


def move_class_to_val(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    """Moves the sample to val, where one of its classes is another one, which train does not have."""
    new, path = f"{rng.integers(10**9)}", copy.image("train", stem)
    if copy.annotations:
        if not copy.own(stem):
            return None
        move_record(copy, stem, f"{new}{path.suffix}", rng)
    else:
        if NEW_CLASS not in copy.classes["classes"]:
            copy.classes["classes"].append(NEW_CLASS)
        new_id = NEW_CLASS["id"]
        edit_mask(copy, stem, lambda ids: np.where(ids == rng.choice(ids[ids != copy.ignore_index]), new_id, ids))
        copy.mask(stem).rename(copy.root / "val/masks" / f"{new}.png")
    path.rename(copy.root / "val/images" / f"{new}{path.suffix}")
    return {f"val/{new}"}


def move_record(copy: Copy, stem: str, name: str, rng: Rng) -> None:
    """A COCO image and its annotations go from train to val, one of them in a new category."""
    train, val = copy.annotations["train"], copy.annotations["val"]
    for content in (train, val):
        if NEW_CLASS not in content["categories"]:
            content["categories"].append(NEW_CLASS)
    record, own = copy.record(stem), copy.own(stem)
    remove(copy, own)
    train["images"].remove(record)
    own[int(rng.integers(len(own)))] |= {"category_id": NEW_CLASS["id"], "iscrowd": 0}
    val["images"].append({**record, "id": record["id"] + 10**9, "file_name": name})
    val["annotations"] += [{**a, "id": a["id"] + 10**9, "image_id": record["id"] + 10**9} for a in own]


# --- faults of masks ----------------------------------------------------------------------------------------------


def edit_mask(copy: Copy, stem: str, change: Callable[[Ids], Ids | None]) -> set[str] | None:
    mask = Image.open(copy.mask(stem))
    changed = change(np.array(mask))
    if changed is None:
        return None
    image = Image.fromarray(changed.astype(np.uint8))
    if mask.mode == "P":
        image.putpalette(mask.getpalette() or [])
    image.save(copy.mask(stem))
    return {f"train/{stem}"}


def put_unknown_id(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    def change(ids: Ids) -> Ids:
        present = [i for i in np.unique(ids) if i != copy.ignore_index]
        return np.where(ids == rng.choice(present), 100 + rng.integers(50), ids)

    return edit_mask(copy, stem, change)


def make_binary(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    def change(ids: Ids) -> Ids | None:
        present = [i for i in np.unique(ids) if i != copy.ignore_index]
        return None if len(present) < 2 else np.where(ids == rng.choice(present), 255, 0)

    return edit_mask(copy, stem, change)


def ignore_otherwise(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    other = next(i for i in (255, 0) if i != copy.ignore_index)

    def change(ids: Ids) -> Ids | None:
        return np.where(ids == copy.ignore_index, other, ids) if (ids == copy.ignore_index).any() else None

    return edit_mask(copy, stem, change)


def ignore_all(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    return edit_mask(copy, stem, lambda ids: np.full_like(ids, copy.ignore_index))


def fill_with_one(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    return edit_mask(copy, stem, lambda ids: np.full_like(ids, rng.choice(ids[ids != copy.ignore_index])))


def shift_mask(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    return edit_mask(copy, stem, lambda ids: shifted(ids, draw_shift(rng), copy.ignore_index))


def spoil_mask(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    return edit_mask(copy, stem, lambda ids: jagged(ids, rng) if rng.random() < 0.5 else holed(ids, rng))


def draw_shift(rng: Rng) -> tuple[int, int]:
    down, across = (int(n) for n in rng.choice([-1, 1], 2) * rng.integers(5, 11, 2))
    return down, across


def shifted(ids: npt.NDArray[Any], by: tuple[int, int], fill: int) -> npt.NDArray[Any]:
    moved = np.full_like(ids, fill)
    (height, width), (down, across) = ids.shape, by
    source = ids[max(0, -down) : height - max(0, down), max(0, -across) : width - max(0, across)]
    moved[max(0, down) :, max(0, across) :][: source.shape[0], : source.shape[1]] = source
    return moved


def jagged(ids: npt.NDArray[Any], rng: Rng) -> npt.NDArray[Any]:
    """Every pixel takes the label of another one, up to three pixels away."""
    rows, columns = np.indices(ids.shape)
    rows = (rows + rng.integers(-3, 4, ids.shape)).clip(0, ids.shape[0] - 1)
    columns = (columns + rng.integers(-3, 4, ids.shape)).clip(0, ids.shape[1] - 1)
    return ids[rows, columns]


def holed(ids: npt.NDArray[Any], rng: Rng, region: Mask | None = None) -> npt.NDArray[Any]:
    """Forty little discs of another label, or as many as a region of the size has room for."""
    inside = cv2.erode(
        (ids == np.bincount(ids.ravel()).argmax() if region is None else region).astype(np.uint8),
        np.ones((9, 9), np.uint8),
    )
    places = np.argwhere(inside)
    spoilt = np.ascontiguousarray(ids)
    other = int(np.unique(ids)[0]) if region is None else 0
    if region is None and other == np.bincount(ids.ravel()).argmax():
        other = int(np.unique(ids)[-1])
    for y, x in places[rng.integers(len(places), size=min(40, len(places) // 20))] if len(places) else ():
        cv2.circle(spoilt, (int(x), int(y)), int(rng.integers(1, 3)), other, -1)
    return spoilt


# --- faults of COCO annotations -----------------------------------------------------------------------------------


def to_mask(annotation: Annotation, size: tuple[int, int]) -> Mask:
    return rle.to_mask(rle.to_runs(to_rle(json.dumps(annotation["segmentation"]).encode(), size), size), size)


def set_mask(annotation: Annotation, mask: Mask) -> None:
    encoded = rle.from_mask(mask)
    compressed = {"size": list(mask.shape), "counts": encoded}
    annotation["segmentation"] = {"size": list(mask.shape), "counts": encoded.decode()}
    annotation["bbox"] = coco_mask.toBbox(compressed).tolist()


def instances(copy: Copy, stem: str, least: int = 0) -> Iterator[tuple[Annotation, Mask]]:
    """Annotations that are no crowd and have so many pixels, with their masks."""
    size = (copy.record(stem)["height"], copy.record(stem)["width"])
    for annotation in copy.own(stem):
        if not annotation["iscrowd"] and (mask := to_mask(annotation, size)).sum() >= max(1, least):
            yield annotation, mask


def put_unknown_category(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    own = copy.own(stem)
    if not own:
        return None
    own[int(rng.integers(len(own)))]["category_id"] = 900 + int(rng.integers(50))
    return {f"train/{stem}"}


def make_crowds(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    for annotation in copy.own(stem):
        annotation["iscrowd"] = 1
    return {f"train/{stem}"} if copy.own(stem) else None


def empty_annotation(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    own, record = copy.own(stem), copy.record(stem)
    if not own:
        return None
    if rng.random() < 0.5:
        copy.annotations["train"]["annotations"] = [
            a for a in copy.annotations["train"]["annotations"] if a["image_id"] != record["id"]
        ]
    else:
        own[int(rng.integers(len(own)))]["segmentation"] = [[5.0, 5.0, 5.0, 5.0, 5.0, 5.0]]
    return {f"train/{stem}"}


def move_box(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    found = list(instances(copy, stem, 100))
    if not found:
        return None
    annotation = found[int(rng.integers(len(found)))][0]
    x, y, width, height = annotation["bbox"]
    kind = rng.integers(3)
    if kind == 0:
        annotation["bbox"] = [x + max(6, 0.3 * width), y, width, height]
    elif kind == 1:
        annotation["bbox"] = [x, y, x + width + 6, y + height + 6]  # corners where sides are meant
    else:
        annotation["bbox"] = [x, y, width + max(6, 0.3 * width), height + max(6, 0.3 * height)]
    return {f"train/{stem}"}


def break_segmentation(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    own, record = copy.own(stem), copy.record(stem)
    if not own:
        return None
    broken: list[Any] = [
        [[10.0, 10.0, 20.0, 20.0]],
        [[10.0, 10.0, 20.0, 20.0, 30.0]],
        [],
        {"size": [record["height"], record["width"]], "counts": [5, 5]},
        {"size": [record["width"] + 1, record["height"]], "counts": "PP"},
    ]
    own[int(rng.integers(len(own)))]["segmentation"] = broken[int(rng.integers(len(broken)))]
    return {f"train/{stem}"}


def merge_touching(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    found = list(instances(copy, stem, 150))
    for i, (first, one) in enumerate(found):
        near = cv2.dilate(one.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        for second, other in found[i + 1 :]:
            balanced = 0.33 < one.sum() / other.sum() < 3
            if (
                second["category_id"] == first["category_id"]
                and balanced
                and 3 < (near & other).sum() < 0.2 * one.sum()
            ):
                closed = cv2.morphologyEx((one | other).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
                set_mask(first, closed > 0)
                remove(copy, [second])
                return {f"train/{stem}"}
    return None


def scatter(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    """One instance takes the masks of others of its class: an id that was used for all of them."""
    groups: dict[int, list[tuple[Annotation, Mask]]] = {}
    for annotation, mask in instances(copy, stem, 30):
        groups.setdefault(annotation["category_id"], []).append((annotation, mask))
    for group in groups.values():
        if len(group) >= 3 and max(m.sum() for _, m in group) < 0.5 * sum(m.sum() for _, m in group):
            centres = [np.argwhere(mask).mean(axis=0) for _, mask in group]
            sides = np.sqrt([mask.sum() for _, mask in group])
            gaps = sorted(float(np.hypot(*(a - b))) for i, a in enumerate(centres) for b in centres[:i])
            if gaps[0] > 2 * sides.max():
                set_mask(group[0][0], np.any([mask for _, mask in group], axis=0))
                remove(copy, [annotation for annotation, _ in group[1:]])
                return {f"train/{stem}"}
    return None


def remove(copy: Copy, gone: Sequence[Annotation]) -> None:
    ids = {annotation["id"] for annotation in gone}
    kept = [a for a in copy.annotations["train"]["annotations"] if a["id"] not in ids]
    copy.annotations["train"]["annotations"] = kept


def spoil_instance(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    found = list(instances(copy, stem, 1500))
    if not found:
        return None
    annotation, mask = found[int(rng.integers(len(found)))]
    whole = mask.astype(np.uint8)
    spoilt = jagged(whole, rng) if rng.random() < 0.5 else holed(whole, rng, mask)
    if (spoilt != whole).sum() < 60:
        return None
    set_mask(annotation, spoilt > 0)
    return {f"train/{stem}"}


def shift_instances(copy: Copy, stem: str, rng: Rng) -> set[str] | None:
    found = list(instances(copy, stem))
    if sum(int(mask.sum()) for _, mask in found) < 2000:
        return None
    by = draw_shift(rng)
    for annotation, mask in found:
        set_mask(annotation, shifted(mask, by, 0))
    remove(copy, [annotation for annotation, mask in found if not shifted(mask, by, 0).any()])
    return {f"train/{stem}"}


Fault = Callable[[Copy, str, Rng], set[str] | None]

FILE_FAULTS: dict[str, Fault] = {
    "missing_pair": remove_file,
    "unreadable": cut_file,
    "size_mismatch": resize_image,
    "exif_rotation": turn_by_exif,
    "duplicate_image": duplicate,
    "near_duplicate": nearly_duplicate,
    "leak": leak,
    "missing_class": move_class_to_val,
}
MASK_FAULTS: dict[str, Fault] = {
    "wrong_ignore_index": ignore_otherwise,
    "binary_0_255": make_binary,
    "id_out_of_range": put_unknown_id,
    "all_ignored": ignore_all,
    "empty_annotation": fill_with_one,
    "shifted_mask": shift_mask,
    "holes_or_jagged": spoil_mask,
    **FILE_FAULTS,
}
COCO_FAULTS: dict[str, Fault] = {
    "scattered_instance": scatter,  # those that ask most of a sample choose first
    "merged_instances": merge_touching,
    "holes_or_jagged": spoil_instance,
    "shifted_mask": shift_instances,
    "box_mismatch": move_box,
    "id_out_of_range": put_unknown_category,
    "all_ignored": make_crowds,
    "empty_annotation": empty_annotation,
    "invalid_segmentation": break_segmentation,
    **FILE_FAULTS,
}


# --- planting and counting ----------------------------------------------------------------------------------------


def copy_of(name: str, data: str, root: Path) -> Copy:
    """A fresh copy of a data set, below a new folder."""
    if name.startswith("example"):
        draw_example(root, num_train=400, num_val=60)
        classes = json.loads((root / "classes.json").read_text())
        splits = {s: root / s / "instances.json" for s in ("train", "val")} if name == "example-coco" else {}
    elif (Path(data) / name / "annotations_train.json").exists():
        for split in ("train", "val"):
            shutil.copytree(f"{data}/{name}/{split}/images", root / split / "images")
        classes, splits = {}, {s: Path(data) / name / f"annotations_{s}.json" for s in ("train", "val")}
    else:
        shutil.copytree(f"{data}/{name}", root, dirs_exist_ok=True)
        classes, splits = json.loads((root / "classes.json").read_text()), {}
    copy = Copy(root, classes, {split: json.loads(path.read_text()) for split, path in splits.items()})
    copy.save()
    return copy


def plant(copy: Copy, kinds: Mapping[str, Fault], number: int, rng: Rng) -> list[str]:
    """Plants kinds in turn, one fault a sample; returns the kinds for which there was no sample left."""
    if copy.annotations:
        stems = [Path(image["file_name"]).stem for image in copy.annotations["train"]["images"]]
    else:
        stems = copy.stems("train")
    free = [stems[i] for i in rng.permutation(len(stems))]
    left = []
    for kind, fault in kinds.items():
        if len(free) < 2 * number and copy.planted:
            left.append(kind)
            continue
        copy.planted[kind] = []
        for stem in list(free):
            if len(copy.planted[kind]) == number:
                break
            if samples := fault(copy, stem, rng):
                copy.planted[kind].append(samples)
                free.remove(stem)
    copy.save()
    return left


def flags_of(copy: Copy) -> Flags:
    found: Flags = {}
    for finding in inspect(copy.job()).fingerprint.findings:
        found.setdefault(finding.kind, set()).update(f"{finding.split}/{i}" for i in finding.sample_ids)
    return found


def score(
    name: str, kind: str, planted: Sequence[set[str]], flagged: set[str], clean: set[str]
) -> dict[str, str | float]:
    hits = sum(bool(samples & flagged) for samples in planted)
    extra = flagged - set().union(*planted)
    new = extra - clean
    return {
        "data": name,
        "kind": kind,
        "planted": float(len(planted)),
        "found": float(hits),
        "recall": hits / max(1, len(planted)),
        "false": float(len(extra)),
        "precision": hits / max(1, hits + len(extra)),
        "in the clean set": float(len(clean)),
        "precision beside those": hits / max(1, hits + len(new)),
        "target": "0.95, 0.7" if kind in VISUAL else "0.95, 0.9",
    }


def run(name: str, data: str, number: int, seed: int, only: Sequence[str]) -> list[Row]:
    """All kinds of a data set, in as many rounds as its samples ask for, and what its clean copy shows."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        pristine = copy_of(name, data, Path(folder) / "clean")
        started = time.perf_counter()
        clean = flags_of(pristine)
        print(f"{name}: clean in {time.perf_counter() - started:.1f} s: ", {k: len(v) for k, v in clean.items()})
        kinds = COCO_FAULTS if pristine.annotations else MASK_FAULTS
        kinds = {kind: fault for kind, fault in kinds.items() if not only or kind in only}
        rows = []
        for round_number in range(len(kinds)):
            copy = copy_of(name, data, Path(folder) / f"round{round_number}")
            left = plant(copy, kinds, number, np.random.default_rng([seed, round_number]))
            flags = flags_of(copy)
            for kind, planted in copy.planted.items():
                rows.append(score(name, kind, planted, flags.get(kind, set()), clean.get(kind, set())))
                missed = sorted(set().union(*[s for s in planted if not s & flags.get(kind, set())]))
                if missed:
                    print(f"  {kind}: missed {missed[:6]}")
            kinds = {kind: kinds[kind] for kind in left}
            shutil.rmtree(copy.root)
            if not kinds:
                break
        order = list(KINDS)
        return sorted(rows, key=lambda row: order.index(str(row["kind"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("RAYSSEG_DATA", "../shared/data"))
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--number", type=int, default=20, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=[], help="these alone")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    rows = [
        row for name in options.sets for row in run(name, options.data, options.number, options.seed, options.kinds)
    ]
    settings = {"number": options.number, "seed": options.seed, "sets": options.sets}
    if options.dry:
        for row in rows:
            print({k: (round(v, 3) if isinstance(v, float) else v) for k, v in row.items()})
    else:
        write_result("inspect", device_name(), rows, settings)


if __name__ == "__main__":
    main()
