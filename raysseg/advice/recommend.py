"""`raysseg recommend`: which model to begin with, and why; what it costs, what rules it out, what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raysseg.advice.amounts import in_gib
from raysseg.advice.guidance import KINDS, Guidance, Kind, Remark, read_guidance
from raysseg.advice.situation import DATA_KINDS, Ask, choose_task, situation_of
from raysseg.catalogue import PROMPT_MODELS
from raysseg.findings.fingerprint import Fingerprint

SIZE = (512, 512)  # pixels, presumed where no data say otherwise
STEP, LEAST_SIDE = 32, 64  # of crops, in pixels


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
    task, presumed = choose_task(ask, found, guidance)
    situation = situation_of(task, ask, found, guidance)
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


# --- ranking ------------------------------------------------------------------------------------------------------


def _holding(remarks: Sequence[Remark], situation: Mapping[str, str]) -> list[Remark]:
    return [remark for remark in remarks if all(part in situation for part in remark.when)]


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
