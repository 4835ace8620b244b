"""DETR with its mask head (Carion et al. 2020), transformers' own, ResNet-50 and 101, and a tiny one for tests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.detr.configuration_detr import DetrConfig
from transformers.models.detr.modeling_detr import (
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrFrozenBatchNorm2d,
)

from raysseg.config import Inference, Loss, Model
from raysseg.masks import View
from raysseg.models import queries
from raysseg.models.base import MEAN, STD, Images, Outputs, SegModel, Targets
from raysseg.models.pretrained import read_config, read_net, repeated_layers, set_classes, write_preprocessing
from raysseg.models.queries import Factors, Queries, SetLoss, Settings
from raysseg.schema import ClassMap, InputError, Task

logger = logging.getLogger(__name__)

# timm's backbone, whether its last stage is dilated (DC5), and the size of the rest
SIZES: dict[str, tuple[str, bool, dict[str, float]]] = {
    "detr-tiny": (
        "test_resnet",
        True,
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_queries": 20,
            "dropout": 0.0,  # with it, learning a handful of images takes many times the steps
        },
    ),
    "detr-resnet-50": ("resnet50", False, {}),
    "detr-resnet-50-dc5": ("resnet50", True, {}),
    "detr-resnet-101": ("resnet101", False, {}),
}

# appendix A.4 of the paper, and the authors' code
SETTINGS = Settings(costs=Factors(classes=1, l1=5, giou=2), factors=Factors(1, 1, 1, 5, 2), mask_loss="focal")

_HEAD = "class_labels_classifier"


class Detr(SegModel):
    """DetrForSegmentation with the house's losses. Boxes and masks are trained together."""

    head_prefixes = (f"net.detr.{_HEAD}.", "net.mask_head.", "net.bbox_attention.")
    backbone_prefixes = ("net.detr.model.backbone.",)

    def __init__(
        self, net: DetrForSegmentation, classes: ClassMap, task: Task, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(classes, task, MEAN, STD)
        self.net = net
        self.criterion = SetLoss(classes, net.config.num_queries, SETTINGS, class_weights)

    def repeated_layers(self) -> Sequence[nn.Module]:
        """See SegModel: those of the transformer."""
        return repeated_layers(self.net)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Regions, and queries by the weight of their class."""
        return self.criterion.normalisers(targets)

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """See SegModel; masks are a quarter of the image. Every layer of the decoder learns classes and boxes."""
        assert isinstance(images, Tensor)
        found = self.net(pixel_values=self.normalise(images), output_hidden_states=targets is not None)
        values = {"class_logits": found.logits, "mask_logits": found.pred_masks, "boxes": found.pred_boxes}
        if targets is None:
            return Outputs(values)
        layers = [self._early_layer(hidden) for hidden in found.decoder_hidden_states[1:-1]]
        layers.append(Queries(values["class_logits"], values["mask_logits"], values["boxes"]))
        return Outputs(values, self.criterion(layers, targets, normalisers))

    def _early_layer(self, hidden: Tensor) -> Queries:
        """What a layer before the last predicts; transformers' `auxiliary_loss` would change the layers after it."""
        normed = self.net.detr.model.decoder.layernorm(hidden)
        boxes = self.net.detr.bbox_predictor(normed).sigmoid()
        return Queries(self.net.detr.class_labels_classifier(normed), boxes=boxes)

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        """See raysseg.models.queries."""
        return queries.decode(outputs, sizes, self.classes, self.task, inference)

    def class_scores(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        """Class probabilities times masks, summed over queries; they don't add up to 1 over the classes."""
        pairs = zip(outputs.values["class_logits"], outputs.values["mask_logits"], strict=True)
        return torch.stack([queries.class_scores(*pair, size) for pair in pairs])

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes transformers' files; `from_pretrained(folder)` reads them."""
        self.net.save_pretrained(folder)
        write_preprocessing(folder, "DetrImageProcessor", size, {"do_pad": True})


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> Detr:
    """A DETR for a class list: from scratch, from DETR's own weights, or from those of DETR that finds boxes alone.

    With weights, the backbone's stem and first stage stay as they are, as the authors have it; BatchNorm always does.

    Raises:
        InputError: the weights can't be loaded, or are of another model.
    """
    if model.weights is None:
        return Detr(_from_scratch(model.name, classes), classes, task, class_weights)
    config = read_config(DetrConfig, model.weights)
    backbone, is_dilated, _ = SIZES[model.name]
    found = (config.backbone_config.backbone, config.backbone_config.output_stride == 16)
    if found != (backbone, is_dilated):
        raise InputError(
            f"model.weights: {model.weights} has the backbone {found[0]}{', dilated' if found[1] else ''}, "
            f"which is no {model.name}; name the model that the weights are of"
        )
    if "DetrForSegmentation" in (config.architectures or ()):
        net = read_net(DetrForSegmentation, model.weights, config, classes, [f"detr.{_HEAD}"])
    else:
        detector = read_net(DetrForObjectDetection, model.weights, config, classes, [_HEAD])
        net = DetrForSegmentation(config)
        net.detr = detector
        logger.info("weights: %s find boxes alone; the mask head is new", model.weights)
    _freeze_stem(net)
    return Detr(net, classes, task, class_weights)


def outline(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> Detr:
    """A DETR that trains as one with weights does, without them."""
    net = _from_scratch(model.name, classes)
    _freeze_stem(net)
    return Detr(net, classes, task, class_weights)


def _freeze_stem(net: DetrForSegmentation) -> None:
    """The stem and the first stage stay as they are."""
    for name, parameter in net.detr.model.backbone.named_parameters():
        parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> Detr:
    """The model of a bundle."""
    return Detr(DetrForSegmentation.from_pretrained(folder), classes, task)


def _from_scratch(name: str, classes: ClassMap) -> DetrForSegmentation:
    """A net of random weights, drawn as the authors draw them.

    transformers draws the matrices far smaller, and queries that hardly differ. Of the backbone, whose BatchNorm is
    frozen, timm has the last one of each block give 0 at first, which would stay; here the blocks' branches are scaled
    down with their number instead (Hayou et al. 2021).
    """
    backbone, is_dilated, sizes = SIZES[name]
    config = DetrConfig(backbone=backbone, dilation=is_dilated, **sizes)
    set_classes(config, classes)
    net = DetrForSegmentation(config)
    model = net.detr.model
    for part in (model.encoder, model.decoder):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    nn.init.normal_(model.query_position_embeddings.weight)
    for layer in (model.input_projection, net.detr.class_labels_classifier, *net.detr.bbox_predictor.layers):
        layer.reset_parameters()
    silent = [m for m in model.backbone.modules() if isinstance(m, DetrFrozenBatchNorm2d) and not m.weight.any()]
    for norm in silent:
        norm.weight.fill_(len(silent) ** -0.5)
    return net
