"""Ray Serve: each model a deployment of its own behind one that takes requests in.

A replica's death fails no request: predictions change nothing, so they are asked for again. What an encoder has made is
kept by an actor of the deployment that answers prompts, which outlives each replica.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application as Application  # what this module builds
from ray.serve.config import AutoscalingConfig, DeploymentActorConfig, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from raysseg import storage
from raysseg.config import ServedBundle, ServedPrompt, ServeJob
from raysseg.hosting import Replicas
from raysseg.runtime import connect, log_to_stderr
from raysseg.schema import InputError, Prompt
from raysseg.section import seconds_of
from raysseg.serve.answers import Answer, Form
from raysseg.serve.api import build_api
from raysseg.serve.embeddings import STORE, EmbeddingStore, StoredEmbeddings
from raysseg.serve.prompt import Encoder, Prompter, to_card
from raysseg.serve.refusal import Refusal
from raysseg.serve.replica import Replica, ask
from raysseg.serve.segment import Segmenter, find_bundle, read_card

logger = logging.getLogger(__name__)

_HEALTH_S = 2.0  # between two checks of a replica
_LOAD_S = 2.0  # between two reports of the load; Ray would have 10, by a variable of each process in time to come
_LOOK_BACK_S = 5.0  # over which the load is averaged
_CARD_S = 10.0  # for which a card is taken for true
_SAY_SO_S = 5.0  # after the time of a request is up, for the answer that tells so
_INGRESS = "_ingress"  # models' names begin otherwise
_INGRESS_ONGOING = 512  # requests that one process takes in at a time
_INGRESS_BYTES = 2**20  # that such a process reserves: what reserves nothing is not spread over the nodes
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # requests are counted instead, see /metrics


def serve_on_ray(job: ServeJob) -> None:
    """Deploys a job: on a cluster that it has joined for good, on one of its own until a signal ends it.

    Raises:
        InputError: it can't be deployed; the message is the replicas'.
    """
    is_joined = "RAY_ADDRESS" in os.environ
    deploy(job)
    logger.info("serve: %s at http://%s:%d/", ", ".join(job.models), job.http.host, job.http.port)
    if not is_joined:
        _wait_for_signal()
        serve.shutdown()


def deploy(job: ServeJob) -> None:
    """Brings the cluster to what a job says, and waits until it answers; what answered before does so meanwhile.

    Raises:
        InputError: it can't be deployed; the message is the replicas'.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a Ray that is started here: requests give way to nothing
    connect()
    timeout_s = job.http.timeout_s + _SAY_SO_S
    options = HTTPOptions(host=job.http.host, port=job.http.port, request_timeout_s=timeout_s)
    serve.start(http_options=options, logging_config=_QUIET)
    running = serve.context._get_global_client().http_config
    if (running.host, running.port) != (job.http.host, job.http.port):
        raise InputError(
            f"http: Serve already listens at {running.host}:{running.port} on this cluster; take that, or end what it "
            "serves (`serve shutdown`)"
        )
    try:
        serve.run(to_application(job), name=job.name, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise InputError(f"{job.name} can't be deployed: {' '.join(_reasons(job.name)) or error}") from error


def _reasons(app_name: str) -> Iterator[str]:
    """What the replicas that could not start have raised: the last line of each traceback."""
    application = serve.status().applications.get(app_name)
    for name, status in application.deployments.items() if application else ():
        if lines := re.findall(r"^[\w.]+Error: .*", status.message, re.MULTILINE):
            yield f"{name}: {lines[-1]}"


def _wait_for_signal() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1):  # a wait without end would let no signal in
        pass
    logger.info("serve: what is under way is finished; nothing more is taken in")


def to_application(job: ServeJob) -> Application:
    """The deployments of a job: one a model, two for a prompted one, and the one that takes requests in.

    Raises:
        StorageError: a bundle is not there.
    """
    job = _pinned(job)
    surge = _surge_percent(job)
    models = []
    for name, served in job.models.items():
        if isinstance(served, ServedPrompt):
            models += _prompt_deployments(name, served, job, surge)
        else:
            options = {**_options(served, surge), "user_config": {"bundle": served.bundle}}
            replicas = serve.deployment(SegmenterReplica).options(name=name, **options)
            models.append(replicas.bind(name, served, job.s3, _device(served)))
    ingress = serve.deployment(serve.ingress(_api_builder(job))()).options(
        name=_INGRESS,
        num_replicas=job.http.replicas,
        max_ongoing_requests=_INGRESS_ONGOING,
        max_queued_requests=_INGRESS_ONGOING,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        health_check_period_s=_HEALTH_S,
        max_surge_percent=100,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": 0, "memory": _INGRESS_BYTES},
    )
    return ingress.bind(*models)


def _pinned(job: ServeJob) -> ServeJob:
    """A job whose models name bundles: else each replica would take what is best in a run when it starts.

    Those that follow a run go on to name that; its bundle is looked for all the same, as replicas take long to say that
    there is none.
    """
    models: dict[str, ServedBundle | ServedPrompt] = dict(job.models)
    for name, served in job.models.items():
        if isinstance(served, ServedBundle):
            uri, _ = find_bundle(served.bundle)
            models[name] = served if served.follow else served.model_copy(update={"bundle": uri})
    return job.model_copy(update={"models": models})


