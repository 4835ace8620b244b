"""Who is stuck, what is passed on, and which failures end a run; the classes as such, without a cluster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raysseg import conductor
from raysseg.conductor import Conductor, Judge, Sign
from raysseg.link import Wish
from raysseg.schema import InputError
from raysseg.storage import StorageError


def sign(rank: int, phase: str, place: tuple[int, int], idle_s: float, num_workers: int = 3) -> Sign:
    return Sign(rank, num_workers, f"pid {rank}", phase, place, idle_s)


def told(*signs: Sign) -> Conductor:
    found = Conductor()
    for entry in signs:
        found.exchange(entry, f"actor {entry.rank}")
    return found


def stuck(found: Conductor, timeout_s: float = 10.0) -> list[int]:
    return [entry.rank for entry, _ in found.stuck(timeout_s)]


def test_who_is_behind_holds_up_the_others() -> None:
    """Rank 1 waits for data of step 5; the others have theirs, and wait for it in the step."""
    found = told(sign(0, "step", (5, 12), 40), sign(1, "data", (5, 11), 41), sign(2, "step", (5, 12), 40))
    assert stuck(found) == [1]
    assert stuck(found) == [], "told once"


def test_all_are_named_where_none_is_behind() -> None:
    assert stuck(told(*(sign(rank, "step", (5, 12), 40) for rank in range(3)))) == [0, 1, 2]


@pytest.mark.parametrize(
    "signs",
    [
        (sign(0, "step", (5, 12), 40), sign(1, "data", (5, 11), 9), sign(2, "step", (5, 12), 40)),  # one moves
        (
            sign(0, "save", (5, 12), 400),
            sign(1, "step", (5, 12), 400),
            sign(2, "step", (5, 12), 400),
        ),  # storage is slow
        (sign(0, "step", (5, 12), 40), sign(1, "data", (5, 11), 41)),  # not all have started
        (),
    ],
)
def test_nobody_is_stuck(signs: tuple[Sign, ...]) -> None:
    assert stuck(told(*signs)) == []


def test_a_silent_process_is_stuck_whatever_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(*(sign(rank, "step", (5, 12), 1) for rank in range(3)))
    now = time.monotonic()
    monkeypatch.setattr(conductor.time, "monotonic", lambda: now + 30)
    for rank in (0, 2):
        found.exchange(sign(rank, "step", (5, 12), 31), "actor")
    assert stuck(found) == [1]


def test_ranks_of_a_larger_group_are_forgotten() -> None:
    found = told(*(sign(rank, "step", (5, 12), 40) for rank in range(3)))
    found.exchange(sign(0, "step", (2, 3), 0, num_workers=1), "actor")
    assert stuck(found) == []
    found.leave(0)
    assert stuck(found, timeout_s=0.0) == []


def test_wishes_reach_the_first_rank_and_a_checkpoint_is_asked_for_once() -> None:
    found = Conductor()
    found.ask(Wish.SAVE)
    found.ask(Wish.STOP)
    assert found.exchange(sign(1, "step", (1, 1), 0), "actor") == Wish.NOTHING
    assert found.exchange(sign(0, "step", (1, 1), 0), "actor") == Wish.SAVE | Wish.STOP
    assert found.exchange(sign(0, "step", (1, 1), 0), "actor") == Wish.STOP


# --- failures -----------------------------------------------------------------------------------------------------


class Remote:
    """Stands for the conductor's handle, which is told that the group has come to its end."""

    @property
    def forget(self) -> Remote:
        return self

    def remote(self) -> None: ...


def save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("{}")


@pytest.mark.parametrize(
    "error",
    [
        InputError("data.train: x.png can't be read"),
        StorageError("s3://b", "access is denied", "Allow it."),
        KeyError("x"),
    ],
)
def test_mistakes_and_bugs_end_the_run(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        Judge(Remote(), str(tmp_path), 3).after_exception(
            None, {1: RuntimeError("Connection closed by peer"), 0: error}
        )
    assert caught.value is error


def test_a_storage_that_is_away_for_a_while_does_not_end_it(tmp_path: Path) -> None:
    Judge(Remote(), str(tmp_path), 3).after_exception(
        None, {0: StorageError("s3://b", "fails", "Wait.", is_transient=True)}
    )


def test_failures_in_a_row_without_progress_end_the_run(tmp_path: Path) -> None:
    judge = Judge(Remote(), str(tmp_path), most=2)
    lost = {0: RuntimeError("worker died")}
    for step in range(5):  # there is a new checkpoint each time
        save(tmp_path, step)
        judge.after_exception(None, lost)
    judge.after_exception(None, lost)
    with pytest.raises(RuntimeError, match=r"3 failures in a row .*scaling\.max_failures.*worker died"):
        judge.after_exception(None, lost)
