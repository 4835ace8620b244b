"""The page of a search, true to its trials and complete whatever they came to; and the importances on it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raysseg import tuning_page
from raysseg.importance import Importance, importances
from raysseg.tuning_page import Objective, TrialRow, TuningPage, Value
from tests.conftest import shown_in_chromium

SPACE: Mapping[str, BaseDistribution] = {
    "optimizer.lr": FloatDistribution(1e-5, 1e-1, log=True),
    "optimizer.name": CategoricalDistribution(["adamw", "sgd"]),
    "data.batch_size": IntDistribution(2, 16),
    "loss.power": FloatDistribution(0.0, 1.0),
}
MIOU = Objective("miou", "max")
LATENCY = Objective("latency_ms", "min")


class PageReader(HTMLParser):
    """Checks that tags close in order; keeps the text, the attributes of every tag, and the tooltips of figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tips: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "link", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["head", "title"]:
            return
        if self.open and self.open[-1] == "title":
            self.tips.append(data)
        elif self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def run_search(
    score: Callable[[optuna.Trial], float | tuple[float, ...]],
    num_trials: int,
    directions: tuple[str, ...] = ("maximize",),
) -> optuna.Study:
    study = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(score, n_trials=num_trials)
    return study


def add(study: optuna.Study, params: dict[str, Value], *values: float) -> None:
    space = {name: SPACE[name] for name in params}
    study.add_trial(optuna.create_trial(params=params, distributions=space, values=list(values)))


def suggest(trial: optuna.Trial) -> tuple[float, str, int, float]:
    return (
        trial.suggest_float("optimizer.lr", 1e-5, 1e-1, log=True),
        trial.suggest_categorical("optimizer.name", ["adamw", "sgd"]),
        trial.suggest_int("data.batch_size", 2, 16),
        trial.suggest_float("loss.power", 0.0, 1.0),
    )


def by_lr(trial: optuna.Trial) -> float:
    return -((math.log10(suggest(trial)[0]) + 3) ** 2)


def draw_trial(number: int, state: tuning_page.State = "complete", epochs: int = 4, **changes: object) -> TrialRow:
    """A trial whose parameters, values and history follow from its number."""
    value = 0.5 + 0.01 * number
    params: dict[str, Value] = {
        "optimizer.lr": 10.0 ** -(1 + number % 5),
        "optimizer.name": ("adamw", "sgd")[number % 2],
    }
    if number % 2:
        params["optimizer.momentum"] = 0.8 + 0.01 * number
    trial = TrialRow(
        number=number,
        state=state,
        params=params,
        values=(value, 40.0 - number) if state == "complete" else None,
        history=[{"epoch": e, "train/loss": 1 / e, "val/miou": value * e / 4} for e in range(1, epochs + 1)],
        seconds=60.0,
    )
    return replace(trial, **changes)  # type: ignore[arg-type]


def draw_page() -> TuningPage:
    """Eight complete trials, the seventh the best, two pruned and one failed."""
    trials = [draw_trial(number) for number in range(8)]
    trials += [draw_trial(8, "pruned", epochs=2, reason="median rule"), draw_trial(9, "pruned", epochs=1)]
    trials.append(draw_trial(10, "failed", epochs=0, reason="out of memory"))
    found = [Importance("optimizer.lr", 0.7, 0.55, 0.81), Importance("optimizer.name", 0.3, 0.19, 0.45)]
    return TuningPage(
        title="a search",
        objectives=[MIOU],
        trials=[replace(trial, values=trial.values and trial.values[:1]) for trial in trials],
        log_scaled=frozenset({"optimizer.lr"}),
        importances={"miou": found},
        best=(7,),
        class_weights={"road": 0.5, "pole": 4.0},
        facts={"sampler": "TPE"},
        job={"kind": "tune", "search": {"trials": 11}},
        notes=["One trial ran out of memory."],
    )


def only(trials: list[TrialRow], best: tuple[int, ...] = ()) -> TuningPage:
    return TuningPage("a search", [MIOU], trials, best=best)


