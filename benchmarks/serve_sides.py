"""What is served in benchmarks of serving: bundles with random weights, scenes, and servers as processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from benchmarks.serve_load import Ask, write_form
from benchmarks.serve_peers import MODEL_NAME, Model
from raysseg import bundle as bundles
from raysseg import config
from raysseg.bundle import Bundle, Preprocessing
from raysseg.config import Inference, ServeJob, parse_as
from raysseg.data import read_class_map
from raysseg.data.example import draw_example
from raysseg.models import build_model

_START_S = 240.0
_STOP_S = 90.0


def draw_images(folder: Path, number: int, side: int) -> list[Path]:
    """Scenes of the example: JPEG and PNG in turns."""
    draw_example(folder, num_train=1, num_val=number, size=(side, side))
    paths = sorted((folder / "val/images").iterdir())
    for path in paths[1::2]:
        Image.open(path).save(path.with_suffix(".png"))
    return [path.with_suffix(".png") if i % 2 else path for i, path in enumerate(paths)]


def write_bundle(classes: Path, model: str, uri: Path, seed: int = 0) -> str:
    """A model that knows nothing, but says something: its last layer is drawn wider."""
    class_map = read_class_map(str(classes))
    torch.manual_seed(seed)
    net = build_model(config.Model(name=model, weights=None), class_map).eval()
    for name, parameter in net.named_parameters():
        if "classifier" in name:
            nn.init.normal_(parameter, std=0.5)
    manifest = Bundle(str(uri), "semantic", class_map, model, Preprocessing(None), {}, {}, {}, Inference(), {})
    bundles.write(manifest, net)
    return str(uri)


def expected_answers(uri: str, images: Sequence[Path]) -> list[bytes]:
    """What a bundle's Predictor says of each image, alone."""
    model = Model(uri)
    return [model.answer(path.read_bytes()) for path in images]


def to_expected(answers: Mapping[str, Sequence[bytes]]) -> dict[str, list[str]]:
    """By version, as a load expects answers."""
    return {version: [hashlib.sha256(body).hexdigest() for body in bodies] for version, bodies in answers.items()}


def to_asks(images: Sequence[Path], folder: Path, url: str) -> list[Ask]:
    """Each image to be segmented, as a form."""
    folder.mkdir(exist_ok=True)
    return [Ask(url, *write_form(folder / f"{path.name}.form", path.read_bytes())) for path in images]


def serve_job(bundle: str, port: int, keys: Mapping[str, object] | None = None, ingress_replicas: int = 1) -> ServeJob:
    """A job of one model, with keys of its own."""
    raw = {
        "kind": "serve",
        "name": MODEL_NAME,
        "models": {MODEL_NAME: {"bundle": bundle, **(keys or {})}},
        "http": {"port": port, "replicas": ingress_replicas},
    }
    return parse_as(ServeJob, raw)


def segment_url(port: int) -> str:
    """Where a job's model segments."""
    return f"http://127.0.0.1:{port}/v1/models/{MODEL_NAME}/segment"


def ours_command(job: ServeJob, path: Path, *, is_local: bool = False) -> list[str]:
    """The command that serves a job, whose file is written."""
    path.write_text(json.dumps({**job.model_dump(mode="json"), "local": is_local}))
    return ["-m", "raysseg.cli", "serve", str(path)]


@contextmanager
def running(command: Sequence[str], health_url: str, log: Path) -> Iterator[None]:
    """`python <command>` as a process, from when it answers 200 at a URL to the end of the block."""
    environment: dict[str, str] = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_for(health_url, process, log)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, and left


def _wait_for(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-3000:]}")
