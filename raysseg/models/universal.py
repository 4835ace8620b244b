"""Mask2Former (Cheng et al. 2022) and EoMT (Kerssies et al. 2025), transformers' own, for all three tasks.

Images are scaled up, where they must be, to whole strides of the net: 32 pixels in Mask2Former, as transformers' own
image processor does, and a patch in EoMT, whose position embeddings are interpolated to the image's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.eomt.configuration_eomt import EomtConfig
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentation
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerPixelDecoderEncoderLayer,
)
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.resnet.modeling_resnet import ResNetBackbone
from transformers.models.swin.configuration_swin import SwinConfig
from transformers.models.swin.modeling_swin import SwinBackbone

from raysseg.config import Inference, Loss, Model
from raysseg.masks import View
from raysseg.models import eomt
from raysseg.models.base import MEAN, STD, Images, Outputs, SegModel, Targets, to_whole_strides
from raysseg.models.pretrained import (
    check_size,
    read_config,
    read_kind,
    read_net,
    repeated_layers,
    set_classes,
    write_preprocessing,
)
from raysseg.models.queries import Factors, Queries, SetLoss, Settings, class_scores, decode
from raysseg.schema import ClassMap, Task

Net: TypeAlias = Mask2FormerForUniversalSegmentation | EomtForUniversalSegmentation
Config: TypeAlias = Mask2FormerConfig | EomtConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]
FACTORS = Factors(classes=2.0, masks=5.0, dice=5.0)  # of both: Mask2Former, section 4.1; EoMT follows it


def _swin_tiny() -> Mask2FormerConfig:
    """As facebook/mask2former-swin-tiny-*; what is not said here is the same in transformers' defaults."""
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.3,
        out_features=STAGES,
    )
    return Mask2FormerConfig(backbone_config=backbone)


def _resnet_50() -> Mask2FormerConfig:
    return Mask2FormerConfig(backbone_config=ResNetConfig(out_features=STAGES))


def _mask2former_tiny() -> Mask2FormerConfig:
    """Masks at stride 2: at 4, the example's poles and sheep can't be drawn well enough."""
    backbone = SwinConfig(
        patch_size=2,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=STAGES,
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_strides=[2, 4, 8, 16],
        common_stride=2,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        dim_feedforward=128,
        encoder_layers=1,
        decoder_layers=4,  # of which transformers builds one less
        num_attention_heads=4,
        num_queries=32,
        train_num_points=1024,
    )


def _eomt(hidden_size: int, num_layers: int, num_heads: int, num_blocks: int) -> EomtConfig:
    return EomtConfig(
        hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads, num_blocks=num_blocks
    )


def _eomt_tiny() -> EomtConfig:
    return EomtConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
        num_upscale_blocks=2,
        num_blocks=2,
        num_queries=32,
        train_num_points=1024,
    )


# sizes of EoMT: DINOv2's ViT, and how many blocks the queries go through, from the authors' configurations
CONFIGS: dict[str, Callable[[], Config]] = {
    "mask2former-tiny": _mask2former_tiny,
    "mask2former-swin-tiny": _swin_tiny,
    "mask2former-resnet-50": _resnet_50,
    "eomt-tiny": _eomt_tiny,
    "eomt-small": lambda: _eomt(384, 12, 6, 3),
    "eomt-base": lambda: _eomt(768, 12, 12, 3),
    "eomt-large": lambda: _eomt(1024, 24, 16, 4),
}

NETS: dict[str, type[Net]] = {"mask2former": Mask2FormerForUniversalSegmentation, "eomt": EomtForUniversalSegmentation}
BACKBONES: dict[str, type[PreTrainedModel]] = {"swin": SwinBackbone, "resnet": ResNetBackbone}


