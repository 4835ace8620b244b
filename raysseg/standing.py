"""How a run stands: a row of metrics an epoch, which epoch is best, and what is kept of the others.

Validation may come later than its epoch, from tasks beside training: each writes a file, and its numbers join the
epoch's row when the run is next looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from raysseg import bundle as bundles
from raysseg import checkpoint, storage
from raysseg.config import TrainJob, TuneJob
from raysseg.schema import InputError

OUT_OF_MEMORY = "a GPU ran out of memory"

History = list[dict[str, float]]
"""A row an epoch: `epoch` and `step`, `train/...`, and `val/...` as soon as it is known."""


def open_run(job: TrainJob | TuneJob, movable: Collection[str]) -> None:
    """Writes job.json, or checks that the run which is there is this one.

    Args:
        job: whose run it is.
        movable: dotted paths that may change when a run goes on.

    Raises:
        InputError: the run exists with other settings.
    """
    uri = storage.join(job.run_uri, "job.json")
    now = job.model_dump(mode="json")
    if storage.exists(uri):
        before = json.loads(storage.read_text(uri))
        moved = sorted(_differences(_fixed(before, movable), _fixed(now, movable)))
        if moved:
            raise InputError(
                f"{job.run_uri}: this run exists with other settings: {'; '.join(moved[:5])}. Give the job another "
                "name, set these back to go on with the run, or delete its folder"
            )
    storage.write_text(uri, json.dumps(now, indent=2))


def _fixed(job: dict[str, Any], movable: Collection[str], path: str = "") -> dict[str, Any]:
    """The keys that a run keeps for good."""
    return {
        key: _fixed(value, movable, f"{path}{key}.") if isinstance(value, dict) else value
        for key, value in job.items()
        if f"{path}{key}" not in movable
    }


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        yield f"{path} was {json.dumps(before)}, now {json.dumps(now)}"


def bundle_uri(job: TrainJob, step: int) -> str:
    """Where the bundle of a step lies, if it is kept."""
    return storage.join(job.run_uri, "bundles", f"{step:08d}")


def is_among_best(job: TrainJob, history: History) -> bool:
    """Whether the last epoch's bundle is worth writing; so it is where its validation is still to come."""
    step = int(history[-1]["step"])
    return step in _pending(job, history) or step in checkpoint.best(_scored(job, history), job.checkpoint.keep)


def settle(job: TrainJob, history: History) -> None:
    """Brings metrics.jsonl, best.json and what is kept up to the history."""
    run_uri = job.run_uri
    rows = "".join(json.dumps(row) + "\n" for row in history)
    storage.write_text(storage.join(run_uri, "metrics.jsonl"), rows)
    scored = _scored(job, history)
    for step in checkpoint.best(scored, 1):
        metric = job.checkpoint.metric
        (value,) = (row[metric] for row in history if row["step"] == step)
        best = {"bundle": f"bundles/{step:08d}", "step": step, "metric": metric, "value": value}
        storage.write_text(storage.join(run_uri, "best.json"), json.dumps(best))
    thin_checkpoints(job, history)
    keep = checkpoint.best(scored, job.checkpoint.keep)
    checkpoint.thin(storage.join(run_uri, "bundles"), bundles.MANIFEST, keep | _pending(job, history))


def thin_checkpoints(job: TrainJob, history: History) -> None:
    """Deletes the checkpoints that are not worth keeping: the best stay, and the newest two."""
    keep = checkpoint.best(_scored(job, history), job.checkpoint.keep)
    newest = checkpoint.steps(job.run_uri)[-2:]
    checkpoint.thin(storage.join(job.run_uri, "checkpoints"), checkpoint.MANIFEST, keep | set(newest))