def with_params(params: Mapping[int, dict[str, Value]]) -> list[TrialRow]:
    return [draw_trial(number, params=settings) for number, settings in params.items()]


PAGES: Mapping[str, TuningPage] = {
    "usual": draw_page(),
    "no trial": only([]),
    "one trial": only([draw_trial(0)], best=(0,)),
    "one epoch": only([draw_trial(0, epochs=1), draw_trial(1, epochs=1)], best=(1,)),
    "all failed": only([draw_trial(i, "failed", epochs=0, reason="no GPU") for i in range(3)]),
    "all running": only([draw_trial(i, "running", epochs=1) for i in range(3)]),
    "all pruned": only([draw_trial(i, "pruned", epochs=2) for i in range(3)]),
    "equal values": only([draw_trial(i, values=(0.0,), history=[]) for i in range(5)], best=(0,)),
    "not finite": only([draw_trial(i, values=(bad,)) for i, bad in enumerate((math.nan, math.inf, -math.inf))]),
    "one parameter": only(with_params({i: {"optimizer.lr": 0.1 * (i + 1)} for i in range(4)}), best=(3,)),
    "no parameters": only(with_params({0: {}, 1: {}}), best=(1,)),
    "30 parameters": only(
        with_params({i: {f"loss.class_weights.class {k}": 0.1 * (i + k + 1) for k in range(30)} for i in range(5)}),
        (4,),
    ),
    "200 trials": only([draw_trial(i, epochs=100) for i in range(200)], best=(199,)),
    "odd values": only(
        with_params(
            {0: {"a": None, "b": 1, "c": 0.0}, 1: {"a": True, "b": "auto", "c": math.nan}, 2: {"a": "x", "b": 2.5}}
        ),
        best=(2,),
    ),
    "two objectives": replace(
        only([draw_trial(i) for i in range(8)], best=(6, 7)), objectives=[MIOU, LATENCY], log_scaled=frozenset({"c"})
    ),
}


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return {name: tuning_page.render(page) for name, page in PAGES.items()}


def marks(figure: tuning_page.Figure | None, kind: str) -> list[tuning_page.Mark]:
    assert figure is not None
    return [mark for mark in figure.marks if mark.kind == kind]


def test_the_parameter_that_decides_has_the_largest_share_beyond_doubt() -> None:
    found = importances(run_search(by_lr, 80))
    assert found[0].param == "optimizer.lr"
    assert found[0].low > max(it.high for it in found[1:])
    assert sum(it.share for it in found) == pytest.approx(1)
    assert all(0 <= it.low <= it.high <= 1 for it in found)
    assert [it.share for it in found] == sorted((it.share for it in found), reverse=True)


def test_importances_depend_on_the_objective_and_its_direction() -> None:
    def score(trial: optuna.Trial) -> tuple[float, float]:
        lr, _, _, power = suggest(trial)
        return -abs(math.log10(lr) + 3), (power - 0.9) ** 2

    study = run_search(score, 80, ("maximize", "minimize"))
    assert importances(study, 0)[0].param == "optimizer.lr"
    assert importances(study, 1)[0].param == "loss.power"
    flipped = run_search(score, 80, ("minimize", "minimize"))
    assert importances(flipped, 0) != importances(study, 0)


def test_the_same_seed_gives_the_same_quantiles() -> None:
    study = run_search(by_lr, 20)
    assert importances(study, seed=3) == importances(study, seed=3)
    assert importances(study, seed=3) != importances(study, seed=4)


def test_fewer_trials_leave_wider_quantiles() -> None:
    few, many = (importances(run_search(by_lr, number))[0] for number in (16, 160))
    assert few.high - few.low > many.high - many.low


def test_a_conditional_parameter_and_a_constant_have_a_share_too() -> None:
    def score(trial: optuna.Trial) -> float:
        _, name, _, _ = suggest(trial)
        trial.suggest_float("constant", 1.0, 1.0)
        return 1 + trial.suggest_float("momentum", 0.0, 1.0) if name == "sgd" else 0.0

    found = {it.param: it for it in importances(run_search(score, 60))}
    assert found["constant"].share == found["constant"].high == 0
    assert found["momentum"].share > found["loss.power"].share
    assert found["optimizer.name"].share > found["loss.power"].share


