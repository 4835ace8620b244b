"""The table that `raysseg recommend` goes by, guidance.yaml, as typed rules. No torch, no ray."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import resources
from typing import Annotated, Literal, get_args

import yaml
from pydantic import Field

from raysseg.catalogue import MODELS, PROMPT_MODELS
from raysseg.schema import Task
from raysseg.section import Section

Kind = Task | Literal["prompt"]
"""What a model is asked to do: one of the tasks that are trained, or to answer prompts."""
Priority = Literal["accuracy", "speed", "small-objects", "interactive"]
UseCase = Literal["medical", "driving", "editing", "inspection"]
Measure = Literal["images", "small_instances", "thin_classes", "dominant_share", "instances", "side"]
KINDS: tuple[Kind, ...] = (*get_args(Task), "prompt")

Text = Annotated[str, Field(min_length=1)]


class Bound(Section):
    """From where on a measure of the data counts."""

    measure: Measure
    below: float | None = None
    start: Annotated[float | None, Field(alias="from")] = None

    def holds(self, value: float) -> bool:
        """Whether this value is beyond the bound."""
        return (self.below is None or value < self.below) and (self.start is None or value >= self.start)


class Licence(Section):
    """Of published weights."""

    text: Text
    is_sure: bool
    is_commercial: bool | None


class Beginning(Section):
    """What a model starts from."""

    weights: str | dict[Task, str] | None = None
    licence: str | None

    def weights_for(self, task: Task) -> str | None:
        """A hub id, or what the model's library calls its own; None: from scratch."""
        return self.weights.get(task) if isinstance(self.weights, dict) else self.weights


class Rule(Section):
    """Points for some models, where all of `when` is the case."""

    models: tuple[str, ...]
    when: tuple[str, ...]
    points: int
    reason: Text
    source: Text

    def holds(self, name: str, situation: Collection[str]) -> bool:
        """Whether a model gets these points."""
        return all(part in situation for part in self.when) and any(fnmatchcase(name, each) for each in self.models)


class CostRule(Section):
    """Points for each doubling of a prediction's FLOPs over the least; the reason goes on with the cheapest's name."""

    when: tuple[str, ...]
    points: int
    reason: Text


class Remark(Section):
    """What no model says, where all of `when` is the case."""

    when: tuple[str, ...]
    text: Text
    source: Text


class Guidance(Section):
    """The whole table; see its head."""

    presumed_task: dict[str, Kind]
    data: dict[str, Bound]
    licences: dict[str, Licence]
    models: dict[str, Beginning]
    rules: tuple[Rule, ...]
    cost_rules: tuple[CostRule, ...]
    remarks: tuple[Remark, ...]

    @cached_property
    def kinds(self) -> dict[str, tuple[Kind, ...]]:
        """The catalogue's models that the table names, those of real size, and what each can be asked to do."""
        known: dict[str, tuple[Kind, ...]] = {name: entry.tasks for name, entry in MODELS.items()}
        known |= dict.fromkeys(PROMPT_MODELS, ("prompt",))
        return {name: kinds for name, kinds in known.items() if any(fnmatchcase(name, each) for each in self.models)}

    def start_of(self, name: str) -> Beginning:
        """What a model starts from."""
        return next(start for pattern, start in self.models.items() if fnmatchcase(name, pattern))

    def rules_for(self, name: str, situation: Collection[str]) -> Sequence[Rule]:
        """The rules that give a model points, in the table's order."""
        return [rule for rule in self.rules if rule.holds(name, situation)]

    def traits_for(self, kind: Kind) -> set[str]:
        """The traits of data on which a rule or a remark for this task depends."""
        whens = [*(rule.when for rule in self.rules), *(remark.when for remark in self.remarks)]
        others = set(KINDS) - {kind}
        return {part for when in whens if not others & set(when) for part in when} & self.data.keys()


@cache
def read_guidance() -> Guidance:
    """The table as it ships."""
    text = resources.files("raysseg.advice").joinpath("guidance.yaml").read_text(encoding="utf-8")
    return Guidance.model_validate(yaml.safe_load(text))
