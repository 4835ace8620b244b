"""What each step of a request costs, from the Predictor alone to the whole path: a part of bench_serve."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve.schema import LoggingConfig

from benchmarks.commands import free_port
from benchmarks.results import Row
from benchmarks.serve_cluster import serving
from benchmarks.serve_load import Ask, Load, send
from benchmarks.serve_peers import Model
from benchmarks.serve_sides import (
    draw_images,
    ours_command,
    running,
    segment_url,
    serve_job,
    to_asks,
    write_bundle,
)
from raysseg.data.decode import decode_image
from raysseg.serve.answers import Answer

_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # as raysseg's own

Step = Callable[[], float]
"""Takes a step for a number of requests, one after another; returns the median of their milliseconds."""


class Echo:
    """A replica that answers at once."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def call(self, method: str, image: bytes, form: str) -> Answer:
        """As a model's replica is called."""
        return Answer(self._body, "application/json")


def build_bare(body: bytes) -> FastAPI:
    """Reads a request, and answers at once."""
    app = FastAPI()

    async def answer(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    app.add_api_route("/at-once", answer, methods=["POST"], response_model=None)
    return app


def build_relay(app_name: str) -> FastAPI:
    """Reads a request, and has an echo answer it."""
    app, handle = FastAPI(), serve.get_deployment_handle("echo", app_name)

    async def answer(request: Request) -> Response:
        found = await handle.call.remote("segment", await request.body(), "json")
        return Response(found.body, media_type=found.media_type)

    app.add_api_route("/by-echo", answer, methods=["POST"], response_model=None)
    return app


def deploy_bare(body: bytes) -> None:
    """Beside the job: an ingress that answers at once, and one whose answers come from another replica."""
    options = {"ray_actor_options": {"num_cpus": 0.1}, "logging_config": _QUIET}
    bare = serve.deployment(serve.ingress(lambda: build_bare(body))())
    serve.run(bare.options(name="bare", **options).bind(), name="bare", route_prefix="/bare")
    echo = serve.deployment(Echo).options(name="echo", **options).bind(body)
    relay = serve.deployment(serve.ingress(lambda: build_relay("relay"))())
    serve.run(relay.options(name="relay", **options).bind(echo), name="relay", route_prefix="/relay")


def measure_hops(options: argparse.Namespace, folder: Path) -> list[Row]:
    """The median of each step by rounds, in turns, and what the whole path adds to the Predictor's own work."""
    images = draw_images(folder / "data", options.images, options.side)
    bundle = write_bundle(folder / "data/classes.json", options.model, folder / "bundle")
    model, files = Model(bundle), [path.read_bytes() for path in images]
    job, local = serve_job(bundle, free_port()), serve_job(bundle, free_port())
    base = f"http://127.0.0.1:{job.http.port}"
    command = ours_command(local, folder / "local.json", is_local=True)
    with running(command, f"http://127.0.0.1:{local.http.port}/healthz", folder / "local.log"), serving(job):
        deploy_bare(model.answer(files[0]))

        def over_http(url: str) -> Step:
            asks = to_asks(images, folder / "forms", url)
            return lambda: http_ms(asks, options.requests)

        steps: dict[str, Step] = {
            "predict": lambda: direct_ms(predictor_calls(model, files), options.requests),
            "decode, predict": lambda: direct_ms(decoding_calls(model, files), options.requests),
            "decode, predict, encode": lambda: direct_ms(answer_calls(model, files), options.requests),
            "local app by uvicorn": over_http(segment_url(local.http.port)),
            "handle call, answered at once": lambda: direct_ms(handle_calls(files), options.requests),
            "ingress of Serve, answered at once": over_http(f"{base}/bare/at-once"),
            "ingress, handle call": over_http(f"{base}/relay/by-echo"),
            "whole path": over_http(segment_url(job.http.port)),
        }
        for step in steps.values():
            step()  # until all is warm
        found: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(options.rounds):
            for name, step in steps.items():
                found[name].append(step())
                print(f"round {i}, {name}: {found[name][-1]:.1f} ms", flush=True)
    return to_rows(found)


def predictor_calls(model: Model, files: list[bytes]) -> list[Callable[[], object]]:
    return [partial(model.predict, [decode_image(file)]) for file in files]


def decoding_calls(model: Model, files: list[bytes]) -> list[Callable[[], object]]:
    def call(file: bytes) -> object:
        return model.predict([decode_image(file)])

    return [partial(call, file) for file in files]


def answer_calls(model: Model, files: list[bytes]) -> list[Callable[[], object]]:
    return [partial(model.answer, file) for file in files]


def handle_calls(files: list[bytes]) -> list[Callable[[], object]]:
    handle = serve.get_deployment_handle("echo", "relay")

    def call(file: bytes) -> object:
        return handle.call.remote("segment", file, "json").result()

    return [partial(call, file) for file in files]


def direct_ms(calls: list[Callable[[], object]], number: int) -> float:
    seconds = []
    for i in range(number):
        began = time.perf_counter()
        calls[i % len(calls)]()
        seconds.append(time.perf_counter() - began)
    return 1000 * median(seconds)


def http_ms(asks: list[Ask], number: int) -> float:
    outcome = send(Load(asks, concurrency=1, count=number))
    if outcome.num_errors:
        raise RuntimeError(f"{outcome.num_errors} requests failed: {outcome.attempts[-1]}")
    return outcome.latency_ms(0.5)


def to_rows(found: dict[str, list[float]]) -> list[Row]:
    """A row a step; then the differences, by which round they were taken in."""

    def less(name: str, other: str) -> list[float]:
        return [a - b for a, b in zip(found[name], found[other], strict=True)]

    work, bare, relay = "decode, predict, encode", "ingress of Serve, answered at once", "ingress, handle call"
    differences = {
        "decoding": less("decode, predict", "predict"),
        "encoding": less(work, "decode, predict"),
        "local app, over its work": less("local app by uvicorn", work),
        "one hop": less(relay, bare),
        "whole path, over its work": less("whole path", work),
    }
    above = [a - b for a, b in zip(differences["whole path, over its work"], found[bare], strict=True)]
    differences["whole path, over its work and the ingress"] = above
    target = {"whole path, over its work and the ingress": f"<= {median(differences['one hop']):.1f}, one hop"}
    return [
        {
            "step": name,
            "p50 ms": median(values),
            "lowest": min(values),
            "highest": max(values),
            "target": target.get(name, "-"),
        }
        for name, values in {**found, **differences}.items()
    ]
