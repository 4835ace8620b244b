"""The page of a run: complete, self-contained, escaped, small, and true to the numbers given."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysseg import report
from raysseg.masks import LabelMap
from raysseg.report import Example, ReportPage, SplitCounts
from raysseg.schema import ClassMap
from tests.conftest import shown_in_chromium

VOID = {"meta", "link", "img", "br", "hr", "input"}


class PageReader(HTMLParser):
    """Checks that tags close in order; keeps what the page would load, its text, its tags and its tooltips."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.titles: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]
        self.titles += [value or "" for name, value in attrs if name == "title"]
        assert not any(name.startswith("on") for name, _ in attrs)
        assert tag != "img" or dict(attrs).get("alt")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def draw_classes(num_classes: int) -> ClassMap:
    colours = np.random.default_rng(0).integers(0, 256, (num_classes, 3)).tolist()
    return ClassMap(
        ids=tuple(range(num_classes)),
        names=tuple(f"class {i}" for i in range(num_classes)),
        colours=tuple((r, g, b) for r, g, b in colours),
        things=(False,) * num_classes,
    )


def draw_example(name: str, classes: ClassMap, size: tuple[int, int] = (120, 160), noise: int = 40) -> Example:
    """Bands of classes under a noisy gradient, a corner not labelled, and a prediction that is off by some pixels."""
    height, width = size
    rows, columns = np.indices(size)
    truth: report.Labels = (columns * len(classes) // width).astype(classes.dtype)
    truth[: height // 6, : width // 6] = classes.ignore
    prediction = np.roll(truth, width // 20, axis=1)
    prediction[prediction == classes.ignore] = 0
    image = np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=2)
    image = image + np.random.default_rng(1).integers(0, noise, (height, width, 3))
    views = LabelMap(truth, classes.ignore), LabelMap(prediction, classes.ignore)
    return Example(name, image.clip(0, 255).astype(np.uint8), *views, 0.4321)


def draw_history(classes: ClassMap, epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "step": epoch * 10,
            "train/loss": 2.0 / epoch,
            "train/lr": 6e-5 / epoch,
            "val/miou": 0.7 - 0.5 / epoch,
            **{f"val/iou/{name}": 0.8 - 0.6 / epoch for name in classes.names},
        }
        for epoch in range(1, epochs + 1)
    ]


def draw_page(num_classes: int = 11, epochs: int = 20, groups: Sequence[str] = ("worst",)) -> ReportPage:
    classes = draw_classes(num_classes)
    confusion = np.random.default_rng(2).integers(0, 300, (num_classes, num_classes))
    np.fill_diagonal(confusion, 20_000)
    metrics = {"miou": 0.61234, "mean_dice": 0.72345, "pixel_accuracy": 0.91256, "frequency_weighted_iou": 0.83367}
    metrics |= {f"iou/{name}": (i + 1) / (num_classes + 2) for i, name in enumerate(classes.names)}
    metrics |= {f"dice/{name}": (i + 1.5) / (num_classes + 2) for i, name in enumerate(classes.names)}
    return ReportPage(
        title="a run",
        task="semantic",
        classes=classes,
        job={"kind": "train", "optimizer": {"name": "adamw", "lr": 6.0e-5}, "scaling": {"workers": [1, 4]}},
        metrics=metrics,
        confusion=confusion.astype(np.int64),
        history=draw_history(classes, epochs),
        splits=[
            SplitCounts("train", 1367, np.arange(1, num_classes + 1) * 1000, 501),
            SplitCounts("val", 101, np.arange(num_classes, 0, -1) * 100, 502),
        ],
        examples={key: [draw_example(f"{key}-0", classes)] for key in groups},
        facts={"images per second": "142.6", "device": "CPU"},
        notes=["2 samples were skipped."],
    )


def read_pictures(html: str) -> list[np.ndarray]:
    uris = re.findall(r'src="data:image/webp;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))) for uri in uris]


def bare_page() -> ReportPage:
    """An evaluation that knows nothing but its metrics."""
    return ReportPage("check", "semantic", draw_classes(3), {}, {"miou": 0.5})


PAGES: Mapping[str, ReportPage] = {
    "11 classes": draw_page(groups=("worst", "median", "best")),
    "2 classes": draw_page(2),
    "150 classes": draw_page(150, epochs=100),
    "300 classes, 16-bit labels": draw_page(300, epochs=2),
    "no history": draw_page(epochs=0),
    "one epoch": draw_page(epochs=1),
    "a long run": draw_page(4, epochs=2000),
    "bare": bare_page(),
}


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return {name: report.render(page) for name, page in PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_well_formed_self_contained_and_small(name: str, rendered: dict[str, str]) -> None:
    html = rendered[name]
    page = PageReader(html)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\(|@import|//", re.sub(r"base64,[^\"]+", "", html).replace("<!doctype html>", ""))
    assert len(html.encode()) < 3_000_000
    assert "nan" not in page.text.lower().split()


def test_numbers_on_the_page_are_those_given(rendered: dict[str, str]) -> None:
    page, html = PAGES["11 classes"], rendered["11 classes"]
    text = PageReader(html).text
    for name, value in page.metrics.items():
        assert f"{value:.3f}" in text, name
    assert re.search(r'class="main"><dt>mIoU</dt><dd>0\.612<', html)
    for words in ("best 0.675 at epoch 20", "142.6", "2 samples were skipped.", "1\u202f367", "501", "mIoU 0.432"):
        assert words.replace("\u202f", " ") in text, words
    row = re.search(r'<th scope="row"><span class="name" title="class 4">.*?</tr>', html, re.DOTALL)
    assert row
    assert re.findall(r"<span>([\d.]+)", row[0])[:2] == [f"{5 / 13:.3f}", f"{5.5 / 13:.3f}"]


def test_an_evaluation_has_no_curves_and_a_run_has(rendered: dict[str, str]) -> None:
    assert 'id="curves"' not in rendered["no history"]
    assert "Evaluation," in rendered["no history"]
    assert rendered["11 classes"].count("<polyline") == 3 + 11
    assert all(
        f'id="{part}"' not in rendered["bare"] for part in ("curves", "classes", "confusion", "examples", "data")
    )


def test_many_classes_give_a_list_of_confusions_in_place_of_a_matrix(rendered: dict[str, str]) -> None:
    assert 'class="matrix"' in rendered["11 classes"]
    assert 'class="matrix"' not in rendered["150 classes"]
    assert rendered["150 classes"].count("is predicted as") == 30


def test_a_class_without_a_number_shows_a_dash_and_is_marked() -> None:
    page = draw_page()
    assert page.confusion is not None
    confusion = page.confusion.copy()
    confusion[3] = 0
    history = [{**row, "val/iou/class 3": math.nan} for row in page.history]
    metrics = {**page.metrics, "miou": math.nan, "iou/class 3": math.nan, "dice/class 3": math.nan}
    html = report.render(replace(page, metrics=metrics, confusion=confusion, history=history, absent=["class 3"]))
    row = re.search(r'<th scope="row"><span class="name" title="class 3">.*?</tr>', html, re.DOTALL)
    assert row
    assert "absent" in row[0]
    assert row[0].count("<span>—</span>") == 2
    assert "<dd>—</dd>" in html
    assert "The means leave out class 3" in PageReader(html).text
    assert html.count("<polyline") == 3 + 10


def test_other_tasks_show_their_own_metrics() -> None:
    page = draw_page(2, epochs=0)
    metrics = {"sq": 0.8, "pq": 0.4567, "pq/class 0": 0.4, "pq/class 1": math.nan}
    html = report.render(replace(page, task="panoptic", metrics=metrics, confusion=None))
    assert '<div class="main"><dt>PQ</dt><dd>0.457</dd></div>' in html
    assert '<th scope="col">PQ</th>' in html
    assert '<th scope="col">IoU</th>' not in html


def test_everything_given_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    classes = replace(draw_classes(2), names=(evil, "<img src=http://example.com/x.png>"))
    base = draw_page(2)
    page = replace(
        base,
        title=evil,
        classes=classes,
        job={evil: [evil]},
        metrics={f"iou/{evil}": 0.5, f"{evil}": 0.25},
        absent=[evil],
        history=draw_history(classes, 3),
        splits=[SplitCounts(evil, 1, np.array([5, 5]), 0)],
        examples={evil: [replace(draw_example("", classes), sample_id=evil)]},
        facts={evil: evil},
        notes=[evil],
    )
    read = PageReader(report.render(page))
    assert read.tags.count("script") == 1
    assert read.tags.count("img") == 4
    assert evil in read.text
    assert evil in read.titles
    assert all(source.startswith(("data:", "#")) for source in read.sources)


def test_nine_noisy_examples_stay_below_3_mb() -> None:
    classes = draw_classes(19)
    groups = {
        key: [draw_example(f"{key}-{i}", classes, size=(500, 500), noise=256) for i in range(3)]
        for key in ("worst", "median", "best")
    }
    html = report.render(replace(draw_page(19), examples=groups))
    assert len(html.encode()) < 3_000_000
    pictures = read_pictures(html)
    assert len(pictures) == 36
    assert {picture.shape for picture in pictures} == {(480, 480, 3)}


def test_an_example_without_prediction_shows_image_and_truth_alone() -> None:
    page = draw_page(3)
    example = replace(draw_example("one", page.classes), prediction=None)
    html = report.render(replace(page, examples={"worst": [example], "best": []}))
    assert len(read_pictures(html)) == 2
    assert "<h3>Best</h3>" not in html


def test_overlay_paints_each_class_in_its_colour_and_hatches_what_is_ignored() -> None:
    classes = replace(draw_classes(2), colours=((250, 10, 20), (5, 200, 90)))
    image = np.full((40, 60, 3), 100, np.uint8)
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 20:] = 1
    labels[:, 40:] = classes.ignore
    painted = report.paint_labels(image, labels, classes)
    for column, colour in ((5, classes.palette[0]), (30, classes.palette[1])):
        expected = np.round((1 - report.OPACITY) * 100 + report.OPACITY * colour.astype(float))
        np.testing.assert_allclose(painted[:, column].astype(float), np.tile(expected, (40, 1)), atol=1)
    ignored = painted[:, 42:]
    assert (ignored == ignored[..., :1]).all()  # grey
    assert len(np.unique(ignored)) == 2  # of two tones
    assert (painted[:, 19] > painted[:, 5]).any(axis=1).all()  # the line between regions is lighter
    assert painted.shape == image.shape


def test_errors_show_wrong_pixels_alone() -> None:
    image = np.full((20, 30, 3), 100, np.uint8)
    truth = np.zeros((20, 30), np.uint8)
    truth[:, 20:] = 255
    prediction = np.zeros((20, 30), np.uint8)
    prediction[:, 10:] = 1
    painted = report.paint_errors(image, truth, prediction, ignore=255)
    assert (painted[:, 10:20] == report.WRONG).all()
    assert (painted[:, :10] == painted[:, :10, :1]).all()
    assert (painted[:, 20:] == painted[:, 20:, :1]).all()


def test_legend_holds_the_iou_in_the_image() -> None:
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 1, 2]], np.uint8)
    ious = report.class_ious(truth, prediction, 255)
    assert ious[0] == ious[1] == 0.5
    assert math.isnan(ious[2])
    view = report.view_example(
        Example("x", np.zeros((1, 4, 3), np.uint8), LabelMap(truth, 255), LabelMap(prediction, 255), math.nan),
        draw_classes(3),
    )
    assert view.wrong == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((360, 480), (480, 360)), ((64, 64), (448, 448)), ((2000, 1000), (240, 480)), ((1, 4000), (480, 1))],
)
def test_pictures_are_at_most_480_wide_and_small_images_are_enlarged(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert report.picture_size(*size) == expected
    labels = np.random.default_rng(0).integers(0, 3, size).astype(np.uint8)
    assert report.resize_labels(labels, expected).shape == expected[::-1]


def test_frequent_confusions_are_ranked_by_share_of_the_true_class() -> None:
    confusion = np.array([[90, 10, 0], [300, 700, 0], [0, 0, 0]])
    pairs = report.frequent_confusions(confusion, 10)
    assert [(p.truth, p.prediction, p.share, p.pixels) for p in pairs] == [(1, 0, 0.3, 300), (0, 1, 0.1, 10)]


@pytest.mark.parametrize(
    "values", [[0.5], [0.0, 0.0], [2.3, 0.28], [0.9, 0.91], [-1.0, -3.0], [6e-5, 0.0], [1e6, 3e6], [0.7, 0.7, 0.7]]
)
def test_charts_hold_every_value_between_few_ticks(values: list[float]) -> None:
    chart = report.build_chart("x", list(enumerate(values, start=1)))
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y, _ in chart.points)
    assert 2 <= len(chart.y_ticks) <= 7
    assert 1 <= len(chart.x_ticks) <= 7


