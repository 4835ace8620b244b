"""Tells experiment trackers how a run goes: TensorBoard, MLflow, Weights & Biases. No Ray, no torch.

metrics.jsonl is written without them (raysseg.standing). A thread does all of their work, the packages' import
included: a server that is slow or down neither holds up training nor ends it. What a tracker has not taken is kept,
within bounds, and offered again after the next epoch.

A run that is taken up again goes on with the tracker's own run, whose id is kept in <run>/trackers.json. Steps that a
kill has undone are hidden by TensorBoard; MLflow and W&B can't delete, and show them twice.

Credentials come from the packages' own environment variables, on the machine of the first rank.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self
from uuid import uuid4

from raysseg import storage
from raysseg.config import MlflowTracker, TrainJob
from raysseg.schema import InputError

logger = logging.getLogger(__name__)

Status = Literal["finished", "failed", "killed"]
"""How a run ended; killed: it was told to stop, and may go on later."""

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # we try again after the next epoch; MLflow's seven take four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""How MLflow behaves, where its environment doesn't say otherwise."""

_KEPT = 10_000  # rows that wait for a tracker; older ones are dropped
_PATIENCE_S = 60.0  # that the end of a run waits for its trackers
_PAUSE_S = 20.0  # for which a tracker that has failed is left alone: a server that hangs takes as long to fail
_WANDB_PATIENCE_S = 30.0


class Row(NamedTuple):
    """Values at a step, and when they were known (seconds since 1970)."""

    step: int
    time_s: float
    values: dict[str, float]


class Tracker(Protocol):
    """One run on one tracker: built with the job and the step that it goes on from. Any method may raise anything."""

    def log(self, rows: Sequence[Row]) -> None:
        """Takes rows, in the order in which they came."""

    def flush(self) -> None:
        """An epoch is over: what was logged should last."""

    def close(self, status: Status) -> None:
        """The run is over."""


def check_trackers(job: TrainJob) -> None:
    """Says before training starts what trackers lack; imports none of them.

    Raises:
        InputError: a package is missing, or nothing says where MLflow is.
    """
    for name in _wanted(job):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder of that name, such as W&B leaves behind
            mend = f"pip install 'raysseg[{name}]', or remove the key"
            raise InputError(f"trackers.{name}: needs the package {name}; {mend}")
    if job.trackers.mlflow is not None:
        _mlflow_uri(job.trackers.mlflow)


def open_trackers(job: TrainJob, step: int) -> Trackers:
    """The trackers of a job, for its first rank alone; without any, what they are told goes nowhere.

    Args:
        job: the resolved job.
        step: optimizer steps that the run has behind it: 0, or those of the checkpoint that it goes on from.
    """
    return Trackers([_Line(name, job, step) for name in _wanted(job)])


