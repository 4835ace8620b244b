"""How much each parameter of a search decides its result, and how far the trials bear that out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raysseg.search import quiet

GOOD = 0.25  # of the trials, which count as good
FEWEST = 4  # trials, of which a quarter is one


@dataclass(frozen=True)
class Importance:
    """A parameter's share of what tells good trials from the rest, in 0 to 1.

    ``low`` and ``high`` are the 5 % and 95 % quantiles of that share over resamples of the trials.
    """

    param: str
    share: float
    low: float
    high: float


def importances(study: optuna.Study, objective: int = 0, resamples: int = 40, seed: int = 0) -> list[Importance]:
    """The importance of every parameter for one objective, largest first.

    PED-ANOVA (Watanabe et al. 2023) on the completed and the pruned trials, the best quarter of them good: how far a
    parameter's distribution among the good trials differs from that among all. A pruned trial has the value it was
    pruned at: without these, a search that prunes would compare its best trials with each other. A bootstrap over the
    trials (Efron 1979) gives the quantiles. Infinite values rank last or first, trials whose value is NaN are left out.

    Args:
        study: with any parameters; those that occur in some of the trials count by how often they do.
        objective: its place among the values of the study.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Nothing where fewer than 4 trials have a value or no parameter tells the good ones apart.
    """
    sign = -1.0 if study.directions[objective] == StudyDirection.MAXIMIZE else 1.0
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    values = [trial.values[objective] if trial.values is not None else math.nan for trial in ended]
    trials = [_ranked(trial, sign * v) for trial, v in zip(ended, values, strict=True) if not math.isnan(v)]
    if len(trials) < FEWEST:
        return []
    random = np.random.default_rng(seed)
    with quiet():
        shares = _shares(trials)
        draws = [_shares([trials[i] for i in random.integers(len(trials), size=len(trials))]) for _ in range(resamples)]
    return [_importance(name, share, [draw.get(name, 0.0) for draw in draws]) for name, share in shares.items()]


def _ranked(trial: FrozenTrial, value: float) -> FrozenTrial:
    """The trial with one finite value, the lower the better; only their order matters to PED-ANOVA."""
    return optuna.create_trial(
        params=trial.params, distributions=trial.distributions, value=float(np.nan_to_num(value))
    )


def _shares(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Importances that add up to 1, largest first; nothing where all are 0."""
    study = optuna.create_study()
    study.add_trials(trials)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=GOOD)
    found = get_param_importances(study, evaluator=evaluator, normalize=False)
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total else {}


def _importance(param: str, share: float, draws: Sequence[float]) -> Importance:
    low, high = np.quantile(draws, (0.05, 0.95)).tolist() if draws else (share, share)
    return Importance(param, share, low, high)
