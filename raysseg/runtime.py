"""The Ray that a stage runs on: joining a cluster or starting a local one, and spreading work over it.

Ray is imported where it is used: a job with 0 workers never loads it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from raysseg.config import Scaling
from raysseg.schema import InputError
from raysseg.storage import S3_ENVIRONMENT

logger = logging.getLogger(__name__)

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Result = TypeVar("Result")

_AT_ONCE = 256  # tasks that Ray is asked for; a question which of them is ready costs time by their number

RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_COLOR_PREFIX": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def log_to_stderr() -> None:
    """Progress and warnings of ours on stderr; in workers, Ray carries them to the driver's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    package = logging.getLogger("raysseg")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS or of this machine, or starts a local one; once a process.

    The endpoint and region of the S3 storage go along to the workers; credentials are the cluster's own affair.
    """
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # a submitted job may bring these very variables
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # before the import: some are read then
    import ray

    if ray.is_initialized():
        return
    quiet = ray.LoggingConfig(log_level="ERROR")
    if "RAY_ADDRESS" in os.environ:
        forwarded = {name: os.environ[name] for name in (*S3_ENVIRONMENT, *RAY_ENVIRONMENT) if name in os.environ}
        ray.init(runtime_env={"env_vars": forwarded}, logging_level=logging.WARNING, logging_config=quiet)
    else:
        ray.init(include_dashboard=False, logging_level=logging.WARNING, logging_config=quiet)
    resources = ray.cluster_resources()
    shown = ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    logger.info(
        "Ray %s: %s, %.1f GiB of object store", ray.__version__, shown, resources["object_store_memory"] / 2**30
    )


def num_shares(scaling: Scaling) -> int:
    """Into how many parts work is cut: one a worker, and one where there is none."""
    return max(1, scaling.max_workers)


def gpus_per_worker(scaling: Scaling) -> float:
    """As the job says; else 1 where the cluster has GPUs."""
    if scaling.gpus_per_worker is not None:
        return scaling.gpus_per_worker
    import ray

    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def spread(
    work: Callable[[Shared, Piece], Iterator[Result]], shared: Shared, pieces: Sequence[Piece], scaling: Scaling
) -> Iterator[Result]:
    """Runs a generator on each piece, over the cluster or in this process; results come as they are made, in no order.

    Args:
        work: called with `shared` and a piece.
        shared: sent to the cluster once.
        pieces: one task each.
        scaling: what a task holds; with 0 workers no Ray is started.
    """
    if scaling.in_process:
        for piece in pieces:
            yield from work(shared, piece)
        return
    import ray

    connect()
    shared_ref = ray.put(shared)
    options = {
        "num_cpus": scaling.cpus_per_worker,
        "num_gpus": gpus_per_worker(scaling),
        "num_returns": "streaming",
    }
    task = ray.remote(_logged).options(**options)
    started = (task.remote(work, shared_ref, piece) for piece in pieces)
    streams = list(islice(started, max(_AT_ONCE, 2 * num_shares(scaling))))
    while streams:
        (ready,), streams = ray.wait(streams, num_returns=1)
        try:
            result: Result = ray.get(next(ready))
        except StopIteration:
            streams += islice(started, 1)
            continue
        except ray.exceptions.RayTaskError as error:
            raise as_input_error(error) or error from None
        streams.append(ready)
        yield result


def _logged(work: Callable[[Shared, Piece], Iterator[Result]], shared: Shared, piece: Piece) -> Iterator[Result]:
    log_to_stderr()
    yield from work(shared, piece)


def as_input_error(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error of Ray's, if that is what it comes from."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, InputError) and not hasattr(current, "cause"):  # Ray's own doubles carry a cause
            return current
        failures = getattr(current, "worker_failures", {})
        inner = (getattr(current, name, None) for name in ("__cause__", "cause", "controller_failure"))
        queue += [*inner, *failures.values()]
    return None
