"""What a search tries next: a job's space as Optuna's, its samplers and rules of pruning. No Ray, no torch."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raysseg.config import JobError, TuneJob
from raysseg.space import (
    CLASS_WEIGHTS,
    Choice,
    Dimension,
    Integers,
    LogUniform,
    Search,
    Uniform,
    WeightDimension,
    WeightExponent,
    WeightFactors,
)

_OWN = "own"  # marks the trial with the train job's own values
_SMALLEST = 1e-6  # of the numbers in (0, 1) from which a share-out of class weights is made

_Distribution = FloatDistribution | IntDistribution | CategoricalDistribution

logger = logging.getLogger(__name__)


def num_trials(job: TuneJob) -> int:
    """How many trials the search has: `search.trials`, or as many as a grid has points, if less.

    The trial with the train job's own values is one of them; where these are no point of the grid, it comes on top of
    the grid's.
    """
    if job.search.sampler != "grid":
        return job.search.trials
    grid = _grid(job.search)
    is_point = own_params(job).keys() == grid.keys()
    return min(job.search.trials, _size(grid) + (0 if is_point else 1))


def ask(study: optuna.Study, job: TuneJob) -> optuna.Trial:
    """The next trial, to be drawn by `draw`; the first one is the train job's own."""
    trials = study.get_trials(deepcopy=False)
    if not trials:
        study.enqueue_trial(own_params(job), {_OWN: True})
    elif job.search.sampler == "grid" and trials[-1].state != TrialState.WAITING:
        study.enqueue_trial(_next_point(trials, job.search))
    return study.ask()


def resume(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial that a former driver left unfinished."""
    return optuna.Trial(study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))


def draw(
    trial: optuna.Trial, job: TuneJob, class_names: Sequence[str], pixels: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Draws a trial's values, seeded by (search.seed, the trial's number); once more, it returns the same ones.

    Optuna knows them by the names of their paths, numbers of class weights by `loss.class_weights.` and `exponent` or
    the class. A dimension counts where the paths that it depends on were drawn and have one of the values.

    Args:
        trial: of `ask` or `resume`.
        job: of the study.
        class_names: one a class.
        pixels: (C,) labelled pixels of each class in the training data.

    Returns:
        Values for the train job by dotted path; none for the trial with the train job's own, of which Optuna is told
        what lies in the space.
    """
    present = [name for name, count in zip(class_names, pixels, strict=True) if count > 0]
    params = {path: _params(path, dimension, present) for path, dimension in job.search.space.items()}
    trial.study.sampler = _sampler(job.search, trial.number, params)
    own = own_params(job) if trial.user_attrs.get(_OWN) else None
    values: dict[str, Any] = {}
    for path in _in_order(job.search.space):
        dimension = job.search.space[path]
        is_told = own is None or params[path].keys() <= own.keys()
        if is_told and _holds(dimension, values):
            drawn = [_suggest(trial, name, distribution) for name, distribution in params[path].items()]
            values[path] = _value(dimension, drawn, pixels)
    return dict(sorted(values.items())) if own is None else {}


def own_params(job: TuneJob) -> dict[str, Any]:
    """Optuna's parameters of the train job's own values, as far as these lie in the space."""
    values = job.train_job({}).model_dump(mode="json")
    own: dict[str, Any] = {}
    for path, dimension in job.search.space.items():
        own |= _own_params(job, path, dimension, _at(values, path))
    return own


def _own_params(job: TuneJob, path: str, dimension: Dimension, value: Any) -> dict[str, Any]:
    if isinstance(dimension, Choice):
        labels = [_label(choice) for choice in dimension.choice if _changes_nothing(job, path, choice)]
        return {path: labels[0]} if labels else {}
    if isinstance(dimension, WeightExponent):
        value = 0.0 if value is None else 1.0 if value == "inverse" else None
    elif isinstance(dimension, WeightDimension):
        return {}
    ((name, distribution),) = _params(path, dimension, ()).items()
    return {name: value} if isinstance(value, int | float) and distribution._contains(value) else {}


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters as the job has them: choices that are lists or mappings are no text."""
    return {name: _unlabelled(value) for name, value in trial.params.items()}


def settings_of(trial: FrozenTrial, class_names: Sequence[str]) -> dict[str, Any]:
    """A trial's parameters for tables and figures: weights of single classes are those that the loss was given.

    Optuna's own are a factor, or a number from which a share is made, before all are set to mean 1.
    """
    names = [f"{CLASS_WEIGHTS}.{name}" for name in class_names]
    by_class = dict(zip(names, weights_of(trial), strict=False))  # which may be none
    return {name: by_class.get(name, value) for name, value in params_of(trial).items()}


def weights_of(trial: FrozenTrial) -> list[float]:
    """The class weights that a trial was given, one a class; nothing where it has the train job's own or a scheme."""
    weights = trial.user_attrs.get("overrides", {}).get(CLASS_WEIGHTS)
    return weights if isinstance(weights, list) else []


def best_numbers(study: optuna.Study) -> list[int]:
    """The completed trials that no other beats: the best by the first objective, then the rest of a Pareto front.

    Returns:
        Numbers of trials; with one objective one at most, the first of equals. Values that are not finite never win.
    """
    signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in study.directions]
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    costs = {
        trial.number: tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))
        for trial in completed
        if all(math.isfinite(value) for value in trial.values)
    }
    front = [number for number, cost in costs.items() if not any(_beats(other, cost) for other in costs.values())]
    ranked = sorted(front, key=lambda number: (costs[number], number))
    return ranked if len(signs) > 1 else ranked[:1]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


