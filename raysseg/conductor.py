"""Between the driver and Ray Train's workers: wishes go down, signs of life come up, failures are judged.

Ray Train's controller loads this module too: it must stay light.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, replace

import ray
import ray.train
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import ResizingState, TrainControllerState
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.util.placement_group import PlacementGroup

from raysseg import storage
from raysseg.link import Wish
from raysseg.runtime import as_input_error, log_to_stderr

_EXCHANGE_S = 1.0
_RESIZE_S = 60.0  # that a resize waits for the checkpoint it asked for
_AT_REST = ("start", "save")  # phases that may take longer than a step
_AT_REST_S = 1800.0
_BUGS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError, ImportError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life.

    Attributes:
        rank: of num_workers.
        process: where it runs, for people.
        phase: what it does.
        place: (step, phases begun): of two ranks, the one that holds up the other is behind.
        idle_s: seconds since the phase began.
    """

    rank: int
    num_workers: int
    process: str
    phase: str
    place: tuple[int, int]
    idle_s: float


class Conductor:
    """An actor that belongs to the driver, known to all ranks."""

    def __init__(self) -> None:
        self._wish = Wish.NOTHING
        self._signs: dict[int, tuple[Sign, float, ActorHandle]] = {}

    def exchange(self, sign: Sign, actor: ActorHandle) -> Wish:
        """Takes a sign of life; gives the first rank what the driver wishes."""
        self._signs = {rank: entry for rank, entry in self._signs.items() if rank < sign.num_workers}
        self._signs[sign.rank] = sign, time.monotonic(), actor
        if sign.rank:
            return Wish.NOTHING
        wish, self._wish = self._wish, self._wish & ~Wish.SAVE  # asked once; to stop stands
        return wish

    def leave(self, rank: int) -> None:
        """A rank is through."""
        self._signs.pop(rank, None)

    def is_alone(self) -> bool:
        """Whether no rank is at work."""
        return not self._signs

    def forget(self) -> None:
        """The group has come to its end."""
        self._signs.clear()

    def ask(self, wish: Wish) -> None:
        """Passes a wish on."""
        self._wish |= wish

    def stuck(self, timeout_s: float) -> list[tuple[Sign, ActorHandle]]:
        """The ranks that hold up the others, told once: whose process is silent, or that are behind when none moves."""
        now = time.monotonic()
        found = [(sign, actor) for sign, heard, actor in self._signs.values() if now - heard > timeout_s]
        signs = [replace(sign, idle_s=sign.idle_s + now - heard) for sign, heard, _ in self._signs.values()]
        limits = [max(timeout_s, _AT_REST_S) if sign.phase in _AT_REST else timeout_s for sign in signs]
        is_moving = any(sign.idle_s <= limit for sign, limit in zip(signs, limits, strict=True))
        if signs and not found and not is_moving and len(signs) == signs[0].num_workers:
            last = min(sign.place for sign in signs)
            found = [(sign, actor) for sign, _, actor in self._signs.values() if sign.place == last]
        for sign, _ in found:
            self._signs.pop(sign.rank)
        return found


class Line:
    """A rank's end of the line to the conductor; a thread keeps it open."""

    def __init__(self, conductor: ActorHandle) -> None:
        context = ray.train.get_context()
        self._conductor = conductor
        self._actor = ray.get_runtime_context().current_actor
        process = f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"
        self._sign = Sign(context.get_world_rank(), context.get_world_size(), process, "start", (0, 0), 0.0)
        self._since = time.monotonic()
        self._wish = Wish.NOTHING
        self._was_preempted = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raysseg-line", daemon=True)
        self._thread.start()

    def wishes(self) -> Wish:
        """What the driver wishes; a checkpoint is asked for once."""
        wish, self._wish = self._wish, self._wish & ~Wish.SAVE
        return wish

    def mark(self, phase: str, step: int) -> None:
        """Tells what the rank does now."""
        self._sign = replace(self._sign, phase=phase, place=(step, self._sign.place[1] + 1))
        self._since = time.monotonic()

    def beat(self) -> None:
        """Tells that the phase goes on."""
        self._since = time.monotonic()

    def is_preempted(self) -> bool:
        """Whether Ray drains a node that a rank runs on; every rank must call it."""
        info = ray.train.get_preemption_info()
        if info is not None and not self._was_preempted:
            logger.warning("nodes are going away, with the workers %s: checkpoints are written", info.preempted_ranks)
        self._was_preempted = info is not None
        return self._was_preempted

    def close(self) -> None:
        """The rank is through."""
        self._closed.set()
        self._thread.join()
        self._conductor.leave.remote(self._sign.rank)

    def _run(self) -> None:
        while not self._closed.wait(_EXCHANGE_S):
            sign = replace(self._sign, idle_s=time.monotonic() - self._since)
            try:
                wish = ray.get(self._conductor.exchange.remote(sign, self._actor))
            except ray.exceptions.ActorUnavailableError:
                continue  # a connection broke
            except ray.exceptions.RayError:
                return  # the driver is gone, and soon this process
            self._wish |= wish


