"""Commands as a user starts them, watched from outside, on a machine that other guests of its host slow down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_STOLEN = 0.15
"""Share of this machine's CPU time that its host may give to others while something is timed."""


class Line(NamedTuple):
    """A line of a command's stderr, without its end.

    Attributes:
        at: seconds from the command's start to its arrival.
        stolen: CPU seconds, over all cores, that the host has given to others in this time; 0 where it does not say.
    """

    text: str
    at: float
    stolen: float


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> list[Line]:
    """Runs `python <arguments>` to its end; returns its stderr and, as the end's own time, an empty line.

    Args:
        arguments: of the interpreter.
        environment: on top of this process's own.

    Raises:
        RuntimeError: the command failed.
    """
    started, stolen = time.perf_counter(), _stolen()

    def now(text: str) -> Line:
        return Line(text.rstrip(), time.perf_counter() - started, _stolen() - stolen)

    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = [now(text) for text in process.stderr]
    if process.returncode:
        tail = [line.text for line in lines[-30:]]
        raise RuntimeError("\n".join([f"{' '.join(command)} came to {process.returncode}", *tail]))
    return [*lines, now("")]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def find(lines: Sequence[Line], awaited: str) -> Line:
    """The first line that holds a text; raises RuntimeError if there is none."""
    for line in lines:
        if awaited in line.text:
            return line
    raise RuntimeError("\n".join([f"{awaited!r} did not come", *(line.text for line in lines[-30:])]))


def is_quiet(begin: Line, end: Line) -> bool:
    """Whether the machine was left alone between two lines of one command."""
    return end.stolen - begin.stolen <= MAX_STOLEN * (end.at - begin.at) * (os.cpu_count() or 1)


START = Line("", 0.0, 0.0)


def alternate_quiet(
    ours: Callable[[], float | None], peer: Callable[[], float | None], rounds: int
) -> tuple[list[float], list[float]]:
    """Figures of both, in turn; a pair in which either is None, for a busy machine, is left out and tried again.

    Raises:
        RuntimeError: after three times as many pairs.
    """
    pairs: list[tuple[float, float]] = []
    for _ in range(3 * rounds):
        a, b = ours(), peer()
        print(f"ours {a}, peer {b}", file=sys.stderr, flush=True)
        if a is not None and b is not None:
            pairs.append((a, b))
        if len(pairs) == rounds:
            return [a for a, _ in pairs], [b for _, b in pairs]
    raise RuntimeError(
        f"only {len(pairs)} of {3 * rounds} pairs ran with less than {MAX_STOLEN:.0%} of the CPU time given to others"
    )


def _stolen() -> float:
    """CPU seconds that the host has given to others since this machine was started."""
    stat = Path("/proc/stat")
    ticks = int(stat.read_text().split(maxsplit=9)[8]) if stat.exists() else 0
    return ticks / os.sysconf("SC_CLK_TCK")
