"""The page of a search: its trials as one self-contained HTML file; laid out in templates/tuning.html.j2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from raysseg.importance import Importance
from raysseg.report import fit_axis, nice_step, open_template, to_count, to_figure, to_label, to_percent, to_short

Value = float | int | str | bool | None
State = Literal["complete", "pruned", "failed", "running"]

CURVE_POINTS = 120  # of a learning curve, that are drawn
OPEN_ROWS = 40  # of trials: a longer table is folded
FAR = 10.0  # interquartile ranges beyond the worse quartile, where a value would flatten all others
WEIGHTS = "loss.class_weights."
WORST_FIRST: Mapping[str, int] = {"failed": 0, "running": 1, "pruned": 2, "complete": 3, "best": 4}
NO_VALUES = "No trial has a value yet."


@dataclass(frozen=True)
class Objective:
    """What is searched for: a metric's name, with or without its ``val/``, or anything else that trials have."""

    name: str
    mode: Literal["max", "min"]


@dataclass(frozen=True)
class TrialRow:
    """A trial.

    Attributes:
        number: its name in the search.
        state: how it ended.
        params: by dotted path; a conditional one is missing where it does not occur.
        values: one for each objective.
        history: a row an epoch, with "epoch" counted from 1, and metrics by name.
        seconds: it took.
        reason: why it failed or was pruned.
    """

    number: int
    state: State
    params: Mapping[str, Value]
    values: tuple[float, ...] | None
    history: Sequence[Mapping[str, float]]
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class TuningPage:
    """All that the page shows; what is empty or None is left out of it.

    Attributes:
        title: usually the job's name.
        objectives: the first is what figures show where there is room for one.
        trials: in any order.
        log_scaled: paths of the parameters that are drawn on log axes.
        importances: of the parameters, by objective.
        best: number of the best trial, or those of the Pareto front.
        class_weights: the winner's, by class.
        facts: short things worth knowing, by label.
        job: the resolved job, nested plain values.
        notes: warnings worth showing.
    """

    title: str
    objectives: Sequence[Objective]
    trials: Sequence[TrialRow]
    log_scaled: frozenset[str] = frozenset()
    importances: Mapping[str, Sequence[Importance]] = field(default_factory=dict)
    best: tuple[int, ...] = ()
    class_weights: Mapping[str, float] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """A scale of numbers or choices; places are shares of its length."""

    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    choices: tuple[str, ...] = ()
    labels: tuple[tuple[float, str], ...] = ()

    def place(self, value: Value) -> float:
        """Where a value lies; numbers beyond the ends at the ends."""
        if self.choices:
            return (self.choices.index(say(value)) + 0.5) / len(self.choices)
        number = float(value or 0)
        if self.is_log:
            return _between(math.log(number), math.log(self.low), math.log(self.high))
        return _between(number, self.low, self.high)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(place, label), from the low end on."""
        if self.choices:
            return [(self.place(choice), choice) for choice in self.choices]
        return [(self.place(number), text) for number, text in self.labels]


class Mark(NamedTuple):
    """A trial's point, in per cent from the upper left; ``kind`` is how it looks, ``text`` what it says."""

    x: float
    y: float
    kind: str
    text: str


class Line(NamedTuple):
    """Points in per cent from the upper left; ``strength`` of the colour in per cent."""

    points: list[tuple[float, float]]
    kind: str
    text: str = ""
    strength: float = 100.0


class Figure(NamedTuple):
    """Lines under marks; ``num_choices`` of the axis below, 0 where it is one of numbers."""

    label: str
    remark: str
    summary: str
    lines: list[Line]
    marks: list[Mark]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_label: str = ""
    num_choices: int = 0


class Upright(NamedTuple):
    """An axis of the parallel coordinates, at ``x`` per cent; ticks in per cent from the top."""

    x: float
    label: str
    path: str
    ticks: list[tuple[float, str]]


class Parallel(NamedTuple):
    """Parallel coordinates; ``limits`` are the values of the weakest and the strongest colour."""

    axes: list[Upright]
    lines: list[Line]
    limits: tuple[str, str]
    has_gaps: bool


class Row(NamedTuple):
    """A trial's row of the table; ``params`` has None where one does not occur."""

    trial: TrialRow
    is_best: bool
    values: list[str]
    params: list[str | None]
    epochs: int
    seconds: str


