"""The yardstick of bench_train: a train job in plain torch, DDP over gloo and a DataLoader, without validation.

`python -m benchmarks.plain_ddp job.yaml [dotted.key=value ...]` says on stderr when its first step is done, and the
images/s of each epoch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from raysseg import config
from raysseg.data import read_class_map
from raysseg.data.augment import augment
from raysseg.loop import learning_rate_factor
from raysseg.masks import to_indices
from raysseg.models import build_model


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Images, (3, H, W) uint8, and labels, (H, W) int64, of the job's training split."""

    def __init__(self, job: config.TrainJob) -> None:
        source = job.data.train
        assert isinstance(source, config.MasksSource)
        assert source.images
        assert source.masks
        self._job, self._classes = job, read_class_map(job.classes)
        self._images, self._masks = (sorted(Path(folder).iterdir()) for folder in (source.images, source.masks))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = np.array(Image.open(self._images[i]).convert("RGB"))
        labels = to_indices(np.array(Image.open(self._masks[i])), self._classes)
        image, labels = augment(
            image,
            labels,
            crop=self._job.data.crop,
            config=self._job.data.augment,
            ignore=self._classes.ignore,
            rng=np.random.default_rng(int(torch.randint(2**62, ()))),
        )
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(labels).long()


def run_rank(rank: int, job: config.TrainJob, meeting_point: str) -> None:
    torch.set_num_threads(1)
    num_ranks = job.scaling.workers
    assert isinstance(num_ranks, int)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=num_ranks)
    torch.manual_seed(job.seed)
    built = build_model(job.model, read_class_map(job.classes))
    model = DistributedDataParallel(built.net)  # transformers' own, with its own loss
    scenes = Scenes(job)
    sampler = DistributedSampler(scenes, seed=job.seed)
    loader = DataLoader(
        scenes, job.batch.global_size // num_ranks, sampler=sampler, num_workers=1, persistent_workers=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), job.optimizer.lr, weight_decay=job.optimizer.weight_decay)
    factor = partial(learning_rate_factor, job.schedule, total=len(loader) * job.schedule.epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(job.schedule.epochs):
        sampler.set_epoch(epoch)
        started = time.perf_counter()
        total = torch.zeros(())
        for step, (images, labels) in enumerate(loader):
            optimizer.zero_grad(set_to_none=True)
            loss = model(pixel_values=(images.float() - built.mean) / built.std, labels=labels).loss
            loss.backward()
            if job.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), job.optimizer.clip_norm)
            optimizer.step()
            schedule.step()
            total += loss.detach()
            if rank == epoch == step == 0:
                print("FIRST STEP", file=sys.stderr, flush=True)
        dist.all_reduce(total)  # every rank is done
        if rank == 0:
            print(f"images/s {len(scenes) / (time.perf_counter() - started)}", file=sys.stderr, flush=True)
    dist.destroy_process_group()


def main() -> None:
    job = config.load(sys.argv[1], sys.argv[2:])
    assert isinstance(job, config.TrainJob)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (job, f"{folder}/meeting-point"), job.scaling.workers)


if __name__ == "__main__":
    main()
