"""Serving on a real Ray: prompts over replicas, deaths, full queues, and another bundle under load."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.util import list_named_actors

from raysseg.config import ServeJob, compose
from raysseg.data.decode import decode_image
from raysseg.predictor import Predictor
from raysseg.schema import InputError
from raysseg.serve import build_app
from raysseg.serve.answers import to_answer
from raysseg.serve.cluster import deploy
from raysseg.serve.segment import find_bundle
from tests.tiny_bundles import write_bundle
from tests.tiny_sam import write_tiny_sam

SMALL = {"cpus_per_replica": 0.2}
Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


@pytest.fixture(scope="module")
def models(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        write_bundle("semantic", example, str(folder / name), seed=seed)
    write_tiny_sam(folder / "sam")
    return {name: str(folder / name) for name in ("first", "second", "sam")}


@pytest.fixture(scope="module")
def photos(example: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((example / "val/images").iterdir())]


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def job_of(models: dict[str, str], bundle: str, port: int) -> ServeJob:
    sam = {"prompt": "sam-vit-base", "weights": models["sam"], "encoder": SMALL, "decoder": {**SMALL, "replicas": 2}}
    narrow = {"bundle": models["first"], **SMALL, "max_ongoing": 1, "max_queue": 1}
    street = {"bundle": models[bundle], **SMALL, "replicas": [1, 2]}
    keys = {"kind": "serve", "name": "street", "models": {"street": street, "narrow": narrow, "sam": sam}}
    job = compose({**keys, "http": {"port": port}}, [])
    assert isinstance(job, ServeJob)
    return job


@pytest.fixture(scope="module")
def url(ray_cluster: None, models: dict[str, str], port: int) -> Iterator[str]:
    deploy(job_of(models, "first", port))
    yield f"http://127.0.0.1:{port}/v1/models"
    serve.shutdown()


def kill(beginning: str) -> str:
    """Ends the first process of an actor of Serve whose name begins so; its name."""
    names = [entry["name"] for entry in list_named_actors(all_namespaces=True)]
    name = min(name for name in names if name.startswith(beginning))
    ray.kill(ray.get_actor(name, namespace="serve"))
    return name


def num_made() -> int:
    names = [entry["name"] for entry in list_named_actors(all_namespaces=True)]
    (name,) = (name for name in names if name.startswith("SERVE_DEPLOYMENT_ACTOR::street::sam"))
    return int(ray.get(ray.get_actor(name, namespace="serve").num_made.remote()))


def ask_all(asks: list[Ask]) -> list[httpx.Response]:
    """The answers to requests that are sent at once."""

    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            return await asyncio.gather(*(ask(client) for ask in asks))

    return asyncio.run(run())


def test_answers_are_the_predictors(url: str, models: dict[str, str], photos: list[bytes]) -> None:
    predictor = Predictor(models["first"])
    for photo in photos[:3]:
        answer = httpx.post(f"{url}/street/segment", files={"image": ("a", photo)}, timeout=60)
        image = decode_image(photo)
        (view,) = predictor.predict([image])
        head = {"model": "street", "version": find_bundle(models["first"])[1], "task": "semantic"}
        assert answer.content == to_answer(view, image, predictor.bundle.classes, "json", head).body
    bad = httpx.post(f"{url}/street/segment", files={"image": ("a", photos[0][:-300])}, timeout=60)
    assert bad.status_code == 422
    assert "can't be decoded" in bad.json()["detail"]
    assert [card["name"] for card in httpx.get(url).json()["models"]] == ["street", "narrow", "sam"]


def test_an_image_is_looked_at_once_however_many_click(url: str, photos: list[bytes]) -> None:
    prompt = json.dumps({"points": [[20, 30]]})

    def click(i: int) -> Ask:
        files = {"image": ("a", photos[i % 3])}
        return lambda client: client.post(f"{url}/sam/prompt", files=files, data={"prompt": prompt})

    before = num_made()
    answers = ask_all([click(i) for i in range(50)])
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 3
    assert num_made() - before == 3


def test_a_dead_replica_loses_no_session(url: str, photos: list[bytes]) -> None:
    key = httpx.post(f"{url}/sam/images", files={"image": ("a", photos[5])}, timeout=60).json()["image"]
    ask = {"image": key, "points": [[20, 30]]}
    first = httpx.post(f"{url}/sam/prompt", json=ask, timeout=60)
    assert first.status_code == 200
    made = num_made()
    for beginning in ("SERVE_REPLICA::street#sam#", "SERVE_REPLICA::street#_sam-encoder#"):
        kill(beginning)
        for _ in range(5):
            again = httpx.post(f"{url}/sam/prompt", json=ask, timeout=60)
            assert again.content == first.content
    assert num_made() == made
    assert "outside of the image" in httpx.post(f"{url}/sam/prompt", json={**ask, "points": [[999, 1]]}).text
    assert httpx.post(f"{url}/sam/prompt", json={**ask, "image": "0" * 64}).status_code == 404
    assert httpx.post(f"{url}/sam/images", files={"image": ("a", photos[6])}, timeout=60).status_code == 201


def test_a_full_queue_says_so_at_once(url: str, photos: list[bytes]) -> None:
    seconds: list[float] = []

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        began = time.perf_counter()
        answer = await client.post(f"{url}/narrow/segment", files={"image": ("a", photos[0])})
        if answer.status_code == 503:
            seconds.append(time.perf_counter() - began)
        return answer

    answers = ask_all([ask] * 40)
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    refused = answers[statuses.index(503)]
    assert refused.headers["retry-after"] == "1"
    assert "too many requests are waiting" in refused.json()["detail"]
    assert min(seconds) < 2


def test_deaths_and_another_bundle_fail_no_request(
    url: str, models: dict[str, str], photos: list[bytes], port: int
) -> None:
    versions = {name: find_bundle(models[name])[1] for name in ("first", "second")}
    answers: list[httpx.Response] = []

    async def load(client: httpx.AsyncClient, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            answers.append(await client.post(f"{url}/street/segment", files={"image": ("a", photos[0])}))

    async def run() -> None:
        is_over = asyncio.Event()
        async with httpx.AsyncClient(timeout=60) as client:
            loads = [asyncio.create_task(load(client, is_over)) for _ in range(4)]
            await asyncio.sleep(2)
            await asyncio.to_thread(kill, "SERVE_REPLICA::street#street#")
            await asyncio.sleep(3)
            await asyncio.to_thread(deploy, job_of(models, "second", port))
            await asyncio.sleep(3)
            is_over.set()
            await asyncio.gather(*loads)

    asyncio.run(run())
    assert {answer.status_code for answer in answers} == {200}
    seen = [answer.json()["version"] for answer in answers]
    assert set(seen) == set(versions.values())
    assert seen[-1] == versions["second"]
    assert len({answer.content for answer in answers}) == 2


def test_a_bundle_that_is_not_there(models: dict[str, str], port: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bundle.json"):
        build_app(job_of({**models, "none": str(tmp_path)}, "none", port))


def test_replicas_of_a_run_that_is_not_followed_stay_with_one_bundle(models: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(models["first"], run / "bundles/00000001")
    (run / "best.json").write_text(json.dumps({"bundle": "bundles/00000001"}))
    for follow, expected in ((None, run / "bundles/00000001"), ("1 minute", run)):
        served = {"bundle": str(run), "follow": follow}
        application = build_app({"name": "x", "models": {"a": served}})
        (segmenter,) = application._bound_deployment.init_args
        assert segmenter._bound_deployment._deployment_config.user_config == {"bundle": str(expected)}


def test_the_load_is_reported_more_often_than_it_is_averaged(models: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # as Ray has it otherwise
        application = build_app({"name": "x", "models": {"a": {"bundle": models["first"], "replicas": [1, 2]}}})
    (segmenter,) = application._bound_deployment.init_args
    scaling = segmenter._bound_deployment._deployment_config.autoscaling_config
    assert scaling.metrics_interval_s < scaling.look_back_period_s


def test_an_application_from_its_arguments(models: dict[str, str]) -> None:
    arguments: dict[str, Any] = {"name": "x", "models": {"a": {"bundle": models["first"]}}}
    assert type(build_app(arguments)).__name__ == "Application"
