"""The page of a data set: its fingerprint as one self-contained HTML file; laid out in templates/inspect.html.j2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import yaml

from raysseg.findings.advice import to_fragment
from raysseg.findings.fingerprint import Advice, SplitFacts
from raysseg.findings.kinds import KINDS, SEVERITIES, Finding
from raysseg.report import MATRIX_CLASSES, Picture, open_template
from raysseg.schema import ClassMap, Task

PICTURES = 8  # of a finding, that are shown
LISTED = 200  # samples of a finding, that are named


@dataclass(frozen=True)
class InspectPage:
    """All that the page shows.

    Attributes:
        title: usually the job's name.
        task: that the data are for.
        classes: names and colours.
        splits: what they hold, the one for training first.
        findings: what is wrong.
        advice: what to do about it.
        pictures: of samples by finding's place and sample id; what can't be drawn is left out.
    """

    title: str
    task: Task
    classes: ClassMap
    splits: Sequence[SplitFacts]
    findings: Sequence[Finding]
    advice: Advice
    pictures: Mapping[tuple[int, str], Picture]


class Shown(NamedTuple):
    """A finding made ready; `samples` are (id, detail, picture), those with pictures first."""

    finding: Finding
    title: str
    pictures: list[tuple[str, str, Picture]]
    listed: list[tuple[str, str]]
    num_more: int


class Bin(NamedTuple):
    """A bar of the histogram of instance sizes; `height` is a share of the highest bar."""

    label: str
    number: int
    height: float


def picked(finding: Finding) -> list[int]:
    """Places of the samples that are worth a picture: from first to last at even distances."""
    number = len(finding.sample_ids)
    return np.unique(np.linspace(0, number - 1, min(PICTURES, number)).astype(int)).tolist() if number else []


def render(page: InspectPage) -> str:
    """The page as one HTML file that loads nothing from outside."""
    train = page.splits[0]
    return open_template("inspect.html.j2").render(
        page=page,
        train=train,
        shown=[_show(page, i) for i in range(len(page.findings))],
        counts={s: sum(finding.severity == s for finding in page.findings) for s in SEVERITIES},
        bins=_bins(train.area_histogram),
        matrix=_cooccurrence(train) if len(page.classes) <= MATRIX_CLASSES else None,
        top_share=max([found.share for split in page.splits for found in split.classes] + [1e-9]),
        fragment=yaml.safe_dump(to_fragment(page.advice.choices), sort_keys=False, allow_unicode=True),
    )


def _show(page: InspectPage, place: int) -> Shown:
    finding = page.findings[place]
    details = dict(zip(finding.sample_ids, finding.details, strict=True))
    pictures = [(i, details[i], page.pictures[place, i]) for i in finding.sample_ids if (place, i) in page.pictures]
    listed = list(details.items())[:LISTED]
    return Shown(finding, KINDS[finding.kind].title, pictures, listed, len(details) - len(listed))


def _bins(histogram: Sequence[int]) -> list[Bin]:
    """One bar for each doubling of the side: two of the area's."""
    pairs = [sum(histogram[i : i + 2]) for i in range(0, len(histogram), 2)]
    top = max(pairs, default=1)
    return [Bin(f"{2**i} to {2 ** (i + 1)}", number, number / top) for i, number in enumerate(pairs)]


def _cooccurrence(split: SplitFacts) -> list[list[float]]:
    """Of the images that hold the row's class, the share that hold the column's too."""
    table = np.array(split.cooccurrence, np.float64)
    shares: list[list[float]] = (table / np.maximum(table.diagonal()[:, None], 1)).tolist()
    return shares
