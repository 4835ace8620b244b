"""Serving: what it costs, what it bears, and the same model served by others.

Parts:
    throughput  requests/s and latency by the number of clients, against FastAPI without batches and, where it is
                installed (`pip install litserve`; it is no dependency), LitServe with them. All decode, predict and
                encode by the same code, with the same number of torch's threads. Two replicas and fastapi-threads run
                the model twice and many times at once, and so on more cores; the others run it in one thread.
    hops        what each step of a request costs, from the Predictor alone to the whole path.
    bytes       an answer's size in each form, for ground truth, against the mask as a JSON array of numbers.
    scaling     from one replica to two under load, and back.
    chaos       a replica is killed every minute, and the bundle is replaced in the middle: is every answer right?
    prompts     SAM at its real size with random weights: the first click on an image, and the next one. And the
                encoder's calls when many first clicks on few images come at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.commands import free_port
from benchmarks.results import Row, device_name, print_rows, write_result
from benchmarks.serve_chaos import measure_chaos
from benchmarks.serve_cluster import num_replicas, running_pids, serving, wait_until
from benchmarks.serve_hops import measure_hops
from benchmarks.serve_load import Client, Load, Outcome, send
from benchmarks.serve_prompts import measure_prompts
from benchmarks.serve_sides import (
    draw_images,
    expected_answers,
    ours_command,
    running,
    segment_url,
    serve_job,
    to_asks,
    to_expected,
    write_bundle,
)
from raysseg import masks
from raysseg.data import read_class_map
from raysseg.data.decode import decode_image
from raysseg.masks import LabelMap
from raysseg.runtime import log_to_stderr
from raysseg.schema import ClassMap
from raysseg.serve.answers import Form, to_answer
from raysseg.serve.segment import find_bundle

# --- throughput ---------------------------------------------------------------------------------------------------

Side = tuple[str, Callable[[], AbstractContextManager[None]]]
"""A URL to send images to, and what starts and stops the server there."""


def measure_throughput(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Each server is started anew in each round; nothing else runs beside it."""
    images = draw_images(folder / "data", options.images, options.side)
    bundle = write_bundle(folder / "data/classes.json", options.model, folder / "bundle")
    expected = to_expected({find_bundle(bundle)[1]: expected_answers(bundle, images)})
    outcomes: dict[tuple[str, int], list[Outcome]] = {}
    num_wrong: Counter[str] = Counter()
    for i in range(options.rounds):
        for name, (url, start) in iter_sides(bundle, folder):
            asks = to_asks(images, folder / "forms", url)
            with start():
                warm = send(Load(asks, concurrency=8, count=48, expected=expected))
                num_wrong[name] += warm.num_wrong + warm.num_errors
                for clients in options.clients:
                    outcome = send(Load(asks, concurrency=clients, seconds=options.seconds))
                    outcomes.setdefault((name, clients), []).append(outcome)
                    print(f"round {i}, {name}, {clients} clients: {outcome.rate:.1f}/s", flush=True)
    keys = sorted(outcomes, key=lambda key: key[1])
    return [{**to_throughput(*key, outcomes[key]), "wrong when checked": num_wrong[key[0]]} for key in keys]


def iter_sides(bundle: str, folder: Path) -> Iterator[tuple[str, Side]]:
    """The servers, in turn."""
    for name, replicas in (("raysseg", 1), ("raysseg, 2 replicas", 2)):
        port = free_port()
        command = ours_command(serve_job(bundle, port, {"replicas": replicas}), folder / "serve.json")
        yield name, (segment_url(port), partial(running, command, health(port, "z"), folder / "raysseg.log"))
    for peer in ("fastapi", "fastapi-threads", "litserve"):
        if peer == "litserve" and importlib.util.find_spec("litserve") is None:
            print("litserve is not installed, and left out")
            continue
        port = free_port()
        command = ["-m", "benchmarks.serve_peers", peer, bundle, str(port)]
        url = f"http://127.0.0.1:{port}/segment"
        yield peer, (url, partial(running, command, health(port), folder / f"{peer}.log"))


