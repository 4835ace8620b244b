"""Clicks on images that a SAM has seen, and on those that it has not: a part of bench_serve."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import ray
import ray.util
import torch
from transformers import SamConfig, SamModel

from benchmarks.commands import free_port
from benchmarks.results import Row
from benchmarks.serve_cluster import serving
from benchmarks.serve_load import Ask, Load, send, write_form
from benchmarks.serve_sides import draw_images
from raysseg.config import ServeJob, parse_as
from raysseg.data.decode import decode_image
from raysseg.models.sam import PromptModel
from raysseg.schema import Prompt

_CLICKS = 50
_UNIQUE = 5
_SIDE = 64
_SMALL: dict[str, dict[str, object]] = {
    "vision_config": {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": 8,
        "global_attn_indexes": [1],
        "window_size": 4,
        "num_pos_feats": 16,
        "mlp_dim": 64,
    },
    "prompt_encoder_config": {
        "hidden_size": 32,
        "image_size": _SIDE,
        "mask_input_channels": 16,
        "patch_size": 8,
        "image_embedding_size": _SIDE // 8,
    },
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    },
}


def measure_prompts(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Latencies with the real size; calls of the encoder with a small one."""
    images = draw_images(folder / "data", max(options.images, _UNIQUE), options.side)
    return [*click_rows(images[: options.images], options.requests, folder), duplicates_row(images, folder)]


def click_rows(images: list[Path], clicks: int, folder: Path) -> list[Row]:
    """The first click on each image, then more on it; beside them, the same prompt without HTTP."""
    weights = write_sam(folder / "sam", {})
    model = PromptModel(weights)
    job = sam_job(weights, decoders=1)
    firsts, seconds, alone = [], [], []
    with serving(job):
        send(first_clicks(job, [warm_up_image(images[0], folder)], folder, concurrency=1))
        for path in images:
            first = send(first_clicks(job, [path], folder, concurrency=1))
            second = send(Load([next_click(job, path, folder)], concurrency=1, count=clicks))
            if first.num_errors or second.num_errors:
                raise RuntimeError(f"requests failed: {[*first.attempts, *second.attempts]}")
            firsts.append(first.latency_ms(0.5))
            seconds.append(second.latency_ms(0.5))
            embedding = model.embed(decode_image(path.read_bytes()))
            alone.append(median(timed_ms(model, embedding, to_prompt(path)) for _ in range(clicks)))
            print(f"{path.name}: {firsts[-1]:.0f}, {seconds[-1]:.0f}, alone {alone[-1]:.0f} ms", flush=True)
    ratios = [b / a for a, b in zip(firsts, seconds, strict=True)]
    return [
        to_row("first click, ms", firsts, "-"),
        to_row("next click, ms", seconds, "-"),
        to_row("next click / first click", ratios, "<= 0.1"),
        to_row("prompt without HTTP, ms", alone, "-"),
        to_row("next click - prompt without HTTP, ms", [a - b for a, b in zip(seconds, alone, strict=True)], "-"),
    ]


def duplicates_row(images: list[Path], folder: Path) -> Row:
    """First clicks on few images, all at once, over two decoders."""
    job = sam_job(write_sam(folder / "small-sam", _SMALL), decoders=2)
    with serving(job):
        outcome = send(first_clicks(job, images[:_UNIQUE], folder, concurrency=_CLICKS))
        calls = num_encoder_calls()
    if outcome.num_errors:
        raise RuntimeError(f"{outcome.num_errors} clicks failed: {outcome.attempts[-1]}")
    return to_row(f"encoder's calls, {_CLICKS} first clicks on {_UNIQUE} images at once", [calls], f"{_UNIQUE}")


def write_sam(folder: Path, config: Mapping[str, object]) -> str:
    """A SAM with random weights; of ViT-B's size where the configuration is empty."""
    torch.manual_seed(0)
    SamModel(SamConfig(**config)).save_pretrained(folder)
    return str(folder)


def sam_job(weights: str, decoders: int) -> ServeJob:
    raw = {
        "kind": "serve",
        "name": "sam",
        "models": {
            "sam": {
                "prompt": "sam-vit-base",
                "weights": weights,
                "encoder": {"cpus_per_replica": 0.5},
                "decoder": {"cpus_per_replica": 0.25, "replicas": decoders},
            }
        },
        "http": {"port": free_port(), "timeout": "10 minutes"},
    }
    return parse_as(ServeJob, raw)


def first_clicks(job: ServeJob, images: list[Path], folder: Path, concurrency: int) -> Load:
    """Each client clicks once, and sends the image along."""
    url = f"http://127.0.0.1:{job.http.port}/v1/models/sam/prompt"
    asks = []
    for path in images:
        prompt = json.dumps({"points": to_prompt(path).points, "labels": [1]})
        asks.append(Ask(url, *write_form(folder / f"{path.name}.click", path.read_bytes(), prompt=prompt)))
    return Load(asks, concurrency, count=concurrency)


def next_click(job: ServeJob, path: Path, folder: Path) -> Ask:
    """A click on an image that is known by its hash."""
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    body = folder / f"{path.name}.json"
    body.write_text(json.dumps({"image": key, "points": to_prompt(path).points, "labels": [1]}))
    return Ask(f"http://127.0.0.1:{job.http.port}/v1/models/sam/prompt", str(body), "application/json")


def to_prompt(path: Path) -> Prompt:
    """A click on the middle of an image."""
    height, width = decode_image(path.read_bytes()).shape[:2]
    return Prompt(points=((width / 2, height / 2),), labels=(1,), box=None, mask=None, is_multimask=True)


def warm_up_image(path: Path, folder: Path) -> Path:
    """The same pixels under another hash."""
    copy = folder / f"warm-up{path.suffix}"
    copy.write_bytes(path.read_bytes() + b"\0")
    return copy


def timed_ms(model: PromptModel, embedding: object, prompt: Prompt) -> float:
    began = time.perf_counter()
    model.prompt(embedding, prompt)  # type: ignore[arg-type]
    return 1000 * (time.perf_counter() - began)


def num_encoder_calls() -> int:
    """As the actor counts them that keeps what the encoder has made."""
    (found,) = [one for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].endswith("::embeddings")]
    store = ray.get_actor(found["name"], namespace=found["namespace"])
    calls: int = ray.get(store.call.remote("num_made"))
    return calls


def to_row(what: str, values: list[float], target: str) -> Row:
    return {"what": what, "median": median(values), "lowest": min(values), "highest": max(values), "target": target}
