"""A load whose replicas are killed and whose bundle is replaced, and every answer checked: a part of bench_serve."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.commands import free_port
from benchmarks.results import Row, to_value_rows
from benchmarks.serve_cluster import INGRESS, kill, running_pids, serving, wait_until
from benchmarks.serve_load import Attempt, Client, Load, Outcome, send
from benchmarks.serve_sides import (
    draw_images,
    expected_answers,
    segment_url,
    serve_job,
    to_asks,
    to_expected,
    write_bundle,
)
from raysseg import rle
from raysseg.config import ServeJob
from raysseg.serve.cluster import deploy
from raysseg.serve.segment import find_bundle

_REPLICAS = {"replicas": 2, "cpus_per_replica": 0.25}
_RECOVERY_S = 120.0


def measure_chaos(options: argparse.Namespace, folder: Path) -> list[Row]:
    """What became of all requests."""
    images = draw_images(folder / "data", options.images, options.side)
    uris = [write_bundle(folder / "data/classes.json", options.model, folder / f"bundle-{i}", seed=i) for i in (0, 1)]
    port = free_port()
    jobs = [serve_job(uri, port, _REPLICAS, ingress_replicas=2) for uri in uris]
    answers = {find_bundle(uri)[1]: expected_answers(uri, images) for uri in uris}
    assert len(answers) == 2, "the bundles have to differ"
    asks = to_asks(images, folder / "forms", segment_url(port))
    clients = max(options.clients)
    load = Load(asks, clients, seconds=options.seconds, retries=1, expected=to_expected(answers))
    with serving(jobs[0]):
        send(Load(asks, clients, count=40))  # until all is warm
        with Client(load) as client:
            disturbed = disturb(jobs, options.seconds, options.kill_every)
            outcome = client.finish()
    for place, body in outcome.odd[:5]:
        print(f"image {place}: {explain(body, {version: bodies[place] for version, bodies in answers.items()})}")
    return to_rows(outcome, disturbed, find_bundle(uris[1])[1])


class Disturbed(NamedTuple):
    """What was done, and how long it took to be made good.

    Attributes:
        whole_s: by deployment, seconds from each kill until all replicas ran again.
        num_lasting: kills after which that took too long.
        update_s: seconds of the update.
    """

    whole_s: dict[str, list[float]]
    num_lasting: int
    update_s: float


def disturb(jobs: Sequence[ServeJob], seconds: float, every: float) -> Disturbed:
    """Kills replicas, of the model and of the ingress in turn, and moves to the second job in the middle."""
    began, num_lasting = time.monotonic(), 0
    (name,) = jobs[0].models
    whole_s: dict[str, list[float]] = {name: [], INGRESS: []}
    with ThreadPoolExecutor(1) as executor:
        updating = executor.submit(update_s, jobs[1], began + seconds / 2)
        for i in range(int(seconds / every)):
            time.sleep(max(0.0, began + (i + 0.5) * every - time.monotonic()))
            deployment = (name, INGRESS)[i % 2]
            try:
                wait_until(lambda of=deployment: len(running_pids(jobs[0], of)) > 0, _RECOVERY_S)  # type: ignore[misc]
                kill(pid := running_pids(jobs[0], deployment)[0])
                whole_s[deployment].append(recovery_s(jobs[0], deployment, pid))
                result = f"whole after {whole_s[deployment][-1]:.1f} s"
            except TimeoutError as error:
                num_lasting, result = num_lasting + 1, str(error)
            print(f"{(i + 0.5) * every:.0f} s: {deployment} killed, {result}", flush=True)
        return Disturbed(whole_s, num_lasting, updating.result())


def update_s(job: ServeJob, at: float) -> float:
    """Seconds that it takes to move to a job, from a moment on."""
    time.sleep(max(0.0, at - time.monotonic()))
    deploy(job)
    return time.monotonic() - at


def recovery_s(job: ServeJob, deployment: str, killed: int) -> float:
    """Seconds until two replicas run again, none of which is the killed one."""

    def is_whole() -> bool:
        pids = running_pids(job, deployment)
        return len(pids) >= 2 and killed not in pids

    return wait_until(is_whole, _RECOVERY_S)


def explain(body: str, expected: dict[str, bytes]) -> str:
    """How a wrong answer differs from the right one."""
    answer = json.loads(body)
    if answer["version"] not in expected:
        return f"version {answer['version']} is none that was served"
    right = json.loads(expected[answer["version"]])
    given, wanted = (to_labels(one) for one in (answer, right))
    return f"{np.mean(given != wanted):.2e} of the pixels differ, of version {answer['version']}"


def to_labels(answer: dict[str, Any]) -> npt.NDArray[np.int64]:
    """The class of each pixel, (H, W)."""
    size: tuple[int, int] = (answer["height"], answer["width"])
    labels = np.full(size, -1, np.int64)
    for segment in answer["segments"]:
        runs = rle.to_runs(segment["segmentation"]["counts"].encode(), size)
        labels[rle.to_mask(runs, size)] = segment["category_id"]
    return labels


def to_rows(outcome: Outcome, disturbed: Disturbed, newer: str) -> list[Row]:
    """The counts, a row each."""
    return to_value_rows(
        ("kills", sum(map(len, disturbed.whole_s.values())) + disturbed.num_lasting, "-"),
        *count_requests(outcome),
        ("answers by the second bundle", sum(one.version == newer for one in outcome.answered), "> 0"),
        ("rolling update, s", disturbed.update_s, "-"),
        (f"not whole again in {_RECOVERY_S:.0f} s", disturbed.num_lasting, "0"),
        *((f"{name} whole again, s", median(seconds), "-") for name, seconds in disturbed.whole_s.items() if seconds),
    )


def count_requests(outcome: Outcome) -> list[tuple[str, float, str]]:
    """What became of a load's requests: name, value, aim."""
    by_request: dict[int, list[Attempt]] = {}
    for attempt in outcome.attempts:
        by_request.setdefault(attempt.request, []).append(attempt)
    failed = [attempt for attempt in outcome.attempts if attempt.status != 200]
    for text, number in Counter(f"{one.status}: {one.error[:160]}" for one in failed).most_common(8):
        print(f"{number} times {text}")
    lost = [number for number, tries in by_request.items() if all(one.status != 200 for one in tries)]
    return [
        ("requests", len(by_request), "-"),
        ("answers 5xx", sum(one.status >= 500 for one in failed), "-"),
        ("other answers than 200", sum(0 < one.status < 500 for one in failed), "0"),
        ("connection errors", sum(one.status == 0 for one in failed), "-"),
        ("retries", len(outcome.attempts) - len(by_request), "-"),
        ("lost after one retry", len(lost), "0"),
        ("wrong answers", outcome.num_wrong, "0"),
        ("requests/s", outcome.rate, "-"),
        ("p50 ms", outcome.latency_ms(0.5), "-"),
        ("p95 ms", outcome.latency_ms(0.95), "-"),
        ("slowest ms", outcome.latency_ms(1.0), "-"),
    ]
