"""What is done otherwise for millions of samples or many workers comes to the same."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raysseg import checkpoint, inputs, storage
from raysseg.config import MasksSource, ShardsSource
from raysseg.data import index as indexes
from raysseg.data import sampling
from raysseg.data.batches import build_feed, read_ids, request_chunk
from raysseg.data.files import IMAGE_SUFFIXES, files_by_stem
from raysseg.data.index import SampleIndex
from raysseg.data.sampling import repeat_factors
from raysseg.ledger import Ledger
from raysseg.loop import TrainState
from raysseg.masks import LabelMap
from raysseg.metrics import Metrics
from raysseg.schema import ClassMap
from raysseg.worker import _compute_together
from tests.conftest import example_job, plan_of
from tests.faults import faulty_proxy


def index_of(names: list[str], chunks: int = 1) -> SampleIndex:
    parts = [pa.table({"sample_id": [str(name) for name in part]}) for part in np.array_split(names, chunks)]
    return SampleIndex(MasksSource(masks="/d"), pa.concat_tables(parts), np.arange(len(names)))


CLASSES = ClassMap((0, 1, 2), ("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (99, 99, 99)), (False,) * 3)
NAMES = [f"a/{i:03d} ü" for i in range(23)]


# ---- the index


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("rows", [4, 100])
def test_fingerprint_is_that_of_the_names_in_lines(chunks: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_ROWS", rows)
    index = index_of(NAMES, chunks)
    digest = hashlib.sha256("\n".join(NAMES).encode())
    digest.update(index.groups.tobytes())
    assert index.fingerprint == digest.hexdigest()[:16]
    assert pickle.loads(pickle.dumps(index)).__dict__["fingerprint"] == index.fingerprint
    assert index.take(np.arange(22)).fingerprint != index.fingerprint


@pytest.mark.parametrize("most", [2**31 - 1, 10])
def test_an_index_in_one_piece_is_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_MOST_BYTES", most)
    index = index_of(NAMES, 5)
    whole = index.in_one_piece
    assert whole.references["sample_id"].num_chunks == 1
    assert whole.references["sample_id"].type == (pa.large_string() if most == 10 else pa.string())
    assert whole.sample_ids == NAMES
    assert whole.fingerprint == index.fingerprint
    assert whole.take(np.array([22, 0])).sample_ids == [NAMES[22], NAMES[0]]


def test_repeat_factors_by_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    presence = np.random.default_rng(0).random((101, 7)) < [0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0]
    shares = np.maximum(presence.mean(axis=0), 1 / len(presence))
    whole = np.where(presence, np.sqrt(0.3 / shares), 1.0).max(axis=1, initial=1.0)
    monkeypatch.setattr(sampling, "_ROWS", 8)
    assert np.array_equal(repeat_factors(presence, 0.3), whole)


def test_what_tasks_share_does_not_grow_with_the_samples(example: Path) -> None:
    job = example_job(str(example), "unused")
    plan = plan_of(job)
    sizes = []
    for number in (20, 10_000):
        index = replace(plan.train.take(np.arange(number) % len(plan.train)), groups=np.arange(number))
        feed = build_feed(job, index, plan.classes, Ledger(), rank=0, num_workers=1)
        sizes.append(len(pickle.dumps(feed.bare)))
        request = request_chunk(feed, 0)
        assert request.index.sample_ids == read_ids(feed, 0, request.positions.tolist())
    assert sizes[0] == sizes[1] < 10_000


# ---- listings


ODD = ["a.png", "b.c.PNG", ".hidden.png", "d/.png", "d/e.png", "noend", "f.", "g.txt", "h.d/i", "k_end.jpg"]


@pytest.mark.parametrize("end", ["", "_end"])
def test_stems_are_those_of_paths(end: str, tmp_path: Path) -> None:
    for name in ODD:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paths = [PurePosixPath(name) for name in ODD]
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    stems = {str(path.with_suffix("")).removesuffix(end): str(path) for path in images if path.stem.endswith(end)}
    assert files_by_stem(str(tmp_path), IMAGE_SUFFIXES, end) == stems
    assert len(stems) == (1 if end else 4)


@pytest.mark.parametrize("most_folders", [1000, 2])
def test_a_tree_is_listed_as_one_listing_would(
    most_folders: int, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_MOST_FOLDERS", most_folders)
    for name in ("b", "a/1", "a/x/2", "a/x/3", "c/1", "d e/ü"):
        storage.write_bytes(f"{s3_bucket}/data/{name}", b"12")
    found = storage.list_tree(f"{s3_bucket}/data")
    assert found == storage.list_files(f"{s3_bucket}/data")
    assert [entry.path for entry in found] == ["a/1", "a/x/2", "a/x/3", "b", "c/1", "d e/ü"]
    assert storage.list_tree(f"{s3_bucket}/nothing") == []


def test_readers_of_a_row_group_are_told(example: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = replace(index_of(NAMES), source=ShardsSource(format="shards", uri="x"), groups=np.arange(23) // 8)
    texts = {}
    for name, index, workers in (("one", shards, 4), ("many", shards, 24), ("files", index_of(NAMES), 24)):
        caplog.clear()
        job = example_job(str(example), "unused", f"scaling.workers={workers}", "batch.global_size=24")
        with caplog.at_level(logging.WARNING):
            inputs._warn_of_readers(job, index)
        texts[name] = caplog.text
    assert texts["one"] == texts["files"] == ""
    assert "24 workers read each one 3 times over; with data.open_shards=24" in texts["many"]


# ---- restoring


def build(seed: int) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters())
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None)


def restore(rank: int, folder: str, run_uri: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    state = build(1 + rank)
    assert checkpoint.restore_newest(run_uri, state) is not None
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(state.model.weight.detach().numpy()))
    dist.destroy_process_group()


def test_ranks_on_one_disk_fetch_a_checkpoint_once(
    new_bucket: Callable[[], str], s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_uri = f"{new_bucket()}/run"
    state = build(0)
    checkpoint.write(run_uri, checkpoint.take(state))
    with faulty_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        mp.spawn(restore, args=(str(tmp_path), run_uri), nprocs=3)
        assert sum(request.startswith("GET") and ".pt" in request for request in proxy.requests) == 1
    for rank in range(3):
        assert np.array_equal(pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()), state.model.weight.detach())


# ---- validating


def counted(names: list[str]) -> Metrics:
    metrics = Metrics("semantic", CLASSES)
    for name in names:
        rng = np.random.default_rng(int(name))
        prediction, truth = (LabelMap(rng.integers(0, 3, (8, 8)).astype(np.uint8), 255) for _ in range(2))
        metrics.update(name, prediction, truth)
    return metrics


def compute(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    names = [str(i) for i in range(10)]
    found = _compute_together(counted(names[rank::3]), index_of(names), rank, 3)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_know_the_numbers_that_the_first_computes(tmp_path: Path) -> None:
    mp.spawn(compute, args=(str(tmp_path),), nprocs=3)
    whole = counted([str(i) for i in range(10)]).compute()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)] == [whole] * 3
