"""The page of a training run or an evaluation: plain values in, one self-contained HTML file out. No torch, no ray.

What stands on the page is worked out here; how it is laid out stands in ``templates/report.html.j2``.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from raysseg.catalogue import HEADLINES
from raysseg.masks import LabelMap, View, to_layers
from raysseg.schema import ClassMap, Task

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB
Labels = npt.NDArray[np.uint8 | np.uint16]  # (H, W) class indices, ClassMap.ignore where not labelled

PER_CLASS = ("iou", "dice", "pq", "mask_ap")  # what is shown of each class
TERMS = {
    "miou": "mIoU",
    "iou": "IoU",
    "dice": "Dice",
    "frequency weighted": "frequency-weighted",
    **{term: term.upper() for term in ("ap", "ar", "pq", "sq", "rq", "hd")},
}
FIGURES = 8  # that stand beside the headline; the rest is folded away
MATRIX_CLASSES = 32  # a matrix of more classes is unreadable: a longer list of confusions stands in its place
PICTURE_SIDE = 480  # pixels of a picture's longer side
PICTURE_BYTES = 50_000  # of an encoded picture: 9 examples of 4 pictures each take 2.4 MB as base64
OPACITY = 0.55  # of a class's colour over the image
WRONG = (196, 0, 74)  # darker than the pale grey around it, so that it does not rest on hue alone


@dataclass(frozen=True)
class Example:
    """An image, its labels and what the model made of it; ``score`` is its mIoU, mask AP or PQ, or NaN."""

    sample_id: str
    image: Pixels
    truth: View
    prediction: View | None
    score: float


@dataclass(frozen=True)
class SplitCounts:
    """What a split of the data holds; ``class_pixels`` is (C,)."""

    name: str
    num_samples: int
    class_pixels: npt.NDArray[np.int64]
    ignored_pixels: int


@dataclass(frozen=True)
class ReportPage:
    """All that a page shows; what is empty or None is left out of it.

    Attributes:
        title: usually the job's name.
        task: decides which metric stands large.
        classes: names and colours.
        job: the resolved job, nested plain values.
        metrics: by name (``miou``, ``iou/<class>``); NaN shows as a dash.
        absent: names of the classes that the ground truth lacks, which the means leave out.
        confusion: (C, C) pixels, rows truth, columns prediction.
        history: rows of ``metrics.jsonl``; empty for an evaluation.
        splits: what the data holds.
        examples: under "worst", "median" and "best".
        facts: short things worth knowing, by label.
        notes: warnings worth showing.
    """

    title: str
    task: Task
    classes: ClassMap
    job: Mapping[str, object]
    metrics: Mapping[str, float]
    absent: Sequence[str] = ()
    confusion: npt.NDArray[np.int64] | None = None
    history: Sequence[Mapping[str, float]] = ()
    splits: Sequence[SplitCounts] = ()
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Confusion(NamedTuple):
    """``share`` of the pixels of class ``truth`` (an index) is predicted as class ``prediction``."""

    truth: int
    prediction: int
    share: float
    pixels: int


class Chart(NamedTuple):
    """A line over the epochs; positions are per cent of the plot, from its upper left."""

    label: str
    colour: str
    points: list[tuple[float, float, str]]  # x, y and what to say when pointed at
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    mark: tuple[float, float, str]  # the point that stands out: the best, or the last
    remark: str
    summary: str


class Picture(NamedTuple):
    """An encoded image; ``size`` is (width, height)."""

    caption: str
    uri: str
    size: tuple[int, int]


class ExampleView(NamedTuple):
    """An example made ready; ``wrong`` is the share of its labelled pixels, ``legend`` has each class's IoU in it."""

    sample_id: str
    score: float
    wrong: float
    pictures: list[Picture]
    legend: dict[int, float]


