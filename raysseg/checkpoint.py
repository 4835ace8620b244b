"""Training state on storage: written whole or not at all, found again, thinned out. No Ray: 0 workers resume too."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from raysseg import storage
from raysseg.ledger import Ledger
from raysseg.loop import TrainState

MANIFEST = "checkpoint.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A checkpoint or bundle by its step, and how good it is; higher is better."""

    step: int
    score: float


def write(run_uri: str, state: TrainState) -> str:
    """Publishes the state as <run>/checkpoints/<step>; returns its URI."""
    uri = storage.join(run_uri, "checkpoints", f"{state.step:08d}")
    manifest: dict[str, object] = {"step": state.step, "ledger": asdict(state.ledger), "history": state.history}
    with tempfile.TemporaryDirectory(prefix="raysseg-") as folder:
        torch.save(state.state_dict(), Path(folder) / "state.pt")
        storage.publish_folder(Path(folder), uri, MANIFEST, manifest)
    return uri


def steps(run_uri: str) -> list[int]:
    """Steps of all checkpoints, ascending."""
    return _steps(storage.join(run_uri, "checkpoints"))


def _steps(folder_uri: str) -> list[int]:
    if not storage.is_remote(folder_uri) and not Path(folder_uri).is_dir():
        return []
    return sorted({int(entry.path.split("/")[0]) for entry in storage.list_files(folder_uri)})


def restore_newest(run_uri: str, state: TrainState) -> str | None:
    """Loads the newest checkpoint that is whole into a state; returns its URI, or None where there is none.

    A damaged one is passed over for the one before, and named.
    """
    for step in reversed(steps(run_uri)):
        uri = storage.join(run_uri, "checkpoints", f"{step:08d}")
        with tempfile.TemporaryDirectory(prefix="raysseg-") as scratch:
            try:
                manifest = storage.read_manifest(uri, MANIFEST)
                folder = storage.fetch_folder(uri, MANIFEST, into=Path(scratch))
            except storage.StorageError as error:
                logger.warning("checkpoint passed over: %s", error)
                continue
            _load(folder, manifest, state)
            return uri
    return None


def _load(folder: Path, manifest: dict[str, Any], state: TrainState) -> None:
    device = next(state.model.parameters()).device
    state.load_state_dict(torch.load(folder / "state.pt", map_location=device, weights_only=True))
    state.step = int(manifest["step"])
    state.ledger = Ledger(**manifest["ledger"])
    state.history = list(manifest["history"])


def best(scored: list[Scored], keep: int) -> set[int]:
    """Steps of the best so many; of equals the earlier."""
    ranked = sorted(scored, key=lambda entry: (-entry.score, entry.step))
    return {entry.step for entry in ranked[:keep]}


def thin(folder_uri: str, manifest_name: str, keep: set[int]) -> None:
    """Deletes the steps of a folder that are not to be kept, each by its manifest first."""
    for step in _steps(folder_uri):
        if step not in keep:
            storage.delete_folder(storage.join(folder_uri, f"{step:08d}"), manifest_name)
