"""The sides of bench_input, one a process: `python -m benchmarks.input_sides SIDE SETTING`.

Each delivers random training crops of one data set as collated batches, and says on stderr, as JSON, how long the first
batch took, how many images came a second, in the first epoch and in those after it, and how much memory was held at the
most (PSS of all its processes, imports included).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.memory import MIB, descendants, held
from raysseg import config, masks, storage
from raysseg.data import read_class_map, read_index
from raysseg.data.batches import Batch, Feed, build_feed, iter_batches, iter_chunks
from raysseg.data.decode import decode_image
from raysseg.ledger import Ledger

NUM_WORKERS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def source_of(root: str, form: str) -> dict[str, str]:
    """The section of a job that reads the data set in `root` from its "shards" or from its "folders"."""
    if form == "shards":
        return {"format": "shards", "uri": f"{root}/shards"}
    return {"format": "masks", "images": f"{root}/images", "masks": f"{root}/masks"}


@dataclass(frozen=True)
class Setting:
    """What is read: the same for all sides.

    Attributes:
        root: URI of a folder with the data set in every side's form.
        classes: path of its class list.
        crop: (height, width) of the crops.
        scale: random resize factor, from and to.
        batch: images in one.
        seconds: that are measured after the first epoch, at least.
    """

    root: str
    classes: str
    crop: tuple[int, int]
    scale: tuple[float, float]
    batch: int
    seconds: float

    def job(self, source: str) -> config.TrainJob:
        data = source_of(self.root, source)
        augment = {"scale": self.scale, "max_class_share": 1} | dict.fromkeys(
            ("brightness", "contrast", "saturation", "hue"), 0
        )
        raw = {
            "kind": "train",
            "name": "input",
            "task": "semantic",
            "classes": self.classes,
            "data": {"train": data, "val": data, "crop": self.crop, "augment": augment},
            "model": {"name": "segformer-b0", "weights": None},
            "schedule": {"epochs": 1000},
            "batch": {"global_size": self.batch, "per_worker": self.batch},
            "storage": "-",
        }
        return config.parse_as(config.TrainJob, raw)


Epochs = Iterator[Iterable[int]]
"""For each epoch its batches, each as the number of its images."""


# --- raysseg ------------------------------------------------------------------------------------------------------


def feed_of(setting: Setting, source: str) -> Feed:
    job = setting.job(source)
    classes = read_class_map(job.classes)
    return build_feed(job, read_index(job.data.train), classes, Ledger(), rank=0, num_workers=1)


def ours(setting: Setting, source: str, chunks_of: Callable[[Feed], Iterator[Batch]]) -> Epochs:
    feed = feed_of(setting, source)
    steps = iter_batches(feed, chunks_of(feed))
    length = -(-feed.num_positions // setting.batch)
    for _ in range(feed.epochs):
        yield (len(next(steps)[0]) for _ in range(length))


def on_ray(setting: Setting, decode: config.Decode) -> Epochs:
    from raysseg import runtime
    from raysseg.data import stream

    runtime.connect()
    return ours(
        setting, "shards", partial(stream.iter_chunks, report=lambda _: None, decode=decode, threads=NUM_WORKERS)
    )


# --- peers --------------------------------------------------------------------------------------------------------


def read(uri: str) -> bytes:
    return storage.read_bytes(uri, may_change=False) if storage.is_remote(uri) else Path(uri).read_bytes()


def list_stems(setting: Setting) -> list[str]:
    return sorted(Path(entry.path).stem for entry in storage.list_files(f"{setting.root}/images"))


def build_transform(setting: Setting, size: tuple[int, int]) -> Callable[[bytes, bytes], tuple[object, object]]:
    """PIL and torchvision's transforms, as in its own references: resize, crop, flip, normalise."""
    import torch
    from PIL import Image
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    classes = read_class_map(setting.classes)
    fill = {tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: classes.ignore_index}
    transform = v2.Compose(
        [
            v2.RandomResize(*(round(min(size) * scale) for scale in setting.scale)),
            v2.RandomCrop(setting.crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def apply(image: bytes, mask: bytes) -> tuple[object, object]:
        pixels = tv_tensors.Image(Image.open(io.BytesIO(image)).convert("RGB"))
        labels = tv_tensors.Mask(torch.from_numpy(np.array(Image.open(io.BytesIO(mask)))))
        pixels, labels = transform(pixels, labels)
        return pixels.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)

    return apply


def size_of(setting: Setting, stem: str) -> tuple[int, int]:
    height, width, _ = decode_image(read(f"{setting.root}/images/{stem}.jpg")).shape
    return height, width


def epochs_of(loader: Iterable[Sequence[object]]) -> Epochs:
    """Of a DataLoader with an iterator an epoch, as a user has it."""
    while True:
        yield (len(batch[0]) for batch in loader)  # type: ignore[arg-type]


def data_loader(dataset: object, batch: int, **options: object) -> Epochs:
    from torch.utils.data import DataLoader

    return epochs_of(DataLoader(dataset, batch, num_workers=NUM_WORKERS, persistent_workers=True, **options))


def pil(setting: Setting) -> Epochs:
    """What a user has today: files, PIL and transforms.v2 in a DataLoader."""
    from torch.utils.data import Dataset

    stems = list_stems(setting)
    transform = build_transform(setting, size_of(setting, stems[0]))

    class Files(Dataset):
        def __len__(self) -> int:
            return len(stems)

        def __getitem__(self, i: int) -> tuple[object, object]:
            root = setting.root
            return transform(read(f"{root}/images/{stems[i]}.jpg"), read(f"{root}/masks/{stems[i]}.png"))

    return data_loader(Files(), setting.batch, shuffle=True)


def best(setting: Setting) -> Epochs:
    """The best DataLoader that we can write: our decoders, codec and transforms, bytes until the device.

    A sample is two files, the image as it is and the id map as shards have it; a worker makes whole batches.
    """
    import torch
    from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

    from raysseg.data.augment import augment
    from raysseg.data.decode import open_pair
    from raysseg.schema import Sample

    stems = list_stems(setting)
    job = setting.job("folders")
    classes = read_class_map(job.classes)

    class Batches(Dataset):
        def __getitem__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            cv2.setNumThreads(1)
            images = torch.empty((len(rows), *setting.crop, 3), dtype=torch.uint8)
            labels = torch.empty((len(rows), *setting.crop), dtype=torch.uint8)
            for row, i in enumerate(rows):
                image_bytes = read(f"{setting.root}/images/{stems[i]}.jpg")
                id_map = read(f"{setting.root}/maps/{stems[i]}.map")
                image, truth = open_pair(Sample(stems[i], image_bytes, 0, 0, id_map), classes)
                rng = np.random.default_rng(int(torch.randint(2**62, ())))
                images.numpy()[row], labels.numpy()[row] = augment(
                    image, truth.labels, crop=setting.crop, config=job.data.augment, ignore=classes.ignore, rng=rng
                )
            return images, labels

    sampler = BatchSampler(RandomSampler(stems), setting.batch, drop_last=False)
    loader = DataLoader(
        Batches(), batch_size=None, sampler=sampler, num_workers=NUM_WORKERS, persistent_workers=True, prefetch_factor=4
    )
    return epochs_of(loader)


def transforming(base: type, setting: Setting) -> Any:
    """A streaming data set that gives its samples through transforms.v2."""
    transform = build_transform(setting, size_of(setting, list_stems(setting)[0]))

    class Streamed(base):  # type: ignore[misc]
        def __getitem__(self, index: object) -> tuple[object, object]:
            sample = super().__getitem__(index)
            return transform(sample["image"], sample["mask"])

    return Streamed


def lit_data(setting: Setting) -> Epochs:
    """LitData's StreamingDataset, with PIL and transforms.v2."""
    import litdata

    streamed = transforming(litdata.StreamingDataset, setting)
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]} if storage.is_remote(setting.root) else None
    cache = tempfile.mkdtemp()
    dataset = streamed(f"{setting.root}/litdata", cache_dir=cache, shuffle=True, storage_options=options)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=setting.batch, num_workers=NUM_WORKERS, persistent_workers=True
    )
    return epochs_of(loader)


