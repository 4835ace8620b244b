"""Ray Train's side of a train job: its workers run the ranks, Ray Data feeds them, tasks beside them validate.

Ray's own state goes to <run>/ray, under a new name each time: it is our checkpoints that a run goes on from.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysseg import storage
from raysseg.conductor import Conductor, Judge, Line, Steward, note_place, release_former
from raysseg.config import Scaling, TrainJob
from raysseg.data import stream
from raysseg.link import Beside, Signals, Wish
from raysseg.runtime import as_input_error, gpus_per_worker, log_to_stderr
from raysseg.saver import Saved
from raysseg.schema import InputError
from raysseg.validation import validate_bundle
from raysseg.worker import Plan, train_epochs

_RESIZE_LOOK_S = 60.0  # between two looks whether an elastic run could have another number of workers
_START_TIMEOUT_S = {"fixed": "180", "elastic": "15"}  # for the workers' place; elastic: what was seen may be gone
_START_ATTEMPTS = {"fixed": 3, "elastic": 40}

logger = logging.getLogger(__name__)


def train_on_ray(plan: Plan, signals: Signals) -> None:
    """Trains all epochs in Ray Train's workers, on the Ray that this process is connected to.

    Args:
        plan: see Plan.
        signals: once one is received, the run is saved and ends.

    Raises:
        InputError: the data can't be used, or the cluster has no room for the workers.
        StorageError: the run can't be saved.
    """
    scaling = plan.job.scaling
    gpus = gpus_per_worker(scaling)
    _check_room(scaling, gpus)
    beside = _resources_beside(plan.job)
    plan_ref = ray.put(replace(plan, validates_beside=beside is not None))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    conductor = ray.remote(Conductor).options(num_cpus=0, scheduling_strategy=here).remote()
    filesystem, path = storage.filesystem(storage.join(plan.job.run_uri, "ray"))
    kind = "elastic" if scaling.is_elastic else "fixed"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = _START_TIMEOUT_S[kind]
    trainer = ray.train.torch.TorchTrainer(
        _run_rank,
        train_loop_config={"plan": plan_ref, "conductor": conductor, "reserves": _leaves_cpus(scaling, gpus)},
        torch_config=ray.train.torch.TorchConfig(timeout_s=int(scaling.collective_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": scaling.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
            elastic_resize_monitor_interval_s=_RESIZE_LOOK_S,
        ),
        run_config=ray.train.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=_START_ATTEMPTS[kind]),
            callbacks=[
                Judge(conductor, plan.job.run_uri, scaling.max_failures),
                Steward(conductor, plan.job.run_uri),
            ],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # its files hold the rest
        ),
        validation_config=_validation_config(plan_ref, beside) if beside is not None else None,
    )
    release_former(plan.job.run_uri)
    try:
        _look_after(trainer.fit, conductor, signals, scaling.step_timeout_s)
    except ray.train.TrainingFailedError as error:
        raise as_input_error(error) or error from None


def _look_after(
    fit: Callable[[], ray.train.Result], conductor: ActorHandle, signals: Signals, step_timeout_s: float
) -> None:
    """Waits for the run in a way that signals come through; replaces workers that are stuck."""
    running = Beside(fit, "raysseg-fit")
    while not running.is_over():
        if signals.received is not None:
            conductor.ask.remote(Wish.STOP)
        for sign, actor in ray.get(conductor.stuck.remote(step_timeout_s)):
            logger.warning(
                "worker %d (%s) is stuck at step %d (%s): no progress for %g s (scaling.step_timeout_s); it is ended, "
                "and the run starts again from its newest checkpoint",
                sign.rank,
                sign.process,
                sign.place[0],
                sign.phase,
                step_timeout_s,
            )
            ray.kill(actor)


def _leaves_cpus(scaling: Scaling, gpus: float) -> bool:
    """Whether data tasks find CPUs that no worker holds; those that only CPUs limit may come to hold them all."""
    return gpus > 0 or not scaling.is_elastic


def _check_room(scaling: Scaling, gpus: float) -> None:
    """Says so where the workers would take every CPU: their data tasks would then wait for ever.

    A cluster that has none at all grows, as its head takes no work.
    """
    if not _leaves_cpus(scaling, gpus):
        return
    cpus = ray.cluster_resources().get("CPU", 0.0)
    taken = scaling.min_workers * scaling.cpus_per_worker
    if cpus and taken > cpus - 1:
        raise InputError(
            f"scaling: {scaling.min_workers} workers of {scaling.cpus_per_worker:g} CPUs take {taken:g} of the "
            f"cluster's {cpus:g}, and their data tasks need one more; lower scaling.workers or scaling.cpus_per_worker"
        )


# --- a worker -----------------------------------------------------------------------------------------------------


def _run_rank(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    log_to_stderr()
    logging.getLogger().setLevel(logging.WARNING)  # some of Ray's loggers stand outside of its own tree
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")  # a hint on speed, for GPUs
    plan: Plan = ray.get(settings["plan"])
    rank = ray.train.get_context().get_world_rank()
    if rank:
        logging.getLogger("raysseg").setLevel(logging.WARNING)
    else:
        note_place(plan.job.run_uri)
    statistics: deque[str] = deque(maxlen=1)  # of the last execution; a long run has many
    share = (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()
    threads = min(max(share, 2), 8)  # more would wait for each other's Python
    decode = plan.job.data.decode
    open_stream = partial(
        stream.iter_chunks, report=statistics.append, decode=decode, threads=threads, reserves=settings["reserves"]
    )
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of objects go by it
    line = Line(settings["conductor"])
    try:
        for saved in train_epochs(plan, open_stream, device, line):
            _report_to_ray(saved, plan)
    finally:
        line.close()
    if rank == 0 and statistics:
        logger.info("Ray Data delivered the training bytes of worker 0:\n%s", statistics[0])
        storage.write_text(storage.join(plan.job.run_uri, "data.log"), statistics[0])


def _report_to_ray(saved: Saved, plan: Plan) -> None:
    """Tells Ray Train of an epoch; its checkpoint is a pointer to ours, so that nothing is copied."""
    if not saved.checkpoint_uri:
        ray.train.report(saved.row)
        return
    with tempfile.TemporaryDirectory(prefix="raysseg-") as folder:
        (Path(folder) / "pointer.json").write_text(json.dumps({"uri": saved.checkpoint_uri, "step": saved.step}))
        pointer = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(saved.row, checkpoint=pointer, validation=plan.validates_beside)


# --- validation beside training -----------------------------------------------------------------------------------


def _resources_beside(job: TrainJob) -> dict[str, float] | None:
    """What a validation task holds beside the workers; None where they validate themselves."""
    gpus = gpus_per_worker(job.scaling)
    wanted = {
        "num_cpus": job.validation.cpus,
        "num_gpus": gpus if job.validation.gpus is None else job.validation.gpus,
    }
    if job.validation.where == "inline":
        return None
    there, workers = ray.cluster_resources(), job.scaling.max_workers
    has_cpus = there.get("CPU", 0.0) - workers * job.scaling.cpus_per_worker - 1 >= wanted["num_cpus"]
    has_gpus = there.get("GPU", 0.0) - workers * gpus >= wanted["num_gpus"]
    if has_cpus and has_gpus:
        logger.info("validation runs beside training, as a task of %g CPUs and %g GPUs", *wanted.values())
        return wanted
    if job.validation.where == "beside":
        raise InputError(
            f"validation: a task of {wanted['num_cpus']:g} CPUs and {wanted['num_gpus']:g} GPUs has no room beside "
            f"{workers} workers and one data task in the cluster's {there.get('CPU', 0):g} CPUs and "
            f"{there.get('GPU', 0):g} GPUs; lower validation.cpus or scaling.workers, or set validation.where=inline"
        )
    return None


def _validation_config(plan_ref: ray.ObjectRef[Plan], resources: dict[str, float]) -> ray.train.ValidationConfig:
    settings = ray.train.ValidationTaskConfig(fn_kwargs={"plan": [plan_ref]})
    return ray.train.ValidationConfig(_validate_beside, settings, ray_remote_kwargs=resources)


def _validate_beside(checkpoint: ray.train.Checkpoint, plan: list[ray.ObjectRef[Plan]]) -> dict[str, float]:
    """Scores an epoch's bundle, in a task that Ray Train starts; the run finds the numbers on storage."""
    log_to_stderr()
    known: Plan = ray.get(plan[0])
    with checkpoint.as_directory() as folder:
        step = int(json.loads((Path(folder) / "pointer.json").read_text())["step"])
    return validate_bundle(known, step, Scaling(workers=0))
