"""Ray Serve in this process, for benchmarks that have to look behind the interface."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from raysseg.config import ServeJob
from raysseg.serve.cluster import deploy

INGRESS = "_ingress"


@contextmanager
def serving(job: ServeJob) -> Iterator[None]:
    """A job on a local Ray of this process, until the end of the block."""
    try:
        deploy(job)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def running_pids(job: ServeJob, deployment: str) -> list[int]:
    """The processes of a deployment's running replicas."""
    return [replica["pid"] for replica in _replicas(job, deployment) if replica["state"] == "RUNNING"]


def num_replicas(job: ServeJob, deployment: str) -> int:
    """Replicas that are there or about to be."""
    return sum(replica["state"] in ("STARTING", "RUNNING") for replica in _replicas(job, deployment))


def _replicas(job: ServeJob, deployment: str) -> list[dict[str, Any]]:
    # what the dashboard would show; there is no public way to it without one
    details = _get_global_client().get_serve_details()
    replicas: list[dict[str, Any]] = details["applications"][job.name]["deployments"][deployment]["replicas"]
    return replicas


def wait_until(is_there: Callable[[], bool], timeout_s: float, pause_s: float = 0.1) -> float:
    """Seconds until something is so; raises TimeoutError."""
    began = time.monotonic()
    while not is_there():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"nothing came of it in {timeout_s:.0f} s")
        time.sleep(pause_s)
    return time.monotonic() - began


def kill(pid: int) -> None:
    """SIGKILL, as the kernel does it when memory is short."""
    os.kill(pid, signal.SIGKILL)
