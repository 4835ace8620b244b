"""Training state on storage: written whole or not at all, found again, thinned out. No Ray: 0 workers resume too."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from raysseg import storage
from raysseg.ledger import Ledger
from raysseg.loop import Tally, TrainState

MANIFEST = "checkpoint.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A training state at rest in host memory, which training no longer changes.

    Attributes:
        tensors: what TrainState.state_dict gives.
        step: optimiser steps done.
        ledger: how far the data have been used.
        tally: what the epoch has come to, over all ranks.
        history: a row of metrics an epoch.
    """

    tensors: dict[str, Any]
    step: int
    ledger: Ledger
    tally: dict[str, float]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """A checkpoint or bundle by its step, and how good it is; higher is better."""

    step: int
    score: float


def take(state: TrainState, into: Snapshot | None = None) -> Snapshot:
    """Copies a state; an older snapshot that is no longer needed lends its memory."""
    tensors = _copied(state.state_dict(), into.tensors if into is not None else None)
    if next(state.model.parameters()).is_cuda:
        torch.cuda.synchronize()  # the copies are under way until then
    return Snapshot(tensors, state.step, state.ledger, dict(state.tally.shared), copy.deepcopy(state.history))


def _copied(value: Any, into: Any) -> Any:
    """A nest of tensors in host memory, written into another one's tensors where they fit."""
    match value:
        case Tensor():
            if not isinstance(into, Tensor) or into.shape != value.shape or into.dtype != value.dtype:
                into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return into.copy_(value, non_blocking=True)
        case dict():
            return {
                key: _copied(part, into.get(key) if isinstance(into, dict) else None) for key, part in value.items()
            }
        case list():
            older = into if isinstance(into, list) and len(into) == len(value) else [None] * len(value)
            return [_copied(part, old) for part, old in zip(value, older, strict=True)]
        case _:
            return value


def write(run_uri: str, snapshot: Snapshot) -> str:
    """Publishes a state as <run>/checkpoints/<step>; returns its URI.

    Its file has a name of its own each time, so that an older checkpoint of the same step stands until this one does.
    """
    uri = uri_of(run_uri, snapshot.step)
    name = f"state-{uuid4().hex[:8]}.pt"
    manifest: dict[str, object] = {
        "state": name,
        "step": snapshot.step,
        "ledger": asdict(snapshot.ledger),
        "tally": snapshot.tally,
        "history": snapshot.history,
    }
    with tempfile.TemporaryDirectory(prefix="raysseg-") as folder:
        torch.save(snapshot.tensors, Path(folder) / name)
        storage.publish_folder(Path(folder), uri, MANIFEST, manifest)
    return uri


def uri_of(run_uri: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return storage.join(run_uri, "checkpoints", f"{step:08d}")


def steps(run_uri: str) -> list[int]:
    """Steps of all checkpoints that were written to their end, ascending."""
    return sorted({int(step) for step, name in _files(storage.join(run_uri, "checkpoints")) if name == MANIFEST})


def _files(folder_uri: str) -> list[tuple[str, str]]:
    """Each file of a folder of steps: the step's name, and the file's within."""
    if not storage.is_remote(folder_uri) and not Path(folder_uri).is_dir():
        return []
    parts = (entry.path.partition("/") for entry in storage.list_files(folder_uri))
    return [(step, name) for step, _, name in parts]


def restore_newest(run_uri: str, state: TrainState) -> str | None:
    """Loads the newest checkpoint that is whole into a state; every rank must call it, and all load the same one.

    Of the ranks that share a disk, one fetches it for all. A damaged one is passed over for the one before, and named.

    Returns:
        Its URI, or None where there is none.

    Raises:
        StorageError: the storage can't be reached.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    found = [steps(run_uri) if is_first else []]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    for step in reversed(found[0]):
        with tempfile.TemporaryDirectory(prefix="raysseg-") as scratch:
            folder = _fetch_once(uri_of(run_uri, step), Path(scratch))
            if _is_everywhere(folder is not None):
                assert folder is not None
                _load(folder, state)
                _is_everywhere(True)  # until then, others may read this rank's folder
                return uri_of(run_uri, step)
    return None


def _fetch_once(uri: str, scratch: Path) -> Path | None:
    """A checkpoint's files, as the first rank whose folder this one can see has fetched them."""
    if not dist.is_initialized() or not storage.is_remote(uri):
        return _fetch(uri, scratch)
    folders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(folders, str(scratch))
    shared = next(Path(folder) for folder in folders if Path(folder).is_dir())
    folder = _fetch(uri, scratch) if shared == scratch else None
    _is_everywhere(True)  # waits for those that fetch
    if shared == scratch or (shared / MANIFEST).is_file():
        return folder if shared == scratch else shared
    return _fetch(uri, scratch)


def _fetch(uri: str, scratch: Path) -> Path | None:
    """The files of a checkpoint, verified; None where it is damaged."""
    try:
        return storage.fetch_folder(uri, MANIFEST, into=scratch)
    except storage.StorageError as error:
        if error.is_transient:
            raise
        logger.warning("checkpoint passed over: %s", error)
        return None


def _is_everywhere(is_here: bool) -> bool:
    if not dist.is_initialized():
        return is_here
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, is_here)
    return all(seen)


def _load(folder: Path, state: TrainState) -> None:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    device = next(state.model.parameters()).device
    state.load_state_dict(torch.load(folder / manifest["state"], map_location=device, weights_only=True))
    state.step = int(manifest["step"])
    state.ledger = Ledger(**manifest["ledger"])
    state.tally = Tally(manifest["tally"])
    state.history = list(manifest["history"])


def best(scored: list[Scored], keep: int) -> set[int]:
    """Steps of the best so many; of equals the earlier."""
    ranked = sorted(scored, key=lambda entry: (-entry.score, entry.step))
    return {entry.step for entry in ranked[:keep]}


def thin(folder_uri: str, manifest_name: str, keep: set[int]) -> None:
    """Deletes the steps of a folder that are not to be kept, unfinished ones too, each by its manifest first."""
    for step in sorted({step for step, _ in _files(folder_uri)}):
        if int(step) not in keep:
            storage.delete_folder(storage.join(folder_uri, step), manifest_name)