def mosaic(setting: Setting) -> Epochs:
    """MosaicML's StreamingDataset, with PIL and transforms.v2."""
    import streaming

    streamed = transforming(streaming.StreamingDataset, setting)
    where = {"local": f"{setting.root}/mds"}
    if storage.is_remote(setting.root):
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"]
        where = {"remote": f"{setting.root}/mds", "local": tempfile.mkdtemp()}
    return data_loader(streamed(**where, shuffle=True, batch_size=setting.batch), setting.batch)


def decoders(setting: Setting) -> Epochs:
    """No pipeline at all: JPEG and PNG decoded from memory by two threads; an upper bound."""
    from concurrent.futures import ThreadPoolExecutor

    stems = list_stems(setting)
    files = [(read(f"{setting.root}/images/{stem}.jpg"), read(f"{setting.root}/masks/{stem}.png")) for stem in stems]

    def decode(pair: tuple[bytes, bytes]) -> int:
        decode_image(pair[0])
        masks.decode_id_map(pair[1])
        return 1

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        while True:
            yield pool.map(decode, files)


SIDES: dict[str, Callable[[Setting], Epochs]] = {
    "shards": partial(ours, source="shards", chunks_of=iter_chunks),
    "shards, Ray, cluster": partial(on_ray, decode="cluster"),
    "shards, Ray, trainer": partial(on_ray, decode="trainer"),
    "folders": partial(ours, source="folders", chunks_of=iter_chunks),
    "PIL DataLoader": pil,
    "best DataLoader": best,
    "LitData": lit_data,
    "Mosaic": mosaic,
    "decoders": decoders,
}


def measure(epochs: Epochs, seconds: float) -> dict[str, float]:
    peak = [0]
    threading.Thread(target=watch_memory, args=(peak,), daemon=True).start()
    started = time.perf_counter()
    first = next(epochs)
    count, first_batch = 0, 0.0
    for size in first:
        first_batch = first_batch or time.perf_counter() - started
        count += size
    ended = time.perf_counter()
    later = 0
    while (spent := time.perf_counter() - ended) < seconds or not later:
        later += sum(next(epochs))
    rates = {"first epoch": count / (ended - started), "later": later / spent}
    return {"first batch s": first_batch, **rates, "peak MiB": peak[0] / MIB}


def watch_memory(peak: list[int]) -> None:
    """Keeps the most that this process and those below it have held."""
    while True:
        peak[0] = max(peak[0], held([os.getpid(), *descendants(os.getpid())]))
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("setting", type=json.loads, help="the fields of Setting, as JSON")
    options = parser.parse_args()
    if options.side != "decoders":
        cv2.setNumThreads(1)
    found = measure(SIDES[options.side](Setting(**options.setting)), Setting(**options.setting).seconds)
    print(json.dumps(found), file=sys.stderr, flush=True)
    os._exit(0)  # no side is asked to put its things away


if __name__ == "__main__":
    main()
