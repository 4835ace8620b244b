"""Models behind an HTTP interface: on a Ray cluster, autoscaled, or in this process."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysseg import config
from raysseg.config import S3, ServedBundle, ServedPrompt, ServeJob
from raysseg.schema import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from raysseg.serve.cluster import Application
    from raysseg.serve.prompt import Prompter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeResult:
    """What `raysseg serve` prints in the end.

    Attributes:
        name: of the job.
        url: of the playground; the interface is below it.
        models: their names.
    """

    name: str
    url: str
    models: list[str]


def serve(job: ServeJob) -> ServeResult:
    """Runs a serve job: until a signal ends it, or, on a cluster that it has joined, beyond its own end.

    Raises:
        InputError: a bundle, weights or the token can't be had, or the port is taken.
    """
    if job.local:
        _serve_here(job)
    else:
        from raysseg.serve.cluster import serve_on_ray

        serve_on_ray(job)
    return ServeResult(job.name, to_url(job), list(job.models))


def build_app(job: ServeJob | Mapping[str, object] | str) -> Application:
    """The application, for `serve.run`, and for `serve run raysseg.serve:build_app job=serve.yaml` and the like.

    Args:
        job: a serve job; its file's path; its keys; or `{"job": PATH}` with overrides by dotted path.

    Raises:
        InputError: it is no serve job.
    """
    from raysseg.serve.cluster import to_application

    return to_application(job if isinstance(job, ServeJob) else read_job(job))


def read_job(given: Mapping[str, object] | str) -> ServeJob:
    """A serve job from the arguments of an application; see build_app."""
    if isinstance(given, str):
        job = config.load(given)
    elif "job" in given:
        overrides = [f"{key}={value}" for key, value in given.items() if key != "job"]
        job = config.load(str(given["job"]), overrides)
    else:
        job = config.compose({"kind": "serve", **given}, [], "args")
    if not isinstance(job, ServeJob):
        raise InputError(f"job: kind is {job.kind!r}; a serve job is needed")
    return job


def build_local_app(job: ServeJob) -> FastAPI:
    """The same interface in this process, one copy of each model, without Ray; for an ASGI server.

    Raises:
        InputError: a bundle, weights or the token can't be had.
    """
    from raysseg.serve.api import build_api
    from raysseg.serve.segment import Segmenter, find_bundle

    bundles = {name: served for name, served in job.models.items() if isinstance(served, ServedBundle)}
    for served in bundles.values():
        find_bundle(served.bundle)
    segmenting = {name: Segmenter(name, served, job.s3) for name, served in bundles.items()}
    prompting = {
        name: _prompt_here(name, served, job.s3)
        for name, served in job.models.items()
        if isinstance(served, ServedPrompt)
    }
    app = build_api(segmenting, prompting, job.http)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for name, segmenter in segmenting.items():
            await segmenter.reconfigure({"bundle": bundles[name].bundle})
        yield

    app.router.lifespan_context = lifespan
    return app


def _prompt_here(name: str, served: ServedPrompt, s3: S3) -> Prompter:
    from raysseg.serve.prompt import EmbeddingsHere, Encoder, Prompter

    return Prompter(name, served, s3, EmbeddingsHere(Encoder(served, s3), served.cache_mib * 2**20))


def to_url(job: ServeJob) -> str:
    """Where the playground is."""
    host = f"[{job.http.host}]" if ":" in job.http.host else job.http.host
    return f"http://{host}:{job.http.port}/"


def _serve_here(job: ServeJob) -> None:
    import uvicorn

    app = build_local_app(job)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    family = socket.AF_INET6 if ":" in job.http.host else socket.AF_INET
    try:
        listening = socket.create_server((job.http.host, job.http.port), family=family)
    except OSError as error:
        raise InputError(
            f"http.port: {to_url(job)} can't be listened on ({error.strerror}); take another one"
        ) from error
    logger.info("serve: %s at %s", ", ".join(job.models), to_url(job))
    server.run(sockets=[listening])