def open_template(name: str) -> jinja2.Template:
    """A page's layout, with the filters that pages have."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raysseg"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": to_figure, "percent": to_percent, "count": to_count, "label": to_label}
    return environment.get_template(name)


def render(page: ReportPage) -> str:
    """The page as one HTML file that loads nothing from outside."""
    means = [name for name in page.metrics if "/" not in name]
    headline = HEADLINES[page.task] if HEADLINES[page.task] in means or not means else means[0]
    figures = [name for name in means if name != headline]
    has_matrix = page.confusion is not None and len(page.classes) <= MATRIX_CLASSES
    return open_template("report.html.j2").render(
        page=page,
        headline=headline,
        figures=figures[:FIGURES],
        more_figures=figures[FIGURES:],
        score_label=to_label(HEADLINES[page.task]),
        columns={key: to_label(key) for key in PER_CLASS if any(m.startswith(f"{key}/") for m in page.metrics)},
        curves=run_curves(page, headline),
        class_curves=class_curves(page),
        class_measure=to_label(class_measure(page)),
        shares=np.nan_to_num(to_shares(page.confusion.sum(axis=1))) if page.confusion is not None else None,
        matrix=to_shares(page.confusion) if page.confusion is not None and has_matrix else None,
        confusions=frequent_confusions(page.confusion, 10 if has_matrix else 30) if page.confusion is not None else [],
        split_shares=[np.nan_to_num(to_shares(split.class_pixels)) for split in page.splits],
        examples={key: [view_example(e, page.classes) for e in group] for key, group in page.examples.items() if group},
        wrong_colour=WRONG,
        nan=math.nan,
        job=yaml.safe_dump(dict(page.job), sort_keys=False, allow_unicode=True),
    )


def to_figure(value: float) -> str:
    """A metric, with three decimals; a dash where there is none."""
    return f"{value:.3f}" if math.isfinite(value) else "—"


def to_short(value: float) -> str:
    """A number of any size in three digits, for axes: 0.25, 6e-5."""
    return f"{value:.3g}".replace("e-0", "e-")


def to_percent(share: float) -> str:
    """A share of 1 in per cent, with a decimal more where it is small."""
    if not math.isfinite(share):
        return "—"
    if 0 < share < 0.0001:
        return "< 0.01\u202f%"
    return f"{100 * share:.{2 if share < 0.01 else 1}f}\u202f%" if share else "0\u202f%"


def to_count(value: int) -> str:
    """A whole number, thousands set apart by narrow spaces."""
    return f"{int(value):,}".replace(",", "\u202f")


def to_label(name: str) -> str:
    """What a metric is called in running text."""
    terms = "|".join(TERMS)
    return re.sub(rf"\b({terms})(?=\d|\b)", lambda found: TERMS[found[0]], name.replace("_", " "))


def to_shares(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Counts as shares of their sum along the last axis; NaN where that is 0."""
    totals = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(totals > 0, totals, np.nan)


def frequent_confusions(confusion: npt.NDArray[np.int64], limit: int) -> list[Confusion]:
    """The pairs of classes that take the largest share of a class away from it, largest first."""
    shares = np.nan_to_num(to_shares(confusion))
    np.fill_diagonal(shares, 0.0)
    order = np.argsort(-shares, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(i), len(shares)) for i in order if shares.flat[i] > 0]
    return [Confusion(i, j, float(shares[i, j]), int(confusion[i, j])) for i, j in pairs]


def run_curves(page: ReportPage, headline: str) -> list[Chart]:
    """Loss, validation and learning rate over the epochs, as far as the history has them."""
    labels = {
        "train/loss": "Training loss",
        f"val/{headline}": f"Validation {to_label(headline)}",
        "train/lr": "Learning rate",
    }
    series = [(key, label, read_series(page, key)) for key, label in labels.items()]
    return [
        build_chart(label, values, is_best_marked=key.startswith("val/")) for key, label, values in series if values
    ]


def class_curves(page: ReportPage) -> list[Chart]:
    """A small chart a class, all on the same axes, each in its class's colour."""
    series = [read_series(page, f"val/{class_measure(page)}/{name}") for name in page.classes.names]
    rows = zip(page.classes.names, page.classes.colours, series, strict=True)
    return [build_chart(name, values, colour=to_ink(colour), limits=(0, 1)) for name, colour, values in rows if values]


