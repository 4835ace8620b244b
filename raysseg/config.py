"""Every knob of every job: YAML and dotted overrides into frozen pydantic models. No torch, no ray."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from raysseg import storage
from raysseg.catalogue import HEADLINES, METRICS, MODELS, PROMPT_MODELS
from raysseg.hosting import Http, Replicas
from raysseg.schema import InputError, Task
from raysseg.section import Duration, Interval, Section, not_ordered, seconds_of
from raysseg.space import LATENCY, Dimension, Objective, Search, usual_mode


class JobError(InputError):
    """A job file that can't be run: names the dotted key, the value received, what is allowed and the mend."""


Uri = Annotated[str, AfterValidator(storage.absolute)]
"""A local path (relative to where the command runs) or an s3:// or gs:// URI."""

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
"""(height, width) in pixels."""

CropSide = Annotated[int, Field(ge=32)]

MIN_SIDE = 64
"""Pixels; what is smaller is enlarged before a model sees it: SegFormer's attention reduces sides 32 times."""

TileSide = Annotated[int, Field(ge=MIN_SIDE)]

Share = Annotated[float, Field(ge=0, le=1)]

ClassWeightScheme = Literal["inverse", "median_frequency", "effective_number"]

Precision = Literal["auto", "fp32", "bf16", "fp16"]

Blend = Literal["gaussian", "uniform"]

if TYPE_CHECKING:
    ModelName = str
    PromptName = str
    MetricName = str
else:
    ModelName = Literal[tuple(MODELS)]
    PromptName = Literal[tuple(PROMPT_MODELS)]
    MetricName = Literal[tuple(dict.fromkeys(name for names in METRICS.values() for name in names))]


# --- data ---------------------------------------------------------------------------------------------------------


class Source(Section):
    """What every source of samples has."""

    on_error: Literal["stop", "skip"] | None = None
    """A sample that can't be read or used: stop the job, or skip it and list it. Default: stop."""
    background: str | None = None
    """Name of the class of pixels that no instance covers, where instances train or score `task: semantic`; default:
    such pixels are ignored."""

    @property
    def is_skipping(self) -> bool:
        """Whether bad samples are skipped."""
        return self.on_error == "skip"