class Trackers:
    """Passes on what it is told, in a thread of its own; no method raises, and `close` alone waits.

    As a context manager it closes by itself: finished; failed after an Exception; killed after any other exception.
    """

    def __init__(self, lines: Sequence[_Line]) -> None:
        self._lines = lines
        self._inbox: queue.Queue[Row | Status | None] = queue.Queue(_KEPT)
        self._thread = threading.Thread(target=self._pass_on, name="trackers", daemon=True) if lines else None
        if self._thread is not None:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Passes on values at a step; NaN is left out. Steps may come in any order, and more than once."""
        numbers = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        if numbers:
            self._tell(Row(step, time.time(), numbers))

    def flush(self) -> None:
        """After an epoch: uploads event files, and tries the trackers that have failed once more."""
        self._tell(None)

    def close(self, status: Status) -> None:
        """Ends the run; waits a minute at most. A second call has no effect."""
        if self._thread is None:
            return
        deadline = time.monotonic() + _PATIENCE_S
        with suppress(queue.Full):
            self._inbox.put(status, timeout=_PATIENCE_S)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("trackers: not all is delivered after %.0f s; metrics.jsonl has every epoch", _PATIENCE_S)
        self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close("finished" if error is None else "failed" if isinstance(error, Exception) else "killed")

    def _tell(self, message: Row | Status | None) -> None:
        if self._thread is not None:
            try:
                self._inbox.put_nowait(message)
            except queue.Full:
                logger.debug("trackers: dropped %s", message)

    def _pass_on(self) -> None:
        for line in self._lines:
            line.deliver()
        while True:
            message = self._inbox.get()
            for line in self._lines:
                if isinstance(message, Row):
                    line.add(message)
                    if self._inbox.empty():  # else in one go with the next
                        line.deliver()
                else:
                    line.deliver(is_epoch=True, status=message)
            if isinstance(message, str):
                return


class _Line:
    """To one tracker: what it has not taken yet, and whether it takes anything."""

    def __init__(self, name: str, job: TrainJob, step: int) -> None:
        self._name, self._job, self._step = name, job, step
        self._tracker: Tracker | None = None
        self._unsent: deque[Row] = deque(maxlen=_KEPT)
        self._is_down, self._failed_s = False, 0.0

    def add(self, row: Row) -> None:
        self._unsent.append(row)

    def deliver(self, is_epoch: bool = False, status: Status | None = None) -> None:
        """Hands the tracker what waits; one that has failed is left alone until an epoch's end, and for a while."""
        if not self._is_down or (is_epoch and time.monotonic() >= self._failed_s + _PAUSE_S):
            self._try(is_epoch, status)
        if status is not None and self._unsent:
            logger.warning("trackers.%s: %d rows could not be delivered", self._name, len(self._unsent))

    def _try(self, is_epoch: bool, status: Status | None) -> None:
        try:
            if self._tracker is None:
                self._tracker = TRACKERS[self._name](self._job, self._step)
            if self._unsent:
                self._tracker.log(self._unsent)
                self._step = max(self._step, *(row.step for row in self._unsent))
                self._unsent.clear()
            if status is not None:
                self._tracker.close(status)
            elif is_epoch:
                self._tracker.flush()
        except Exception as error:  # whatever a package raises: the model is worth more than its curves
            if not self._is_down:
                then = "training goes on, and each epoch tries again" if status is None else "metrics.jsonl has it all"
                logger.warning("trackers.%s: %s; %s", self._name, _reason(error), then)
            self._is_down, self._failed_s, self._tracker = True, time.monotonic(), None
        else:
            if self._is_down:
                logger.info("trackers.%s: goes on", self._name)
            self._is_down = False


def _reason(error: Exception) -> str:
    """The error's first line, without the user names and passwords that URIs may hold."""
    text = re.sub(r"//[^/\s@]+@", "//", str(error).partition("\n")[0])
    return f"{type(error).__name__}: {text[:400]}"


def _wanted(job: TrainJob) -> list[str]:
    return [name for name in TRACKERS if getattr(job.trackers, name)]


# --- what a run keeps ---------------------------------------------------------------------------------------------


def _read_ids(job: TrainJob) -> dict[str, str]:
    """The run's id by tracker."""
    uri = storage.join(job.run_uri, "trackers.json")
    ids: dict[str, str] = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    return ids


def _write_id(job: TrainJob, name: str, run_id: str) -> None:
    ids = _read_ids(job) | {name: run_id}
    storage.write_text(storage.join(job.run_uri, "trackers.json"), json.dumps(ids, indent=2) + "\n")