def class_measure(page: ReportPage) -> str:
    """What the history follows of each class: the first of PER_CLASS that it has, or nothing."""
    keys = {key for row in page.history for key in row}
    return next((measure for measure in PER_CLASS if any(key.startswith(f"val/{measure}/") for key in keys)), "")


def read_series(page: ReportPage, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have a finite number under ``key``."""
    return [(row["epoch"], row[key]) for row in page.history if math.isfinite(row.get(key, math.nan))]


def build_chart(
    label: str,
    values: list[tuple[float, float]],
    *,
    is_best_marked: bool = False,
    colour: str = "var(--accent)",
    limits: tuple[float, float] | None = None,
) -> Chart:
    """A chart of (epoch, value) pairs; without ``limits`` its axis fits the values."""
    first, width = values[0][0], values[-1][0] - values[0][0]
    low, high = limits or fit_axis([y for _, y in values])
    x_step, y_step = max(1.0, nice_step(width / 5)), nice_step((high - low) / (2 if limits else 4))
    y_ticks = [i * y_step for i in range(math.floor(low / y_step + 1e-9), math.ceil(high / y_step - 1e-9) + 1)]
    x_ticks = [i * x_step for i in range(math.ceil(first / x_step), math.floor((first + width) / x_step) + 1)]

    def place(x: float, y: float) -> tuple[float, float, str]:
        across = (x - first) / width if width else 0.5
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(100 * across, 2), round(100 * (1 - up), 2), f"epoch {x:g}: {to_short(y)}"

    say = to_figure if limits else to_short
    mark = max(values, key=lambda value: value[1]) if is_best_marked else values[-1]
    kept = np.unique(np.linspace(0, len(values) - 1, 60 if limits else 300).astype(int))  # of a very long run
    return Chart(
        label=label,
        colour=colour,
        points=[place(*values[i]) for i in kept],
        x_ticks=[(place(x, low)[0], f"{x:g}") for x in x_ticks],
        y_ticks=[(place(first, y)[1], to_short(y)) for y in y_ticks],
        mark=place(*mark),
        remark=f"best {to_figure(mark[1])} at epoch {mark[0]:g}" if is_best_marked else say(mark[1]),
        summary=f"{label}: {to_short(values[0][1])} at epoch {first:g}, {to_short(values[-1][1])} at {first + width:g}",
    )


def fit_axis(values: list[float]) -> tuple[float, float]:
    """The range of the values, and 0 with it unless that would flatten them to less than half of the height."""
    low, high = min(values), max(values)
    if low == high or high - low >= max(abs(low), abs(high)) / 2:
        low, high = min(low, 0.0), max(high, 0.0)
    return low, high if high > low else low + 1


def nice_step(step: float) -> float:
    """The next number of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def to_ink(colour: tuple[int, int, int]) -> str:
    """A colour for lines, made darker or lighter until it stands out 3:1 on the light and the dark page (WCAG)."""
    rgb = np.array(colour, dtype=float)
    steps = [rgb + (end - rgb) * k / 20 for k in range(21) for end in (0.0, 255.0)]
    red, green, blue = next(c for c in steps if 0.13 <= (c / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722) <= 0.28)
    return f"rgb({red:.0f} {green:.0f} {blue:.0f})"


def view_example(example: Example, classes: ClassMap) -> ExampleView:
    """The example's pictures, its legend and how much of it is wrong."""
    truth, regions = flatten(example.truth, classes)
    size = picture_size(*truth.shape)
    image = np.asarray(Image.fromarray(example.image).resize(size, Image.Resampling.BOX))
    shown = resize_labels(truth, size)
    paintings = {"Image": image, "Ground truth": paint_labels(image, shown, classes, resize_labels(regions, size))}
    wrong, prediction = math.nan, None
    if example.prediction is not None:
        prediction, regions = flatten(example.prediction, classes)
        guess, is_labelled = resize_labels(prediction, size), truth != classes.ignore
        wrong = float((prediction != truth)[is_labelled].mean()) if is_labelled.any() else math.nan
        paintings["Prediction"] = paint_labels(image, guess, classes, resize_labels(regions, size))
        paintings["Errors"] = paint_errors(image, shown, guess, classes.ignore)
    return ExampleView(
        sample_id=example.sample_id,
        score=example.score,
        wrong=wrong,
        pictures=[Picture(name, to_data_uri(pixels), size) for name, pixels in paintings.items()],
        legend=class_ious(truth, prediction, classes.ignore),
    )


def flatten(view: View, classes: ClassMap) -> tuple[Labels, Labels]:
    """Each pixel's class and the number of its region, both (H, W); of overlapping instances the smaller is on top."""
    if isinstance(view, LabelMap):
        return view.labels, view.labels
    layers = to_layers(view, classes)
    return layers.labels, layers.numbers.max(0)


def class_ious(truth: Labels, prediction: Labels | None, ignore: int) -> dict[int, float]:
    """IoU over the labelled pixels of each class that occurs in the image; NaN where there is none."""
    guess = truth if prediction is None else prediction
    ious = {}
    present = {*np.unique(truth).tolist(), *np.unique(guess).tolist()}
    for index in sorted(index for index in present if index < ignore - 1):  # which are those of no class
        is_true, is_guessed = truth == index, (guess == index) & (truth != ignore)
        union = int((is_true | is_guessed).sum())
        ious[index] = float((is_true & is_guessed).sum() / union) if union and prediction is not None else math.nan
    return ious


def picture_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a picture: its longer side at most PICTURE_SIDE, small images enlarged by a whole number."""
    longer = max(height, width)
    scale = max(1, PICTURE_SIDE // longer) if longer <= PICTURE_SIDE else PICTURE_SIDE / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize_labels(labels: Labels, size: tuple[int, int]) -> Labels:
    """The nearest label of each pixel of a (width, height) picture."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in (size[1], size[0]))
    nearest = np.ix_((rows * labels.shape[0]).astype(int), (columns * labels.shape[1]).astype(int))
    return labels[nearest]


def paint_labels(image: Pixels, labels: Labels, classes: ClassMap, regions: Labels | None = None) -> Pixels:
    """The image under its classes' colours, a thin line between regions, and hatching where it is not labelled.

    Regions, (H, W), are told apart by number; without them, by class.
    """
    is_class = labels < len(classes)
    colours = classes.palette[np.where(is_class, labels, 0)]  # (H, W, 3)
    opacity = OPACITY * is_class[..., None]
    hatched = hatch((1 - opacity) * image + opacity * colours, image, labels == classes.ignore)
    return outline(hatched, labels if regions is None else regions)


def paint_errors(image: Pixels, truth: Labels, prediction: Labels, ignore: int) -> Pixels:
    """The image in pale grey with its wrong pixels in one dark, loud colour, and hatching where it is not labelled."""
    is_ignored = truth == ignore
    pale = np.repeat(150 + 0.4 * image.mean(axis=2, keepdims=True), 3, axis=2)
    painted = np.where(((truth != prediction) & ~is_ignored)[..., None], np.array(WRONG), pale)
    return hatch(painted, image, is_ignored).round().astype(np.uint8)


def hatch(painted: npt.NDArray[np.float64], image: Pixels, where: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """``painted``, with grey diagonal stripes over the image ``where`` that holds."""
    rows, columns = np.indices(where.shape)
    stripes = np.where((rows + columns) // 4 % 2, 105.0, 205.0)
    grey = 0.35 * image.mean(axis=2) + 0.65 * stripes
    return np.where(where[..., None], grey[..., None], painted)


def outline(painted: npt.NDArray[np.float64], regions: Labels) -> Pixels:
    """``painted``, with a line one pixel wide between regions that lets the colour of thin ones through."""
    is_edge = np.zeros(regions.shape, dtype=bool)
    is_edge[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    is_edge[:-1] |= regions[:-1] != regions[1:]
    return np.where(is_edge[..., None], 0.4 * painted + 0.6 * 255, painted).round().astype(np.uint8)


def to_data_uri(pixels: Pixels) -> str:
    """The picture as WebP, of the best quality that keeps to PICTURE_BYTES."""
    for quality in (85, 70, 50, 30, 10, 0):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", quality=quality)
        if file.tell() <= PICTURE_BYTES:
            break
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