class MasksSource(Source):
    """Folders of images and of masks, paired by their path below the folder less the suffix."""

    format: Literal["masks"] = "masks"
    images: Uri | None = None
    """Folder of JPEG, PNG, TIFF or WebP images."""
    masks: Uri | None = None
    """Folder of PNG (palette, grey 8 or 16 bit, RGB colours of the class list), .npy or .npz masks of class ids."""
    preset: Literal["cityscapes", "ade20k"] | None = None
    """A data set's own layout and class list. cityscapes: leftImg8bit and gtFine with the 19 classes that are scored;
    ade20k: the 150 of SceneParsing, where 0 is not labelled."""
    images_end: str = ""
    """Text in which the stems of images end, and which pairing leaves out, such as `_leftImg8bit`; others are left
    alone."""
    masks_end: str = ""
    """The same of masks, such as `_gtFine_labelIds`."""
    reduce_zero_label: bool = False
    """Where `classes` is a list of names: the masks' ids count from 1, and 0 means not labelled."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("preset") == "cityscapes":
            return {"images_end": "_leftImg8bit", "masks_end": "_gtFine_labelIds", **value}
        return value

    @model_validator(mode="after")
    def _has_a_folder(self) -> Self:
        if self.images is None and self.masks is None:
            raise PydanticCustomError("no_folder", "names neither `images` nor `masks`; give at least one of them")
        return self


class CocoSource(Source):
    """COCO instances: polygons and RLE, compressed or not, in one JSON file."""

    format: Literal["coco"]
    annotations: Uri
    """JSON file with `images`, `annotations` and `categories`."""
    images: Uri | None = None
    """Folder below which the files lie that `file_name` names."""


class CocoPanopticSource(Source):
    """COCO panoptic: a JSON file, and a folder of PNG files whose colours are segment ids."""

    format: Literal["coco_panoptic"]
    annotations: Uri
    """JSON file with `images`, `annotations` (`segments_info`) and `categories`."""
    masks: Uri
    """Folder of the PNG files that the annotations name."""
    images: Uri | None = None
    """Folder below which the files lie that `file_name` names."""


class YoloSource(Source):
    """YOLO polygons: a text file an image, a line an instance: class, then x and y from 0 to 1 in turn."""

    format: Literal["yolo"]
    images: Uri
    """Folder of images."""
    labels: Uri
    """Folder of .txt files, paired with the images by their path less the suffix; no file: no instance."""
    names: Uri | None = None
    """The YAML file of the data set, whose `names` are the categories; default: they are known by number."""


class HuggingFaceSource(Source):
    """A folder that `datasets` wrote (`save_to_disk`) or that holds its Parquet files, with label images."""

    format: Literal["huggingface"]
    uri: Uri
    """Folder of one split."""
    image: str = "image"
    """Column of images."""
    mask: str | None = "label"
    """Column of label images; null: there is none."""


class ShardsSource(Source):
    """Parquet shards that `raysseg shard` wrote."""

    format: Literal["shards"]
    uri: Uri
    """Folder of the shards."""


AnySource = Annotated[
    MasksSource | CocoSource | CocoPanopticSource | YoloSource | HuggingFaceSource | ShardsSource,
    Field(discriminator="format"),
]


Decode = Literal["cluster", "trainer"]


class Augment(Section):
    """How training images are varied; image and mask move together, seeded by (seed, epoch, position)."""

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Random resize factor, uniform."""
    max_class_share: Share = 0.75
    """A crop in which one class fills more than this share of the labelled pixels is drawn again."""
    min_object_share: Share = 0.0
    """A crop is drawn again until it keeps this share of the area of a class other than the image's largest; 0: off."""
    tries: Annotated[int, Field(ge=1)] = 10
    """How often a crop is drawn at most."""
    class_crop: Share = 0.0
    """Probability that a crop is placed around a pixel of a class that is drawn evenly from the image's classes, so
    that rare ones get more than their share; such a crop is not drawn again."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: Share = 0.0
    """Probability of a vertical flip."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees; uniform in [-rotation, rotation]."""
    brightness: Share = 0.2
    """Factor uniform in [1 - x, 1 + x]; likewise contrast and saturation."""
    contrast: Share = 0.2
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Shift uniform in [-x, x] of the colour circle."""

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise not_ordered("scale", *self.scale)
        return self


class TrainData(Section):
    """The splits, and what happens to an image before the model sees it."""

    train: AnySource
    val: AnySource
    size: Size | None = None
    """(height, width) that every image is resized to first, in training and prediction alike. Default: as it is."""
    crop: tuple[CropSide, CropSide] = (512, 512)
    """(height, width) of training crops, 32 at least; smaller images are padded."""
    augment: Augment | None = Augment()
    """null: no augmenting; the crop is then the top left corner."""
    oversample: Annotated[float, Field(gt=0, le=1)] | None = None
    """Images with a class that a share f < oversample of the training images holds come sqrt(oversample / f) times an
    epoch on average (repeat factors; Gupta et al. 2019). null: every image comes once."""
    open_shards: Annotated[int, Field(ge=1)] = 16
    """Row groups of shuffled shards that are open at once, and from which an epoch's order is dealt in turn."""
    decode: Decode = "cluster"
    """Where training images are decoded and augmented: by tasks all over the cluster, or by threads of the workers that
    train, which then receive files as they are stored: cheaper, where their CPUs have time for it."""
    on_error: Literal["stop", "skip"] = "stop"
    """Samples that can't be read or used: stop, or skip them and list them beside the run."""

    @model_validator(mode="before")
    @classmethod
    def _hand_down_on_error(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("on_error") not in ("stop", "skip"):
            return value
        return {
            key: {"on_error": value["on_error"], **part}
            if key in ("train", "val") and isinstance(part, Mapping)
            else part
            for key, part in value.items()
        }


# --- model, loss, optimiser ---------------------------------------------------------------------------------------


class Model(Section):
    """Which model, and the weights that it starts from."""

    name: ModelName
    weights: str | None
    """A hub id, a local folder, an s3:// URI, or null: from scratch. Where the model is of torchvision or
    segmentation_models.pytorch, their own: `imagenet` for the encoder, `torchvision` for all of Mask R-CNN."""
    encoder: str | None = None
    """Of U-Net and DeepLabV3+: the name of an encoder in segmentation_models.pytorch or timm."""
    checkpoint_activations: bool = False
    """Keep less of forward passes, and compute it once more in backward passes: the same numbers, less memory, about a
    third more time."""


@dataclass(frozen=True)
class LossTerm:
    """Marks a key of Loss as the weight of a term.

    Attributes:
        takes_class_weights: whether class weights change the term.
    """

    takes_class_weights: bool


WeightedTerm = Annotated[float, Field(ge=0), LossTerm(takes_class_weights=True)]
UnweightedTerm = Annotated[float, Field(ge=0), LossTerm(takes_class_weights=False)]


class Loss(Section):
    """Weights of the loss terms, 0 turns one off; and what the terms go by."""

    cross_entropy: WeightedTerm = 1.0
    focal: WeightedTerm = 0.0
    """Cross-entropy that easy pixels have little part in (Lin et al. 2017)."""
    ohem: WeightedTerm = 0.0
    """Cross-entropy of each image's hard pixels alone (Shrivastava et al. 2016)."""
    boundary: WeightedTerm = 0.0
    """Cross-entropy near boundaries between classes, beside another term; 10 beside a cross-entropy of 1 is U-Net's
    (Ronneberger et al. 2015)."""
    dice: UnweightedTerm = 0.0
    """1 - soft Dice by image and class (Milletari et al. 2016)."""
    tversky: UnweightedTerm = 0.0
    """Dice that weighs false positives and false negatives apart (Salehi et al. 2017)."""
    lovasz: UnweightedTerm = 0.0
    """1 - IoU by image and class, made convex (Berman et al. 2018)."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much less easy pixels weigh; 0: as cross_entropy."""
    ohem_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Pixels are hard whose class is given less than this probability."""
    ohem_min_kept: Annotated[float, Field(gt=0, le=1)] = 0.0625
    """The share of an image's labelled pixels that are taken as hard at least."""
    boundary_sigma: Annotated[float, Field(gt=0, le=40)] = 5.0
    """Pixels: the weight is exp(-d^2 / 2 sigma^2) at a distance d from another class, and 0 beyond 3 sigma."""
    tversky_alpha: Annotated[float, Field(ge=0)] = 0.3
    """Weight of false positives; with both at 0.5 it is Dice."""
    tversky_beta: Annotated[float, Field(gt=0)] = 0.7
    """Weight of false negatives."""
    tversky_gamma: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of each class's loss: focal Tversky (Abraham and Khan 2019), whose 4/3 is 0.75 here."""
    class_weights: (
        Literal["inverse", "median_frequency", "effective_number"] | tuple[Annotated[float, Field(ge=0)], ...] | None
    ) = None
    """One weight a class in the class list's order, or a scheme that is computed from the training masks; of the terms
    that go by pixels."""
    effective_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999999
    """The beta of `effective_number` (Cui et al. 2019); counts are pixels, hence so near to 1."""

    @property
    def terms(self) -> dict[str, float]:
        """The terms in use and their weights."""
        return {name: weight for name in LOSS_TERMS if (weight := getattr(self, name)) > 0}

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not self.terms:
            raise PydanticCustomError(
                "no_loss", "every term is 0; give {names} a positive weight", {"names": _either(LOSS_TERMS)}
            )
        if list(self.terms) == ["boundary"]:
            message = "boundary alone leaves what is far from boundaries untaught; give {names} a positive weight too"
            others = [name for name in LOSS_TERMS if name != "boundary"]
            raise PydanticCustomError("boundary_alone", message, {"names": _either(others)})
        return self

    @model_validator(mode="after")
    def _uses_class_weights(self) -> Self:
        takers = [name for name, term in LOSS_TERMS.items() if term.takes_class_weights]
        if self.class_weights is not None and self.terms and not self.terms.keys() & set(takers):
            message = "no term in use takes them ({used}); leave them out, or give {takers} a positive weight"
            context = {"key": "class_weights", "used": ", ".join(self.terms), "takers": _either(takers)}
            raise PydanticCustomError("no_use", message, context)
        return self


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


LOSS_TERMS: dict[str, LossTerm] = {
    name: mark for name, info in Loss.model_fields.items() for mark in info.metadata if isinstance(mark, LossTerm)
}
"""The terms that a job can weigh; `raysseg.losses.LOSSES` computes them."""


class Optimizer(Section):
    """The optimiser; norms and biases carry no weight decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 6e-5
    head_lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """The learning rate of what is new to the data set, over `lr`."""
    backbone_lr_factor: Annotated[float, Field(ge=0)] = 1.0
    """The learning rate of the image encoder over `lr`, where the model tells it apart; 0: it stays as it is."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW only."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD only."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null: no clipping."""


class EarlyStopping(Section):
    """When a run ends before its last epoch."""

    patience: Annotated[int, Field(ge=1)]
    """Epochs without a better value."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much a value must be better to count."""
    metric: str | None = None
    """Default: checkpoint.metric."""
    mode: Literal["max", "min"] | None = None
    """Default: checkpoint.mode; min for train/loss."""


class Ema(Section):
    """An exponential moving average of the weights, kept beside them."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9998
    """What of the average stays in a step; less in the first steps: (1 + step) / (10 + step) at most."""
    is_used: bool = True
    """Validation scores, and the bundle holds, the average; false: it is only kept in the checkpoints."""


class Schedule(Section):
    """How long, and how the learning rate moves."""

    epochs: Annotated[int, Field(ge=1)] = 50
    warmup: Share = 0.05
    """Share of all steps over which the learning rate rises from 0."""
    decay: Literal["polynomial", "cosine", "none"] = "polynomial"
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of the polynomial."""
    early_stopping: EarlyStopping | None = None
    """End before the last epoch where a metric no longer gets better; null: never."""


class Batch(Section):
    """Accumulation follows from these two and the number of workers."""

    global_size: Annotated[int, Field(ge=1)] = 16
    """Images an optimiser step."""
    per_worker: Annotated[int, Field(ge=1)] = 4
    """Images a worker's forward pass, at most."""


AUTO = 0
"""Of a train job's `batch.per_worker`: `auto`, before it is decided."""


def _as_per_worker(value: Any) -> Any:
    if value == "auto":
        return AUTO
    if isinstance(value, int | float) and value < 1:
        raise PydanticCustomError("per_worker", "allowed: numbers from 1 on, or auto")
    return value


PerWorker = Annotated[
    int,
    BeforeValidator(_as_per_worker),
    PlainSerializer(lambda images: "auto" if images == AUTO else images),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]


class TrainBatch(Batch):
    """Accumulation follows from these two and the number of workers."""

    per_worker: PerWorker = 4
    """Images a worker's forward pass, at most. `auto`: as many as the GPU's memory should hold, in even parts of a
    worker's share of the global batch; 4 on CPUs. It is decided once a run, and no result depends on it."""


class Scaling(Section):
    """How many processes, and what each holds."""

    workers: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """0: in this process, without a cluster. [min, max]: elastic."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """Default: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.5
    """Reserved for a worker beside its data tasks, which take whole CPUs: some must stay free for them."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any worker's progress after which those that hold up the others are named and replaced."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures in a row, without a new checkpoint in between, that a run outlives; preemptions don't count."""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change in the run."""
        return self.min_workers < self.max_workers

    @property
    def collective_timeout_s(self) -> float:
        """For which workers wait for each other: those that are stuck are found before."""
        return max(1800.0, 2 * self.step_timeout_s)

    @property
    def max_workers(self) -> int:
        """At most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def min_workers(self) -> int:
        """At least."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def in_process(self) -> bool:
        """Whether the job runs in this process, without Ray."""
        return self.workers == 0

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise not_ordered("workers", *self.workers)
        return self


class Checkpoint(Section):
    """When training's state is saved, what is kept, and by which measure."""

    every: Interval = "10 minutes"
    """Such as `500 steps`, `10 minutes` or `1 epoch`; the end of each epoch is saved besides."""
    keep: Annotated[int, Field(ge=1)] = 2
    """The best so many checkpoints and bundles stay, and the newest checkpoint."""
    metric: str = ""
    """Default: val/miou, val/mask_ap or val/pq, as the task is."""
    mode: Literal["max", "min"] = "max"
    """Default: max; min for train/loss."""

    def every_steps(self, steps_per_epoch: int) -> int | None:
        """Optimiser steps between two checkpoints; None where they go by time."""
        amount, _, unit = self.every.partition(" ")
        return {"step": int(amount), "epoch": int(amount) * steps_per_epoch}.get(unit.removesuffix("s"))

    @property
    def every_s(self) -> float | None:
        """Seconds between two checkpoints; None where they go by steps."""
        return seconds_of(self.every)


class Validation(Section):
    """Where an epoch's bundle is scored while training goes on, or waits."""

    where: Literal["auto", "inline", "beside"] = "auto"
    """inline: by the workers, which stop training for it. beside: by a task of its own, on resources of its own. auto:
    beside, where the cluster has room for that task, else inline."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Of the task beside."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """Default: as a worker's."""


class Inference(Section):
    """How a model's outputs become masks."""

    score_threshold: Share = 0.0
    """Instances, and segments of panoptic segmentation, below this score are left out."""
    mask_threshold: Share = 0.5
    """A pixel belongs to an instance from this probability on."""
    overlap_threshold: Share = 0.8
    """Panoptic: a segment of which others cover more than the rest is left out (MaskFormer's)."""
    max_instances: Annotated[int, Field(ge=1)] = 100
    """Instance: of an image, by score."""
    tile: tuple[TileSide, TileSide] | None = None
    """Semantic: (height, width) in pixels of the window that slides over an image, 64 at least; null: whole images."""
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    """Share of a tile's side that the next one covers again, at least. nnU-Net takes 0.5, which looks at a pixel four
    times; 0.25 not quite twice."""
    blend: Blend = "gaussian"
    """What tiles count where they overlap: less towards their edges, by a Gaussian of an eighth of their sides (Isensee
    et al. 2021), or alike."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], Field(min_length=1)] = (1.0,)
    """Semantic: factors at which an image, or each of its tiles, is looked at; probabilities are averaged."""
    flip: bool = False
    """Semantic: each view is looked at in the mirror, too."""

    @property
    def is_plain(self) -> bool:
        """Whether an image goes through the model whole and once."""
        return self.tile is None and self.scales == (1.0,) and not self.flip

    def over(self, base: Inference) -> Inference:
        """The keys that were set here, and the others as they are there."""
        return base.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})

    def misfit(self, task: Task, size: Size | None) -> tuple[str, str] | None:
        """The first key that has no place where a model of this task sees images at this size, and why."""
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        for key in changed:
            if task not in _TASKS_OF[key]:
                why = " yet, since images go through whole and once" if "semantic" in _TASKS_OF[key] else ""
                return key, f"has no effect where the task is {task}{why}; leave it out"
            if key in ("overlap", "blend") and self.tile is None:
                return key, "has no effect without `inference.tile`; set that, or leave it out"
        if self.tile is not None and size is not None:
            why = f"tiles are cut from images as they are, but this model sees them at {list(size)} (`data.size`)"
            return "tile", f"{why}; leave it out, or train with data.size=null"
        return None


_TASKS_OF: dict[str, tuple[Task, ...]] = {
    "score_threshold": ("instance", "panoptic"),
    "mask_threshold": ("instance", "panoptic"),
    "overlap_threshold": ("panoptic",),
    "max_instances": ("instance",),
    **dict.fromkeys(("tile", "overlap", "blend", "scales", "flip"), ("semantic",)),
}
"""Which tasks read a key of Inference."""


class S3(Section):
    """Where the usual environment variables don't say it; no secrets here."""

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool | None = None


def _whole_uri(uri: str) -> str:
    """A tracking URI for any working directory."""
    if "://" not in uri and uri != "databricks":
        raise PydanticCustomError("uri", "allowed: a URI such as http://mlflow:5000 or sqlite:///mlflow.db")
    scheme, separator, path = uri.partition(":///")
    return f"sqlite:///{Path(path).absolute()}" if scheme == "sqlite" and separator else uri


class MlflowTracker(Section):
    """MLflow. Credentials come from its environment alone: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
    MLFLOW_TRACKING_TOKEN."""

    uri: Annotated[str, AfterValidator(_whole_uri)] | None = None
    """Of a tracking server or a data base, such as http://mlflow:5000 or sqlite:///mlflow.db; default: the
    environment's MLFLOW_TRACKING_URI."""
    experiment: str | None = None
    """Default: the job's name."""

    @model_validator(mode="after")
    def _is_public(self) -> Self:
        if self.uri is not None and urlsplit(self.uri).password is not None:
            message = "holds a password; leave this key out, and set the environment's MLFLOW_TRACKING_URI"
            raise PydanticCustomError("password", message, {"key": "uri"})  # of the section: it shows no value
        return self


class WandbTracker(Section):
    """Weights & Biases. Credentials come from its environment alone: WANDB_API_KEY, or what `wandb login` has left."""

    project: str | None = None
    """Default: the environment's WANDB_PROJECT, or W&B's own."""
    entity: str | None = None
    """User or team; default: the environment's WANDB_ENTITY, or the key's own."""
    mode: Literal["online", "offline"] | None = None
    """offline: into the run's folder, for `wandb sync`; default: the environment's WANDB_MODE, or online."""


class Trackers(Section):
    """Who else is told of a run, beside its metrics.jsonl; no secrets here, see each tracker."""

    tensorboard: bool = False
    """Event files in the run's folder tensorboard/."""
    mlflow: MlflowTracker | None = None
    wandb: WandbTracker | None = None


# --- jobs ---------------------------------------------------------------------------------------------------------


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class BaseJob(Section):
    """What every job has."""

    name: Annotated[str, Field(pattern=_NAME)]
    """Of the run: letters, digits, dot, dash, underscore."""
    s3: S3 = S3()


class DataJob(BaseJob):
    """What every job over data has."""

    task: Task
    scaling: Scaling = Scaling()


Classes = Uri | tuple[str, ...]
"""A JSON file `{classes: [{id, name, colour, isthing, from}], ignore_index, dropped}`, or a list of names: of the data
set's categories, or with ids 0, 1, 2, ... where it names none. `from`: ids or names that are read as the class."""


class TrainJob(DataJob):
    """One training run."""

    kind: Literal["train"]
    classes: Classes | None = None
    """Default: the categories of `data.train`, where it names them."""
    data: TrainData
    model: Model
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    batch: TrainBatch = TrainBatch()
    checkpoint: Checkpoint = Checkpoint()
    metrics: tuple[MetricName, ...] = ()
    """Beside the task's own, what takes longer: boundary_iou and surface (semantic), boundary_ap (instance),
    boundary_pq (panoptic)."""
    validation: Validation = Validation()
    inference: Inference = Inference()
    """In validation; the bundle takes it along."""
    ema: Ema | None = None
    """An average of the weights beside them; null: none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose gradient is not finite: stop the run, or leave the step out; its samples are named and saved."""
    trackers: Trackers = Trackers()
    precision: Precision = "auto"
    """auto: bf16 on GPUs that have it, else fp32."""
    compile: bool = False
    """torch.compile."""
    channels_last: bool = False
    """NHWC memory format; faster on many GPUs."""
    seed: Annotated[int, Field(ge=0)] = 0
    storage: Uri
    """The run is the folder <storage>/<name>."""

    @property
    def run_uri(self) -> str:
        """The run's folder."""
        return storage.join(self.storage, self.name)

    @model_validator(mode="before")
    @classmethod
    def _fill_model_defaults(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return _merged(_model_defaults(value.get("model"), value.get("task")), value)

    @model_validator(mode="before")
    @classmethod
    def _fill_headline(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("task") not in HEADLINES:
            return value
        value = _merged({"checkpoint": {"metric": f"val/{HEADLINES[value['task']]}"}}, value)
        checkpoint = value["checkpoint"]
        if isinstance(checkpoint, Mapping) and checkpoint.get("metric") == "train/loss":
            return _merged({"checkpoint": {"mode": "min"}}, value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        entry = MODELS[self.model.name]
        if self.task not in entry.tasks:
            message = "received {task}; allowed for `model.name` {name}: {allowed}"
            context = {"key": "task", "task": self.task, "name": self.model.name, "allowed": ", ".join(entry.tasks)}
            raise PydanticCustomError("task", message, context)
        if self.model.encoder is not None and not entry.takes_encoder:
            takers = ", ".join(name for name, other in MODELS.items() if other.takes_encoder)
            message = "{name} has its own; leave it out, or take one of {takers}"
            context = {"key": "model.encoder", "name": self.model.name, "takers": takers}
            raise PydanticCustomError("encoder", message, context)
        if self.model.checkpoint_activations and not entry.recomputes:
            able = ", ".join(name for name, other in MODELS.items() if other.recomputes)
            message = "{name} can't compute its layers twice; leave it out, or take one of {able}"
            context = {"key": "model.checkpoint_activations", "name": self.model.name, "able": able}
            raise PydanticCustomError("recomputes", message, context)
        if entry.has_own_loss:
            takes = {"class_weights", "effective_beta"} if entry.takes_class_weights else set()
            surplus = sorted(self.loss.model_fields_set - takes)
            if surplus:
                message = "{name} brings its own loss; allowed: {allowed}"
                allowed = ", ".join(sorted(takes)) or "nothing; leave `loss` out"
                context = {"key": f"loss.{surplus[0]}", "name": self.model.name, "allowed": allowed}
                raise PydanticCustomError("loss", message, context)
        _check_metrics(self.task, self.metrics)
        if self.validation.where == "beside" and self.scaling.in_process:
            message = "there are no tasks with `scaling.workers: 0`; set inline or auto"
            raise PydanticCustomError("beside", message, {"key": "validation.where"})
        if misfit := self.inference.misfit(self.task, self.data.size):
            raise PydanticCustomError("inference", "{why}", {"key": f"inference.{misfit[0]}", "why": misfit[1]})
        for split in ("train", "val"):
            source = getattr(self.data, split)
            if isinstance(source, MasksSource) and (source.images is None or source.masks is None):
                message = "needs both `images` and `masks` to train"
                raise PydanticCustomError("source", message, {"key": f"data.{split}"})
        return self


def _check_metrics(task: Task, metrics: Sequence[str]) -> None:
    surplus = [name for name in metrics if name not in METRICS[task]]
    if surplus:
        message = "{surplus} is none of this task's; allowed: {allowed}"
        context = {"key": "metrics", "surplus": surplus[0], "allowed": ", ".join(METRICS[task])}
        raise PydanticCustomError("metrics", message, context)


class EvaluateJob(DataJob):
    """Metrics of a bundle, or of stored predictions, over a data set."""

    kind: Literal["evaluate"]
    classes: Classes | None = None
    data: AnySource
    bundle: Uri | None = None
    predictions: AnySource | None = None
    metrics: tuple[MetricName, ...] = ()
    """Beside the task's own, what takes longer; see TrainJob."""
    inference: Inference = Inference()
    """Keys that are left out are as the bundle was validated."""
    batch: Batch = Batch()
    precision: Precision = "auto"
    storage: Uri | None = None
    """The report goes to <storage>/<name>/report.html; default: no report."""

    @model_validator(mode="after")
    def _has_one_side(self) -> Self:
        _check_metrics(self.task, self.metrics)
        if (self.bundle is None) == (self.predictions is None):
            raise PydanticCustomError("sides", "give either `bundle` or `predictions`")
        if self.predictions is not None and self.inference != Inference():
            message = "has no effect on stored predictions; leave it out"
            raise PydanticCustomError("inference", message, {"key": "inference"})
        if isinstance(self.data, MasksSource):
            if self.data.masks is None:
                raise PydanticCustomError("masks", "missing: there is no truth to score by", {"key": "data.masks"})
            if self.bundle is not None and self.data.images is None:
                raise PydanticCustomError("images", "missing: a bundle predicts from images", {"key": "data.images"})
        return self


class ShardOutput(Section):
    """Where the data set goes, and how it is cut."""

    format: Literal["shards", "masks", "coco", "coco_panoptic"] = "shards"
    """shards, or what other programs read: folders of images and masks, COCO instances, COCO panoptic."""
    uri: Uri
    """Folder; a run that was broken off is taken up again there."""
    rows_per_file: Annotated[int, Field(ge=1)] = 512
    """Samples that are written in one go."""
    rows_per_group: Annotated[int, Field(ge=1)] = 32
    """Samples that are read at once, at most; fewer where they come to more than 8 MiB."""


class ShardJob(DataJob):
    """Any source into canonical Parquet shards, or back."""

    kind: Literal["shard"]
    classes: Classes | None = None
    """Default: the categories of the data set."""
    data: AnySource
    output: ShardOutput


class PredictOutput(Section):
    """Where predictions go, and in which form."""

    format: Literal["coco", "masks", "coco_panoptic", "shards"]
    """coco (instance, semantic): a COCO data set with scores, and COCO results; masks (semantic, panoptic): PNG id
    maps; coco_panoptic (panoptic): JSON and PNG; shards: Parquet with the images."""
    uri: Uri
    """Folder of its own; a run that was broken off is taken up again there."""
    rows_per_file: Annotated[int, Field(ge=1)] = 128
    """Images that are finished in one go, rounded up to whole batches: what is lost at most where a run breaks off."""
    rows_per_group: Annotated[int, Field(ge=1)] = 32
    """Of shards: samples that are read at once later, at most."""


OUTPUTS: dict[Task, tuple[str, ...]] = {
    "semantic": ("masks", "coco", "shards"),
    "instance": ("coco", "shards"),
    "panoptic": ("coco_panoptic", "masks", "shards"),
}
"""The formats that can hold a task's predictions."""


class PredictJob(BaseJob):
    """A bundle's predictions over a data set, with or without labels."""

    kind: Literal["predict"]
    bundle: Uri
    data: AnySource
    """Its images alone are read, unless `metrics` asks for the labels."""
    output: PredictOutput
    metrics: bool | tuple[MetricName, ...] = False
    """true: score the predictions by the labels of `data`; a list: with these beside the task's own, see TrainJob."""
    inference: Inference = Inference()
    """Keys that are left out are as the bundle was validated."""
    batch: Batch = Batch()
    precision: Precision = "auto"
    scaling: Scaling = Scaling()

    @property
    def is_scored(self) -> bool:
        """Whether there are metrics."""
        return self.metrics is not False

    @property
    def more_metrics(self) -> tuple[str, ...]:
        """Those beside the task's own."""
        return () if isinstance(self.metrics, bool) else self.metrics

    @property
    def source(self) -> AnySource:
        """What is read: masks of which nothing is asked need not be there."""
        is_idle = isinstance(self.data, MasksSource) and not self.is_scored
        return self.data.model_copy(update={"masks": None}) if is_idle else self.data

    @model_validator(mode="after")
    def _has_images(self) -> Self:
        if getattr(self.data, "images", "") is None:
            raise PydanticCustomError("images", "missing: a bundle predicts from images", {"key": "data.images"})
        if self.is_scored and isinstance(self.data, MasksSource) and self.data.masks is None:
            message = "missing: `metrics` need a truth to score by"
            raise PydanticCustomError("masks", message, {"key": "data.masks"})
        return self


class Splits(Section):
    """The splits of a data set, as a train job has them."""

    train: AnySource
    val: AnySource | None = None


def _is_split(value: Any) -> str:
    return "splits" if isinstance(value, Splits) or (isinstance(value, Mapping) and "train" in value) else "source"


class InspectJob(DataJob):
    """The fingerprint of a data set: what it is, what is wrong with it, what to do about it."""

    kind: Literal["inspect"]
    task: Task = "semantic"
    classes: Classes | None = None
    """Default: the categories of the data set; where it names none, the ids that its masks hold."""
    data: Annotated[Annotated[AnySource, Tag("source")] | Annotated[Splits, Tag("splits")], Discriminator(_is_split)]
    """A source, or `train` and `val`."""
    val: AnySource | None = None
    """A second source, which should share no image with `data`."""
    storage: Uri = Field(default="runs", validate_default=True)
    """fingerprint.json and the page, report.html, go to <storage>/<name>."""

    @property
    def run_uri(self) -> str:
        """The folder of the fingerprint."""
        return storage.join(self.storage, self.name)

    @property
    def splits(self) -> dict[str, AnySource]:
        """The sources by split, the one for training first."""
        train, val = (self.data.train, self.data.val) if isinstance(self.data, Splits) else (self.data, self.val)
        return {"train": train, "val": val} if val is not None else {"data": train}

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if isinstance(self.data, Splits) and self.val is not None:
            message = "stands beside `data.train`; name the second source once, as `data.val`"
            raise PydanticCustomError("twice", message, {"key": "val"})
        return self


class ExportJob(BaseJob):
    """A bundle as an ONNX graph, for runtimes without torch."""

    kind: Literal["export"]
    bundle: Uri
    output: Uri
    """A file that ends in .onnx, or a folder, in which it is model.onnx."""
    opset: Annotated[int, Field(ge=18)] = 20
    """Version of ONNX's operators."""
    size: tuple[TileSide, TileSide] | None = None
    """(height, width) of the images that the graph takes; null: any, of 64 pixels a side at least."""

    @property
    def file_uri(self) -> str:
        """Where the graph goes."""
        return self.output if self.output.endswith(".onnx") else storage.join(self.output, "model.onnx")


# --- serving ------------------------------------------------------------------------------------------------------


class ServedBundle(Replicas):
    """A trained model that segments images."""

    bundle: Uri
    """A bundle; or a run's folder, of which the best bundle is taken."""
    follow: Duration | None = None
    """How often a run's folder is looked at for a better bundle, which then takes over; null: never."""
    batch_pixels: Annotated[int, Field(ge=1)] | None = None
    """Of the images, as the model sees them, that go through it together; a larger one goes alone. Default: 4 million
    on a GPU; on CPUs each image goes alone, as a batch takes as long as its images one by one."""
    max_pixels: Annotated[int, Field(ge=1024)] | None = None
    """Of an image that goes through the model whole, as it is; a larger one is refused. Default: 4 million on CPUs,
    where all others would wait for it for minutes; on a GPU, and where images are resized or cut into tiles,
    `http.max_pixels` alone counts."""
    inference: Inference = Inference()
    """Keys that are left out are as the bundle was validated."""
    precision: Precision = "auto"


class ServedPrompt(Section):
    """A model that segments what points, boxes or masks ask for; its two halves have replicas of their own."""

    prompt: PromptName
    weights: str | None = None
    """A hub id, a local folder or an s3:// URI; default: the authors' at the hub."""
    encoder: Replicas = Replicas()
    """Looks at each image once."""
    decoder: Replicas = Replicas()
    """Answers each prompt; without a GPU, if not told otherwise."""
    cache_mib: Annotated[int, Field(ge=16)] = 2048
    """For what the encoder has made of images; the least recently used goes first."""
    points_per_side: Annotated[int, Field(ge=1, le=128)] = 32
    """Of the grid of points by which everything in an image is looked for; the time goes with its square, and on CPUs
    is minutes for 32: see `http.timeout`."""
    precision: Precision = "auto"

    @model_validator(mode="before")
    @classmethod
    def _decode_on_cpus(cls, value: Any) -> Any:
        return _merged({"decoder": {"gpus_per_replica": 0}}, value) if isinstance(value, Mapping) else value


def _is_prompt(value: Any) -> str:
    is_prompt = isinstance(value, ServedPrompt) or (isinstance(value, Mapping) and "prompt" in value)
    return "prompted" if is_prompt else "trained"


AnyServed = Annotated[
    Annotated[ServedBundle, Tag("trained")] | Annotated[ServedPrompt, Tag("prompted")], Discriminator(_is_prompt)
]


class ServeJob(BaseJob):
    """Models behind an HTTP interface."""

    kind: Literal["serve"]
    models: Annotated[dict[Annotated[str, Field(pattern=_NAME)], AnyServed], Field(min_length=1)]
    """By the name that requests give."""
    http: Http = Http()
    local: bool = False
    """In this process, one copy of each model, without a cluster: to try things out."""


# --- search -------------------------------------------------------------------------------------------------------


def _check_train(raw: dict[str, Any]) -> dict[str, Any]:
    TrainJob.model_validate({"kind": "train", "name": "trial", "storage": "trials", **raw})
    return raw


class TuneJob(BaseJob):
    """A search over a train job's settings."""

    kind: Literal["tune"]
    train: Annotated[dict[str, Any], AfterValidator(_check_train), WithJsonSchema({"type": ["string", "object"]})]
    """A train job's file, whose path is taken from where this file lies; or its keys; or both: `{file: PATH, ...}`, and
    the keys win."""
    search: Search
    storage: Uri = Field(default="", validate_default=False)
    """The search is the folder <storage>/<name>; default: the train job's storage."""

    @property
    def run_uri(self) -> str:
        """The search's folder."""
        return storage.join(self.storage, self.name)

    def trial_uri(self, number: int) -> str:
        """The folder of a trial's run."""
        return storage.join(self.run_uri, "trials", f"{number:04d}")

    @cached_property
    def epochs(self) -> int:
        """Of a trial."""
        return self.search.epochs or self.train_job({}).schedule.epochs

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What is searched for; the first one names the winner."""
        if self.search.objectives is not None:
            return self.search.objectives
        own = self.train_job({}).checkpoint
        metric = self.search.metric or own.metric
        default = own.mode if metric == own.metric else usual_mode(metric)
        return (Objective(metric=metric, mode=self.search.mode or default),)

    @cached_property
    def epoch_objective(self) -> Objective:
        """By which a trial's best epoch is told: the first objective, or the train job's own in place of latency."""
        own = self.train_job({}).checkpoint
        first = self.objectives[0]
        return first if first.metric != LATENCY else Objective(metric=own.metric, mode=own.mode)

    def train_job(self, overrides: Mapping[str, Any]) -> TrainJob:
        """The train job, with values by dotted path.

        Raises:
            JobError: they don't fit.
        """
        return parse_as(TrainJob, self._train_keys(overrides), "train")

    def trial_job(self, number: int, overrides: Mapping[str, Any]) -> TrainJob:
        """The job of a trial, whose run is `trial_uri`.

        Raises:
            JobError: the values don't fit.
        """
        fixed: dict[str, Any] = {
            "name": f"{number:04d}",
            "storage": storage.join(self.run_uri, "trials"),
            "schedule.epochs": self.epochs,
            "checkpoint.metric": self.epoch_objective.metric,
            "checkpoint.mode": self.epoch_objective.mode,
            "validation.where": "inline",  # room beside one trial is another one's
        }
        mlflow = self.train_job({}).trackers.mlflow
        if mlflow is not None and mlflow.experiment is None:
            fixed |= {"trackers.mlflow.experiment": self.name}
        return parse_as(TrainJob, self._train_keys({**overrides, **fixed}), f"trial {number}")

    def winner_keys(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a job that trains a trial's settings for as long as the train job says."""
        return self._train_keys({"name": f"{self.name}-best", "storage": self.storage, **overrides})

    def _train_keys(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        s3 = self.s3.model_dump(exclude_none=True)
        raw = {"kind": "train", "name": self.name, "storage": self.storage, "s3": s3, **self.train}
        for path, value in overrides.items():
            raw = _laid_over(raw, path, value)
        return raw

    @model_validator(mode="before")
    @classmethod
    def _share_storage(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("train"), Mapping):
            return value
        return {**{key: value["train"][key] for key in ("storage", "s3") if key in value["train"]}, **value}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.storage:
            raise PydanticCustomError("missing", "missing; neither here nor in `train`", {"key": "storage"})
        for path, dimension in self.search.space.items():
            for value in dimension.extremes:
                try:
                    self.train_job({**_enabling(dimension), path: value})
                except JobError as error:
                    message = "holds a value that the train job refuses: {reason}"
                    context = {"key": f"search.space.{path}", "reason": str(error).removeprefix("train: ")}
                    raise PydanticCustomError("space", message, context) from error
        return self


def _enabling(dimension: Dimension) -> dict[str, Any]:
    """Values under which a dimension counts."""
    return {path: values[0] for path, values in dimension.conditions.items()}


def _laid_over(raw: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A mapping with the value at a dotted path replaced, all else as it is."""
    key, _, rest = path.partition(".")
    inner = raw.get(key)
    below = inner if isinstance(inner, Mapping) else {}
    return {**raw, key: _laid_over(below, rest, value) if rest else value}


Job = TrainJob | EvaluateJob | PredictJob | ShardJob | InspectJob | ExportJob | TuneJob | ServeJob
JOBS: dict[str, type[Job]] = {
    "train": TrainJob,
    "tune": TuneJob,
    "evaluate": EvaluateJob,
    "predict": PredictJob,
    "serve": ServeJob,
    "shard": ShardJob,
    "inspect": InspectJob,
    "export": ExportJob,
}


def _model_defaults(model: object, task: object) -> dict[str, Any]:
    """The settings of a model's authors, see raysseg.catalogue."""
    if not isinstance(model, Mapping) or (entry := MODELS.get(str(model.get("name")))) is None:
        return {}
    defaults = {section: dict(values) for section, values in entry.defaults.items()}
    if model.get("weights") is None:
        defaults = _merged(defaults, entry.from_scratch)
    return _merged(defaults, next((keys for name, keys in entry.by_task.items() if name == task), {}))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``base``, mapping by mapping."""
    out = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            out[key] = _merged(base[key], over[key])
    return out


# --- reading ------------------------------------------------------------------------------------------------------

AnyJob = TypeVar("AnyJob", bound=BaseJob)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice; YAML's own loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Reads a job file.

    Args:
        path: YAML file, local or s3://. ``${NAME}`` and ``${NAME:-default}`` stand for environment variables.
        overrides: ``dotted.key=value``, values in YAML; they win over the file.

    Raises:
        JobError: with every mistake found, each with its dotted key, the value, what is allowed and the mend.
    """
    raw = _read_yaml(str(path))
    if raw.get("kind") != "tune":
        return compose(raw, overrides, str(path))
    raw = _naming_file(_overridden(_naming_file(raw), overrides))
    return compose({**raw, **_train_keys(raw, str(path))}, [], str(path))


def files(path: str, overrides: Sequence[str] = ()) -> list[str]:
    """What a job is read from: its file, and the train job's that a tune job names; raises JobError, see load."""
    train_file = _train_file(_naming_file(_overridden(_naming_file(_read_yaml(path)), overrides)), path)
    return [path] if train_file is None else [path, train_file]


def variables(text: str) -> set[str]:
    """The environment variables that a job file's text names."""
    return {match.group(1) for match in _VARIABLE.finditer(text)}


def _naming_file(raw: dict[str, Any]) -> dict[str, Any]:
    """A tune job whose `train` is a mapping, where it is a path."""
    return {**raw, "train": {"file": raw["train"]}} if isinstance(raw.get("train"), str) else raw


def _train_keys(raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The `train` of a tune job, with the keys of the file that it names."""
    file = _train_file(raw, path)
    if file is None:
        return {}
    read = _read_yaml(file)
    if read.get("kind", "train") != "train":
        raise JobError(f"{path}: train: {file} is of the kind {json.dumps(read['kind'])}; a train job is needed")
    return {
        "train": _merged(_expanded(read, file), {key: value for key, value in raw["train"].items() if key != "file"})
    }


def _train_file(raw: Mapping[str, Any], path: str) -> str | None:
    """The train job's file that a tune job names."""
    given = raw.get("train")
    is_named = raw.get("kind") == "tune" and isinstance(given, Mapping) and isinstance(given.get("file"), str)
    return _beside(path, _expanded(raw["train"]["file"], path)) if is_named else None


def _read_yaml(path: str) -> dict[str, Any]:
    text = storage.read_text(path)
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise JobError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        held = "nothing" if raw is None else f"{type(raw).__name__} {text.strip()[:40]!r}"
        raise JobError(f"{path}: a job file is a mapping of keys to values (`kind: train`, ...); this one holds {held}")
    return raw


def _beside(path: str, other: str) -> str:
    """A path or URI that a file names, taken from where the file lies."""
    folder = path.rpartition("/")[0]
    return other if "://" in other or other.startswith("/") or not folder else f"{folder}/{other}"


def compose(raw: Mapping[str, Any], overrides: Sequence[str], where: str = "job") -> Job:
    """A job from a mapping, with overrides and environment variables as `load` has them; raises JobError likewise."""
    return parse(_expanded(_overridden(dict(raw), overrides), where), where)


def parse(raw: Mapping[str, Any], where: str = "job") -> Job:
    """Turns a mapping into a job; raises JobError, see load."""
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in JOBS:
        received = f"received {json.dumps(kind, default=str)}" if "kind" in raw else "missing"
        raise JobError(f"{where}: kind: {received}; allowed: {', '.join(JOBS)}")
    job = parse_as(JOBS[kind], raw, where)
    storage.use_s3(job.s3.endpoint, job.s3.region, job.s3.anonymous)
    return job


def parse_as(job_class: type[AnyJob], raw: Mapping[str, Any], where: str = "job") -> AnyJob:
    """Turns a mapping into a job of one class; raises JobError, see load."""
    try:
        return job_class.model_validate(raw)
    except ValidationError as error:
        lines = _explained(error.errors(include_url=False), raw)
        raise JobError("\n".join(f"{where}: {line}" for line in lines)) from error


def plain_inspect(images: str, masks: str, overrides: Sequence[str] = ()) -> Job:
    """The job of `raysseg inspect IMAGES MASKS`: a classes.json in the folders above the masks is their class list."""
    above = Path(storage.absolute(masks)).parent if not storage.is_remote(masks) else None
    folders = [above, above.parent] if above is not None else []
    listed = next((str(folder / "classes.json") for folder in folders if (folder / "classes.json").is_file()), None)
    name = _as_name(f"inspect-{'-'.join(folder.name for folder in folders[::-1])}")
    data = {"format": "masks", "images": images, "masks": masks}
    return compose({"kind": "inspect", "name": name, "classes": listed, "data": data}, overrides, "inspect")


def plain_folder(folder: str, overrides: Sequence[str] = ()) -> Job:
    """The job of `raysseg inspect FOLDER`: of images/ and masks/, or of train/ and val/ with both; and classes.json."""
    root = Path(storage.absolute(folder))
    splits = {
        name: {"format": "masks", **{kind: str(part / kind) for kind in ("images", "masks")}}
        for name, part in {"": root, "train": root / "train", "val": root / "val"}.items()
        if (part / "images").is_dir() and (part / "masks").is_dir()
    }
    data = splits.pop("", None) or splits
    if "format" not in data and "train" not in data:
        mend = "name IMAGES and MASKS, or write an inspect job, which knows other formats"
        raise JobError(f"{folder}: holds neither images/ and masks/ nor train/ with both; {mend}")
    listed = str(root / "classes.json") if (root / "classes.json").is_file() else None
    raw = {"kind": "inspect", "name": _as_name(f"inspect-{root.name}"), "classes": listed, "data": data}
    return compose(raw, overrides, "inspect")


def plain_export(bundle: str, output: str, overrides: Sequence[str] = ()) -> Job:
    """The job of `raysseg export BUNDLE OUT.onnx`."""
    raw = {"kind": "export", "name": _as_name(f"export-{bundle}"), "bundle": bundle, "output": output}
    return compose(raw, overrides, "export")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, so that editors complete and check it."""
    schemas = {kind: job.model_json_schema() for kind, job in JOBS.items()}
    definitions: dict[str, Any] = {}
    for schema in schemas.values():
        definitions |= schema.pop("$defs", {})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "raysseg job",
        "oneOf": list(schemas.values()),
        "$defs": definitions,
    }


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise JobError(f"override {override!r}: write dotted.key=value, such as optimizer.lr=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise JobError(f"override {override!r}: the value is not valid YAML: {error}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        raw = _merged(raw, value)
    return raw


_VARIABLE: re.Pattern[str] = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expanded(value: Any, where: str) -> Any:
    """Environment variables in every string below ``value``."""
    if isinstance(value, dict):
        return {key: _expanded(part, where) for key, part in value.items()}
    if isinstance(value, list):
        return [_expanded(part, where) for part in value]
    if not isinstance(value, str):
        return value

    def expand(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name)
        if found is None and default is None:
            mend = f"set it, or write ${{{name}:-default}}"
            raise JobError(f"{where}: {value!r} needs the environment variable {name}, which is not set: {mend}")
        return str(default) if found is None else found

    return _VARIABLE.sub(expand, value)


# What is allowed, by the type of pydantic's error; errors of our own bring their sentence.
_ALLOWED = {
    "greater_than": "numbers above {gt:g}",
    "greater_than_equal": "numbers from {ge:g} on",
    "less_than": "numbers below {lt:g}",
    "less_than_equal": "numbers up to {le:g}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "too_long": "a list of {max_length}",
    "too_short": "{min_length} or more of them",
    "dict_type": "a mapping of keys to values",
    "string_pattern_mismatch": "letters, digits, '.', '-' and '_', beginning with a letter or digit",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def _explained(errors: Sequence[ErrorDetails], raw: Mapping[str, Any]) -> list[str]:
    """A line a mistake: the dotted key, the value, what is allowed.

    Where a value may be of several kinds, pydantic reports each kind that it is not: the errors that come furthest into
    the value stand for all of them.
    """
    places = [tuple(_place(details, raw)) for details in errors]
    reasons: dict[tuple[str, ...], dict[str, ErrorDetails]] = {}
    for place, details in zip(places, errors, strict=True):
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places):
            reasons.setdefault(place, {})[details["type"]] = details
    return [_line(".".join(place) or "job", list(found.values())) for place, found in reasons.items()]


def _line(key: str, errors: Sequence[ErrorDetails]) -> str:
    kind, value, context = errors[0]["type"], errors[0]["input"], errors[0].get("ctx", {})
    if kind == "union_tag_invalid":
        return f"{key}: received {json.dumps(context['tag'], default=str)}; allowed: {context['expected_tags']}"
    if kind == "union_tag_not_found" or (kind == "missing" and isinstance(errors[0]["loc"][-1], str)):
        return f"{key}: missing; it has no default"
    if len(errors) == 1 and kind not in (*_ALLOWED, "missing"):
        reason = errors[0]["msg"].removeprefix("Value error, ")
        is_whole = kind == "unknown_key" or isinstance(value, BaseModel | Mapping)
        return f"{key}: {reason}" if is_whole else f"{key}: received {json.dumps(value, default=str)}; {reason}"
    allowed = [_allowed(details) for details in errors]
    return f"{key}: received {json.dumps(value, default=str)}; allowed: {', or '.join(allowed)}"


def _allowed(details: ErrorDetails) -> str:
    if details["type"] == "missing":  # an entry of a list
        return f"a list of {int(details['loc'][-1]) + 1}"
    template = _ALLOWED.get(details["type"])
    return template.format(**details.get("ctx", {})) if template else details["msg"]


def _place(details: ErrorDetails, raw: Any) -> Iterator[str]:
    """The keys of the file that lead to a mistake: pydantic puts the names of unions' branches in between."""
    loc, kind = details["loc"], details["type"]
    has_tag = True  # of a union told apart by `format`: comes once, before the keys of the mapping
    for i, part in enumerate(loc):
        if isinstance(raw, Mapping) and has_tag and part == raw.get("format"):
            has_tag = False
        elif isinstance(raw, Mapping) and (part in raw or (kind == "missing" and i == len(loc) - 1)):
            raw, has_tag = raw.get(part), True
            yield str(part)
        elif isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
            yield str(part)
    if kind.startswith("union_tag"):
        yield "format"
    if "key" in (context := details.get("ctx", {})):
        yield from [context["key"]] if kind == "unknown_key" else context["key"].split(".")
