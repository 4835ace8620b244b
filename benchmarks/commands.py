"""Commands as a user starts them, watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence


def run(arguments: Sequence[str], environment: Mapping[str, str], awaited: str = "") -> tuple[float, list[str]]:
    """Runs `python <arguments>` to its end.

    Args:
        arguments: of the interpreter.
        environment: on top of this process's own.
        awaited: what the awaited line on stderr holds; empty: none is awaited.

    Returns:
        Seconds from the start to the arrival of the awaited line (to the end if none is awaited), and all of stderr.

    Raises:
        RuntimeError: the command failed, or the line did not come.
    """
    started = time.perf_counter()
    command = [sys.executable, *arguments]
    lines: list[str] = []
    arrived = None
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if awaited and arrived is None and awaited in line:
                arrived = time.perf_counter() - started
    if process.returncode or (awaited and arrived is None):
        raise RuntimeError("\n".join([f"{' '.join(command)} came to {process.returncode}", *lines[-30:]]))
    return time.perf_counter() - started if arrived is None else arrived, lines
