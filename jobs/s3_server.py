"""An S3 server on this machine, in memory, for the demo and the tests: moto's, of ``pip install raysseg[dev]``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_START_S = 120  # 2 s on an idle machine


@contextmanager
def s3_server(environment: Mapping[str, str] | None = None, host: str = "127.0.0.1") -> Iterator[str]:
    """Run a server for the length of the block and yield its endpoint; what it held is gone afterwards.

    Args:
        environment: variables for the server beside this process's own; see moto's documentation.
        host: the address that it listens on.
    """
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--host", host, "--port", str(port)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(server, host, port)
        yield f"http://{host}:{port}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("moto's S3 server did not start; is it installed? pip install 'raysseg[dev]'")
