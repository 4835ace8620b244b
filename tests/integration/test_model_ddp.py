"""Every model trains on two ranks: DDP finds no parameter unused, and both end up with the same weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.integration.test_model_contract import TINY, step


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    moved = {pair: step(*pair, [slice(2 * rank, 2 * rank + 2)], torch.float32) for pair in TINY}
    sums = {pair: [float(m.double().sum()) for m in of_one.values()] for pair, of_one in moved.items()}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(sums))
    dist.barrier()
    dist.destroy_process_group()


def test_distributed_training_finds_no_unused_parameter(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    first, second = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2))
    assert first == second
    assert first.keys() == set(TINY)
    assert all(any(sums) for sums in first.values())
