"""What a rank and whoever started the run tell each other. No torch, no Ray."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from types import FrameType
from typing import Protocol


class Wish(IntFlag):
    """What a rank wants all of them to do after a step."""

    NOTHING = 0
    SAVE = 1
    """Save a checkpoint."""
    STOP = 2
    """Save a checkpoint and end."""
    REPORT = 4
    """Tell that an epoch is on storage."""
    LOOK = 8
    """Ask whether a node is going away."""
    FINISH = 16
    """End: more epochs would not help."""


class Link(Protocol):
    """What ties a rank to whoever started the run."""

    def wishes(self) -> Wish:
        """What is asked of the run from outside; does not wait."""

    def mark(self, phase: str, step: int) -> None:
        """Tells what the rank does now; all ranks run through the same phases."""

    def beat(self) -> None:
        """Tells that the phase goes on."""

    def is_preempted(self) -> bool:
        """Whether a node is going away; every rank must call it."""


@dataclass
class Signals:
    """SIGTERM and Ctrl-C: the first one asks, the second one interrupts.

    Attributes:
        received: the first one's number.
        answer: what happens then, for people.
    """

    received: int | None = None
    answer: str = "the run is saved and ends after this step"

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        name = signal.Signals(number).name
        text = f"raysseg: {name}: {self.answer}; once more, and it ends at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # logging may be in the middle of a line


@contextmanager
def signals_noted(signals: Signals | None = None) -> Iterator[Signals]:
    """Takes the signals that end a process as a question, for the length of the block; in the main thread alone."""
    signals = signals or Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals._note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Alone:
    """The link of a run in this process."""

    signals: Signals

    def wishes(self) -> Wish:
        """To stop, after a signal."""
        return Wish.STOP if self.signals.received is not None else Wish.NOTHING

    def mark(self, phase: str, step: int) -> None:
        """Nobody looks on."""

    def beat(self) -> None:
        """Nobody listens."""

    def is_preempted(self) -> bool:
        """Never: a process has no notice of that."""
        return False


class Beside:
    """A call in a thread of its own, so that this one stays free for signals."""

    def __init__(self, act: Callable[[], object], name: str) -> None:
        self._act = act
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def is_over(self, wait_s: float | None = 1.0) -> bool:
        """Waits for a while, or for its end; raises what the call raised."""
        self._thread.join(wait_s)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:  # whoever waits for it gets it
            self._error = error
