"""A head node of Ray in processes of its own, which end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.serve_sides import free_port

_START_S = 120


@contextmanager
def ray_head(
    folder: Path, options: Mapping[str, object], variables: Mapping[str, str], is_ready: Callable[[], bool]
) -> Iterator[None]:
    """Runs a head for the length of the block.

    Args:
        folder: for its files; short, as the paths of sockets have a limit.
        options: of `ray start`; ports that are left out are free ones.
        variables: of its environment, beside this process's.
        is_ready: whether it answers.
    """
    ports = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    given = {**{name: free_port() for name in ports}, "temp-dir": folder, "node-ip-address": "127.0.0.1", **options}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **variables,
    }
    with (folder / "log").open("w") as log:
        ray = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in given.items())],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(is_ready, folder / "log")
        yield
    finally:
        ray.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            ray.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(ray.pid, signal.SIGKILL)


def _wait(is_ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not is_ready():
        if time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.5)
