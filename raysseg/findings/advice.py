"""What a data set holds -> what to do about it: keys of a train job, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from raysseg.catalogue import MODELS
from raysseg.config import AnySource
from raysseg.findings.fingerprint import COCO_SIDES, Advice, Choice, ClassFacts, Fingerprint, SplitFacts, Tree, Value
from raysseg.findings.kinds import Finding
from raysseg.schema import Task

_CROP = 512  # pixels: what most published recipes crop to
_STEP = 32  # models' strides divide it
_LARGE = 2048  # pixels of the longer side, beyond which halving pays
_UNEVEN = 10.0  # ratio of the largest to the smallest class, from which weights help more than they harm
_RARE = 0.1  # of the images: fewer hold the class
_MOST_REPEATS = 4  # of an image in an epoch: more would learn single images by heart
_BLOCKING = frozenset({"missing_pair", "unreadable", "size_mismatch", "exif_rotation", "invalid_segmentation"})


@dataclass(frozen=True)
class Start:
    """What a train job is written for.

    Attributes:
        task: of the model.
        model: its name in the catalogue.
        weights: what it starts from; None: from scratch.
        reason: for both.
        written_by: the verb.
        choices: keys beside those that the data ask for.
        remarks: what no key says.
    """

    task: Task
    model: str
    weights: str | None
    reason: str
    written_by: str
    choices: Sequence[Choice] = ()
    remarks: Sequence[str] = ()

    @property
    def family(self) -> str:
        """What the job is named after."""
        return self.model.partition("-")[0]

    def takes(self, key: str) -> bool:
        """Whether the job has a place for a key: advice on losses and on mIoU is for label maps."""
        section = key.partition(".")[0]
        if section == "loss":
            return not MODELS[self.model].has_own_loss
        return section != "checkpoint" or self.task == "semantic"


START = Start(
    "semantic",
    "segformer-b0",
    "nvidia/mit-b0",
    "Small and quick to start with; segformer-b2 and larger are better and slower. `raysseg recommend` knows others.",
    "inspect",
)
"""Where nobody has chosen."""


def advise(train: SplitFacts, findings: Sequence[Finding]) -> Advice:
    """Advice for training on a split."""
    choices = [
        *_choose_size(train),
        *_choose_crops(train),
        *_choose_repeats(train),
        *_choose_loss(train),
        *_choose_metric(train),
        *_choose_on_error(findings),
    ]
    return Advice(choices, list(_remarks(train, findings)))


def to_fragment(choices: Sequence[Choice]) -> dict[str, Tree | Value]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Tree | Value] = {}
    for choice in choices:
        _put(tree, choice.key, choice.value)
    return tree


def to_train_job(found: Fingerprint, start: Start, *, storage: str, scaling: Mapping[str, Value] | None = None) -> str:
    """A complete train job as YAML, with the reasons as comments.

    Args:
        found: the data that are to be trained on, and the advice for them.
        start: with what.
        storage: where runs go.
        scaling: keys of the job's section; None: the defaults.
    """
    sources = [_to_train_source(source, start.task) for source in found.data.values()]
    tree: dict[str, Tree | Value] = {"kind": "train", "name": f"{found.name}-{start.family}", "task": start.task}
    choices = [choice for choice in found.advice.choices if start.takes(choice.key)]
    comments = {choice.key: choice.reason for choice in (*choices, *start.choices)}
    comments |= {
        "kind": f"Written by `raysseg {start.written_by}`; run it with `raysseg train`, change what you know better."
    }
    if found.listed is not None:
        tree["classes"] = found.listed
    _put(tree, "data.train", sources[0])
    _put(tree, "data.val", sources[-1])
    if len(sources) == 1:
        comments["data.val"] = "Replace it: these are the training samples, by which no model can be judged."
    _put(tree, "model.name", start.model)
    _put(tree, "model.weights", start.weights)
    comments["model"] = start.reason
    for choice in (*choices, *start.choices):
        _put(tree, choice.key, choice.value)
    if scaling:
        tree["scaling"] = scaling
    tree["storage"] = storage
    remarks = [remark for remark in found.advice.remarks if "loss." not in remark or start.takes("loss")]
    return to_yaml(tree, comments, [*remarks, *start.remarks])


def to_yaml(tree: Tree, comments: Mapping[str, str], remarks: Sequence[str] = ()) -> str:
    """A job file.

    Args:
        tree: its keys.
        comments: that stand above keys, by dotted path; several lines where they have several.
        remarks: comments at the head.
    """
    return "\n".join([*(f"# {remark}" for remark in remarks), *_lines(tree, comments)]) + "\n"


# --- choices ------------------------------------------------------------------------------------------------------


def _choose_size(train: SplitFacts) -> Iterator[Choice]:
    height, width = train.height[1], train.width[1]
    thin = [found.name for found in train.classes if found.is_thin]
    if thin:
        yield Choice("data.size", None, f"Images stay as they are; scaled down, these would vanish: {_listed(thin)}.")
    elif max(height, width) > _LARGE and not any(found.is_tiny for found in train.classes):
        text = f"Images of {width}x{height} hold no thin or tiny class: half of the resolution is four times as fast."
        yield Choice("data.size", [height // 2, width // 2], text)
    else:
        yield Choice("data.size", None, f"Images stay as they are: {width}x{height} (width x height) in the median.")


def _choose_crops(train: SplitFacts) -> Iterator[Choice]:
    sides = (train.height[1], train.width[1])
    crop = [max(_STEP, min(_CROP, side // _STEP * _STEP)) for side in sides]
    if crop == [_CROP, _CROP]:
        text = f"{_CROP} pixels see enough around most things and fit {max(sides)} pixels of side several times over."
    else:
        text = f"The most of {sides[1]}x{sides[0]} images that {_STEP} divides, up to {_CROP}: little is padded."
    yield Choice("data.crop", crop, text)
    thin = [found.name for found in train.classes if found.is_thin]
    if thin:
        text = f"Never scaled down by much, for strokes of fewer than 4 pixels: {_listed(thin)}."
        yield Choice("data.augment.scale", [0.75, 2.0], text)
    tiny = [found.name for found in train.classes if found.is_tiny]
    if tiny:
        text = f"Half of the crops lie around a class drawn evenly: these fill less than 0.5 % each: {_listed(tiny)}."
        yield Choice("data.augment.class_crop", 0.5, text)
    elif 0.8 < train.dominant_share < 1:
        text = f"{_dominance(train)}; most crops would miss what matters."
        yield Choice("data.augment.min_object_share", 0.3, text)


def _choose_repeats(train: SplitFacts) -> Iterator[Choice]:
    """Repeat factors, sqrt(threshold / share), that stay within bounds."""
    shares = {found.name: found.images / train.num_samples for found in train.classes if found.images}
    rare = [name for name, share in shares.items() if share < _RARE]
    if rare:
        threshold = float(f"{min(_RARE, _MOST_REPEATS**2 * min(shares.values())):.2g}")
        times = (threshold / min(shares.values())) ** 0.5
        shown = _listed([f"{name} ({shares[name]:.1%})" for name in sorted(rare, key=shares.__getitem__)])
        text = f"In fewer than {_RARE:.0%} of the images: {shown}; the rarest come {times:.2g} times an epoch."
        yield Choice("data.oversample", threshold, text)


def _choose_loss(train: SplitFacts) -> Iterator[Choice]:
    present = [found for found in train.classes if found.pixels]
    if len(present) < 2:
        return
    rarest, largest = min(present, key=lambda c: c.share), max(present, key=lambda c: c.share)
    ratio = _unevenness(present)
    shown = f"{largest.name} has {ratio:,.0f} times the pixels of {rarest.name}"
    if ratio >= _UNEVEN:
        weights = [found.weights["median_frequency"] for found in present]
        text = f"{shown}; weights will run from {min(weights):.2g} to {max(weights):.2g}."
        yield Choice("loss.class_weights", "median_frequency", text)
    else:
        yield Choice("loss.class_weights", None, f"{shown}: even enough without weights.")
    if train.dominant_share > 0.9 or any(found.is_tiny for found in present):
        why = _dominance(train) if train.dominant_share > 0.9 else "some classes are tiny"
        yield Choice("loss.dice", 1.0, f"Dice counts each class alike, whatever its size: {why}.")
    elif train.dominant_share > 0.5:
        yield Choice("loss.dice", 0.5, f"Dice helps the smaller classes: {_dominance(train)}.")
    if train.dominant_share > 0.98:
        yield Choice("loss.focal", 0.5, f"Easy pixels should weigh less: {_dominance(train)}.")


def _choose_metric(train: SplitFacts) -> Iterator[Choice]:
    present = [found for found in train.classes if found.pixels]
    if len(present) == 2 and train.dominant_share > 0.7:
        foreground = next(found.name for found in present if found.name != train.dominant)
        text = f"The mean would be flattered by {train.dominant}: {foreground} is what matters."
        yield Choice("checkpoint.metric", f"val/iou/{foreground}", text)
    else:
        text = "Each class counts alike; pixel accuracy would reward the large ones alone."
        yield Choice("checkpoint.metric", "val/miou", text)


def _choose_on_error(findings: Sequence[Finding]) -> Iterator[Choice]:
    broken = {f"{f.split}/{i}" for f in findings if f.kind in _BLOCKING for i in f.sample_ids}
    if broken:
        text = f"{len(broken)} samples can't be used as they are; skipped.json will list them. Better: mend them."
        yield Choice("data.on_error", "skip", text)


def _remarks(train: SplitFacts, findings: Sequence[Finding]) -> Iterator[str]:
    yield train.verdict + "."
    absent = [found.name for found in train.classes if not found.pixels]
    if absent:
        yield f"No pixel of {_listed(absent)}: nothing can be learnt of them here."
    small = sum(found.small for found in train.classes)
    total = sum(found.instances for found in train.classes)
    if total and small > 0.5 * total:
        side = COCO_SIDES[0]
        yield f"{small / total:.0%} of the instances are smaller than {side}x{side} pixels: keep the resolution."
    yield from _more_terms(train)
    errors = [f.kind for f in findings if f.severity == "error"]
    if errors:
        yield f"Mend the errors first: {_listed(sorted(set(errors)))}."


def _more_terms(train: SplitFacts) -> Iterator[str]:
    """Terms that no key asks for, as they are not sure to be better; figures are of docs/results.md, Balance."""
    present = [found for found in train.classes if found.pixels]
    if len(present) < 2:
        return
    if any(found.is_thin for found in present):
        yield (
            "For thin classes also try loss.boundary: 10 beside cross-entropy: on cracks it reached an IoU of 0.299, "
            "cross-entropy alone 0.000, Dice beside it 0.315."
        )
    if train.dominant_share > 0.9 or any(found.is_tiny for found in present):
        yield (
            "Where a miss is worse than a false alarm, also try loss.tversky in place of loss.dice: on cracks 0.333, "
            "Dice 0.315, which is within what seeds differ by."
        )
    if len(present) > 2 and _unevenness(present) >= _UNEVEN:
        yield (
            "Where mIoU is what counts, loss.lovasz beside cross-entropy goes for IoU itself; it takes 13 times as "
            "long, and what it gains on these data is not known."
        )


def _unevenness(present: Sequence[ClassFacts]) -> float:
    """The largest class's share over the smallest's."""
    shares = [found.share for found in present]
    return max(shares) / max(min(shares), 1e-12)


def _dominance(train: SplitFacts) -> str:
    return f"{train.dominant} fills {train.dominant_share:.0%} of the labelled pixels"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- YAML ---------------------------------------------------------------------------------------------------------


def to_tree(source: AnySource) -> dict[str, Value]:
    """A source as a job names it, without what is as it is anyway."""
    return {"format": source.format, **source.model_dump(mode="json", exclude_defaults=True, exclude={"on_error"})}


def _to_train_source(source: Mapping[str, Value], task: Task) -> Tree:
    """With a class for what no instance covers, where that is to be learnt."""
    is_open = task == "semantic" and source["format"] in ("coco", "yolo") and "background" not in source
    return {**source, **({"background": "background"} if is_open else {})}


def _put(tree: dict[str, Tree | Value], key: str, value: Tree | Value) -> None:
    first, _, rest = key.partition(".")
    if not rest:
        tree[first] = value
        return
    branch = tree.setdefault(first, {})
    assert isinstance(branch, dict), f"{key} lies below a value"
    _put(branch, rest, value)


def _lines(tree: Tree, comments: Mapping[str, str], path: str = "", indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        key = f"{path}{name}"
        yield from (f"{indent}# {line}" for line in comments.get(key, "").splitlines())
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _lines(value, comments, f"{key}.", f"{indent}  ")
        else:
            shown = yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()
            yield f"{indent}{name}: {shown[1:-1]}"  # in a list, so that YAML adds no end of document
