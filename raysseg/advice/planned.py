"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from raysseg.advice.amounts import in_gib

_HEAD = ("GPU", "precision", "fits", "per_worker", "passes", "memory", "images/s", "epoch", "cost", "reads")


def as_text(result: dict[str, Any]) -> str:
    """The lines that `raysseg plan` prints."""
    return "\n".join([*_job_lines(result), *_trial_lines(result), "", *_choice_lines(result), *_remark_lines(result)])


def _job_lines(result: dict[str, Any]) -> Iterator[str]:
    height, width = result["crop"]
    yield f"{result['model']}, {result['task']}, crops of {width}x{height}"
    yield f"global batch {result['global_batch']} over {result['workers']} {_plural('worker', result['workers'])}"
    trained = result["trainable"] / result["parameters"]
    yield f"{result['parameters'] / 1e6:.1f} M parameters, {trained:.0%} of them trained"
    forward, training = (result[f"flops_{what}"] / 1e9 for what in ("forward", "training"))
    yield f"{forward:.3g} GFLOP an image forward, {training:.3g} in training"
    yield f"{result['num_images']} images an epoch of {result['image_bytes'] / 1000:.0f} kB"


def _choice_lines(result: dict[str, Any]) -> Iterator[str]:
    choices = result["choices"]
    yield from _columns([_HEAD, *map(_cells, choices)])
    if len(choices) == 1:
        yield ""
        parts = [(name, number) for name, number in choices[0]["memory"].items() if number]
        yield from _columns([(f"  {name}", in_gib(number)) for name, number in parts])
    if any(choice["speed"] for choice in choices):
        yield ""
        yield "images/s, epoch, cost and reads are estimates by data sheets, lowest to highest, unless it says measured"


def _cells(choice: dict[str, Any]) -> tuple[str, ...]:
    memory = f"{in_gib(choice['takes']).removesuffix(' GiB')} of {in_gib(choice['usable'])}"
    start = (choice["gpu"] or "-", choice["precision"], str(choice["largest"]))
    if not choice["largest"]:
        return (*start, "-", "-", memory, "does not fit", "-", "-", "-")
    batch = (str(choice["per_worker"]), str(choice["accumulation"]), memory)
    if not choice["fits"]:
        return (*start, *batch, "does not fit", "-", "-", "-")
    if choice["speed"] is None:
        return (*start, *batch, "-", "-", "-", "-")
    speed = choice["speed"]
    spread = f"{speed['likely']:.3g} ({speed['low']:.3g} to {speed['high']:.3g})"
    rate = spread if speed["source"] == "estimate" else f"{speed['likely']:.3g} {speed['source']}"
    return (
        *(*start, *batch, rate, _duration(choice["epoch_s"])),
        *(f"${choice['epoch_cost']:.2g}", f"{choice['read_mb_s']:.3g} MB/s"),
    )


def _trial_lines(result: dict[str, Any]) -> Iterator[str]:
    if (trial := result.get("trial")) is None:
        return
    yield ""
    yield (
        f"measured over {trial['steps']} steps on {trial['device']}: {trial['images_per_s']:.3g} images/s, "
        f"{trial['wait_share']:.0%} of the time waiting for data, {in_gib(trial['memory'])} {trial['memory_is']}"
    )
    rates = [choice["speed"]["likely"] / result["workers"] for choice in result["choices"] if choice["speed"]]
    wanted = f"; of the GPUs below, one takes {min(rates):.3g} to {max(rates):.3g}" if rates else ""
    yield f"the input alone gives a worker {trial['input_images_per_s']:.3g} images/s{wanted}"


def _remark_lines(result: dict[str, Any]) -> Iterator[str]:
    if result["presumed"]:
        yield from ("", "presumed:", *(f"  {line}" for line in result["presumed"]))


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plural(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"
