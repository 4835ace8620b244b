"""RF-DETR for instances (Robinson et al. 2025, arXiv 2511.09554), transformers' own: real-time sizes, and a tiny one.

A DINOv2 whose attention is mostly within windows, a first stage that chooses places of its map as queries, and a
decoder. In training, several groups of queries go side by side, each matched for itself (Chen et al. 2023); later, one.
Images are scaled up, where they must be, to whole windows of patches, and so far that the map has a place a query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.rf_detr.configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import RfDetrForInstanceSegmentation

from raysseg.config import Inference, Loss, Model
from raysseg.masks import View
from raysseg.models.base import MEAN, STD, Images, Outputs, SegModel, Targets, to_whole_strides
from raysseg.models.pretrained import (
    check_size,
    read_config,
    read_net,
    repeated_layers,
    set_classes,
    write_preprocessing,
)
from raysseg.models.queries import Factors, Queries, SetLoss, Settings, to_mask_set
from raysseg.schema import ClassMap, Task

# the authors' code; its class factor of 5 for masks was said to be a mistake, and never took effect
COSTS = Factors(classes=2, masks=5, dice=5, l1=5, giou=2)
FACTORS = Factors(classes=1, masks=5, dice=5, l1=5, giou=2)

PRIOR = -math.log(99)  # the logit of a class to begin with: likely at 0.01 (Lin et al. 2017)


def _published(image_size: int, num_windows: int, num_layers: int, num_queries: int) -> RfDetrConfig:
    """As Roboflow/rf-detr-seg-*; what is not said here is the same in transformers' defaults."""
    backbone = RfDetrDinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=image_size,
        patch_size=12,
        num_windows=num_windows,
        out_features=["stage3", "stage6", "stage9", "stage12"],
    )
    return RfDetrConfig(
        backbone_config=backbone, decoder_layers=num_layers, decoder_n_points=2, num_queries=num_queries, dropout=0.0
    )


def _tiny() -> RfDetrConfig:
    backbone = RfDetrDinov2Config(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
        num_windows=2,
        out_features=["stage2", "stage4"],
    )
    return RfDetrConfig(
        backbone_config=backbone,
        d_model=64,
        c2f_num_blocks=1,
        decoder_layers=2,
        decoder_ffn_dim=128,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        decoder_n_points=2,
        intermediate_size=128,
        num_queries=40,
        group_detr=3,
        dropout=0.0,
        mask_downsample_ratio=2,
        mask_point_sample_ratio=2,
    )


CONFIGS: dict[str, Callable[[], RfDetrConfig]] = {
    "rfdetr-tiny": _tiny,
    "rfdetr-seg-nano": lambda: _published(312, 1, 4, 100),
    "rfdetr-seg-small": lambda: _published(384, 2, 4, 100),
    "rfdetr-seg-medium": lambda: _published(432, 2, 5, 200),
    "rfdetr-seg-large": lambda: _published(504, 2, 5, 300),
    "rfdetr-seg-xlarge": lambda: _published(624, 2, 6, 300),
    "rfdetr-seg-2xlarge": lambda: _published(768, 2, 6, 300),
}


