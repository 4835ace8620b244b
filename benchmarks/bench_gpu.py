"""SegFormer-B0 at 512x512 in bf16 on one GPU: `fit` against transformers.Trainer on decoded tensors in memory."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.bench_train import DEVICE, Round, build, our_round, random_batches, synchronise, synthetic_job
from benchmarks.results import compare, device_name, write_result
from raysseg import config
from raysseg.data.batches import Batch

EPOCH = 5000  # images


class Decoded(Dataset[dict[str, Tensor]]):
    """The rows of some batches as the Trainer takes them: normalised (3, H, W) float32 and (H, W) int64, repeated."""

    def __init__(self, batches: list[Batch], mean: Tensor, std: Tensor, length: int) -> None:
        images = torch.cat([torch.from_numpy(batch.images) for batch in batches]).permute(0, 3, 1, 2)
        self._images = ((images - mean) / std).contiguous()
        self._labels = torch.cat([torch.from_numpy(batch.labels) for batch in batches]).long()
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = i % len(self._images)
        return {"pixel_values": self._images[row], "labels": self._labels[row]}


class Clock(TrainerCallback):
    """The time after the last step of each round; the first round is for warming up."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.ticks: list[float] = []

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step % self._steps == 0:
            synchronise()
            self.ticks.append(time.perf_counter())


def trainer_rates(job: config.TrainJob, batches: list[Batch], steps: int, loader_workers: int) -> list[float]:
    """Images/s of each round but the first."""
    built = build(job)
    clock = Clock(steps)
    num_steps = steps * job.schedule.epochs
    data = Decoded(batches, built.mean.cpu(), built.std.cpu(), num_steps * job.batch.global_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=job.batch.global_size,
            max_steps=num_steps,
            learning_rate=job.optimizer.lr,
            weight_decay=job.optimizer.weight_decay,
            max_grad_norm=job.optimizer.clip_norm,
            bf16=DEVICE.type == "cuda",
            torch_compile=job.compile,
            dataloader_num_workers=loader_workers,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(built.net, arguments, train_dataset=data, callbacks=[clock]).train()
    images = steps * job.batch.global_size
    return [images / (stop - start) for start, stop in zip(clock.ticks, clock.ticks[1:], strict=False)]


def our_rates(train: Round, rounds: int) -> list[float]:
    """Images/s of each round but a first one."""
    return [train() for _ in range(rounds + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--loader-workers", type=int, default=4, help="of the Trainer's DataLoader")
    parser.add_argument("--compile", action="store_true", help="both sides")
    parser.add_argument("--channels-last", action="store_true", help="ours; the Trainer has no such option")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu needs a CUDA device; there is none here")
        return
    if importlib.util.find_spec("accelerate") is None:
        parser.error("transformers.Trainer needs the package accelerate: pip install accelerate")
    job = synthetic_job(
        crop=options.crop,
        batch=options.batch,
        epochs=options.rounds + 1,
        is_compiled=options.compile,
        channels_last=options.channels_last,
    )
    batches = random_batches(job, 4)
    # in two blocks, ours before and after, so that a drift of the clock shows
    before = our_rates(our_round(job, batches, options.steps), options.rounds)
    peer = trainer_rates(job, batches, options.steps, options.loader_workers)
    after = our_rates(our_round(job, batches, options.steps), options.rounds)
    ours = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    epochs = [EPOCH / median(ours), EPOCH / median(peer)]
    rows = [
        compare("images/s", ours, peer, ">= 1.2"),
        compare(f"s an epoch of {EPOCH} images", epochs[:1], epochs[1:], "-"),
    ]
    settings = vars(options) | {"before": before, "after": after, "peer": "transformers.Trainer"}
    write_result("gpu", device_name(), rows, settings)


if __name__ == "__main__":
    main()