def health(port: int, more: str = "") -> str:
    return f"http://127.0.0.1:{port}/health{more}"


def to_throughput(name: str, clients: int, rounds: Sequence[Outcome]) -> Row:
    rates = [outcome.rate for outcome in rounds]
    return {
        "server": name,
        "clients": clients,
        "requests/s": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "p50 ms": median(outcome.latency_ms(0.5) for outcome in rounds),
        "p95 ms": median(outcome.latency_ms(0.95) for outcome in rounds),
        "requests": sum(len(outcome.attempts) for outcome in rounds),
        "errors": sum(outcome.num_errors for outcome in rounds),
    }


# --- bytes --------------------------------------------------------------------------------------------------------


def measure_bytes(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Sizes of answers, and the milliseconds that they take, in the mean over ground truth."""
    draw_images(folder / "example", options.images, options.side)
    rows = bytes_rows("example", folder / "example")
    if "RAYSSEG_DATA" in os.environ:
        rows += bytes_rows("camvid", Path(os.environ["RAYSSEG_DATA"]) / "camvid")
    return rows


def bytes_rows(name: str, data: Path) -> list[Row]:
    classes = read_class_map(str(data / "classes.json"))
    forms: dict[str, Callable[[LabelMap, np.ndarray], bytes]] = {
        "JSON array of numbers": lambda view, _: to_numbers(view, classes),
        "json": lambda view, image: to_body("json", view, image, classes),
        "ids": lambda view, image: to_body("ids", view, image, classes),
        "polygons": lambda view, image: to_body("polygons", view, image, classes),
        "overlay": lambda view, image: to_body("overlay", view, image, classes),
    }
    stems = sorted(path.stem for path in (data / "val/masks").glob("*.png"))
    found = {path.stem: path for path in (data / "val/images").iterdir()}
    sizes: dict[str, list[tuple[int, int, float]]] = {form: [] for form in forms}
    for stem in stems:
        ids = masks.decode_id_map((data / f"val/masks/{stem}.png").read_bytes(), classes)
        view = LabelMap(masks.to_indices(ids, classes), classes.ignore)
        image = decode_image(found[stem].read_bytes())
        for form, encode in forms.items():
            began = time.perf_counter()
            body = encode(view, image)
            took = time.perf_counter() - began
            sizes[form].append((len(body), len(zlib.compress(body, 6)), 1000 * took))
    means = {form: np.mean(values, axis=0).tolist() for form, values in sizes.items()}
    peer = means["JSON array of numbers"]
    return [
        {
            "data": f"{name}, {len(stems)} of {image.shape[1]}x{image.shape[0]}",
            "form": form,
            "bytes": size,
            "share of the array": size / peer[0],
            "deflated": small,
            "its share": small / peer[1],
            "ms": ms,
        }
        for form, (size, small, ms) in means.items()
    ]


def to_numbers(view: LabelMap, classes: ClassMap) -> bytes:
    """What many an example answers with, without a space."""
    return json.dumps({"mask": masks.to_ids(view.labels, classes).tolist()}, separators=(",", ":")).encode()


def to_body(form: Form, view: LabelMap, image: np.ndarray, classes: ClassMap) -> bytes:
    return to_answer(view, image, classes, form, {"model": "bench", "version": "0" * 12, "task": "semantic"}).body


# --- scaling ------------------------------------------------------------------------------------------------------


def measure_scaling(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Seconds from the load's begin to a second replica, and from its end to one alone."""
    images = draw_images(folder / "data", options.images, options.side)
    bundle = write_bundle(folder / "data/classes.json", options.model, folder / "bundle")
    delays = {"upscale_delay": "2 seconds", "downscale_delay": "5 seconds"}
    job = serve_job(bundle, free_port(), {"replicas": [1, 2], "cpus_per_replica": 0.5, **delays})
    asks = to_asks(images, folder / "forms", segment_url(job.http.port))
    rows: list[Row] = []
    (name,) = job.models
    with serving(job):
        send(Load(asks, concurrency=2, count=20))
        for i in range(options.rounds):
            wait_until(lambda: num_replicas(job, name) == 1, 120)
            with Client(Load(asks, concurrency=max(options.clients), seconds=600)) as client:
                wait_until(lambda: num_replicas(job, name) == 2, 120)
                decided = time.time()
                wait_until(lambda: len(running_pids(job, name)) == 2, 120)
                up = time.time()
                time.sleep(options.seconds)
                outcome = client.stop()
            began = min(attempt.at for attempt in outcome.attempts)
            down = wait_until(lambda: num_replicas(job, name) == 1, 300)
            rows.append(
                {
                    "round": i,
                    "decision s": decided - began,
                    "second replica s": up - began,
                    "requests/s, one": rate_between(outcome, began, decided),
                    "requests/s, while it starts": rate_between(outcome, decided, up),
                    "requests/s, two": rate_between(outcome, up + 1, up + options.seconds),
                    "errors": outcome.num_errors,
                    "down s": down,
                }
            )
            print(rows[-1], flush=True)
    return rows


def rate_between(outcome: Outcome, begin: float, end: float) -> float:
    """Answers a second that came in a span of time."""
    return sum(begin <= one.at + one.seconds < end for one in outcome.answered) / (end - begin)


# ------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[argparse.Namespace, Path], list[Row]], Mapping[str, object]]] = {
    "throughput": (measure_throughput, {"seconds": 20.0}),
    "hops": (measure_hops, {"model": "segformer-tiny", "requests": 100, "rounds": 5}),
    "bytes": (measure_bytes, {"images": 40}),
    "scaling": (measure_scaling, {"seconds": 20.0}),
    "chaos": (measure_chaos, {"seconds": 600.0, "model": "segformer-tiny", "clients": [4]}),
    "prompts": (measure_prompts, {"images": 5, "requests": 10}),
}
"""Each part, and its own settings."""

