"""`raysseg recommend`: which model to begin with, and why; what it costs, what rules it out, what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raysseg.advice.amounts import in_gib
from raysseg.advice.guidance import KINDS, Guidance, Kind, Measure, Priority, Remark, UseCase, read_guidance
from raysseg.catalogue import PROMPT_MODELS
from raysseg.findings.advice import Start, to_train_job, to_yaml
from raysseg.findings.fingerprint import COCO_SIDES, Choice, Fingerprint, SplitFacts, Tree
from raysseg.schema import InputError

SIZE = (512, 512)  # pixels, presumed where no data say otherwise
STEP, LEAST_SIDE = 32, 64  # of crops, in pixels
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


@dataclass(frozen=True)
class Cost:
    """What a model takes, by estimates; `raysseg plan` knows a job's own.

    Attributes:
        size: of the images, (height, width).
        parameters: of the model.
        flops: of a forward pass over an image.
        fixed_bytes: of training: weights, gradients, the optimiser's state.
        image_bytes: of training, for each image of a batch.
        batch: the most images that fit into the memory that was named, 16 at most; None: none was named.
        latency_s: of an image on the GPU that was named; None: none was named.
    """

    size: tuple[int, int]
    parameters: int
    flops: float
    fixed_bytes: int
    image_bytes: int
    batch: int | None
    latency_s: float | None


@dataclass(frozen=True)
class Reason:
    """Why a model has points, and who says so."""

    points: int
    reason: str
    source: str


@dataclass(frozen=True)
class Ranked:
    """A model in its place.

    Attributes:
        name: in a job.
        weights: that it starts from; None: from scratch.
        licence: of the weights, as far as it is known.
        points: the sum of the reasons'.
        reasons: for the place.
        cost: of training and running it.
    """

    name: str
    weights: str | None
    licence: str | None
    points: int
    reasons: list[Reason]
    cost: Cost | None


@dataclass(frozen=True)
class Excluded:
    """A model that is ruled out, why, and what brings it back."""

    name: str
    reason: str
    mend: str


@dataclass(frozen=True)
class Recommendation:
    """What `raysseg recommend` prints.

    Attributes:
        task: that the models are ranked for.
        situation: what the rules go by, each with where it is from.
        models: the best first.
        excluded: what is ruled out.
        remarks: what no model says.
        presumed: what nobody has said.
        unsure: what is not known.
    """

    task: Kind
    situation: dict[str, str]
    models: list[Ranked]
    excluded: list[Excluded]
    remarks: list[str]
    presumed: list[str]
    unsure: list[str]


def recommend(ask: Ask, found: Fingerprint | None = None) -> Recommendation:
    """Ranks the models for what is asked, and for the data if they are known.

    Raises:
        InputError: the data can't be trained for this task, or a name is unknown.
    """
    guidance = read_guidance()
    task, presumed = _choose_task(ask, found, guidance)
    situation = _situation(task, ask, found, guidance)
    able = [name for name, kinds in guidance.kinds.items() if task in kinds]
    costs = _costs(able, ask, found)
    excluded = [*_excluded_by_task(task, found, guidance), *_excluded_by_cost(costs, ask)]
    left = [name for name in able if name not in {entry.name for entry in excluded}]
    least = min((costs[name].flops for name in left if name in costs), default=None)
    models = [_rank(name, task, situation, guidance, costs.get(name), least) for name in left]
    order = list(guidance.kinds)
    models.sort(key=lambda m: (-m.points, m.cost.flops if m.cost else math.inf, order.index(m.name)))
    return Recommendation(
        task=task,
        situation=situation,
        models=models,
        excluded=excluded,
        remarks=[f"{remark.text} ({remark.source})" for remark in _holding(guidance.remarks, situation)],
        presumed=[*presumed, *_presumed(task, ask, found)],
        unsure=list(_unsure(models, ask, guidance)),
    )


# --- what is the case ---------------------------------------------------------------------------------------------


def _choose_task(ask: Ask, found: Fingerprint | None, guidance: Guidance) -> tuple[Kind, list[str]]:
    """The task, and where it is from unless it was asked for."""
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


def _situation(task: Kind, ask: Ask, found: Fingerprint | None, guidance: Guidance) -> dict[str, str]:
    """What the rules go by, each with where it is from."""
    situation: dict[str, str] = {task: "the task"}
    if ask.priority:
        situation[ask.priority] = "the priority"
    if ask.use_case:
        situation[ask.use_case] = "the use case"
    if found is not None:
        measures = measure(found.train)
        for name, bound in guidance.data.items():
            value, shown = measures[bound.measure]
            if bound.holds(value):
                situation.setdefault(name, shown)
    return situation


def measure(split: SplitFacts) -> dict[Measure, tuple[float, str]]:
    """The measures of a split that bounds are for, each with the sentence that says it."""
    instances = sum(found.instances for found in split.classes)
    small = sum(found.small for found in split.classes) / max(1, instances)
    thin = [found.name for found in split.classes if found.is_thin]
    side, per_image = max(split.height[1], split.width[1]), instances / max(1, split.num_usable)
    return {
        "images": (split.num_usable, f"{split.num_usable:,} images"),
        "small_instances": (small, f"{small:.0%} of the instances are smaller than {COCO_SIDES[0]}x{COCO_SIDES[0]}"),
        "thin_classes": (len(thin), f"narrower than 4 pixels: {', '.join(thin[:4])}{', ...' if len(thin) > 4 else ''}"),
        "dominant_share": (split.dominant_share, f"{split.dominant} fills {split.dominant_share:.0%} of the pixels"),
        "instances": (per_image, f"{per_image:.0f} instances an image"),
        "side": (side, f"images of {split.width[1]}x{split.height[1]}"),
    }


def _holding(remarks: Sequence[Remark], situation: Mapping[str, str]) -> list[Remark]:
    return [remark for remark in remarks if all(part in situation for part in remark.when)]


# --- ranking ------------------------------------------------------------------------------------------------------


def _rank(
    name: str, task: Kind, situation: Mapping[str, str], guidance: Guidance, cost: Cost | None, least: float | None
) -> Ranked:
    """A model with its reasons; `least` are the fewest FLOPs of any model that is left."""
    reasons = [Reason(rule.points, rule.reason, rule.source) for rule in guidance.rules_for(name, situation)]
    for rule in guidance.cost_rules:
        if cost is not None and least and all(part in situation for part in rule.when):
            factor = cost.flops / least
            if points := rule.points * round(math.log2(factor)):
                reasons.append(Reason(points, f"{factor:.1f} {rule.reason}", "raysseg/advice/costs.json"))
    start = guidance.start_of(name)
    weights = PROMPT_MODELS[name] if task == "prompt" else start.weights_for(task)
    licence = guidance.licences[start.licence].text if start.licence else None
    return Ranked(name, weights, licence, sum(reason.points for reason in reasons), reasons, cost)


# --- costs --------------------------------------------------------------------------------------------------------


def _costs(names: Sequence[str], ask: Ask, found: Fingerprint | None) -> dict[str, Cost]:
    return {}


# --- what is ruled out, and what is not known ----------------------------------------------------------------------


def _excluded_by_task(task: Kind, found: Fingerprint | None, guidance: Guidance) -> Iterator[Excluded]:
    open_to = KINDS if found is None else (*DATA_KINDS[found.format], "prompt")
    for name, kinds in guidance.kinds.items():
        if task not in kinds:
            does = "answers prompts" if kinds == ("prompt",) else f"is trained for {' and '.join(kinds)} labels"
            mend = next(
                (f"--task {kind}" for kind in kinds if kind in open_to), f"--task {kinds[0]}, and labels for it"
            )
            yield Excluded(name, f"{does}, not for {task}", mend)


def _excluded_by_cost(costs: Mapping[str, Cost], ask: Ask) -> Iterator[Excluded]:
    for name, cost in costs.items():
        height, width = cost.size
        if cost.batch == 0 and ask.memory is not None:
            need = cost.fixed_bytes + cost.image_bytes
            yield Excluded(
                name,
                f"training on one image of {width}x{height} takes about {in_gib(need)} of {in_gib(ask.memory)}",
                _fitting(cost, ask.memory),
            )
        elif ask.latency_s is not None and cost.latency_s is not None and cost.latency_s > ask.latency_s:
            yield Excluded(
                name,
                f"about {cost.latency_s * 1000:.0f} ms an image, more than {ask.latency_s * 1000:g}",
                f"--latency {cost.latency_s * 1000:.0f}ms, a faster GPU, or smaller images (data.size)",
            )


def _fitting(cost: Cost, memory: int) -> str:
    """How one image would fit: crops of fewer pixels, or more memory."""
    more = f"--gpu-memory {math.ceil((cost.fixed_bytes + cost.image_bytes) / 2**30)}GiB"
    room = (memory - cost.fixed_bytes) / cost.image_bytes
    sides = [math.floor(side * math.sqrt(max(0.0, room)) / STEP) * STEP for side in cost.size]
    return f"{more}, or data.crop: {sides}" if min(sides) >= LEAST_SIDE else more


def _presumed(task: Kind, ask: Ask, found: Fingerprint | None) -> Iterator[str]:
    if task == "prompt":
        return
    if found is None:
        yield (
            f"images of {SIZE[1]}x{SIZE[0]}; their number, imbalance and small things count for nothing yet: name the "
            "data, or their fingerprint.json"
        )
    elif len(found.splits) == 1:
        yield "the data are for training; validation wants a split of its own"


def _unsure(models: Sequence[Ranked], ask: Ask, guidance: Guidance) -> Iterator[str]:
    yield "points are for what is published and what was measured here; on your data, train the first two and compare"
    if any(model.cost for model in models):
        yield "memory and FLOPs are estimates, scaled by pixels from 512x512; `raysseg plan` takes a job's own settings"
    if ask.latency_s is not None:
        yield "latency is an estimate from FLOPs until it is measured: `raysseg plan --measure`"
    starts = [guidance.start_of(model.name).licence for model in models]
    doubtful = [name for name, licence in guidance.licences.items() if name in starts and not licence.is_sure]
    if doubtful:
        yield f"licences of weights that should be read before they are built on: {', '.join(doubtful)}"


# --- a job --------------------------------------------------------------------------------------------------------


def to_job(answer: Recommendation, found: Fingerprint | None) -> str:
    """A complete job for the first model, YAML with the reasons as comments: to train it, or to serve one with prompts.

    Raises:
        InputError: every model is ruled out, or there are no data to train on.
    """
    if not answer.models:
        raise InputError("--write-job: every model is ruled out; see what brings them back")
    best = answer.models[0]
    reason = "\n".join([f"{best.points} points:", *(_as_line(reason) for reason in best.reasons)])
    reason += f"\nLicence of the weights: {best.licence}." if best.licence else ""
    if answer.task == "prompt":
        return _to_serve_job(best, reason)
    if found is None:
        raise InputError("--write-job: a train job wants data: name a fingerprint.json, a folder or an inspect job")
    start = Start(
        answer.task, best.name, best.weights, reason, "recommend", list(_choose_batch(best.cost)), answer.remarks
    )
    return to_train_job(found, start, storage="runs")


def _to_serve_job(best: Ranked, reason: str) -> str:
    http: Tree = {"host": "127.0.0.1", "port": 8000}
    models: Tree = {"sam": {"prompt": best.name, "weights": best.weights}}
    comments = {
        "kind": "Written by `raysseg recommend`; run it with `raysseg serve`, change what you know better.",
        "models.sam": reason,
        "http": "Beyond this machine: host: 0.0.0.0, and token_variable.",
    }
    return to_yaml({"kind": "serve", "name": "prompts", "models": models, "http": http}, comments)


def _choose_batch(cost: Cost | None) -> Iterator[Choice]:
    if cost is not None and cost.batch:
        need = in_gib(cost.fixed_bytes + cost.batch * cost.image_bytes)
        text = f"Takes about {need}, by estimate; accumulation makes up the global batch. `raysseg plan` knows better."
        yield Choice("batch.per_worker", cost.batch, text)


def _as_line(reason: Reason) -> str:
    return f"{reason.points:+d}  {reason.reason} ({reason.source})"