def has_stalled(job: TrainJob, history: History) -> bool:
    """Whether early stopping ends the run: so many epochs in a row, as far as they are scored, were not better."""
    rule = job.schedule.early_stopping
    if rule is None:
        return False
    metric = rule.metric or job.checkpoint.metric
    mode = rule.mode or ("min" if metric == "train/loss" else job.checkpoint.mode)
    best, since = -math.inf, 0
    for value in (row[metric] for row in history if metric in row):
        score = value if mode == "max" else -value
        best, since = (score, 0) if score > best + rule.min_delta else (best, since + 1)
    return since >= rule.patience


class Room(NamedTuple):
    """What is known of a worker's memory.

    Attributes:
        per_worker: images a forward pass: as the job says, or as it was found to fit; AUTO where it is not found yet.
        was_halved: whether memory ran out with as many as the job asks for.
    """

    per_worker: int
    was_halved: bool


def per_worker(job: TrainJob) -> int:
    """Images a worker's forward pass; see Room."""
    return read_room(job).per_worker


def read_room(job: TrainJob) -> Room:
    """What was found for as many images as the job asks for."""
    uri = storage.join(job.run_uri, "per_worker.json")
    found: dict[str, Any] = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    if found.get("asked") != job.batch.per_worker:
        return Room(job.batch.per_worker, was_halved=False)
    return Room(int(found["per_worker"]), was_halved=found["because"] == OUT_OF_MEMORY)


def write_per_worker(job: TrainJob, asked: int, images: int, because: str) -> None:
    """Sets the images of a worker's forward pass for as long as the job asks for so many."""
    content = {"asked": asked, "per_worker": images, "because": because}
    storage.write_text(storage.join(job.run_uri, "per_worker.json"), json.dumps(content))


def read_best(job: TrainJob) -> dict[str, Any]:
    """best.json: the best bundle's place, its step, the metric it was chosen by and its value."""
    best: dict[str, Any] = json.loads(storage.read_text(storage.join(job.run_uri, "best.json")))
    return best


def read_history(job: TrainJob) -> History:
    """The rows of metrics.jsonl, with the validations that have come since."""
    lines = storage.read_text(storage.join(job.run_uri, "metrics.jsonl")).splitlines()
    return with_validations(job, [json.loads(line) for line in lines])


def read_history_so_far(job: TrainJob) -> History:
    """The same; nothing where the run has no row yet."""
    return read_history(job) if storage.exists(storage.join(job.run_uri, "metrics.jsonl")) else []


def with_validations(job: TrainJob, history: History) -> History:
    """The rows, with what validations beside training have found."""
    return [row | (_read_validation(job, int(row["step"])) if _is_waiting(row) else {}) for row in history]


def not_validated(history: History) -> list[int]:
    """Steps whose validation is not known."""
    return [int(row["step"]) for row in history if _is_waiting(row)]


def write_validation(job: TrainJob, step: int, metrics: dict[str, float]) -> None:
    """Puts a validation's numbers on storage, where the run will find them."""
    storage.write_text(_validation_uri(job, step), json.dumps(metrics))


def _read_validation(job: TrainJob, step: int) -> dict[str, float]:
    """The numbers of a step's validation; none while it is still to come."""
    uri = _validation_uri(job, step)
    metrics: dict[str, float] = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    return metrics


def _is_waiting(row: dict[str, float]) -> bool:
    return not any(name.startswith("val/") for name in row)


def _validation_uri(job: TrainJob, step: int) -> str:
    return storage.join(job.run_uri, "validations", f"{step:08d}.json")


def _pending(job: TrainJob, history: History) -> set[int]:
    """Steps that can't be ranked yet, or whose validation still needs their bundle."""
    return {int(row["step"]) for row in history if job.checkpoint.metric not in row or _is_waiting(row)}


def _scored(job: TrainJob, history: History) -> list[checkpoint.Scored]:
    sign = 1.0 if job.checkpoint.mode == "max" else -1.0
    values = [(int(row["step"]), row[job.checkpoint.metric]) for row in history if job.checkpoint.metric in row]
    return [checkpoint.Scored(step, -math.inf if math.isnan(value) else sign * value) for step, value in values]
