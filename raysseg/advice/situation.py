"""What `raysseg recommend` is asked, and what is the case: the task, the priority, the use case, traits of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raysseg.advice.guidance import KINDS, Guidance, Kind, Measure, Priority, UseCase
from raysseg.findings.fingerprint import COCO_SIDES, Fingerprint, SplitFacts
from raysseg.schema import InputError

DATA_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "masks": ("semantic",),
    "huggingface": ("semantic",),
    "coco": ("instance", "semantic"),
    "yolo": ("instance", "semantic"),
    "coco_panoptic": ("panoptic", "instance", "semantic"),
    "shards": KINDS[:-1],
}
"""What a format's labels can be trained for; shards hold what they were written from."""


@dataclass(frozen=True)
class Ask:
    """What is asked for; None: not said.

    Attributes:
        kind: the task, or to answer prompts.
        priority: what counts most.
        use_case: what it is for.
        memory: of a GPU, bytes.
        latency_s: that an image may take, seconds.
        gpu: its name, see raysseg.advice.gpus.
    """

    kind: Kind | None = None
    priority: Priority | None = None
    use_case: UseCase | None = None
    memory: int | None = None
    latency_s: float | None = None
    gpu: str | None = None


def choose_task(ask: Ask, found: Fingerprint | None, guidance: Guidance) -> tuple[Kind, list[str]]:
    """The task, and where it is from unless it was asked for.

    Raises:
        InputError: the data can't be trained for it.
    """
    implied = [name for name in (ask.priority, ask.use_case) if name and name in guidance.presumed_task]
    prompting = [name for name in implied if guidance.presumed_task[name] == "prompt"]
    if ask.kind is not None:
        task, why = ask.kind, None
    elif prompting:
        task, why = "prompt", f"for {prompting[0]}"
    elif found is not None:
        task, why = found.task, "as the data were inspected for it"
    elif implied:
        task, why = guidance.presumed_task[implied[0]], f"for {implied[0]}"
    else:
        task, why = "semantic", "as none is named"
    if found is not None and task != "prompt" and task not in DATA_KINDS[found.format]:
        allowed = ", ".join(kind for kind in KINDS if kind in DATA_KINDS[found.format])
        message = f"--task: {task} can't be trained from the format {found.format}; allowed: {allowed}, prompt"
        raise InputError(f"{message}; instances want COCO or YOLO annotations, segments COCO panoptic: docs/data.md")
    others = [
        kind for kind in KINDS if kind != task and (found is None or kind in (*DATA_KINDS[found.format], "prompt"))
    ]
    return task, [] if why is None else [f"--task {task}, {why}; others: {', '.join(others)}"]


def situation_of(task: Kind, ask: Ask, found: Fingerprint | None, guidance: Guidance) -> dict[str, str]:
    """What the rules go by, each with where it is from."""
    situation: dict[str, str] = {task: "the task"}
    if ask.priority:
        situation[ask.priority] = "the priority"
    if ask.use_case:
        situation[ask.use_case] = "the use case"
    if found is not None:
        measures = measure(found.train)
        for name in sorted(guidance.traits_for(task), key=list(guidance.data).index):
            value, shown = measures[guidance.data[name].measure]
            if guidance.data[name].holds(value):
                situation.setdefault(name, shown)
    return situation


def measure(split: SplitFacts) -> dict[Measure, tuple[float, str]]:
    """The measures of a split that bounds are for, each with the sentence that says it."""
    instances = sum(found.instances for found in split.classes)
    small = sum(found.small for found in split.classes) / max(1, instances)
    thin = [found.name for found in split.classes if found.is_thin]
    dominant_share = split.dominant_share if sum(found.pixels > 0 for found in split.classes) > 1 else 0.0
    side, per_image = max(split.height[1], split.width[1]), instances / max(1, split.num_usable)
    return {
        "images": (split.num_usable, f"{split.num_usable:,} images"),
        "small_instances": (small, f"{small:.0%} of the instances are smaller than {COCO_SIDES[0]}x{COCO_SIDES[0]}"),
        "thin_classes": (len(thin), f"narrower than 4 pixels: {', '.join(thin[:4])}{', ...' if len(thin) > 4 else ''}"),
        "dominant_share": (dominant_share, f"{split.dominant} fills {split.dominant_share:.0%} of the pixels"),
        "instances": (per_image, f"{per_image:.0f} instances an image"),
        "side": (side, f"images of {split.width[1]}x{split.height[1]}"),
    }