def render(page: TuningPage) -> str:
    """The page as one HTML file that loads nothing from outside."""
    names = {path: to_name(path) for path in paths_of(page)}
    states = [trial.state for trial in page.trials]
    histories = [draw_history(page, i) for i in range(len(page.objectives))]
    best = [trial for trial in page.trials if trial.number in page.best]
    return open_template("tuning.html.j2").render(
        page=page,
        labels=[to_label(objective.name) for objective in page.objectives],
        headline=[say_value(_best_value(page, i)) for i in range(len(page.objectives))],
        counts={state: states.count(state) for state in ("complete", "pruned", "failed", "running")},
        facts={**_epoch_facts(page), **page.facts},
        histories=[figure for figure in histories if figure is not None],
        parallel=draw_parallel(page),
        importances=[(name, found) for name, found in page.importances.items() if found],
        slices=draw_slices(page),
        curves=draw_curves(page),
        pareto=draw_pareto(page),
        names=names,
        rows=_rows(page, list(names)),
        open_rows=OPEN_ROWS,
        no_values=NO_VALUES,
        winner=yaml.safe_dump(dict(best[0].params), sort_keys=False, allow_unicode=True)
        if len(best) == 1 and best[0].params
        else "",
        top_weight=max((page.class_weights or {"": 1.0}).values()),
        job=yaml.safe_dump(dict(page.job), sort_keys=False, allow_unicode=True),
    )


def say(value: Value) -> str:
    """A parameter's value as text."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:.4g}".replace("e-0", "e-")


def say_value(value: float) -> str:
    """An objective's value: three decimals, or three digits where these say little."""
    return to_figure(value) if value == 0 or 0.1 <= abs(value) < 100 or not math.isfinite(value) else to_short(value)


def to_name(path: str) -> str:
    """What a parameter is called: its path, of class weights the class."""
    if path == f"{WEIGHTS}exponent":
        return "class weights' exponent"
    return f"weight of {path.removeprefix(WEIGHTS)}" if path.startswith(WEIGHTS) else path


def paths_of(page: TuningPage) -> list[str]:
    """Every parameter's path, the most important for the first objective first."""
    ranked = [found.param for found in page.importances.get(page.objectives[0].name, ())]
    paths = dict.fromkeys(path for trial in page.trials for path in trial.params)
    return sorted(paths, key=lambda path: ranked.index(path) if path in ranked else len(ranked))


def varied_paths(page: TuningPage, trials: Sequence[TrialRow]) -> list[str]:
    """The paths that have different values in the trials, or are missing from some of them."""
    return [
        path
        for path in paths_of(page)
        if len({say(trial.params[path]) if _has(trial, path) else None for trial in trials}) > 1
    ]


def fit(values: Sequence[Value], *, is_log: bool = False, most: int = 4) -> Axis:
    """An axis that holds the values, with about ``most`` ticks; of choices unless all are numbers."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return Axis(choices=tuple(dict.fromkeys(say(value) for value in sorted(values, key=_choice_order))))
    if is_log and min(numbers) > 0:
        ticks = _log_ticks(min(numbers), max(numbers), most)
        return Axis(min(numbers), max(numbers), is_log=True, labels=tuple((tick, to_short(tick)) for tick in ticks))
    low, high = fit_axis([float(number) for number in numbers])
    step = nice_step((high - low) / most)
    step = max(1.0, step) if all(isinstance(number, int) for number in numbers) else step
    ticks = [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return Axis(ticks[0], ticks[-1], labels=tuple((tick, to_short(tick)) for tick in ticks))


def reach(values: Sequence[float], mode: Literal["max", "min"]) -> list[float]:
    """The values without those so much worse than the rest that they would flatten it."""
    lower, upper = np.quantile(values, (0.25, 0.75)).tolist()
    room = FAR * (upper - lower) or math.inf
    return [value for value in values if (value >= lower - room if mode == "max" else value <= upper + room)]


def draw_history(page: TuningPage, index: int) -> Figure | None:
    """An objective's value by trial with the best so far; None where no trial has a value."""
    objective, label = page.objectives[index], to_label(page.objectives[index].name)
    trials = sorted((trial for trial in page.trials if trial.state != "running"), key=lambda trial: trial.number)
    values = {trial.number: _value(page, trial, index) for trial in trials}
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    x_axis = fit([0, *values], most=6)
    y_axis = fit(reach(known, objective.mode))
    rim = 100.0 if objective.mode == "max" else 0.0
    marks = []
    for trial in trials:
        value = values[trial.number]
        y = rim if value is None else _down(y_axis.place(value))
        kind = "failed" if trial.state == "complete" and value is None else _kind(page, trial)
        marks.append(Mark(_across(x_axis.place(trial.number)), y, kind, _tell(trial, label, value)))
    completed = [(t.number, value) for t in trials if t.state == "complete" and (value := values[t.number]) is not None]
    steps = _best_so_far(completed, objective.mode, max(values))
    top = f"best {say_value(steps[-1][1])}" if steps else ""
    return Figure(
        label=label,
        remark=top,
        summary=f"{label} of {len(trials)} trials{', ' + top if top else ''}",
        lines=[Line([_point(x_axis, y_axis, *step) for step in steps], "running-best")],
        marks=sorted(marks, key=lambda mark: WORST_FIRST[mark.kind]),
        x_ticks=_x_ticks(x_axis),
        y_ticks=_y_ticks(y_axis),
        x_label="trial",
    )