def test_few_or_equal_trials_give_no_importances() -> None:
    assert importances(optuna.create_study()) == []
    assert importances(run_search(by_lr, 3)) == []
    assert importances(run_search(by_lr, 4)) != []
    assert importances(run_search(lambda trial: 0.0 * suggest(trial)[0], 20)) == []
    assert importances(run_search(lambda trial: trial.number, 20)) == []


def test_a_single_parameter_has_it_all() -> None:
    study = run_search(lambda trial: trial.suggest_float("x", 0, 1), 30)
    assert importances(study) == [Importance("x", 1.0, 1.0, 1.0)]


def test_infinite_values_count_as_worst_and_nan_not_at_all() -> None:
    study = optuna.create_study(direction="minimize")
    for i in range(24):
        lr = 10.0 ** -(1 + 4 * i / 24)
        add(study, {"optimizer.lr": lr, "loss.power": (i * 7 % 24) / 24}, math.inf if i < 16 else 1.0 + i % 3)
    study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.FAIL))
    found = importances(study)
    assert found[0].param == "optimizer.lr"
    assert found[0].low > found[1].high
    for trial in study.get_trials(deepcopy=False)[:21]:
        trial.values = [math.nan]
    assert importances(study) == []


def test_pruned_trials_count_with_their_last_value() -> None:
    """Of the few that were left to the end no four differ enough to tell; the pruned ones had bad learning rates."""

    def prune(trial: optuna.Trial) -> float:
        value = by_lr(trial)
        trial.report(2 * value, 1)
        if value < -0.05:
            raise optuna.TrialPruned
        return value

    study = run_search(prune, 24)
    states = [trial.state for trial in study.trials]
    assert states.count(optuna.trial.TrialState.COMPLETE) < 4
    found = importances(study)
    assert found[0].param == "optimizer.lr"
    for _ in range(9):
        study.tell(study.ask(), state=optuna.trial.TrialState.PRUNED)  # before its first value
    assert importances(study) == found


def test_importances_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    study = run_search(by_lr, 12)
    verbosity = optuna.logging.get_verbosity()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importances(study, resamples=3)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert optuna.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("name", PAGES)
def test_page_is_well_formed_self_contained_and_small(name: str, rendered: dict[str, str]) -> None:
    html = rendered[name]
    page = PageReader(html)
    sources = [value or "" for _, attrs in page.tags for key, value in attrs.items() if key in {"src", "href"}]
    assert all(source.startswith(("data:", "#")) for source in sources)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {source[1:] for source in sources if source.startswith("#")} <= ids
    assert not re.search(r"url\(|@import|//", html)
    assert len(html.encode()) < 1_500_000
    words = [word.strip(".,:") for word in " ".join([page.text, *page.tips]).lower().split()]
    if name != "odd values":
        assert not {"nan", "inf", "-inf"} & set(words)
    for _, attrs in page.tags:
        for place in (attrs.get("cx"), attrs.get("cy"), attrs.get("x"), attrs.get("y")):
            assert place is None or 0 <= float(place.rstrip("%")) <= 100


def test_headline_and_facts_are_those_of_the_trials(rendered: dict[str, str]) -> None:
    html = rendered["usual"]
    assert '<div class="main"><dt>best mIoU</dt><dd>0.570</dd></div>' in html
    for label, number in {"best trial": 7, "complete": 8, "pruned": 2, "failed": 1}.items():
        assert f"<dt>{label}</dt><dd>{number}</dd>" in html
    assert "<dd>0.520</dd>" in tuning_page.render(replace(PAGES["usual"], best=(2,)))
    assert "<dt>running</dt>" not in html
    assert "<dt>epochs trained</dt><dd>35</dd>" in html
    assert "3 of 8 planned (37.5" in html
    assert "planned" not in PageReader(rendered["all pruned"]).text
    text = PageReader(html).text
    for words in (
        "TPE",
        "One trial ran out of memory.",
        "optimizer.lr: 0.001",
        "trials: 11",
        "Search over 3 parameters",
    ):
        assert words in text, words


