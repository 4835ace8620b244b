"""`raysseg recommend`: which model to begin with, and why; what it costs, what rules it out, what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raysseg.advice.amounts import in_gib
from raysseg.advice.estimates import GPU, Cost, estimate_costs, memory_of
from raysseg.advice.guidance import KINDS, Guidance, Kind, Remark, read_guidance
from raysseg.advice.profiles import SIZE
from raysseg.advice.situation import DATA_KINDS, Ask, choose_task, situation_of
from raysseg.catalogue import MODELS, PROMPT_MODELS
from raysseg.findings.fingerprint import Fingerprint


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
    costs = estimate_costs(able, task, ask, found)
    excluded = [*_excluded_by_task(task, found, guidance), *_excluded_by_cost(costs, ask)]
    left = [name for name in able if name not in {entry.name for entry in excluded}]
    cheapest = min((name for name in left if name in costs), key=lambda name: costs[name].flops, default=None)
    models = [_rank(name, task, situation, guidance, costs, cheapest) for name in left]
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
    name: str,
    task: Kind,
    situation: Mapping[str, str],
    guidance: Guidance,
    costs: Mapping[str, Cost],
    cheapest: str | None,
) -> Ranked:
    """A model with its reasons; the cheapest is that of the fewest FLOPs of those that are left."""
    reasons = [Reason(rule.points, rule.reason, rule.source) for rule in guidance.rules_for(name, situation)]
    for rule in guidance.cost_rules:
        if cheapest and name in costs and all(part in situation for part in rule.when):
            factor = costs[name].flops / costs[cheapest].flops
            if points := rule.points * round(math.log2(factor)):
                reasons.append(Reason(points, f"{factor:.1f} {rule.reason} {cheapest}", "raysseg/advice/extents.json"))
    start = guidance.start_of(name)
    weights = PROMPT_MODELS[name] if task == "prompt" else start.weights_for(task)
    licence = guidance.licences[start.licence].text if start.licence else None
    return Ranked(name, weights, licence, sum(reason.points for reason in reasons), reasons, costs.get(name))


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
    memory = memory_of(ask)
    for name, cost in costs.items():
        if cost.batch == 0 and memory is not None:
            need = cost.training_bytes(1)
            text = f"training takes about {in_gib(need)} for one image of {_shown(cost.crop)}, of {in_gib(memory)}"
            mend = f"--gpu-memory {math.ceil(need / 2**30)}GiB"
            mend += f", data.crop: {list(cost.smaller)}" if cost.smaller else ""
            mend += ", perhaps model.checkpoint_activations: true" if MODELS[name].recomputes else ""
            yield Excluded(name, text, mend)
        elif ask.latency_s is not None and cost.latency_s is not None and cost.latency_s > ask.latency_s:
            took = f"{math.ceil(cost.latency_s * 1000)}ms"
            text = f"about {took} an image of {_shown(cost.size)}, more than {ask.latency_s * 1000:g}ms"
            yield Excluded(name, text, f"--latency {took}, a faster --gpu, or smaller images (data.size)")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _presumed(task: Kind, ask: Ask, found: Fingerprint | None) -> Iterator[str]:
    if ask.latency_s is not None and ask.gpu is None and task != "prompt":
        yield f"--gpu {GPU}, for the latency"
    if found is None and task != "prompt":
        yield (
            f"images of {_shown(SIZE)}; their number, imbalance and small things count for nothing yet: name the "
            "data, or their fingerprint.json"
        )


def _unsure(models: Sequence[Ranked], ask: Ask, guidance: Guidance) -> Iterator[str]:
    yield "points are for what is published and what was measured here; on your data, train the first two and compare"
    costs = [model.cost for model in models if model.cost]
    if costs:
        yield (
            "memory is worked out for 21 classes, bf16 and three sizes, and by pixels in between; `raysseg plan JOB` "
            "takes a job's own"
        )
    if any(cost.latency_s is not None for cost in costs):
        yield (
            "latency is an estimate from operations and data sheets, until it is measured: `raysseg plan --measure`; "
            "decoding and what masks are made of come on top"
        )
    if len(costs) < len(models) and (memory_of(ask) is not None or ask.latency_s is not None):
        yield "memory and latency of prompted models are not tabulated: they rule none out"
    starts = [guidance.start_of(model.name).licence for model in models]
    doubtful = [name for name, licence in guidance.licences.items() if name in starts and not licence.is_sure]
    if doubtful:
        yield f"licences of weights that should be read before they are built on: {', '.join(doubtful)}"