def _surge_percent(job: ServeJob) -> int:
    """How many new replicas may stand beside old ones: all, or none where the cluster has no room for that."""
    if not ray.is_initialized():
        return 100
    halves = [
        half
        for served in job.models.values()
        for half in ((served.encoder, served.decoder) if isinstance(served, ServedPrompt) else (served,))
    ]
    there = ray.cluster_resources()
    cpus = sum(max(1, half.bounds[0]) * half.cpus_per_replica for half in halves)
    gpus = sum(max(1, half.bounds[0]) * _gpus(half) for half in halves)
    if 2 * cpus <= there.get("CPU", 0) and 2 * gpus <= there.get("GPU", 0):
        return 100
    logger.info("serve: no room for old and new replicas at once; where they are replaced, requests wait for new ones")
    return 0


def _prompt_deployments(name: str, served: ServedPrompt, job: ServeJob, surge: int) -> list[Application]:
    encoder = serve.deployment(EncoderReplica).options(name=_encoder_name(name), **_options(served.encoder, surge))
    keeper = DeploymentActorConfig(
        name=STORE,
        actor_class=ray.remote(EmbeddingStore),
        init_kwargs={"encoder": _encoder_name(name), "max_bytes": served.cache_mib * 2**20},
        actor_options={"num_cpus": 0},
    )
    options = {**_options(served.decoder, surge), "deployment_actors": [keeper]}
    prompter = serve.deployment(PrompterReplica).options(name=name, **options)
    return [
        encoder.bind(served, job.s3, _device(served.encoder)),
        prompter.bind(name, served, job.s3, StoredEmbeddings(), _device(served.decoder)),
    ]


def _encoder_name(name: str) -> str:
    return f"_{name}-encoder"


def _options(replicas: Replicas, surge: int) -> dict[str, Any]:
    """How Serve is to run a deployment."""
    least, most = replicas.bounds
    actor: dict[str, Any] = {"num_cpus": replicas.cpus_per_replica}
    if (gpus := _gpus(replicas)) > 0:
        actor["num_gpus"] = gpus
    return {
        "ray_actor_options": actor,
        "max_ongoing_requests": replicas.max_ongoing,
        "max_queued_requests": replicas.max_queue,
        "health_check_period_s": _HEALTH_S,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 60,
        "max_surge_percent": surge,
        "logging_config": _QUIET,
        **({"num_replicas": least} if least == most else {"autoscaling_config": _autoscaling(replicas)}),
    }


def _autoscaling(replicas: Replicas) -> AutoscalingConfig:
    least, most = replicas.bounds
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=max(1, replicas.max_ongoing // 2),
        metrics_interval_s=_LOAD_S,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=seconds_of(replicas.upscale_delay),
        downscale_delay_s=seconds_of(replicas.downscale_delay),
    )


def _gpus(replicas: Replicas) -> float:
    """As the job says; else 1 where the cluster that this process has joined has GPUs."""
    if replicas.gpus_per_replica is not None:
        return replicas.gpus_per_replica
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0


def _device(replicas: Replicas) -> str | None:
    """A replica without a GPU of its own leaves those alone that it may see."""
    return None if _gpus(replicas) > 0 else "cpu"


# --- replicas -----------------------------------------------------------------------------------------------------


class SegmenterReplica(Replica, Segmenter):
    """A replica of a model that segments."""


class EncoderReplica(Replica, Encoder):
    """A replica of what looks at images."""


class PrompterReplica(Replica, Prompter):
    """A replica of what answers prompts."""


# --- the ingress --------------------------------------------------------------------------------------------------


def _api_builder(job: ServeJob) -> Any:
    """What makes the interface in the replica that takes requests in."""

    def build() -> FastAPI:
        log_to_stderr()
        storage.use_s3(job.s3.endpoint, job.s3.region, job.s3.anonymous)
        app_name = serve.get_replica_context().app_name
        segmenting, prompting = {}, {}
        for name, served in job.models.items():
            handle = serve.get_deployment_handle(name, app_name)
            if isinstance(served, ServedPrompt):
                prompting[name] = RemotePrompter(name, served, handle)
            else:
                segmenting[name] = RemoteSegmenter(name, served, handle)
        return build_api(segmenting, prompting, job.http)

    return build


class RemoteSegmenter:
    """A Segmenter behind a handle."""

    def __init__(self, name: str, served: ServedBundle, handle: DeploymentHandle) -> None:
        self._name, self._served, self._handle = name, served, handle
        self._card: tuple[float, dict[str, Any]] | None = None

    async def card(self) -> dict[str, Any]:
        """From the bundle itself: no replica is woken for it."""
        if self._card is None or time.monotonic() - self._card[0] > _CARD_S:
            try:
                self._card = time.monotonic(), await asyncio.to_thread(read_card, self._name, self._served)
            except storage.StorageError as error:
                if self._card is None:
                    logger.warning("the bundle of %s can't be read: %s", self._name, error)
                    raise Refusal(503, f"the bundle of {self._name} can't be read; ask again later", 10) from error
        return self._card[1]

    async def segment(self, image: bytes, form: Form) -> Answer:
        """See Segmenter."""
        answer: Answer = await ask(self._handle, "segment", image, form)
        return answer


class RemotePrompter:
    """A Prompter behind a handle."""

    def __init__(self, name: str, served: ServedPrompt, handle: DeploymentHandle) -> None:
        self._name, self._served, self._handle = name, served, handle

    async def card(self) -> dict[str, Any]:
        """See Prompter."""
        return to_card(self._name, self._served)

    async def upload(self, key: str, image: bytes) -> Answer:
        """See Prompter."""
        answer: Answer = await ask(self._handle, "upload", key, image)
        return answer

    async def prompt(self, key: str, image: bytes | None, prompt: Prompt) -> Answer:
        """See Prompter."""
        answer: Answer = await ask(self._handle, "prompt", key, image, prompt)
        return answer

    async def everything(self, key: str, image: bytes | None) -> Answer:
        """See Prompter."""
        answer: Answer = await ask(self._handle, "everything", key, image)
        return answer