def test_lines_stand_out_on_both_pages() -> None:
    def luminance(colour: str) -> float:
        rgb = np.array([int(n) for n in re.findall(r"\d+", colour)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    for colour in [(0, 0, 0), (255, 255, 255), (0, 0, 255), (255, 255, 0), (128, 128, 128)]:
        ink = luminance(report.to_ink(colour))
        for paper in ("rgb(252 252 250)", "rgb(20 23 26)"):
            bright, dark = sorted((ink, luminance(paper)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 3


def test_a_browser_shows_the_page_without_complaint(tmp_path: Path, rendered: dict[str, str]) -> None:
    dom = shown_in_chromium(rendered["11 classes"], tmp_path)
    assert dom.count("<img") == 12


def test_names_of_metrics_read_as_in_the_papers() -> None:
    names = {
        "miou": "mIoU",
        "mask_ap": "mask AP",
        "box_ap50": "box AP50",
        "mask_ar_small": "mask AR small",
        "pq_things": "PQ things",
        "boundary_pq": "boundary PQ",
        "boundary_iou": "boundary IoU",
        "mean_dice": "mean Dice",
        "surface_dice_3px": "surface Dice 3px",
        "hd95": "HD95",
        "frequency_weighted_iou": "frequency-weighted IoU",
        "pixel_accuracy": "pixel accuracy",
    }
    assert {name: report.to_label(name) for name in names} == names


def test_only_the_first_numbers_stand_large() -> None:
    metrics = dict.fromkeys(["mask_ap", *(f"mask_ar{i}" for i in range(1, 12))], 0.25)
    page = replace(draw_page(3), task="instance", metrics=metrics)
    head, rest = report.render(page).split("<details>", 1)
    assert "mask AR8" in head
    assert "mask AR9" not in head
    assert "3 more numbers" in rest
    assert "mask AP 0." in rest  # of an example
