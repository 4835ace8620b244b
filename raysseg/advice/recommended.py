"""A recommendation as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from raysseg.advice.amounts import in_gib

_SHOWN = 5  # models; the others are in --json
_WIDTH = 118


def as_text(answer: Mapping[str, Any]) -> str:
    """A recommendation as text; takes it as the JSON object has it."""
    return "\n".join(_lines(answer))


def _lines(answer: Mapping[str, Any]) -> Iterator[str]:
    facts = [name if name == answer["task"] else f"{name} ({why})" for name, why in answer["situation"].items()]
    yield f"for {', '.join(facts)}"
    models: Sequence[Mapping[str, Any]] = answer["models"]
    for place, model in enumerate(models[:_SHOWN], 1):
        yield ""
        unit = "point" if abs(model["points"]) == 1 else "points"
        yield f"{place}. {model['name']}  {model['points']} {unit}{_lead(models, place)}"
        yield from _about(model)
    if len(models) > _SHOWN:
        rest = ", ".join(f"{model['name']} {model['points']}" for model in models[_SHOWN:])
        yield from ("", *_wrapped(f"then {rest}", "   "))
    if not models:
        yield from ("", "no model is left")
    yield from _excluded(answer["excluded"], answer["task"])
    for title in ("remarks", "presumed", "unsure"):
        if answer[title]:
            yield from ("", f"{title}:")
            for text in answer[title]:
                yield from _wrapped(f"- {text}", "  ")
    if "job" in answer:
        yield from ("", f"job: {answer['job']}")


def _lead(models: Sequence[Mapping[str, Any]], place: int) -> str:
    """By what a model is ahead of the next one."""
    if place == len(models):
        return ""
    model, other = models[place - 1], models[place]
    lead = model["points"] - other["points"]
    if lead:
        return f", {lead} ahead of {other['name']}"
    factor = other["cost"]["flops"] / model["cost"]["flops"] if model["cost"] and other["cost"] else 1.0
    more = f", which takes {factor:.1f} times the FLOPs" if factor >= 1.05 else ""
    return f", even with {other['name']}{more}"


def _about(model: Mapping[str, Any]) -> Iterator[str]:
    for reason in model["reasons"]:
        yield from _wrapped(f"{reason['points']:+d}  {reason['reason']} ({reason['source']})", "   ")
    weights = model["weights"] or "null, from scratch"
    yield from _wrapped(f"weights: {weights}" + (f"; {model['licence']}" if model["licence"] else ""), "   ")
    if model["cost"]:
        yield from _wrapped(_cost(model["cost"]), "   ")


def _cost(cost: Mapping[str, Any]) -> str:
    height, width = cost["crop"]
    text = (
        f"{cost['parameters'] / 1e6:.1f} M parameters; {cost['flops'] / 1e9:.0f} GFLOPs an image of 512x512; training "
        f"takes about {in_gib(cost['fixed_bytes'])} and {in_gib(cost['image_bytes'])} for each crop of {width}x{height}"
    )
    text += f", of which {cost['batch']} fit" if cost["batch"] else ""
    if cost["latency_s"] is None:
        return text
    height, width = cost["size"]
    return f"{text}; about {cost['latency_s'] * 1000:.3g} ms an image of {width}x{height}"


def _excluded(excluded: Sequence[Mapping[str, str]], task: str) -> Iterator[str]:
    """What is ruled out by cost, one by one; by task, in a line."""
    is_other = [entry["reason"].endswith(f"not for {task}") for entry in excluded]
    costly = [entry for entry, other in zip(excluded, is_other, strict=True) if not other]
    if costly:
        yield from ("", "ruled out:")
    for entry in costly:
        yield from _wrapped(f"- {entry['name']}: {entry['reason']}; back with {entry['mend']}", "  ")
    mends = dict.fromkeys(entry["mend"] for entry, other in zip(excluded, is_other, strict=True) if other)
    if mends:
        yield from ("", f"{sum(is_other)} models are for other tasks: {'; '.join(mends)}")


def _wrapped(text: str, indent: str) -> list[str]:
    return wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False)
