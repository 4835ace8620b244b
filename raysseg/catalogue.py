"""What a job can name: the models with their authors' settings, and the metrics. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raysseg.schema import Task


@dataclass(frozen=True)
class Entry:
    """A model.

    Attributes:
        family: the module in raysseg.models.
        tasks: what it can be trained for.
        source: whose settings the defaults are.
        defaults: keys of a train job, by section.
        from_scratch: keys that differ where there are no weights.
        by_task: keys that differ with the task.
        has_own_loss: whether it brings its loss along; then `loss:` takes `class_weights` alone, if anything.
        takes_class_weights: whether its loss has a place for them.
        takes_encoder: whether `model.encoder` chooses its backbone.
        recomputes: whether `model.checkpoint_activations` has a place; not where all layers have BatchNorm, whose
            statistics would count an image twice.
    """

    family: str
    tasks: tuple[Task, ...]
    source: str
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    from_scratch: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    by_task: Mapping[Task, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    has_own_loss: bool = False
    takes_class_weights: bool = True
    takes_encoder: bool = False
    recomputes: bool = False


_SEGFORMER = Entry(
    family="segformer",
    tasks=("semantic",),
    source="Xie et al. 2021, section 4.1; ten times the rate from scratch",
    defaults={"optimizer": {"lr": 6e-5, "head_lr_factor": 10.0}},
    from_scratch={"optimizer": {"lr": 6e-4, "head_lr_factor": 1.0}},
    recomputes=True,
)

_DETR = Entry(
    family="detr",
    tasks=("panoptic", "instance", "semantic"),
    source="Carion et al. 2020, appendix A.4, and the authors' code; the backbone at full rate from scratch",
    defaults={"optimizer": {"lr": 1e-4, "backbone_lr_factor": 0.1, "weight_decay": 1e-4, "clip_norm": 0.1}},
    from_scratch={"optimizer": {"backbone_lr_factor": 1.0}},
    by_task={"panoptic": {"inference": {"score_threshold": 0.85}}},
    has_own_loss=True,
    recomputes=True,
)

_MASKRCNN = Entry(
    family="maskrcnn",
    tasks=("instance",),
    source="torchvision's references/detection; a quarter of its rate, which is for 16 images a step, as its tutorial",
    defaults={"optimizer": {"name": "sgd", "lr": 5e-3, "momentum": 0.9, "weight_decay": 1e-4, "clip_norm": None}},
    has_own_loss=True,
    takes_class_weights=False,
)

_MASK2FORMER = Entry(
    family="universal",
    tasks=("semantic", "instance", "panoptic"),
    source="Cheng et al. 2022, section 4.1; its steps at 0.9 and 0.95 of the training are a linear decay here",
    defaults={"optimizer": {"lr": 1e-4, "backbone_lr_factor": 0.1, "weight_decay": 0.05, "clip_norm": 0.01}},
    from_scratch={"optimizer": {"backbone_lr_factor": 1.0}},
    has_own_loss=True,
    recomputes=True,
)

_EOMT = Entry(
    family="universal",
    tasks=("semantic", "instance", "panoptic"),
    source="Kerssies et al. 2025, section 4.1; of its layer-wise decay 0.8 two rates are left: the ViT's blocks before "
    "the queries learn at a tenth",
    defaults={
        "optimizer": {"lr": 1e-4, "backbone_lr_factor": 0.1, "weight_decay": 0.05, "clip_norm": 0.01},
        "schedule": {"power": 0.9},
    },
    from_scratch={"optimizer": {"backbone_lr_factor": 1.0}},
    has_own_loss=True,
    recomputes=True,
)

_RFDETR = Entry(
    family="rfdetr",
    tasks=("instance",),
    source="the authors' code (Robinson et al. 2025); its encoder's 1.5e-4, decayed from layer to layer to a third on "
    "average and by 0.49 in all, is one factor here, and the decoder's 0.7, the moving average of the weights and the "
    "random image sizes are left out; the backbone at full rate from scratch",
    defaults={"optimizer": {"lr": 1e-4, "backbone_lr_factor": 0.25, "weight_decay": 1e-4, "clip_norm": 0.1}},
    from_scratch={"optimizer": {"backbone_lr_factor": 1.0}},
    has_own_loss=True,
    takes_class_weights=False,
    recomputes=True,
)

_SMP = Entry(
    family="smp",
    tasks=("semantic",),
    source="the CamVid example of segmentation_models.pytorch: Adam at 2e-4 with cosine decay; no paper's. Five times "
    "the rate from scratch",
    defaults={"optimizer": {"lr": 2e-4}, "schedule": {"decay": "cosine"}},
    from_scratch={"optimizer": {"lr": 1e-3}},
    takes_encoder=True,
)

MODELS: dict[str, Entry] = {
    **{f"segformer-{size}": _SEGFORMER for size in ("tiny", "b0", "b1", "b2", "b3", "b4", "b5")},
    **{f"detr-{size}": _DETR for size in ("tiny", "resnet-50", "resnet-50-dc5", "resnet-101")},
    **dict.fromkeys(("unet", "unet-tiny", "deeplabv3plus"), _SMP),
    **{f"maskrcnn-{size}": _MASKRCNN for size in ("tiny", "resnet50-fpn", "resnet50-fpn-v2", "resnet101-fpn")},
    **{f"mask2former-{size}": _MASK2FORMER for size in ("tiny", "swin-tiny", "resnet-50")},
    **{f"eomt-{size}": _EOMT for size in ("tiny", "small", "base", "large")},
    "rfdetr-tiny": _RFDETR,
    **{f"rfdetr-seg-{size}": _RFDETR for size in ("nano", "small", "medium", "large", "xlarge", "2xlarge")},
}
"""Every model that a job can name; `tiny` ones are for tests."""

METRICS: dict[Task, tuple[str, ...]] = {
    "semantic": ("boundary_iou", "surface"),
    "instance": ("boundary_ap",),
    "panoptic": ("boundary_pq",),
}
"""What can be measured beside a task's own metrics."""

HEADLINES: dict[Task, str] = {"semantic": "miou", "instance": "mask_ap", "panoptic": "pq"}
"""The number that stands for all of a task's."""

PROMPT_MODELS: dict[str, str] = {
    **{f"sam-vit-{size}": f"facebook/sam-vit-{size}" for size in ("base", "large", "huge")},
    **{f"sam-hq-vit-{size}": f"syscv-community/sam-hq-vit-{size}" for size in ("base", "large", "huge")},
    **{f"sam2-hiera-{size}": f"facebook/sam2-hiera-{size}" for size in ("tiny", "small", "base-plus", "large")},
    **{f"sam2.1-hiera-{size}": f"facebook/sam2.1-hiera-{size}" for size in ("tiny", "small", "base-plus", "large")},
    "sam3-tracker": "facebook/sam3",
}
"""Every prompted model that a job can name, and the hub id of its authors' weights."""
