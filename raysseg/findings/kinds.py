"""The kinds of finding: how grave each is, what it means, and the mend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Severity = Literal["error", "warning", "note"]
_MOST_DETAILS = 4  # of a sample, that are spelt out
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """A kind of finding; `message` follows on the number of samples."""

    severity: Severity
    title: str
    message: str
    mend: str


@dataclass(frozen=True, order=True)
class Flag:
    """A sample that a rule points at; `number` is the segment that is meant, from 1 on, 0 for none."""

    kind: str
    split: str
    sample_id: str
    detail: str
    number: int = 0


@dataclass(frozen=True)
class Finding:
    """What is wrong, with its samples.

    Attributes:
        kind: one of KINDS.
        severity: error: training stops or learns what is false; warning: probably wrong; note: worth a look.
        split: in which it is.
        sample_ids: in the order of their names.
        details: what exactly, one for each sample.
        segments: the numbers of the segments that are meant, from 1 on, for each sample; none for whole samples.
        message: a sentence.
        mend: what to do.
    """

    kind: str
    severity: Severity
    split: str
    sample_ids: tuple[str, ...]
    details: tuple[str, ...]
    segments: tuple[tuple[int, ...], ...]
    message: str
    mend: str


KINDS: Mapping[str, Kind] = {
    "missing_pair": Kind(
        "error",
        "No partner",
        "have an image without a mask, or the reverse",
        "add the missing file, rename it to the same stem, or leave the pair out with on_error: skip",
    ),
    "unreadable": Kind(
        "error",
        "Unreadable files",
        "have an image or a mask that can't be decoded",
        "copy or export the file anew; on_error: skip leaves it out",
    ),
    "size_mismatch": Kind(
        "error",
        "Sizes differ",
        "have an image and labels of different sizes",
        "pair the right files, or scale the mask to its image without interpolation",
    ),
    "exif_rotation": Kind(
        "error",
        "EXIF rotation",
        "have an image that its EXIF tag turns",
        "turn the pixels and remove the tag (exiftran -ai), then see that the mask lies on the image",
    ),
    "id_out_of_range": Kind(
        "error",
        "Unknown ids",
        "hold ids that the class list lacks",
        "add the ids to the class list, `dropped` among them, or correct the masks",
    ),
    "binary_0_255": Kind(
        "error",
        "Binary masks of 0 and 255",
        "have a mask of 0 and 255, which are not its classes",
        "store the masks as 0 and 1, or give the foreground the id 255 and the list another ignore_index",
    ),
    "wrong_ignore_index": Kind(
        "error",
        "Probably another ignore index",
        "mark pixels with an id that is customary for 'not labelled', and is not the class list's ignore_index",
        "set ignore_index to that id, or list the id as `dropped`",
    ),
    "all_ignored": Kind(
        "warning",
        "Nothing labelled",
        "have no labelled pixel: all are ignored, dropped or crowds",
        "leave them out, or label them: they teach nothing, and cost as much as others",
    ),
    "empty_annotation": Kind(
        "warning",
        "Empty annotations",
        "have an annotation without content: no segment, a segment of no pixel, or a single class all over",
        "see whether there is truly nothing in the image; remove empty segments",
    ),
    "box_mismatch": Kind(
        "warning",
        "Boxes off their masks",
        "have a bounding box that does not fit its mask",
        "compute the boxes from the masks, or see which of the two is meant",
    ),
    "invalid_segmentation": Kind(
        "error",
        "Invalid polygons or RLE",
        "have a polygon or an RLE that can't be read",
        "draw or encode the segment anew, or remove it",
    ),
    "duplicate_image": Kind(
        "warning",
        "The same image more than once",
        "show the same pixels as another sample of the split",
        "keep one of them; if their masks differ, see which one is right",
    ),
    "near_duplicate": Kind(
        "note",  # frames of a video are like that
        "Nearly the same image more than once",
        "show nearly the image of another sample of the split",
        "keep one of them, or see that none of its likes goes into val",
    ),
    "leak": Kind(
        "error",
        "The same image in train and val",
        "show an image that train holds too, as it is or slightly changed",
        "remove them from one split, or split by scene, patient or video: the score would be too good",
    ),
    "missing_class": Kind(
        "warning",
        "Classes that train lacks",
        "hold a class of which train has no pixel",
        "split anew so that each class occurs in both, or drop the class",
    ),
    "shifted_mask": Kind(
        "warning",
        "Shifted masks",
        "have boundaries that would fit the image's edges clearly better if moved",
        "move the mask back; see whether cropping or resizing treated image and mask alike",
    ),
    "holes_or_jagged": Kind(
        "warning",
        "Holes or jagged outlines",
        "have a region far rougher, or with more small holes, than its class is elsewhere",
        "smooth or redraw it; store masks without lossy compression and resize without interpolation",
    ),
    "merged_instances": Kind(
        "note",  # shape tells some of those of compact classes, such as nuclei, and none of the others
        "Several things in one instance",
        "have an instance that looks like two that touch",
        "look at it, and cut it in two if it is two",
    ),
    "scattered_instance": Kind(
        "warning",
        "Scattered instances",
        "have an instance in pieces far apart",
        "give each thing its own instance, or mark the group as iscrowd",
    ),
}


def to_findings(flags: Iterable[Flag], num_samples: Mapping[str, int]) -> list[Finding]:
    """One finding a kind and split, the gravest first; samples by name."""
    findings = []
    for (kind, split), group in groupby(sorted(set(flags)), key=lambda flag: (flag.kind, flag.split)):
        by_sample = {key: list(own) for key, own in groupby(group, key=lambda flag: flag.sample_id)}
        about = KINDS[kind]
        findings.append(
            Finding(
                kind,
                about.severity,
                split,
                tuple(by_sample),
                tuple(_in_one(own) for own in by_sample.values()),
                tuple(tuple(sorted({flag.number for flag in own} - {0})) for own in by_sample.values()),
                f"{len(by_sample)} of {num_samples[split]} samples of {split} {about.message}",
                about.mend,
            )
        )
    order = list(KINDS)
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), order.index(f.kind), f.split))


def _in_one(flags: list[Flag]) -> str:
    return "; ".join(flag.detail for flag in flags[:_MOST_DETAILS]) + ("; ..." if len(flags) > _MOST_DETAILS else "")