class Judge(ray.train.UserCallback):  # type: ignore[misc]
    """Ends a run whose failures no restart mends: mistakes, bugs, and too many in a row without a new checkpoint."""

    def __init__(self, conductor: ActorHandle, run_uri: str, most: int) -> None:
        self._conductor = conductor
        self._run_uri = run_uri
        self._most = most
        self._in_a_row = 0
        self._known: set[int] = set()

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Raises what ends the run; Ray asks once a poll."""
        self._conductor.forget.remote()
        if any(_is_preempted_actor(error) for error in worker_exceptions.values()):
            return
        for error in worker_exceptions.values():
            mistake = as_input_error(error)
            if mistake is not None and not getattr(mistake, "is_transient", False):
                raise mistake
            if mistake is None and isinstance(error, _BUGS):
                raise error
        found = _checkpoints(self._run_uri)
        self._in_a_row = 1 if found - self._known else self._in_a_row + 1
        self._known |= found
        first = next(iter(worker_exceptions.values()))
        reason = (str(first).strip() or type(first).__name__).splitlines()[-1]
        if self._in_a_row > self._most:
            raise RuntimeError(
                f"{self._in_a_row} failures in a row without a new checkpoint in between (scaling.max_failures), "
                f"the last one: {reason}"
            ) from first
        log_to_stderr()
        logger.warning(
            "workers %s failed (%s); the run starts again from its newest checkpoint", [*worker_exceptions], reason
        )


class Steward(ControllerCallback):  # type: ignore[misc]
    """Has a checkpoint written before Ray Train ends a group of workers to make it larger or smaller.

    It also notes what Ray has reserved for the run. Where the driver is killed, Ray would hold that for three minutes,
    and the next start would wait for it.
    """

    def __init__(self, conductor: ActorHandle, run_uri: str) -> None:
        self._conductor = conductor
        self._run_uri = run_uri

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Notes under which name Ray reserves the run's resources."""
        storage.write_text(_reservation_uri(self._run_uri), f"train-{train_run_context.run_id}")

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Waits for the checkpoint, for a while."""
        if not isinstance(current_state, ResizingState):
            return
        before = _checkpoints(self._run_uri)
        ray.get(self._conductor.ask.remote(Wish.SAVE))
        deadline = time.monotonic() + _RESIZE_S
        while not _checkpoints(self._run_uri) - before and time.monotonic() < deadline:
            if ray.get(self._conductor.is_alone.remote()):
                break  # training has come to its end meanwhile
            time.sleep(0.5)
        ray.get(self._conductor.forget.remote())


def note_place(run_uri: str) -> None:
    """Notes which placement group holds the run's workers; one of them calls it."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        storage.write_text(_place_uri(run_uri), group.id.hex())


def release_former(run_uri: str) -> None:
    """Gives back what Ray holds for this run, whose driver, or whose trial's process, was killed."""
    uri = _reservation_uri(run_uri)
    if storage.exists(uri):
        get_or_create_autoscaling_coordinator().cancel_request.remote(storage.read_text(uri))
    uri = _place_uri(run_uri)
    if storage.exists(uri):
        group = PlacementGroup(PlacementGroupID.from_hex(storage.read_text(uri)))
        if ray.util.placement_group_table(group).get("state", "REMOVED") != "REMOVED":
            ray.util.remove_placement_group(group)


def _place_uri(run_uri: str) -> str:
    return storage.join(run_uri, "ray", "placement_group.txt")


def _reservation_uri(run_uri: str) -> str:
    return storage.join(run_uri, "ray", "reservation.txt")


def _checkpoints(run_uri: str) -> set[int]:
    """The steps of all that were written to their end; none while the storage is away."""
    from raysseg import checkpoint  # imports torch, and is asked where something went wrong alone

    try:
        return set(checkpoint.steps(run_uri))
    except storage.StorageError as error:
        if not error.is_transient:
            raise
        return set()