def draw_parallel(page: TuningPage) -> Parallel | None:
    """A line a trial across the varied parameters to the first objective; None with fewer than two complete trials."""
    values = _completed(page, 0)
    shown = [trial for trial in page.trials if trial.number in values or trial.state == "pruned"]
    paths = varied_paths(page, [trial for trial in shown if trial.number in values])
    if len(values) < 2 or not paths:
        return None
    mode = page.objectives[0].mode
    axes = {path: fit(_settings(shown, path), is_log=path in page.log_scaled, most=5) for path in paths}
    last = fit(reach(list(values.values()), mode), most=5)
    gaps = {path for path in paths if any(not _has(trial, path) for trial in shown)}
    xs = [round(100 * i / len(paths), 2) for i in range(len(paths) + 1)]
    weakest, strongest = _colour_limits(list(values.values()), mode)

    def height(path: str, place: float) -> float:
        return _down(0.12 + 0.88 * place) if path in gaps else _down(place)

    def trace(trial: TrialRow) -> Line:
        ys = [height(path, axes[path].place(trial.params[path])) if _has(trial, path) else _down(0.0) for path in paths]
        value = values.get(trial.number)
        ys += [] if value is None else [_down(last.place(value))]
        strength = 0.0 if value is None else 100 * _between(value, weakest, strongest)
        text = _tell(trial, to_label(page.objectives[0].name), value)
        return Line(list(zip(xs, ys, strict=False)), _kind(page, trial), text, round(max(strength, 10.0), 1))

    uprights = [
        Upright(x, to_name(path), path, _gap_ticks(path in gaps) + [(height(path, y), t) for y, t in axes[path].ticks])
        for x, path in zip(xs, paths, strict=False)
    ]
    label = to_label(page.objectives[0].name)
    lines = sorted((trace(trial) for trial in shown), key=lambda line: (WORST_FIRST[line.kind], line.strength))
    return Parallel(
        axes=[*uprights, Upright(100.0, label, label, _y_ticks(last))],
        lines=lines,
        limits=(say_value(weakest), say_value(strongest)),
        has_gaps=bool(gaps),
    )


def draw_slices(page: TuningPage) -> list[Figure]:
    """The first objective by each varied parameter, of the complete trials."""
    values = _completed(page, 0)
    trials = [trial for trial in page.trials if trial.number in values]
    if len(values) < 2:
        return []
    y_axis = fit(reach(list(values.values()), page.objectives[0].mode), most=3)
    label = to_label(page.objectives[0].name)

    def slice_of(path: str) -> Figure:
        having = [trial for trial in trials if _has(trial, path)]
        x_axis = fit(_settings(having, path), is_log=path in page.log_scaled, most=3)
        marks = [
            Mark(
                *_point(x_axis, y_axis, trial.params[path], values[trial.number]),
                _kind(page, trial),
                f"{say(trial.params[path])}, {_tell(trial, label, values[trial.number])}",
            )
            for trial in having
        ]
        return Figure(
            label=to_name(path),
            remark="" if len(having) == len(trials) else f"in {len(having)} of {len(trials)}",
            summary=f"{label} by {path} of {len(having)} trials",
            lines=[],
            marks=sorted(marks, key=lambda mark: WORST_FIRST[mark.kind]),
            x_ticks=_x_ticks(x_axis),
            y_ticks=_y_ticks(y_axis),
            num_choices=len(x_axis.choices),
        )

    return [slice_of(path) for path in varied_paths(page, trials)]