def test_history_shows_every_trial_and_the_best_so_far() -> None:
    page = only([draw_trial(i, values=(value,)) for i, value in enumerate((3.0, 1.0, 5.0, 4.0))], best=(2,))
    figure = tuning_page.draw_history(page, 0)
    assert figure is not None
    heights = [y for _, y in figure.lines[0].points]
    assert len(set(heights)) == 2
    assert heights == sorted(heights, reverse=True)
    assert figure.remark == "best 5.000"
    lowest = tuning_page.draw_history(replace(page, objectives=[Objective("miou", "min")]), 0)
    assert lowest is not None
    assert lowest.remark == "best 1.000"


def test_history_sets_failed_trials_on_the_worse_rim_with_their_reason() -> None:
    page = draw_page()
    figure = tuning_page.draw_history(page, 0)
    (failed,) = marks(figure, "failed")
    assert failed.y == 100
    assert failed.text == "trial 10, failed: out of memory"
    assert len(marks(figure, "complete")) == 7
    assert [mark.text for mark in marks(figure, "best")] == ["trial 7: mIoU 0.570"]
    assert "trial 8, pruned: mIoU 0.290: median rule" in [mark.text for mark in marks(figure, "pruned")]
    (failed,) = marks(tuning_page.draw_history(replace(page, objectives=[Objective("miou", "min")]), 0), "failed")
    assert failed.y == 0


def test_a_diverged_trial_does_not_flatten_the_rest() -> None:
    trials = [draw_trial(i, values=(0.3 + 0.01 * i,)) for i in range(9)] + [draw_trial(9, values=(1e6,))]
    page = replace(only(trials, best=(0,)), objectives=[Objective("loss", "min")])
    figure = tuning_page.draw_history(page, 0)
    heights = {mark.text: mark.y for mark in marks(figure, "complete")}
    assert heights["trial 9: loss 1e+06"] == 0
    assert heights["trial 1: loss 0.310"] - heights["trial 8: loss 0.380"] > 15


