"""The yardstick of bench_startup: a bare TorchTrainer, the imports that training needs, and a trivial Ray Dataset."""

from __future__ import annotations

import logging
import sys
import tempfile

import ray
import ray.data
import ray.train
import ray.train.torch


def run_rank() -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from transformers.models.segformer.modeling_segformer import SegformerForSemanticSegmentation  # noqa: F401

    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    batch = next(iter(ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=4)))
    model(batch["id"].float()[:, None]).sum().backward()
    print("FIRST STEP", file=sys.stderr, flush=True)
    ray.train.report({"loss": 0.0})


def main() -> None:
    quiet = ray.LoggingConfig(log_level="ERROR")
    ray.init(include_dashboard=False, logging_level=logging.WARNING, logging_config=quiet)  # as runtime.connect does
    with tempfile.TemporaryDirectory() as folder:
        ray.train.torch.TorchTrainer(
            run_rank,
            datasets={"train": ray.data.range(64)},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(storage_path=folder, name="bare"),
        ).fit()


if __name__ == "__main__":
    main()