def _settings(job: TrainJob) -> dict[str, object]:
    """The resolved job by dotted keys; lists stay whole."""

    def flat(prefix: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            return {prefix: value}
        below = [flat(f"{prefix}.{key}" if prefix else key, part) for key, part in value.items()]
        return {key: part for found in below for key, part in found.items()}

    return flat("", job.model_dump(mode="json"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Folder:
    """Where a package writes files: the URI's folder where that is local, else one that is uploaded to it.

    Packages give their files other names at each start, so that no upload replaces an earlier start's.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._temporary = TemporaryDirectory(prefix="raysseg-") if storage.is_remote(uri) else None
        self.path = Path(storage.absolute(uri) if self._temporary is None else self._temporary.name)
        self.path.mkdir(parents=True, exist_ok=True)

    def upload(self) -> None:
        if self._temporary is not None:
            for path in self.path.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    storage.write_bytes(
                        storage.join(self._uri, path.relative_to(self.path).as_posix()), path.read_bytes()
                    )


# --- trackers -----------------------------------------------------------------------------------------------------


class _TensorBoard:
    """Event files in <run>/tensorboard; the job is a text."""

    def __init__(self, job: TrainJob, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        uri = storage.join(job.run_uri, "tensorboard")
        is_first = not (storage.exists(uri) and storage.list_files(uri))
        self._folder = _Folder(uri)
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(self._folder.path))
        # A reader that meets a start forgets what it has read of this step and later ones.
        self._writer.add_event(
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        if is_first:
            lines = "\n".join(f"    {key}: {_text(value)}" for key, value in _settings(job).items())
            tensor = TensorProto(dtype="DT_STRING", string_val=[lines.encode()], tensor_shape={"dim": [{"size": 1}]})
            metadata = create_summary_metadata(display_name="job", description="")
            value = Summary.Value(tag="job", metadata=metadata, tensor=tensor)
            self._writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            self._writer.add_event(
                self._event(wall_time=row.time_s, step=row.step, summary=self._summary(value=values))
            )
        self._writer.flush()

    def flush(self) -> None:
        self._folder.upload()

    def close(self, status: Status) -> None:
        self._writer.close()
        self._folder.upload()


def _mlflow_uri(tracker: MlflowTracker) -> str:
    uri = tracker.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError("trackers.mlflow.uri: missing; set it, or the environment's MLFLOW_TRACKING_URI")
    return uri


class _Mlflow:
    """A run of an experiment; the job is its parameters."""

    _STATUS: Mapping[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
    _BATCH = 1000  # metrics, and a tenth of it parameters: what MLflow takes at once
    _LONGEST = 6000  # characters of a parameter

    def __init__(self, job: TrainJob, step: int) -> None:
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before the import: some are read then
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        assert job.trackers.mlflow is not None
        self._metric = Metric
        self._client = MlflowClient(_mlflow_uri(job.trackers.mlflow))
        run = None
        if (known := _read_ids(job).get("mlflow")) is not None:
            try:
                run = self._client.get_run(known)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if run is None or run.info.lifecycle_stage != "active":
            experiment = self._experiment_id(job.trackers.mlflow.experiment or job.name)
            run = self._client.create_run(experiment, run_name=job.name)
            _write_id(job, "mlflow", run.info.run_id)
        self._run_id = run.info.run_id
        if not run.data.params:
            params = [Param(_mlflow_key(key), _text(value)[: self._LONGEST]) for key, value in _settings(job).items()]
            for first in range(0, len(params), self._BATCH // 10):
                self._client.log_batch(self._run_id, params=params[first : first + self._BATCH // 10])
        self._client.update_run(self._run_id, status="RUNNING")
        logger.info("trackers.mlflow: run %s", self._run_id)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run was faster
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def log(self, rows: Sequence[Row]) -> None:
        metrics = [
            self._metric(_mlflow_key(name), value, int(row.time_s * 1000), row.step)
            for row in rows
            for name, value in row.values.items()
        ]
        for first in range(0, len(metrics), self._BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + self._BATCH])

    def flush(self) -> None:
        pass  # `log` has sent all

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, self._STATUS[status])


def _mlflow_key(name: str) -> str:
    """A name that MLflow takes: class names may hold any character."""
    return re.sub(r"[^\w.\- :/]", "_", name, flags=re.ASCII)[:250]


class _Wandb:
    """A W&B run; the job is its config. Steps are a value of their own: W&B's own counter takes no step twice."""

    def __init__(self, job: TrainJob, step: int) -> None:
        import wandb

        tracker = job.trackers.wandb
        assert tracker is not None
        wandb.setup(wandb.Settings(silent=True))
        mode = tracker.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not wandb.login(
            prompt=False, verify=False
        ):  # on a terminal `init` would wait for a key
            raise InputError("no API key; set WANDB_API_KEY, or run `wandb login`")
        known = _read_ids(job).get("wandb")
        self._folder = _Folder(job.run_uri)  # W&B makes the folder wandb/ in it
        self._run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            mode=tracker.mode,
            name=job.name,
            id=known or uuid4().hex,
            resume="allow",
            reinit="create_new",  # whoever calls us may have a run of their own
            config=_settings(job) if known is None else None,
            dir=str(self._folder.path),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                init_timeout=_WANDB_PATIENCE_S,
                finish_timeout=_WANDB_PATIENCE_S,
            ),
        )
        if self._run.disabled:
            raise InputError(f"WANDB_MODE is {mode}; set it to online or offline, or remove the key trackers.wandb")
        if known is None:
            _write_id(job, "wandb", self._run.id)
        self._run.define_metric("*", step_metric="step")
        logger.info("trackers.wandb: %s", f"offline, in {self._run.dir}" if self._run.offline else self._run.url)

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"step": row.step, **row.values})

    def flush(self) -> None:
        if self._run.offline:
            self._folder.upload()

    def close(self, status: Status) -> None:
        import wandb

        self._run.finish(exit_code=0 if status == "finished" else 1)
        if self._run.offline:
            wandb.teardown()  # its process writes the file's end only now
            self._folder.upload()


TRACKERS: dict[str, Callable[[TrainJob, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _Mlflow,
    "wandb": _Wandb,
}
"""By their key in the job, which is also their package and the extra that installs it."""