# --- from dimensions to parameters, and back --------------------------------------------------------------------------


def to_weights(pixels: npt.NDArray[np.int64], exponent: float) -> npt.NDArray[np.float64]:
    """Class weights (1 / pixels) ** exponent, (C,), with mean 1 over the classes that occur; the others get 0."""
    return _balanced((1 / pixels[pixels > 0]) ** exponent, pixels)


def _balanced(raw: npt.NDArray[np.float64], pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(C,) of positive numbers for the classes that occur; as losses.balance has them."""
    weights = np.zeros(len(pixels))
    weights[pixels > 0] = raw / raw.mean()
    return weights


def _params(path: str, dimension: Dimension, classes: Sequence[str]) -> dict[str, _Distribution]:
    """Optuna's parameters of a dimension."""
    with quiet():  # steps need not meet the largest value
        match dimension:
            case Uniform():
                return {path: FloatDistribution(*dimension.uniform, step=dimension.step)}
            case LogUniform():
                return {path: FloatDistribution(*dimension.log_uniform, log=True)}
            case Integers():
                return {path: IntDistribution(*dimension.between, log=dimension.log, step=dimension.step)}
            case Choice():
                return {path: CategoricalDistribution([_label(choice) for choice in dimension.choice])}
            case WeightExponent():
                return {f"{path}.exponent": FloatDistribution(*dimension.exponent)}
            case WeightFactors():
                return {f"{path}.{name}": FloatDistribution(*dimension.factors, log=True) for name in classes}
            case _:
                return {f"{path}.{name}": FloatDistribution(_SMALLEST, 1 - _SMALLEST) for name in classes}


def _suggest(trial: optuna.Trial, name: str, distribution: _Distribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=log)
    return trial.suggest_float(name, low, high, step=step, log=log)


def _value(dimension: Dimension, drawn: Sequence[Any], pixels: npt.NDArray[np.int64]) -> Any:
    """The train job's value."""
    if isinstance(dimension, WeightExponent):
        return to_weights(pixels, drawn[0]).tolist()
    if isinstance(dimension, WeightDimension):
        numbers = np.array(drawn)
        # exponential variates over their sum are uniform on the simplex
        return _balanced(numbers if isinstance(dimension, WeightFactors) else -np.log1p(-numbers), pixels).tolist()
    if isinstance(dimension, Choice):
        return next(choice for choice in dimension.choice if _label(choice) == drawn[0])
    return _rounded(drawn[0]) if isinstance(dimension, Uniform) and dimension.is_finite else drawn[0]


def _rounded(number: float) -> float:
    """Less what adding up steps leaves in the last digits."""
    return float(f"{number:.12g}")


def _label(choice: Any) -> bool | int | float | str | None:
    """What Optuna, whose choices are scalars, has for a choice."""
    return choice if isinstance(choice, bool | int | float | str | None) else json.dumps(choice)


def _unlabelled(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _in_order(space: Mapping[str, Dimension]) -> list[str]:
    """Paths, after those that they depend on; the same for any order of the job's keys."""
    return list(TopologicalSorter({path: sorted(space[path].when) for path in sorted(space)}).static_order())


def _holds(dimension: Dimension, values: Mapping[str, Any]) -> bool:
    """Whether a dimension's conditions do, given the values drawn."""
    return all(
        path in values and any(_is_same(values[path], value) for value in allowed)
        for path, allowed in dimension.conditions.items()
    )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other)
    return bool(one == other)


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _changes_nothing(job: TuneJob, path: str, value: Any) -> bool:
    try:
        return job.train_job({path: value}) == job.train_job({})
    except JobError:
        return False


# --- grids ------------------------------------------------------------------------------------------------------------

_Grid = dict[str, list[Any]]


def _grid(search: Search) -> _Grid:
    """The values of each parameter."""
    params: dict[str, _Distribution] = {}
    for path, dimension in search.space.items():
        params |= _params(path, dimension, ())
    return {name: _all_values(distribution) for name, distribution in sorted(params.items())}


def _all_values(distribution: _Distribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert distribution.step is not None
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return [_rounded(distribution.low + i * distribution.step) for i in range(count)]


def _size(grid: _Grid) -> int:
    return math.prod(len(values) for values in grid.values())


def _next_point(trials: Sequence[FrozenTrial], search: Search) -> dict[str, Any]:
    """A point of the grid that no trial has; any where all are taken."""
    grid = _grid(search)
    known = [{**trial.system_attrs.get("fixed_params", {}), **trial.params} for trial in trials]
    taken = {_as_key(params) for params in known if params.keys() == grid.keys()}
    random = np.random.default_rng((search.seed, len(trials)))
    while True:
        point = {name: values[random.integers(len(values))] for name, values in grid.items()}
        if _as_key(point) not in taken or len(taken) >= _size(grid):
            return point


def _as_key(params: Mapping[str, Any]) -> str:
    """For comparison."""
    rounded = {name: _rounded(value) if isinstance(value, float) else value for name, value in params.items()}
    return json.dumps(rounded, sort_keys=True)


# --- samplers and pruners ---------------------------------------------------------------------------------------------


def _sampler(search: Search, number: int, params: Mapping[str, Mapping[str, BaseDistribution]]) -> BaseSampler:
    """The sampler of one trial: all that it knows is the study, so a restart changes nothing."""
    seed = int(np.random.SeedSequence((search.seed, number)).generate_state(1)[0])
    with quiet():
        if search.sampler == "tpe":
            return TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
        if search.sampler == "cma_es":
            always = [params[path] for path, dimension in sorted(search.space.items()) if not dimension.when]
            return _CmaEs({name: found for part in always for name, found in part.items()}, search, seed)
        return RandomSampler(seed=seed)


class _CmaEs(CmaEsSampler):
    """CMA-ES over the numbers that every trial has; what else there is, is drawn at random.

    Optuna's own takes what all trials so far have in common, for which the train job's own trial may lack a number;
    and gives up where that changes.
    """

    def __init__(self, params: Mapping[str, BaseDistribution], search: Search, seed: int) -> None:
        is_pruning = search.pruning is not None
        super().__init__(seed=seed, warn_independent_sampling=False, consider_pruned_trials=is_pruning)
        self._params: dict[str, BaseDistribution] = {
            name: distribution
            for name, distribution in params.items()
            if isinstance(distribution, FloatDistribution | IntDistribution) and not distribution.single()
        }

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._params

    def _get_trials(self, study: optuna.Study) -> list[FrozenTrial]:
        """Those that it learns from; NaN, which pruned ones can end on, is as bad as it gets."""
        trials = super()._get_trials(study)
        for trial in trials:
            if trial.value is not None and math.isnan(trial.value):
                trial.value = -math.inf if study.direction == StudyDirection.MAXIMIZE else math.inf
        return trials


def build_pruner(job: TuneJob) -> BasePruner:
    """By `search.pruning`."""
    rule = job.search.pruning
    if rule is None:
        return NopPruner()
    if rule.min_epochs >= job.epochs:
        logger.warning("search.pruning has no effect: a trial has %d epochs, and trains its min_epochs", job.epochs)
    if rule.rule == "asha":
        return _BeforeLast(SuccessiveHalvingPruner(rule.min_epochs, rule.reduction), job.epochs)
    return _BeforeLast(MedianPruner(rule.first_trials, rule.min_epochs), job.epochs)


class _BeforeLast(BasePruner):
    """A rule that leaves alone the trials that have reached their last epoch; steps are epochs, from 1 on."""

    def __init__(self, rule: BasePruner, epochs: int) -> None:
        self._rule, self._epochs = rule, epochs

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if trial.last_step is None or trial.last_step >= self._epochs:
            return False
        with quiet():  # numpy minds rows of NaN
            return self._rule.prune(study, trial)


@contextmanager
def quiet() -> Iterator[None]:
    """The block without Optuna's messages and warnings."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