def test_parallel_lines_run_from_the_parameters_to_the_value() -> None:
    page = draw_page()
    parallel = tuning_page.draw_parallel(page)
    assert parallel is not None
    assert [axis.label for axis in parallel.axes] == ["optimizer.lr", "optimizer.name", "optimizer.momentum", "mIoU"]
    assert [text for _, text in parallel.axes[0].ticks] == ["1e-5", "0.0001", "0.001", "0.01", "0.1"]
    gaps = [y2 - y1 for (y1, _), (y2, _) in zip(parallel.axes[0].ticks, parallel.axes[0].ticks[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 4)
    assert [text for _, text in parallel.axes[1].ticks] == ["adamw", "sgd"]
    assert parallel.axes[2].ticks[0] == (100.0, "unset")
    assert max(y for y, _ in parallel.axes[2].ticks[1:]) < 90
    best = parallel.lines[-1]
    assert best.kind == "best"
    assert best.strength == 100
    assert best.points[0][1] == parallel.axes[0].ticks[2][0]
    assert parallel.has_gaps
    unset = [line for line in parallel.lines if line.kind == "complete" and line.points[2][1] == 100]
    assert len(unset) == 4
    assert {len(line.points) for line in parallel.lines if line.kind == "pruned"} == {3}
    strengths = {line.text: line.strength for line in parallel.lines}
    assert strengths["trial 6: mIoU 0.560"] > strengths["trial 2: mIoU 0.520"] > strengths["trial 0: mIoU 0.500"]


def test_importance_bars_carry_whiskers(rendered: dict[str, str]) -> None:
    html = rendered["usual"]
    assert 'style="width:70.00%"></span><span class="whisker" style="left:55.00%;width:26.00%"' in html
    assert "The whiskers span 5 % to 95 %" in PageReader(html).text
    assert PageReader(html).text.index("optimizer.lr 70.0") < PageReader(html).text.index("optimizer.name 30.0")


def test_slices_hold_the_complete_trials_that_have_the_parameter() -> None:
    slices = {figure.label: figure for figure in tuning_page.draw_slices(draw_page())}
    assert list(slices) == ["optimizer.lr", "optimizer.name", "optimizer.momentum"]
    assert {label: len(figure.marks) for label, figure in slices.items()} == {
        "optimizer.lr": 8,
        "optimizer.name": 8,
        "optimizer.momentum": 4,
    }
    assert slices["optimizer.momentum"].remark == "in 4 of 8"
    assert slices["optimizer.name"].num_choices == 2
    assert {mark.x for mark in slices["optimizer.name"].marks} == {25.0, 75.0}
    across = {mark.text.split(",")[0]: mark.x for mark in slices["optimizer.lr"].marks}
    assert across["0.01"] - across["0.001"] == pytest.approx(across["0.1"] - across["0.01"], abs=0.02)
    assert slices["optimizer.lr"].marks[-1].kind == "best"


def test_learning_curves_end_where_trials_were_pruned() -> None:
    figure = tuning_page.draw_curves(draw_page())
    assert figure is not None
    assert figure.label == "mIoU"
    lengths = [len(line.points) for line in figure.lines]
    assert sorted(lengths) == [1, 2, *[4] * 8]
    assert figure.lines[-1].kind == "best"
    ends = [line.points[-1] for line in figure.lines if line.kind == "pruned"]
    assert sorted(mark[:2] for mark in marks(figure, "pruned")) == sorted(ends)
    assert "trial 8, pruned: mIoU 0.290: median rule, epoch 2" in [mark.text for mark in figure.marks]


def test_learning_curves_follow_the_first_objective_that_histories_have() -> None:
    figure = tuning_page.draw_curves(
        replace(PAGES["two objectives"], objectives=[LATENCY, Objective("val/miou", "max")])
    )
    assert figure is not None
    assert figure.label == "val/mIoU"
    assert tuning_page.draw_curves(replace(PAGES["two objectives"], objectives=[LATENCY])) is None


def test_pareto_front_is_joined_and_the_rest_faint(rendered: dict[str, str]) -> None:
    trials = [
        draw_trial(i, values=values) for i, values in enumerate([(0.5, 10.0), (0.6, 30.0), (0.7, 20.0), (0.4, 40.0)])
    ]
    page = replace(only(trials, best=(2, 0)), objectives=[MIOU, LATENCY])
    figure = tuning_page.draw_pareto(page)
    assert figure is not None
    (left, low), (right, high) = figure.lines[0].points
    assert left < right
    assert low > high
    assert len(marks(figure, "best")) == len(marks(figure, "complete")) == 2
    assert "trial 2: mIoU 0.700, latency ms 20.000" in [mark.text for mark in figure.marks]
    html = tuning_page.render(page)
    assert '<div class="main"><dt>best mIoU</dt><dd>0.700</dd></div>' in html
    assert "<dt>best latency ms</dt><dd>10.000</dd>" in html
    assert "<dt>on the Pareto front</dt><dd>2</dd>" in html
    assert 'id="pareto"' not in rendered["usual"]


def test_the_table_lists_every_trial_the_best_first(rendered: dict[str, str]) -> None:
    body = re.search(r"<tbody>(.*?)</tbody>", rendered["usual"], re.DOTALL)
    assert body
    rows = re.findall(r'<th scope="row">(\d+)</th>(.*?)</tr>', body[1], re.DOTALL)
    assert [int(number) for number, _ in rows] == [7, 6, 5, 4, 3, 2, 1, 0, 8, 9, 10]
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", rows[0][1])]
    assert cells == ["complete best", "0.570", "0.001", "sgd", "0.87", "4", "60", ""]
    assert "out of memory" in rows[-1][1]
    assert ">—</td>" in rows[1][1]


def test_class_weights_are_bars_of_the_largest(rendered: dict[str, str]) -> None:
    assert re.search(r'<dt>road</dt><dd><span class="bar"><i style="width:12\.50%"', rendered["usual"])
    assert re.search(r'<dt>pole</dt><dd><span class="bar"><i style="width:100\.00%"', rendered["usual"])
    assert "Class weights" not in rendered["one trial"]


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("no trial", ["The search has no trials yet."]),
        ("one trial", ["There is nothing to compare", "Not known: it takes four trials"]),
        ("all failed", [tuning_page.NO_VALUES, "No trial has reported an objective by epoch.", "no GPU"]),
        ("all running", [tuning_page.NO_VALUES, "There is nothing to compare"]),
        ("all pruned", ["There is nothing to compare"]),
        ("not finite", [tuning_page.NO_VALUES]),
        ("no parameters", ["There is nothing to compare", "Search over 0 parameters"]),
    ],
)
def test_a_sentence_stands_where_there_is_nothing_to_draw(
    name: str, sentences: list[str], rendered: dict[str, str]
) -> None:
    text = PageReader(rendered[name]).text
    for sentence in sentences:
        assert sentence in text
    if name == "no trial":
        assert "<dd>—</dd>" in rendered[name]
        assert "<svg" not in rendered[name]