class Universal(SegModel):
    """A net whose queries are classes and masks, with the house's matching and losses.

    EoMT's blocks with queries learn with masked attention, which is annealed in the course of training, and do without
    at the end; a net that does without already is trained so.
    """

    head_prefixes = ("net.class_predictor.",)

    def __init__(self, net: Net, classes: ClassMap, task: Task, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(classes, task, MEAN, STD)
        self.net = net
        settings = Settings(
            costs=FACTORS,
            factors=FACTORS,
            mask_loss="cross_entropy",
            num_points=net.config.train_num_points,
            no_object=net.config.no_object_weight,
        )
        self.criterion = SetLoss(classes, net.config.num_queries, settings, class_weights)
        self._mask_shares: list[float] = []
        self._is_annealed = False
        if isinstance(net, EomtForUniversalSegmentation):
            num_encoder_layers = net.config.num_hidden_layers - net.config.num_blocks
            self.backbone_prefixes = ("net.embeddings.", *(f"net.layers.{i}." for i in range(num_encoder_layers)))
            self._stride = int(net.config.patch_size)
            self._mask_shares = net.attn_mask_probs.tolist()
            self._is_annealed = any(self._mask_shares)
        else:
            encoder = net.model.pixel_level_module.encoder
            self.backbone_prefixes = ("net.model.pixel_level_module.encoder.",)
            self._stride = int(net.config.feature_strides[-1])
            if net.config.backbone_config.model_type == "swin":
                encoder.swin.layernorm.requires_grad_(False)  # of the last stage without its own norm; not used

    def set_progress(self, progress: float) -> None:
        """Anneals EoMT's masked attention."""
        if self._is_annealed:
            num_blocks = len(self._mask_shares)
            self._mask_shares = [eomt.mask_share(progress, i, num_blocks) for i in range(num_blocks)]

    def repeated_layers(self) -> Sequence[nn.Module]:
        """See SegModel: those of Swin or the ViT, and of the decoders."""
        return repeated_layers(self.net, (Mask2FormerPixelDecoderEncoderLayer,))

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Target regions, and queries by the weight of their class."""
        return self.criterion.normalisers(targets)

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """See SegModel; values are `class_logits` (B, Q, C + 1) and `mask_logits` (B, Q, h, w)."""
        assert isinstance(images, Tensor)
        pixels = to_whole_strides(self.normalise(images), self._stride)
        layers = self._predict_layers(pixels, targets)
        last = layers[-1]
        assert last.mask_logits is not None
        values = {"class_logits": last.class_logits, "mask_logits": last.mask_logits}
        return Outputs(values, self.criterion(layers, targets, normalisers) if targets is not None else {})

    def _predict_layers(self, pixels: Tensor, targets: Targets | None) -> list[Queries]:
        """The last layer's predictions, and with targets those of all that learn."""
        if isinstance(self.net, EomtForUniversalSegmentation):
            shares = self._mask_shares if self.training else _settled(self._mask_shares)
            seeds = targets.seeds if targets is not None else None
            return eomt.predict_layers(self.net, pixels, shares, seeds, is_last_enough=targets is None)
        found = self.net(pixel_values=pixels, output_auxiliary_logits=targets is not None)
        before = found.auxiliary_logits or []
        return [
            *(Queries(layer["class_queries_logits"], layer["masks_queries_logits"]) for layer in before),
            Queries(found.class_queries_logits, found.masks_queries_logits),
        ]

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        """See SegModel."""
        return decode(outputs, sizes, self.classes, self.task, inference)

    def class_scores(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        """The classes' probabilities times the masks', summed over queries; they add up to 1 in no pixel."""
        rows = zip(outputs.values["class_logits"], outputs.values["mask_logits"], strict=True)
        return torch.stack([class_scores(*row, size) for row in rows])

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes transformers' files; `from_pretrained(folder)` reads them.

        Transformers' EoMT takes square images of the configured size alone, to which its processor scales and pads.
        """
        if isinstance(self.net, EomtForUniversalSegmentation):
            self.net.attn_mask_probs.copy_(torch.tensor(_settled(self._mask_shares)))
            side = self.net.config.image_size
            square = {"size": {"shortest_edge": side, "longest_edge": side}, "do_pad": True, "do_split_image": False}
            write_preprocessing(folder, "EomtImageProcessor", (side, side), square)
        else:
            more = {"size_divisor": self._stride, "do_reduce_labels": False, "ignore_index": self.classes.ignore}
            write_preprocessing(folder, "Mask2FormerImageProcessor", size, more)
        self.net.save_pretrained(folder)


def _settled(shares: Sequence[float]) -> list[float]:
    """Each block's share as all or nothing, so that evaluation draws no lots."""
    return [float(share > 0.5) for share in shares]


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> Universal:
    """A net for a class list, from scratch, from weights whose class head is rebuilt, or on a backbone with weights.

    Raises:
        InputError: the weights can't be loaded, or are of another size.
    """
    config = CONFIGS[model.name]()
    kind = NETS[config.model_type]
    if model.weights is None:
        set_classes(config, classes)
        return Universal(kind(config), classes, task, class_weights)
    backbone = getattr(config, "backbone_config", None)
    if backbone is not None and read_kind(model.weights) == backbone.model_type:
        found = read_config(type(backbone), model.weights)
        check_size(model, _size(found), _size(backbone))
        set_classes(config, classes)
        net = kind(config)
        net.model.pixel_level_module.encoder = read_net(
            BACKBONES[found.model_type], model.weights, backbone, classes, []
        )
        return Universal(net, classes, task, class_weights)
    found = read_config(type(config), model.weights)
    check_size(model, _size(found), _size(config))
    net = read_net(kind, model.weights, found, classes, ["class_predictor"])
    return Universal(net, classes, task, class_weights)


def _size(config: PreTrainedConfig) -> dict[str, object]:
    """What tells a family's sizes apart."""
    if (backbone := getattr(config, "backbone_config", None)) is not None:
        return {"backbone": backbone.model_type, **_size(backbone), "hidden_dim": config.hidden_dim}
    names = {
        "swin": ("depths", "embed_dim"),
        "resnet": ("depths", "hidden_sizes"),
        "eomt": ("num_hidden_layers", "hidden_size", "patch_size"),
    }.get(config.model_type, ())
    return {name: getattr(config, name) for name in names}


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> Universal:
    """The model of a bundle."""
    return Universal(NETS[CONFIGS[name]().model_type].from_pretrained(folder), classes, task)