def draw_curves(page: TuningPage) -> Figure | None:
    """Each trial's course of the first objective that the histories have; None where they have none."""
    objective = next((it for it in page.objectives if metric_of(page, it)), None)
    if objective is None:
        return None
    key, label = metric_of(page, objective), to_label(objective.name)
    series = {trial.number: read_series(trial, key) for trial in page.trials}
    points = [point for values in series.values() for point in values]
    x_axis = fit([int(epoch) for epoch, _ in points], most=6)
    y_axis = fit(reach([value for _, value in points], objective.mode))
    drawn = [(trial, series[trial.number]) for trial in page.trials if series[trial.number]]
    drawn.sort(key=lambda pair: WORST_FIRST[_kind(page, pair[0])])
    lines, marks = [], []
    for trial, values in drawn:
        kept = np.unique(np.linspace(0, len(values) - 1, CURVE_POINTS).astype(int))
        line = [_point(x_axis, y_axis, *values[i]) for i in kept]
        lines.append(Line(line, _kind(page, trial), _tell(trial, label, values[-1][1])))
        if trial.state != "complete" or len(values) == 1:
            end = f"{_tell(trial, label, values[-1][1])}, epoch {values[-1][0]:g}"
            marks.append(Mark(*line[-1], _kind(page, trial), end))
    return Figure(
        label=label,
        remark=f"{len(drawn)} trial{'s' if len(drawn) != 1 else ''}",
        summary=f"{label} over the epochs, of {len(drawn)} trials",
        lines=lines,
        marks=marks,
        x_ticks=_x_ticks(x_axis),
        y_ticks=_y_ticks(y_axis),
        x_label="epoch",
    )


def draw_pareto(page: TuningPage) -> Figure | None:
    """The first two objectives against each other with the front; None where no trial has both."""
    if len(page.objectives) < 2:
        return None
    across, up = _completed(page, 1), _completed(page, 0)
    trials = [trial for trial in page.trials if trial.number in across and trial.number in up]
    if not trials:
        return None
    up_label, across_label = (to_label(objective.name) for objective in page.objectives[:2])
    x_axis = fit(reach([across[trial.number] for trial in trials], page.objectives[1].mode), most=6)
    y_axis = fit(reach([up[trial.number] for trial in trials], page.objectives[0].mode))

    def mark(trial: TrialRow) -> Mark:
        text = f"{_tell(trial, up_label, up[trial.number])}, {across_label} {say_value(across[trial.number])}"
        return Mark(*_point(x_axis, y_axis, across[trial.number], up[trial.number]), _kind(page, trial), text)

    front = sorted((trial for trial in trials if trial.number in page.best), key=lambda trial: across[trial.number])
    return Figure(
        label=f"{up_label} (up) by {across_label} (across)",
        remark=f"{len(front)} of {len(trials)} on the front",
        summary=f"{up_label} by {across_label} of {len(trials)} trials, {len(front)} of them on the Pareto front",
        lines=[Line([mark(trial)[:2] for trial in front], "front")],
        marks=sorted((mark(trial) for trial in trials), key=lambda mark: WORST_FIRST[mark.kind]),
        x_ticks=_x_ticks(x_axis),
        y_ticks=_y_ticks(y_axis),
    )


def metric_of(page: TuningPage, objective: Objective) -> str:
    """What the histories call an objective; nothing where they lack it."""
    keys = {key for trial in page.trials for row in trial.history for key in row if math.isfinite(row[key])}
    return next((key for key in (objective.name, f"val/{objective.name}") if key in keys), "")


