"""A train job whose workers tell what they do: `raysseg train` for the survival benchmark and test.

Usage: python -m benchmarks.survival_driver LOG JOB [dotted.key=value ...]

Each worker appends lines of JSON to LOG, apart from anything that the run itself keeps: when it starts, when training
begins, which samples an optimiser step has used, and each step's number and loss. The samples are known by the colour
of the pixels that reached the model; they are written in a hook of torch's optimisers.

For the loss curves to be comparable, BatchNorm is frozen and dropout is 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

SAMPLES_PER_CHANNEL = 256


def main(log: str, job_path: str, *overrides: str) -> int:
    from raysseg import cli, trainer

    trainer._run_rank = partial(run_rank, log=log, pause_s=float(os.environ["SURVIVAL_PAUSE_S"]))
    trainer._RESIZE_LOOK_S = 5.0
    return cli.main(["train", job_path, *overrides, "--json"])


def run_rank(settings: dict[str, Any], *, log: str, pause_s: float) -> None:
    """Ray Train's function for a worker, with a log of its own."""
    note = partial(_note, Path(log))
    note("enter")
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from raysseg import trainer, worker
    from raysseg.data.batches import Batch
    from raysseg.loop import Step, TrainState

    build, iterate, fit = worker.build_model, worker.iter_batches, worker.fit
    delivered: deque[list[int]] = deque()

    def build_frozen(*arguments: Any) -> torch.nn.Module:
        model = build(*arguments)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().train = lambda mode=True, module=module: module
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "SegformerDropPath":
                module.drop_prob = 0.0
        return model

    def iterate_noting(*arguments: Any) -> Iterator[list[Batch]]:
        for step in iterate(*arguments):
            delivered.append(
                [sample_of(image) for b in step for image, p in zip(b.images, b.positions, strict=True) if p >= 0]
            )
            yield step

    def fit_noting(model: Any, state: TrainState, *arguments: Any, **settings: Any) -> Iterator[Any]:
        note("fit", step=state.step, epoch=state.ledger.epoch, position=state.ledger.position)
        for event in fit(model, state, *arguments, **settings):
            if isinstance(event, Step):
                note("step", step=event.step, epoch=event.epoch, loss=float(event.loss))
                if not hurry_file(log).exists():
                    time.sleep(pause_s)
            yield event

    worker.build_model, worker.iter_batches, worker.fit = build_frozen, iterate_noting, fit_noting
    register_optimizer_step_post_hook(lambda *_: note("used", ids=delivered.popleft()))
    trainer._run_rank(settings)


def hurry_file(log: str | Path) -> Path:
    """Once it is there, no step is followed by a pause any more."""
    return Path(log).with_suffix(".hurry")


def colour_of(sample: int) -> tuple[int, int, int]:
    """A sample's pixels, all of them."""
    return sample % SAMPLES_PER_CHANNEL, sample // SAMPLES_PER_CHANNEL, 0


def sample_of(image: Any) -> int:
    """The sample that some pixels belong to."""
    red, green, _ = image[0, 0].tolist()
    return int(red) + SAMPLES_PER_CHANNEL * int(green)


def _note(log: Path, what: str, **content: Any) -> None:
    import ray.train

    context = ray.train.get_context()
    line = {"what": what, "at": time.time(), "pid": os.getpid(), "rank": context.get_world_rank()}
    line["node"] = ray.util.get_node_ip_address()
    group = ray.util.get_current_placement_group()
    line |= {"workers": context.get_world_size(), "group": group.id.hex(), **content}
    with log.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
