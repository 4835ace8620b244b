"""Puts a run on storage while it trains: the loop hands over a copy of its state, and a thread does the rest."""

from __future__ import annotations

import copy
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

from raysseg import bundle as bundles
from raysseg import checkpoint, standing
from raysseg.bundle import Bundle
from raysseg.checkpoint import Snapshot
from raysseg.config import TrainJob
from raysseg.loop import TrainState, scored_model
from raysseg.models import SegModel
from raysseg.storage import StorageError

_PAUSES_S = (5.0, 20.0, 60.0)  # between attempts where the storage fails for reasons that may pass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """An epoch is trained and on storage; the first rank alone knows where."""

    step: int
    row: dict[str, float]
    checkpoint_uri: str


class Saver:
    """One save at a time. A checkpoint within an epoch that fails is left out; an epoch has to be saved.

    Args:
        job: of the run.
        bundle: what all bundles of the run have in common.
        validates_beside: every epoch needs its bundle, since its validation is still to come.
    """

    def __init__(self, job: TrainJob, bundle: Bundle, *, validates_beside: bool) -> None:
        self._job, self._bundle, self._validates_beside = job, bundle, validates_beside
        self._pending: Future[Snapshot] | None = None
        self._is_epoch = False
        self._spare: Snapshot | None = None  # lends its memory to the next one

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way, or an epoch waits to be taken."""
        return self._pending is not None and (self._is_epoch or not self._pending.done())

    @property
    def has_epoch(self) -> bool:
        """Whether `take` need not wait."""
        return self._is_epoch and self._pending is not None and self._pending.done()

    def save(self, state: TrainState, *, is_epoch: bool) -> None:
        """Begins to save a state; waits for the save before, and for nothing else."""
        self.finish()
        snapshot = checkpoint.take(state, into=self._spare)
        model = copy.deepcopy(scored_model(state, self._job.ema)).cpu() if is_epoch else None
        self._pending, self._is_epoch = Future(), is_epoch
        # not one of a pool, which the interpreter would wait for at its end
        thread = threading.Thread(target=self._run, args=(self._pending, snapshot, model), daemon=True)
        thread.start()

    def _run(self, pending: Future[Snapshot], snapshot: Snapshot, model: SegModel | None) -> None:
        try:
            pending.set_result(self._write(snapshot, model))
        except BaseException as error:  # whoever waits for it gets it
            pending.set_exception(error)

    def take(self, state: TrainState) -> Saved:
        """Waits for the epoch that is being saved; validations that have come since join the state's history.

        Raises:
            StorageError: it can't be saved.
        """
        assert self._is_epoch, "there is no epoch to take"
        assert self._pending is not None
        self._spare, self._pending, self._is_epoch = self._pending.result(), None, False
        history = self._spare.history
        state.history = [*history, *state.history[len(history) :]]
        return Saved(self._spare.step, history[-1], checkpoint.uri_of(self._job.run_uri, self._spare.step))

    def finish(self, *, is_last: bool = False) -> None:
        """Waits for the checkpoint that is being saved, if there is one.

        Raises:
            StorageError: it can't be saved, and no other one follows.
        """
        assert not self._is_epoch, "an epoch is to be taken first"
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._spare = pending.result()
        except StorageError as error:
            if is_last:
                raise
            logger.warning("a checkpoint was left out; training goes on, and the one before stands: %s", error)

    def _write(self, snapshot: Snapshot, model: SegModel | None) -> Snapshot:
        """What the thread does; with the model of an epoch's bundle."""
        for pause_s in _PAUSES_S:
            try:
                return self._write_once(snapshot, model)
            except StorageError as error:
                if not error.is_transient:
                    raise
                logger.warning("step %d is not saved yet; once more in %g s: %s", snapshot.step, pause_s, error)
            time.sleep(pause_s)
        return self._write_once(snapshot, model)

    def _write_once(self, snapshot: Snapshot, model: SegModel | None) -> Snapshot:
        job = self._job
        if self._validates_beside:
            snapshot = replace(snapshot, history=standing.with_validations(job, snapshot.history))
        if model is None:
            started = time.perf_counter()
            uri = checkpoint.write(job.run_uri, snapshot)
            standing.thin_checkpoints(job, snapshot.history)
            logger.info("step %d: saved %s in %.1f s", snapshot.step, uri, time.perf_counter() - started)
            return snapshot
        if standing.is_among_best(job, snapshot.history) or self._validates_beside:
            uri = standing.bundle_uri(job, snapshot.step)  # first: a checkpoint that knows of an epoch has its bundle
            bundles.write(replace(self._bundle, uri=uri, metrics=snapshot.history[-1]), model)
        checkpoint.write(job.run_uri, snapshot)
        standing.settle(job, snapshot.history)
        return snapshot