class RfDetr(SegModel):
    """RfDetrForInstanceSegmentation with the house's matching and losses; every layer and the first stage learn."""

    head_prefixes = ("net.model.class_embed.", "net.model.model.enc_out_class_embed.")
    backbone_prefixes = ("net.model.model.backbone.backbone.",)

    def __init__(self, net: RfDetrForInstanceSegmentation, classes: ClassMap, task: Task) -> None:
        super().__init__(classes, task, MEAN, STD)
        self.net = net
        config, backbone = net.config, net.config.backbone_config
        side = backbone.image_size // config.mask_downsample_ratio
        settings = Settings(
            costs=COSTS,
            factors=FACTORS,
            mask_loss="cross_entropy",
            num_points=max(side, side**2 // config.mask_point_sample_ratio),
            class_loss="iou_aware",
        )
        self.criterion = SetLoss(classes, config.num_queries, settings)
        self._stride = backbone.patch_size * backbone.num_windows
        self._num_squares = math.ceil(config.num_queries / backbone.num_windows**2)
        embeddings = net.model.model.backbone.backbone.embeddings
        embeddings.window_partition = partial(_to_windows, patch_size=backbone.patch_size, num=backbone.num_windows)
        if embeddings.mask_token is not None:
            embeddings.mask_token.requires_grad_(False)  # of DINOv2's own training; not used

    def repeated_layers(self) -> Sequence[nn.Module]:
        """See SegModel: those of DINOv2 and the decoder."""
        return repeated_layers(self.net)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Target regions."""
        return self.criterion.normalisers(targets)

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """See SegModel; values are `class_logits` (B, Q, C), `mask_logits` (B, Q, h, w) and `boxes` (B, Q, 4).

        In training they are of all groups of queries.
        """
        assert isinstance(images, Tensor)
        layers = self._predict_layers(to_whole_strides(self.normalise(images), self._stride, self._num_squares))
        last = layers[-1]
        assert last.mask_logits is not None
        assert last.boxes is not None
        values = {"class_logits": last.class_logits, "mask_logits": last.mask_logits, "boxes": last.boxes}
        return Outputs(values, self.criterion(layers, targets, normalisers) if targets is not None else {})

    def _predict_layers(self, pixels: Tensor) -> list[Queries]:
        """What the first stage and each layer of the decoder predict; as transformers' forward, which keeps it back."""
        detector, size = self.net.model, pixels.shape[-2:]
        found = detector.model(pixels)
        maps, hidden = found.backbone_features, found.intermediate_hidden_states  # hidden: (L, B, Q, D)
        first = Queries(
            detector.predict_encoder_class_logits(found.enc_outputs_class),
            self.net.segmentation_head(maps, found.enc_outputs_class, size, skip_blocks=True),
            found.enc_outputs_coord_logits,
        )
        classes, boxes = detector.predict_class_and_boxes(hidden, found.intermediate_reference_points[-1])
        masks = self.net.segmentation_head(maps, hidden, size)
        return [first, *(Queries(*layer) for layer in zip(classes, masks, boxes, strict=True))]

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        """The best pairs of a query and a class; a score is the class's alone, as in the authors' postprocessing."""
        rows = zip(outputs.values["class_logits"], outputs.values["mask_logits"], sizes, strict=True)
        return [
            to_mask_set(logits.float().sigmoid(), masks, size, self.classes, inference, weigh_masks=False)
            for logits, masks, size in rows
        ]

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes transformers' files; `from_pretrained(folder)` reads them.

        Where there are windows, transformers' backbone mixes up the patches of images that are not square; its
        processor scales to squares, as the authors do.
        """
        self.net.save_pretrained(folder)
        side = self.net.config.backbone_config.image_size
        write_preprocessing(folder, "RfDetrImageProcessor", size or (side, side), {"do_pad": False})


def _to_windows(embeddings: Tensor, height: int, width: int, *, patch_size: int, num: int) -> Tensor:
    """Tokens of an image (B, 1 + h * w, D) as those of its windows (B * num ** 2, 1 + tokens of one, D).

    As transformers' for square images; of others, transformers swaps a window's sides.
    """
    rows, columns = height // patch_size // num, width // patch_size // num
    patches = embeddings[:, 1:].view(-1, num, rows, num, columns, embeddings.shape[2]).transpose(2, 3)
    windows = patches.reshape(-1, rows * columns, embeddings.shape[2])
    return torch.cat([embeddings[:, :1].repeat_interleave(num**2, 0), windows], 1)


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> RfDetr:
    """An RF-DETR for a class list, from scratch, or from weights whose class heads are rebuilt.

    Raises:
        InputError: the weights can't be loaded, or are of another size.
    """
    if model.weights is None:
        return RfDetr(_from_scratch(model.name, classes), classes, task)
    config = read_config(RfDetrConfig, model.weights)
    check_size(model, _size(config), _size(CONFIGS[model.name]()))
    config.dropout = 0.0  # as the authors train; transformers' default is another
    heads = ["model.class_embed", *(f"model.model.enc_out_class_embed.{i}" for i in range(config.group_detr))]
    net = read_net(RfDetrForInstanceSegmentation, model.weights, config, classes, heads, bias=PRIOR)
    return RfDetr(net, classes, task)


def _size(config: RfDetrConfig) -> dict[str, object]:
    """What tells the sizes apart."""
    backbone = config.backbone_config
    names = ("hidden_size", "image_size", "patch_size", "num_windows")
    return {
        **{name: getattr(backbone, name) for name in names},
        **{name: getattr(config, name) for name in ("decoder_layers", "num_queries")},
    }


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> RfDetr:
    """The model of a bundle."""
    return RfDetr(RfDetrForInstanceSegmentation.from_pretrained(folder), classes, task)


def _from_scratch(name: str, classes: ClassMap) -> RfDetrForInstanceSegmentation:
    """A net of random weights, drawn as the authors draw them; transformers draws matrices and queries far smaller."""
    config = CONFIGS[name]()
    set_classes(config, classes)
    net = RfDetrForInstanceSegmentation(config)
    model = net.model.model
    for part in (model.decoder, model.enc_output):
        for parameter in part.parameters():
            if parameter.ndim > 1 and parameter.any():  # not where deformable attention begins with none
                nn.init.xavier_uniform_(parameter)
    nn.init.normal_(model.query_feat.weight)
    nn.init.zeros_(model.reference_point_embed.weight)  # which refines the first stage's boxes
    for head in (net.model.bbox_embed, *model.enc_out_bbox_embed):
        for layer in head.layers:
            layer.reset_parameters()
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    for head in (net.model.class_embed, *model.enc_out_class_embed):
        head.reset_parameters()
        nn.init.constant_(head.bias, PRIOR)
    return net