DEFAULTS: dict[str, object] = {
    "model": "segformer-b0",
    "side": 256,
    "images": 16,
    "clients": [1, 8, 32],
    "rounds": 3,
    "seconds": 20.0,
    "requests": 100,
    "kill_every": 60.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--model", help="a semantic one of raysseg's; default: segformer-b0, or -tiny, as the part is")
    parser.add_argument("--side", type=int, help="pixels, of the square scenes; default: 256")
    parser.add_argument("--images", type=int, help="scenes; default: 16, 40 or 5, as the part is")
    parser.add_argument("--clients", type=int, nargs="+", help="default: 1 8 32; 4 in chaos")
    parser.add_argument("--rounds", type=int, help="default: 3; 5 of hops")
    parser.add_argument("--seconds", type=float, help="of load; default: 20; 600 of chaos")
    parser.add_argument("--requests", type=int, help="of hops and prompts, a round; default: 100 and 10")
    parser.add_argument("--kill-every", type=float, help="seconds, in chaos; default: 60")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process with a model")
    parser.add_argument("--dry", action="store_true", help="print the result, and keep none")
    options = parser.parse_args()
    log_to_stderr()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # Ray's processes have it from here
    torch.set_num_threads(options.threads)
    given = {key: value for key, value in vars(options).items() if value is not None}
    for part in options.part:
        measure, own = PARTS[part]
        settings = argparse.Namespace(**{**DEFAULTS, **own, **given, "part": part})
        folder = Path(tempfile.mkdtemp(prefix="raysseg-bench-"))
        try:
            rows = measure(settings, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # replicas may still write there
        if options.dry:
            print_rows(rows)
        else:
            write_result(f"serve-{part}", device_name(), rows, vars(settings))


if __name__ == "__main__":
    main()
