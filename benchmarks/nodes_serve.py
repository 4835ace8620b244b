"""A load on two nodes, one of which is killed and replaced: a part of bench_nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from benchmarks.commands import free_port
from benchmarks.nodes import S3, Ground, Node
from benchmarks.results import Row, to_value_rows
from benchmarks.serve_chaos import count_requests
from benchmarks.serve_cluster import INGRESS, wait_until
from benchmarks.serve_load import Client, Load, Outcome, send
from benchmarks.serve_peers import MODEL_NAME
from benchmarks.serve_sides import draw_images, expected_answers, segment_url, to_asks, to_expected, write_bundle
from raysseg.serve.segment import find_bundle

ENVIRONMENT: dict[str, str] = {}
_MODEL = "segformer-tiny"
_CLIENTS = 4
_TIMEOUT_S = 20.0  # of a try
_SETTLED_S = 5.0  # of load before the kill, and when all is whole again
_WHOLE_S = 240.0


def measure(ground: Ground, *, silent: bool) -> list[Row]:
    """What became of the requests, and how long it took."""
    port, began = free_port(), time.time()
    load = prepare(ground, port)
    deploy(ground, port)
    deployed_s = time.time() - began
    send(replace(load, count=40, expected=None, retries=0))  # until all is warm
    places = {name: nodes_of(ground, name) for name in (MODEL_NAME, INGRESS)}
    victim = choose_victim(ground, places[INGRESS])
    print(f"replicas at {places}; {victim.address} is killed")
    found = disturb(ground, load, victim, silent=silent)
    entry = origin(ground, found.newcomer.address, port)
    by_newcomer = send(replace(load, concurrency=1, count=8, retries=0, origins=(entry,)))
    return to_value_rows(
        ("nodes of the model's replicas", len(set(places[MODEL_NAME])), "2"),
        ("nodes of the processes that take requests in", len(set(places[INGRESS])), "2"),
        *count_requests(found.outcome),
        ("right answers by the new node", len(by_newcomer.answered) - by_newcomer.num_wrong, "8"),
        ("a replica runs on the new node", found.newcomer.address in nodes_of(ground, MODEL_NAME), "1"),
        ("longest time without an answer, s", longest_pause_s(found.outcome), "-"),
        *((f"{what}, s", seconds, "-") for what, seconds in found.seconds.items()),
        ("until the deployment answers, s", deployed_s, "-"),
        ("all of it, s", time.time() - began, "-"),
    )


class Disturbed(NamedTuple):
    """What became of a load.

    Attributes:
        outcome: of all requests.
        newcomer: the new node.
        seconds: from the kill until something was so again.
    """

    outcome: Outcome
    newcomer: Node
    seconds: dict[str, float]


def disturb(ground: Ground, load: Load, victim: Node, *, silent: bool) -> Disturbed:
    """Kills a node under a load, and starts a new one at once."""
    seconds: dict[str, float] = {}
    with Client(load) as client, ThreadPoolExecutor(1) as executor:
        time.sleep(_SETTLED_S)
        kill = ground.take_away(victim, silent=silent)
        adding = executor.submit(ground.cluster.add, num_cpus=1)
        for name in (INGRESS, MODEL_NAME):
            wait_until(lambda of=name: is_whole(nodes_of(ground, of), victim.address), _WHOLE_S)  # type: ignore[misc]
            seconds[f"{name} whole again"] = time.time() - kill
        newcomer = adding.result()
        wait_until(lambda: takes_requests(ground, newcomer.address), _WHOLE_S)
        seconds["the new node takes requests in"] = time.time() - kill
        time.sleep(_SETTLED_S)
        return Disturbed(client.stop(), newcomer, seconds)


def choose_victim(ground: Ground, ingress: Sequence[str]) -> Node:
    """A node that holds a replica, and takes requests in."""
    _, *workers = ground.cluster.nodes
    return next((node for node in workers if node.address in ingress), workers[0])


def prepare(ground: Ground, port: int) -> Load:
    """The bundle on storage, and the load that asks for it."""
    torch.set_num_threads(1)
    images = draw_images(ground.folder / "data", 8, 128)
    bundle = write_bundle(ground.folder / "data/classes.json", _MODEL, ground.folder / "bundle")
    ground.upload("bundle")
    expected = to_expected({find_bundle(bundle)[1]: expected_answers(bundle, images)})
    asks = to_asks(images, ground.folder / "forms", segment_url(port))
    origins = tuple({origin(ground, node.address, port): None for node in ground.cluster.nodes[1:]})
    return Load(asks, _CLIENTS, retries=1, expected=expected, timeout_s=_TIMEOUT_S, origins=origins)


def origin(ground: Ground, address: str, port: int) -> str:
    """Where a node takes requests in; on loopback, all nodes share one port of one address."""
    network = ground.cluster.network
    return f"http://{address if network.is_real else network.here}:{port}"


def deploy(ground: Ground, port: int) -> None:
    """Sends the job, and waits until it is deployed."""
    network = ground.cluster.network
    job = {
        "kind": "serve",
        "name": MODEL_NAME,
        "models": {MODEL_NAME: {"bundle": "${BUCKET}/bundle", "replicas": 2}},
        "http": {"host": "0.0.0.0" if network.is_real else network.here, "port": port, "replicas": 2},
        "s3": S3,
    }
    (ground.folder / "serve.json").write_text(json.dumps(job))
    command, environment = ground.submit(ground.folder / "serve.json")
    subprocess.run([sys.executable, *command], env={**os.environ, **environment}, check=True)


def nodes_of(ground: Ground, deployment: str) -> list[str]:
    """The addresses of the nodes on which a deployment's replicas run."""
    application = _details(ground)["applications"][MODEL_NAME]
    replicas = application["deployments"][deployment]["replicas"]
    return [replica["node_ip"] for replica in replicas if replica["state"] == "RUNNING"]


def takes_requests(ground: Ground, address: str) -> bool:
    """Whether Serve's proxy on a node answers."""
    proxies = _details(ground)["proxies"].values()
    return any(proxy["node_ip"] == address and proxy["status"] == "HEALTHY" for proxy in proxies)


def _details(ground: Ground) -> dict[str, Any]:
    details: dict[str, Any] = ground.cluster.get("/api/serve/applications/")
    return details


def is_whole(places: list[str], gone: str) -> bool:
    """Whether two replicas run, none of them where none can be any more."""
    return len(places) == 2 and gone not in places


def longest_pause_s(outcome: Outcome) -> float:
    """For how long no answer came, of one client or another."""
    ends = sorted(attempt.at + attempt.seconds for attempt in outcome.answered)
    return max(after - before for before, after in pairwise(ends))