def read_series(trial: TrialRow, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have a finite number under ``key``."""
    return [(row["epoch"], row[key]) for row in trial.history if math.isfinite(row.get(key, math.nan))]


def _value(page: TuningPage, trial: TrialRow, index: int) -> float | None:
    """A finite value, of a pruned trial its last; None where there is none."""
    if trial.state in {"failed", "running"}:
        return None
    if trial.values is not None:
        return trial.values[index] if math.isfinite(trial.values[index]) else None
    series = read_series(trial, metric_of(page, page.objectives[index])) if trial.state == "pruned" else []
    return series[-1][1] if series else None


def _completed(page: TuningPage, index: int) -> dict[int, float]:
    """The finite values of the complete trials, by number."""
    values = {trial.number: _value(page, trial, index) for trial in page.trials if trial.state == "complete"}
    return {number: value for number, value in values.items() if value is not None}


def _has(trial: TrialRow, path: str) -> bool:
    """Whether a parameter occurs in a trial, with a value that can be drawn."""
    value = trial.params.get(path)
    return path in trial.params and not (isinstance(value, float) and not math.isfinite(value))


def _settings(trials: Sequence[TrialRow], path: str) -> list[Value]:
    return [trial.params[path] for trial in trials if _has(trial, path)]


def _kind(page: TuningPage, trial: TrialRow) -> str:
    return "best" if trial.number in page.best else trial.state


def _tell(trial: TrialRow, label: str, value: float | None) -> str:
    state = "" if trial.state == "complete" else f", {trial.state}"
    found = "no finite value" if value is None and trial.state == "complete" else ""
    found = f"{label} {say_value(value)}" if value is not None else found
    return ": ".join(part for part in (f"trial {trial.number}{state}", found, trial.reason) if part)


def _best_so_far(
    values: Sequence[tuple[int, float]], mode: Literal["max", "min"], last: int
) -> list[tuple[int, float]]:
    """Corners of the steps from best to best, up to the last trial."""
    corners: list[tuple[int, float]] = []
    for number, value in values:
        if not corners:
            corners.append((number, value))
        elif value > corners[-1][1] if mode == "max" else value < corners[-1][1]:
            corners += [(number, corners[-1][1]), (number, value)]
    return [*corners, (last, corners[-1][1])] if corners else []


def _best_value(page: TuningPage, index: int) -> float:
    values = _completed(page, index)
    found = [values[number] for number in page.best if number in values]
    pick = max if page.objectives[index].mode == "max" else min
    return pick(found, default=math.nan)


def _epoch_facts(page: TuningPage) -> dict[str, str]:
    """Epochs trained, and how many of those that the longest complete trial had were left to pruned ones."""
    planned = max((_epochs(trial) for trial in page.trials if trial.state == "complete"), default=0)
    pruned = [_epochs(trial) for trial in page.trials if trial.state == "pruned"]
    facts = {"epochs trained": to_count(sum(_epochs(trial) for trial in page.trials))}
    if pruned and planned:
        whole = planned * len(pruned)
        share = f" ({to_percent(sum(pruned) / whole)})"
        facts["epochs of the pruned trials"] = f"{to_count(sum(pruned))} of {to_count(whole)} planned{share}"
    return facts if any(trial.history for trial in page.trials) else {}


def _epochs(trial: TrialRow) -> int:
    return int(max((row["epoch"] for row in trial.history), default=0))


def _rows(page: TuningPage, paths: Sequence[str]) -> list[Row]:
    """The best first, then by the first objective, those without a value last."""
    sign = -1 if page.objectives[0].mode == "max" else 1

    def rank(trial: TrialRow) -> tuple[int, float, int]:
        value = _value(page, trial, 0)
        return -WORST_FIRST[_kind(page, trial)], math.inf if value is None else sign * value, trial.number

    return [
        Row(
            trial=trial,
            is_best=trial.number in page.best,
            values=[say_value(value) for value in trial.values or ()] or ["—"] * len(page.objectives),
            params=[say(trial.params[path]) if path in trial.params else None for path in paths],
            epochs=_epochs(trial),
            seconds=to_count(round(trial.seconds)) if math.isfinite(trial.seconds) else "—",
        )
        for trial in sorted(page.trials, key=rank)
    ]


def _colour_limits(values: Sequence[float], mode: Literal["max", "min"]) -> tuple[float, float]:
    """The worst value but a tenth, so that few bad trials do not use up the colours, and the best."""
    worst = float(np.quantile(values, 0.1 if mode == "max" else 0.9))
    return worst, max(values) if mode == "max" else min(values)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; with one of them or none, 2 and 5 too, or else the ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5)):
        ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
        inside = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
        if len(inside) > 1:
            return inside[:: math.ceil(len(inside) / (most + 1))]
    return sorted({low, high})


def _choice_order(value: Value) -> tuple[bool, float, str]:
    """Numbers first, by size, then words."""
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if isinstance(value, int | float) else 0.0, say(value)


def _between(value: float, low: float, high: float) -> float:
    """How far a value is from low to high, in 0 to 1; halfway where these are the same."""
    return min(max((value - low) / (high - low), 0.0), 1.0) if low != high else 0.5


def _across(share: float) -> float:
    return round(100 * share, 2)


def _down(share: float) -> float:
    return round(100 * (1 - share), 2)


def _point(x_axis: Axis, y_axis: Axis, x: Value, y: Value) -> tuple[float, float]:
    return _across(x_axis.place(x)), _down(y_axis.place(y))


def _x_ticks(axis: Axis) -> list[tuple[float, str]]:
    return [(_across(place), text) for place, text in axis.ticks]


def _y_ticks(axis: Axis) -> list[tuple[float, str]]:
    return [(_down(place), text) for place, text in axis.ticks]


def _gap_ticks(has_gap: bool) -> list[tuple[float, str]]:
    return [(_down(0.0), "unset")] if has_gap else []
