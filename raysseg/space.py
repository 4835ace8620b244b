"""What a search varies, and what it is after. No torch, no ray, no Optuna."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from raysseg.section import Duration, Section, not_ordered

LATENCY = "latency_ms"
"""The objective that no validation holds: milliseconds in which a trial's model predicts one validation image."""

CLASS_WEIGHTS = "loss.class_weights"
"""The path at which class weights are searched by shapes of their own."""

Scalar = bool | int | float | str | None


class Dimension(Section):
    """What a path of the train job is searched over."""

    when: dict[str, Scalar | Annotated[tuple[Scalar, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Other paths of the space and the values, one or a list, that they must have; else the train job's own value
    stands."""

    @property
    def shape(self) -> str:
        """The key that says which kind of dimension this is."""
        return next(shape for shape, kind in _DIMENSIONS.items() if type(self) is kind)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(smallest, largest), where numbers are searched."""
        return None

    @property
    def extremes(self) -> Sequence[Any]:
        """Values of the train job's key of which all others are in between."""
        return self.bounds or ()

    @property
    def is_finite(self) -> bool:
        """Whether its values can be counted."""
        return False

    @property
    def is_number(self) -> bool:
        """Whether it is searched by numbers in a range, of which more than one is possible."""
        return self.bounds is not None and self.bounds[0] < self.bounds[1]

    @property
    def conditions(self) -> dict[str, tuple[Scalar, ...]]:
        """The values that other paths must have one of."""
        return {path: value if isinstance(value, tuple) else (value,) for path, value in self.when.items()}


class Uniform(Dimension):
    """A number, every one as likely."""

    uniform: tuple[float, float]
    """[smallest, largest]."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Only so far apart, from the smallest on."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(smallest, largest)."""
        return self.uniform

    @property
    def is_finite(self) -> bool:
        """Whether it has steps."""
        return self.step is not None


class LogUniform(Dimension):
    """A positive number, every order of magnitude as likely."""

    log_uniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    """[smallest, largest]."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(smallest, largest)."""
        return self.log_uniform


class Integers(Dimension):
    """A whole number."""

    between: tuple[int, int] = Field(alias="int")
    """[smallest, largest]."""
    step: Annotated[int, Field(ge=1)] = 1
    log: bool = False
    """Every order of magnitude as likely."""

    @property
    def bounds(self) -> tuple[int, int]:
        """(smallest, largest)."""
        return self.between

    @property
    def is_finite(self) -> bool:
        """They can be counted."""
        return True


class Choice(Dimension):
    """One of a list: numbers, texts, lists, mappings or null."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)]

    @property
    def extremes(self) -> Sequence[Any]:
        """All of them."""
        return self.choice

    @property
    def is_finite(self) -> bool:
        """They can be counted."""
        return True


class WeightDimension(Dimension):
    """What class weights alone are searched over."""

    @property
    def extremes(self) -> Sequence[Any]:
        """Weights fit where a scheme does."""
        return ("inverse",)


class WeightExponent(WeightDimension):
    """Class weights between none and inverse frequency: (1 / pixels) ** exponent; one number for any count of
    classes."""

    exponent: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
    """[smallest, largest]; 0: all alike, 0.5: square root, 1: inverse frequency."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(smallest, largest)."""
        return self.exponent


class WeightFactors(WeightDimension):
    """Class weights as a factor for each class, log-uniform."""

    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    """[smallest, largest]."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(smallest, largest)."""
        return self.factors


class WeightSimplex(WeightDimension):
    """Class weights that share out a sum, every share-out as likely."""

    simplex: Literal[True]

    @property
    def is_number(self) -> bool:
        """They are."""
        return True


_DIMENSIONS: dict[str, type[Dimension]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "int": Integers,
    "choice": Choice,
    "exponent": WeightExponent,
    "factors": WeightFactors,
    "simplex": WeightSimplex,
}


def _shape_of(value: Any) -> str | None:
    """The key that says which kind of dimension this is."""
    if isinstance(value, Dimension):
        return value.shape
    return next((key for key in value if key in _DIMENSIONS), None) if isinstance(value, Mapping) else None


AnyDimension = Annotated[
    Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("log_uniform")]
    | Annotated[Integers, Tag("int")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[WeightExponent, Tag("exponent")]
    | Annotated[WeightFactors, Tag("factors")]
    | Annotated[WeightSimplex, Tag("simplex")],
    Discriminator(
        _shape_of,
        custom_error_type="dimension",
        custom_error_message=f"allowed: a mapping with one of {', '.join(_DIMENSIONS)}, such as {{uniform: [0, 1]}}",
    ),
]


def usual_mode(metric: str) -> Literal["max", "min"]:
    """Which way a metric is better."""
    return "min" if metric in ("train/loss", LATENCY) else "max"


class Objective(Section):
    """What a search makes as large, or as small, as it can."""

    metric: str
    """A metric of a run, such as val/miou, or latency_ms: of one validation image, on the trial's device."""
    mode: Literal["max", "min"]
    """Default: max; min for train/loss and latency_ms."""

    @model_validator(mode="before")
    @classmethod
    def _fill_mode(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("metric"), str):
            return {"mode": usual_mode(value["metric"]), **value}
        return value


class Pruning(Section):
    """When a trial ends before its last epoch, since others were better by then."""

    rule: Literal["asha", "median"] = "asha"
    """asha: at epochs min_epochs, min_epochs x reduction, ... the best 1 / reduction go on (Li et al. 2020). median:
    from min_epochs on, a trial goes on while its best is no worse than the median of the others at that epoch."""
    min_epochs: Annotated[int, Field(ge=1)] = 1
    """Every trial trains so many."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Of asha."""
    first_trials: Annotated[int, Field(ge=1)] = 4
    """Of median: so many trials end on their own first."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        foreign = "first_trials" if self.rule == "asha" else "reduction"
        if getattr(self, foreign) != type(self).model_fields[foreign].default:
            message = "has no effect where the rule is {rule}; leave it out"
            raise PydanticCustomError("no_effect", message, {"key": foreign, "rule": self.rule})
        return self


class Search(Section):
    """What is searched, for what, and how long."""

    space: Annotated[dict[str, AnyDimension], Field(min_length=1)]
    """Dotted paths of the train job, each with what it is searched over."""
    metric: str | None = None
    """Default: the train job's checkpoint.metric."""
    mode: Literal["max", "min"] | None = None
    """Default: max; min for train/loss and latency_ms."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=2)] | None = None
    """Several at once, in place of `metric` and `mode`: the result is a Pareto front, its winner the best by the first
    one."""
    trials: Annotated[int, Field(ge=1)] = 20
    """The first one has the train job's own values."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Of a trial; default: the train job's schedule.epochs."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at the same time, at most; default: as many as the cluster has room for."""
    time_limit: Duration | None = None
    """Such as `2 hours`: trials under way are then stopped, and the same command goes on with them."""
    sampler: Literal["tpe", "cma_es", "random", "grid"] = "tpe"
    pruning: Pruning | None = None
    """null: every trial trains all of its epochs."""
    max_failures: Annotated[int, Field(ge=0)] = 5
    """Failed trials that the search outlives; each is recorded with its reason."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _flatten_space(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("space"), Mapping):
            return {**value, "space": dict(_flat_space(value["space"]))}
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for path, dimension in self.space.items():
            _check_dimension(path, dimension, self)
        _check_conditions(self.space)
        if self.objectives is not None and (self.metric is not None or self.mode is not None):
            raise PydanticCustomError("twice", "stand beside `objectives`; keep one", {"key": "metric"})
        if self.objectives is not None and self.pruning is not None:
            message = "ends trials by one objective, and there are several; leave it out"
            raise PydanticCustomError("pruning", message, {"key": "pruning"})
        if self.objectives is not None and len({one.metric for one in self.objectives}) < len(self.objectives):
            raise PydanticCustomError("twice", "name a metric twice; keep one", {"key": "objectives"})
        if self.metric == LATENCY and self.pruning is not None:
            message = "goes by each epoch's metrics, and `latency_ms` is none of them; leave it out"
            raise PydanticCustomError("pruning", message, {"key": "pruning"})
        if self.objectives is not None and self.sampler == "cma_es":
            raise PydanticCustomError("sampler", "cma_es takes one objective; take tpe", {"key": "sampler"})
        if self.sampler == "cma_es" and not any(one.is_number and not one.when for one in self.space.values()):
            message = "cma_es goes by numbers that every trial has, and the space holds none; take tpe"
            raise PydanticCustomError("sampler", message, {"key": "sampler"})
        return self


def _flat_space(space: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dimensions by dotted path: overrides nest them."""
    for key, value in space.items():
        inner = f"{path}{key}"
        is_nested = isinstance(value, Mapping) and value and all(isinstance(part, Mapping) for part in value.values())
        is_nested = is_nested and not value.keys() & {"when", *_DIMENSIONS}
        yield from _flat_space(value, f"{inner}.") if is_nested else [(inner, value)]


def overlap(path: str, other: str) -> bool:
    """Whether one of two dotted paths is, or lies below, the other."""
    shorter, longer = sorted((path.split("."), other.split(".")), key=len)
    return longer[: len(shorter)] == shorter


def _check_dimension(path: str, dimension: Dimension, search: Search) -> None:
    key = {"key": f"space.{path}"}
    if dimension.bounds is not None and dimension.bounds[0] > dimension.bounds[1]:
        raise not_ordered(f"space.{path}.{dimension.shape}", *dimension.bounds)
    if isinstance(dimension, WeightDimension) and path != CLASS_WEIGHTS:
        message = "`{shape}` is a shape of class weights; it belongs at {path}"
        raise PydanticCustomError("weights", message, key | {"shape": dimension.shape, "path": CLASS_WEIGHTS})
    if isinstance(dimension, Integers) and dimension.log and (dimension.step > 1 or dimension.between[0] < 1):
        raise PydanticCustomError("log", "`log` takes no `step`, and whole numbers from 1 on", key)
    if any(overlap(path, fixed) for fixed in _FIXED):
        message = "is the same for all trials{mend}"
        mend = "; set search.epochs" if path == "schedule.epochs" else "; leave it out of the space"
        raise PydanticCustomError("fixed", message, key | {"mend": mend})
    if search.sampler == "grid" and not dimension.is_finite:
        message = "a grid needs values that can be counted: `choice`, `int`, or `uniform` with `step`"
        raise PydanticCustomError("grid", message, key)
    if search.sampler == "grid" and dimension.when:
        raise PydanticCustomError("grid", "a grid takes no conditions; leave `when` out", key)


_FIXED = (
    *("kind", "name", "task", "classes", "storage", "s3", "scaling", "checkpoint", "validation", "metrics", "trackers"),
    *("data.train", "data.val", "data.on_error", "schedule.epochs", "schedule.early_stopping"),
)
"""Paths that no search may vary: trials would not be comparable, or not runs of one study."""


def _check_conditions(space: Mapping[str, Dimension]) -> None:
    for path, dimension in space.items():
        for other, values in dimension.conditions.items():
            choices = space[other].extremes if isinstance(space.get(other), Choice) else values
            if not set(values) & {choice for choice in choices if isinstance(choice, Scalar)}:
                message = "asks `{other}` for a value that it never has; allowed: {allowed}"
                allowed = ", ".join(map(json.dumps, choices))
                context = {"key": f"space.{path}.when", "other": other, "allowed": allowed}
                raise PydanticCustomError("when", message, context)
        seen = [path]
        queue = [*dimension.when]
        while queue:
            other = queue.pop()
            if other not in space:
                message = "names `{other}`, which the space does not hold"
                raise PydanticCustomError("when", message, {"key": f"space.{path}.when", "other": other})
            if other == path:
                message = "depends on itself: {way}"
                way = " -> ".join([*seen, path])
                raise PydanticCustomError("when", message, {"key": f"space.{path}.when", "way": way})
            if other not in seen:
                seen.append(other)
                queue += space[other].when
