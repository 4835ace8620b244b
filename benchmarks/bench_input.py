"""Images/s from storage to a collated batch: raysseg against DataLoader, LitData and MosaicML Streaming.

LitData (`litdata`; without obstore, whose client takes no plain HTTP) and MosaicML Streaming (`mosaicml-streaming`) are
measured where they are installed. All sides give random crops of the same size, drawn alike; where a peer's user would
write the transforms, they are PIL and torchvision.transforms.v2.

What did not help, on two cores: simplejpeg or TurboJPEG for whole images (as fast as cv2 within 10 %); cv2.LUT in
place of numpy's take (a tenth of a millisecond a map); palette PNGs decoded as grey ones by cv2 (0.29 against 0.41 ms
of Pillow's on CamVid; shards hold no PNGs). What did: decoding windows (17 against 58 ms on HRF), parts of 8 MiB in
place of whole chunks (page faults took a quarter of the time), id maps in zstd, heads of files read without Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from benchmarks.commands import find, run
from benchmarks.input_sides import NUM_WORKERS, SIDES, Setting
from benchmarks.results import device_name, write_result
from jobs.s3_server import s3_server
from raysseg import config, masks, storage
from raysseg.shard import shard

DATA = Path(os.environ.get("RAYSSEG_DATA", "../shared/data"))
CROPS = {"camvid": (352, 480), "coco_instances": (512, 512), "hrf_av": (512, 512)}
COPIES = {"camvid": 1, "coco_instances": 1, "hrf_av": 8}
OURS = "shards"
TARGETS = {
    ("camvid", "PIL DataLoader"): 2.5,
    ("hrf_av", "PIL DataLoader"): 6.0,
    ("camvid", "best DataLoader"): 1.0,
    ("coco_instances", "best DataLoader"): 1.0,
    ("hrf_av", "best DataLoader"): 1.0,
}
PEERS = {"LitData": "litdata", "Mosaic": "streaming"}


def prepare(name: str, folder: Path) -> str:
    """Writes a data set in every side's form; returns the path of its class list."""
    classes = str((DATA / name / "classes.json").resolve())
    if name == "coco_instances":
        source = {
            "format": "coco",
            "annotations": f"{DATA / name}/annotations_train.json",
            "images": f"{DATA / name}/train/images",
        }
        convert(source, {"format": "masks", "uri": str(folder / "converted")}, None)
        split, classes = folder / "converted", str(folder / "converted/classes.json")
    else:
        split = DATA / name / "train"
    for kind in ("images", "masks", "maps"):
        (folder / kind).mkdir()
    for mask in sorted((split / "masks").iterdir()):
        image = next((split / "images").glob(f"{mask.stem}.*"))
        for copy in range(COPIES[name]):
            stem = f"{mask.stem}-{copy}"
            shutil.copyfile(image, folder / f"images/{stem}.jpg")
            shutil.copyfile(mask, folder / f"masks/{stem}.png")
            ids = masks.decode_id_map(mask.read_bytes())
            (folder / f"maps/{stem}.map").write_bytes(masks.compress_id_map(ids))
    source = {"format": "masks", "images": str(folder / "images"), "masks": str(folder / "masks")}
    convert(source, {"uri": str(folder / "shards")}, classes)
    if find_spec("litdata"):
        write_litdata(folder)
    if find_spec("streaming"):
        write_mosaic(folder)
    return classes


def convert(source: dict[str, str], output: dict[str, str], classes: str | None) -> None:
    raw = {"kind": "shard", "name": "input", "task": "semantic", "classes": classes, "data": source, "output": output}
    shard(config.parse_as(config.ShardJob, raw | {"scaling": {"workers": 0}}))


def read_pair(folder: str, stem: str) -> dict[str, bytes]:
    return {
        "image": Path(folder, f"images/{stem}.jpg").read_bytes(),
        "mask": Path(folder, f"masks/{stem}.png").read_bytes(),
    }


def stems_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "images").iterdir())


def write_litdata(folder: Path) -> None:
    from functools import partial

    import litdata

    read = partial(read_pair, str(folder))
    litdata.optimize(read, stems_of(folder), str(folder / "litdata"), chunk_bytes="16MB", num_workers=1, verbose=False)


def write_mosaic(folder: Path) -> None:
    import streaming

    columns = {"image": "bytes", "mask": "bytes"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=2**24) as writer:
        for stem in stems_of(folder):
            writer.write(read_pair(str(folder), stem))


@contextmanager
def stored(folder: Path, where: str) -> Iterator[str]:
    """The folder's URI: its own path, or on an S3 server on loopback."""
    if where == "disk":
        yield str(folder)
        return
    import boto3

    with s3_server() as endpoint:
        os.environ |= {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_ALLOW_HTTP": "true"}
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bench")
        for path in folder.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"s3://bench/{path.relative_to(folder)}", path.read_bytes())
        yield "s3://bench"


def measure(sides: Sequence[str], setting: Setting, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Figures of each side, in turn."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            lines = run(["-m", "benchmarks.input_sides", side, json.dumps(asdict(setting))], {})
            found[side].append(json.loads(find(lines, '{"first batch s"').text))
            print(side, found[side][-1], file=sys.stderr, flush=True)
    return found


def to_rows(name: str, where: str, found: dict[str, list[dict[str, float]]]) -> list[dict[str, str | float]]:
    """A row a side; the ratio is ours to it, round by round."""
    rows: list[dict[str, str | float]] = []
    for side, figures in found.items():
        ratios = sorted(ours["later"] / peer["later"] for ours, peer in zip(found[OURS], figures, strict=True))
        target = TARGETS.get((name, side)) or (1.5 if side in PEERS else None)
        rows.append(
            {
                "data": f"{name}, {where}",
                "side": side,
                "images/s": median(f["later"] for f in figures),
                "first epoch": median(f["first epoch"] for f in figures),
                "first batch s": median(f["first batch s"] for f in figures),
                "peak MiB": max(f["peak MiB"] for f in figures),
                "ours to it": median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "target": f">= {target}" if target else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=CROPS, default=list(CROPS))
    parser.add_argument("--storage", nargs="+", choices=("disk", "S3"), default=["disk", "S3"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="that each side runs in a round, at least")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    sides = [side for side in options.sides if side not in PEERS or find_spec(PEERS[side])]
    if left_out := set(options.sides) - set(sides):
        print(f"not installed, so left out: {', '.join(sorted(left_out))}", file=sys.stderr)
    rows = []
    for name in options.data:
        with tempfile.TemporaryDirectory() as folder:
            classes = prepare(name, Path(folder))
            for where in options.storage:
                with stored(Path(folder), where) as root:
                    setting = Setting(root, classes, CROPS[name], (0.5, 2.0), options.batch, options.seconds)
                    rows += to_rows(name, where, measure(sides, setting, options.rounds))
    settings = {"scale": [0.5, 2.0], "flip": 0.5, "crops": CROPS, "copies": COPIES, "workers": NUM_WORKERS}
    what = "-".join(["input", *options.data, *options.storage]).lower()
    write_result(what, device_name(), rows, settings | vars(options))


if __name__ == "__main__":
    main()
