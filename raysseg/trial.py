"""A trial of a search, as Ray Tune runs it: a train job's own run, an epoch a step.

A trial of one worker trains in the trial's own process, which then takes the next trial; one of more workers is a run
of Ray Train.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import ray
import ray.tune
import torch

from raysseg import standing, storage
from raysseg.config import TrainJob
from raysseg.data.batches import Pair, iter_pairs
from raysseg.data.decode import Pixels
from raysseg.data.index import SampleIndex
from raysseg.desk import Account
from raysseg.inputs import Inputs, build_plan
from raysseg.link import Beside, Signals
from raysseg.place import trains_here
from raysseg.predictor import Predictor
from raysseg.runtime import gpus_per_worker, log_to_stderr
from raysseg.schema import ClassMap, InputError, Task
from raysseg.space import LATENCY
from raysseg.train import MOVABLE, iter_epochs_here
from raysseg.trainer import train_on_ray
from raysseg.worker import Plan

_LOOK_S = 2.0  # between two looks at a run of Ray Train
_TIMED = 10  # predictions, after some that warm up
_WARM_UP = 3
_OUTAGE_S = 60.0  # for which a storage that went away is left alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common.

    Attributes:
        inputs: of the train job.
        objectives: what is searched for, and the metric by which epochs are ranked.
        threads: of a trial that trains in its own process, at most.
    """

    inputs: Inputs
    objectives: frozenset[str]
    threads: int


class TrialProcess(ray.tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a trial; one process takes one trial after the other."""

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        """Begins with the first trial."""
        log_to_stderr()
        logging.getLogger("raysseg").setLevel(logging.WARNING)  # the search tells how its trials go
        torch.set_num_threads(min(shared.threads, os.cpu_count() or 1))
        self._shared = shared
        self._take(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Leaves a trial for the next one."""
        try:
            self._leave()
        except Exception:  # which is no concern of the next one
            logger.exception("trial %s ended badly", self._job.name)
        self._take(new_config["job"])
        return True

    def cleanup(self) -> None:
        """Leaves the last trial."""
        self._leave()

    def step(self) -> dict[str, Any]:
        """Trains an epoch, or waits a while for one; what goes wrong becomes the trial's reason to fail.

        Where another attempt, in a new process, may do better, the error is raised, and Ray Tune makes that attempt.
        """
        try:
            account = self._advance()
        except Exception as error:
            if getattr(error, "is_transient", False):
                time.sleep(_OUTAGE_S)
                raise
            if isinstance(error, torch.AcceleratorError):  # this process can use the GPU no more
                raise
            if not isinstance(error, InputError):
                logger.exception("trial %s failed", self._job.name)
            account = replace(self._account(), is_over=True, reason=_reason_of(error))
        return {"account": account, "done": account.is_over}

    def _take(self, job: TrainJob) -> None:
        self._job = job
        self._began = time.monotonic()
        self._training: Training | None = None

    def _advance(self) -> Account:
        """Goes on with the trial, to its end after the last epoch."""
        if self._training is None:
            standing.open_run(self._job, MOVABLE)
            plan = build_plan(self._job, self._shared.inputs)
            self._training = TrainingHere(plan) if trains_here(self._job.scaling) else TrainingOnRay(plan)
        goes_on = self._training.advance()
        account = self._account()
        if goes_on and len(account.history) < self._job.schedule.epochs:
            return account
        while self._training.advance():
            pass  # the last epoch is on storage; what comes after it ends soon
        account = replace(self._account(), is_over=True)
        return replace(account, latency_ms=self._time_prediction()) if LATENCY in self._shared.objectives else account

    def _account(self) -> Account:
        """With the rows of the epochs so far, as far as they decide anything."""
        kept = {"epoch", *self._shared.objectives}
        rows = standing.read_history_so_far(self._job)
        history = [{name: row[name] for name in kept & row.keys()} for row in rows]
        return Account(int(self._job.name), history, seconds=time.monotonic() - self._began)

    def _time_prediction(self) -> float:
        job, inputs = self._job, self._shared.inputs
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
        gc.collect()  # of its model, before the next one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, InputError) else f"{type(error).__name__}: {lines[-1]}"


def _first_image(index: SampleIndex, classes: ClassMap, task: Task) -> Pixels:
    """Of those that can be used."""
    pairs = (pair for batch in iter_pairs(index, classes, task, rows=1) for pair in batch)
    return next(pair.image for pair in pairs if isinstance(pair, Pair))


def time_prediction(job: TrainJob, image: Pixels) -> float:
    """Milliseconds, in the median, in which a run's best model predicts an image, (H, W, 3) uint8."""
    bundle_uri = storage.join(job.run_uri, standing.read_best(job)["bundle"])
    device = "cpu" if job.scaling.gpus_per_worker == 0 else None
    predictor = Predictor(bundle_uri, device=device, precision=job.precision, inference=job.inference)
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
    """A run of Ray Train, which a thread waits for."""

    def __init__(self, plan: Plan) -> None:
        self._signals = Signals()
        self._running = Beside(partial(train_on_ray, plan, self._signals), "raysseg-trial")

    def advance(self) -> bool:
        """Waits a while."""
        return not self._running.is_over(_LOOK_S)

    def close(self) -> None:
        """Has it saved, and waits for its workers' end."""
        self._signals.received = signal.SIGTERM
        self._running.is_over(None)
