"""A trial of a search, as Ray Tune runs it: a train job's own run, an epoch a step.

A trial of one worker trains in the trial's own process, which then takes the next trial; one of more workers is a run
of Ray Train.
"""

from __future__ import annotations

import logging
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.tune
import torch

from raysseg import standing, storage
from raysseg.config import Scaling, TrainJob, TuneJob
from raysseg.data.batches import Pair, iter_pairs
from raysseg.data.decode import Pixels
from raysseg.data.index import SampleIndex
from raysseg.desk import Account
from raysseg.inputs import Inputs, build_plan
from raysseg.link import Signals
from raysseg.predictor import Predictor
from raysseg.runtime import gpus_per_worker, log_to_stderr
from raysseg.schema import ClassMap, InputError, Task
from raysseg.standing import History
from raysseg.storage import StorageError
from raysseg.train import MOVABLE, iter_epochs_here
from raysseg.trainer import train_on_ray
from raysseg.worker import Plan

_LOOK_S = 2.0  # between two looks at a run of Ray Train
_TIMED = 10  # predictions, after some that warm up
_WARM_UP = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common.

    Attributes:
        job: the search.
        inputs: of its train job.
        threads: of a trial that trains in its own process.
        is_timed: whether latency is an objective.
    """

    job: TuneJob
    inputs: Inputs
    threads: int
    is_timed: bool


def trains_here(scaling: Scaling) -> bool:
    """Whether a trial trains in its own process."""
    return scaling.max_workers <= 1


class TrialProcess(ray.tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a trial; one process takes one trial after the other."""

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        """Begins with the first trial."""
        log_to_stderr()
        logging.getLogger("raysseg").setLevel(logging.WARNING)  # the search tells how its trials go
        torch.set_num_threads(shared.threads)
        self._shared = shared
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Leaves a trial for the next one."""
        self._leave()
        self._take(new_config)
        return True

    def cleanup(self) -> None:
        """Leaves the last trial."""
        self._leave()

    def step(self) -> dict[str, Any]:
        """Trains an epoch, or waits a while for one; whatever goes wrong becomes the trial's reason to fail."""
        try:
            account = self._advance()
        except Exception as error:
            if not isinstance(error, InputError):
                logger.exception("trial %d failed", self._number)
            account = Account(self._number, self._history(), True, self._seconds(), reason=_reason_of(error))
        return {"account": account, "done": account.is_over}

    def _take(self, config: dict[str, Any]) -> None:
        self._number, self._overrides = int(config["number"]), dict(config["overrides"])
        self._began = time.monotonic()
        self._job: TrainJob | None = None
        self._training: Training | None = None

    def _advance(self) -> Account:
        if self._training is None:
            self._job = self._shared.job.trial_job(self._number, self._overrides)
            standing.open_run(self._job, MOVABLE)
            plan = build_plan(self._job, self._shared.inputs)
            self._training = TrainingHere(plan) if trains_here(self._job.scaling) else TrainingOnRay(plan)
        goes_on = self._training.advance()
        history = self._history()
        assert self._job is not None
        if goes_on and len(history) < self._job.schedule.epochs:
            return Account(self._number, history, False, self._seconds())
        while self._training.advance():
            pass  # the last epoch is on storage; what comes after it ends soon
        latency_ms = self._time_prediction(self._job) if self._shared.is_timed else None
        return Account(self._number, self._history(), True, self._seconds(), latency_ms)

    def _history(self) -> History:
        if self._job is None or not storage.exists(storage.join(self._job.run_uri, "metrics.jsonl")):
            return []
        return standing.read_history(self._job)

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _time_prediction(self, job: TrainJob) -> float:
        inputs = self._shared.inputs
        image = _first_image(inputs.splits["val"], inputs.classes, job.task)
        if trains_here(job.scaling):
            return time_prediction(job, image)
        gpus = gpus_per_worker(job.scaling)
        options = {"num_cpus": job.scaling.cpus_per_worker, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        latency_ms: float = ray.get(ray.remote(time_prediction).options(**options).remote(job, image))
        return latency_ms

    def _leave(self) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None


def _reason_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, InputError | StorageError) else f"{type(error).__name__}: {lines[-1]}"


def _first_image(index: SampleIndex, classes: ClassMap, task: Task) -> Pixels:
    """Of those that can be used."""
    pairs = (pair for batch in iter_pairs(index, classes, task, rows=1) for pair in batch)
    return next(pair.image for pair in pairs if isinstance(pair, Pair))


def time_prediction(job: TrainJob, image: Pixels) -> float:
    """Milliseconds, in the median, in which a run's best model predicts an image, (H, W, 3) uint8."""
    bundle_uri = storage.join(job.run_uri, standing.read_best(job)["bundle"])
    predictor = Predictor(bundle_uri, precision=job.precision, inference=job.inference)
    seconds = [_seconds_of(lambda: predictor.predict([image])) for _ in range(_WARM_UP + _TIMED)]
    return 1000 * statistics.median(seconds[_WARM_UP:])


def _seconds_of(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- a run under way ----------------------------------------------------------------------------------------------


class Training(Protocol):
    """A trial's run."""

    def advance(self) -> bool:
        """Goes on for a while, an epoch at most; False once there is nothing more to do."""

    def close(self) -> None:
        """Ends it where it stands."""


class TrainingHere:
    """A run in this process: it stands still between two steps."""

    def __init__(self, plan: Plan) -> None:
        self._epochs = iter_epochs_here(plan, Signals())

    def advance(self) -> bool:
        """Trains an epoch."""
        return next(self._epochs, None) is not None

    def close(self) -> None:
        """Lets go of it."""
        self._epochs.close()


class TrainingOnRay:
    """A run of Ray Train, in a thread that waits for it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._signals = Signals()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="raysseg-trial", daemon=True)
        self._thread.start()

    def advance(self) -> bool:
        """Waits a while."""
        self._thread.join(_LOOK_S)
        if self._error is not None:
            raise self._error
        return self._thread.is_alive()

    def close(self) -> None:
        """Has it saved, and waits for its workers' end."""
        self._signals.received = signal.SIGTERM
        self._thread.join()

    def _run(self) -> None:
        try:
            train_on_ray(self._plan, self._signals)
        except BaseException as error:  # whoever looks on gets it
            self._error = error