def test_long_searches_are_drawn_in_full_and_their_table_folded(rendered: dict[str, str]) -> None:
    assert "<details >" in rendered["200 trials"]
    assert "<details open>" in rendered["usual"]
    assert rendered["200 trials"].count('<th scope="row">') == 200
    assert len(tuning_page.draw_slices(PAGES["30 parameters"])) == 30
    parallel = tuning_page.draw_parallel(PAGES["30 parameters"])
    assert parallel is not None
    assert [axis.label for axis in parallel.axes[:2]] == ["weight of class 0", "weight of class 1"]


def test_equal_values_and_odd_parameters_are_placed_all_the_same() -> None:
    figure = tuning_page.draw_history(PAGES["equal values"], 0)
    assert {mark.y for mark in marks(figure, "complete")} == {100.0}
    labels = {
        figure.label: [text for _, text in figure.x_ticks] for figure in tuning_page.draw_slices(PAGES["odd values"])
    }
    assert labels["a"] == ["true", "none", "x"]
    assert labels["b"] == ["1", "2.5", "auto"]


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([0.0, 0.0], False),
        ([0.0, 1.0], True),
        ([3e-4, 3e-4], True),
        ([2e-4, 3e-4], True),
        ([1e-12, 1e12], True),
        ([1, 2], False),
        ([-5.0, -4.9], False),
    ],
)
def test_axes_hold_their_values_between_few_ticks(values: list[float], is_log: bool) -> None:
    axis = tuning_page.fit(values, is_log=is_log)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert 1 <= len(axis.ticks) <= 7
    assert all(0 <= place <= 1 for place, _ in axis.ticks)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_everything_given_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    trials = [
        draw_trial(i, state, params={evil: value, f"loss.class_weights.{evil}": 0.5 + i}, values=(i, i), reason=evil)
        for i, (state, value) in enumerate([("complete", evil), ("complete", "b"), ("failed", evil), ("pruned", evil)])
    ]
    page = TuningPage(
        title=evil,
        objectives=[Objective(evil, "max"), Objective(f"b{evil}", "min")],
        trials=[replace(trial, history=[{"epoch": 1, evil: 0.5}]) for trial in trials],
        importances={evil: [Importance(evil, 1.0, 0.5, 1.0)]},
        best=(1,),
        class_weights={evil: 1.0},
        facts={evil: evil},
        job={evil: [evil]},
        notes=[evil],
    )
    read = PageReader(tuning_page.render(page))
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert evil in read.text
    assert any(evil in tip for tip in read.tips)
    assert any(evil in (attrs.get("title") or "") for _, attrs in read.tags)


def test_a_browser_shows_the_page_without_complaint(tmp_path: Path, rendered: dict[str, str]) -> None:
    dom = shown_in_chromium(rendered["usual"], tmp_path)
    assert dom.count('<th scope="row">') == 11
