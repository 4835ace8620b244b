"""Mask R-CNN (He et al. 2017) with a feature pyramid, made of torchvision's parts; ResNet-50, v2, ResNet-101, tiny.

The parameters are named as in torchvision, so that its own `maskrcnn_resnet50_fpn` can load the files of a bundle;
torchvision owns no `from_pretrained`, and loading needs `load` of this module.

Normalisation follows torchvision: from scratch the backbone has BatchNorm that learns; with weights it is frozen, and
so are the backbone's stem and first stage. v2 has BatchNorm everywhere, which learns in any case. BatchNorm wants some
images a forward pass: with one or two from scratch, training is noisy (He et al. 2019, section 3).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import get_weight, resnet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FrozenBatchNorm2d, box_iou

from raysseg import rle, storage
from raysseg.config import Inference, Loss, Model
from raysseg.masks import MaskSet, View
from raysseg.models.base import MEAN, STD, Images, Outputs, SegModel, Targets
from raysseg.schema import ClassMap, InputError, Task

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "model.safetensors", "maskrcnn.json"
STRIDE = 32  # of the backbone's last stage: images are padded to a multiple of it
PASTED = 2**22  # pixels of the masks that are drawn at once: a hundred masks of a large image are gigabytes


@dataclass(frozen=True)
class Shape:
    """What tells the models apart.

    Attributes:
        backbone: torchvision's ResNet, or the residual blocks of each stage of a smaller one.
        is_v2: torchvision's second version (Li et al. 2021): convolutions in the box head, BatchNorm in all heads.
        channels: of the pyramid and the mask head.
        hidden: width of the box head.
        anchors: side of each pyramid level's anchors, in pixels.
        proposals: that an image's boxes are sought among, in training and afterwards.
        sampled: boxes of an image that the heads train on.
        downloads: torchvision's weights, by what a job calls them.
    """

    backbone: str | tuple[int, int, int, int]
    is_v2: bool = False
    channels: int = 256
    hidden: int = 1024
    anchors: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    proposals: tuple[int, int] = (2000, 1000)
    sampled: int = 512
    downloads: Mapping[str, str] = field(default_factory=dict)


_COCO = "MaskRCNN_ResNet50_FPN"
_RESNET50 = {"imagenet": "ResNet50_Weights.IMAGENET1K_V1"}
SHAPES = {
    "maskrcnn-resnet50-fpn": Shape("resnet50", downloads={"torchvision": f"{_COCO}_Weights.COCO_V1", **_RESNET50}),
    "maskrcnn-resnet50-fpn-v2": Shape(
        "resnet50", is_v2=True, downloads={"torchvision": f"{_COCO}_V2_Weights.COCO_V1", **_RESNET50}
    ),
    "maskrcnn-resnet101-fpn": Shape("resnet101", downloads={"imagenet": "ResNet101_Weights.IMAGENET1K_V1"}),
    "maskrcnn-tiny": Shape(
        (1, 1, 1, 1), channels=32, hidden=128, anchors=(8, 16, 32, 64, 128), proposals=(400, 400), sampled=64
    ),
}
HEADS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.")


class MaskRcnn(SegModel):
    """Mask R-CNN over images of any sizes, which are padded to the largest of their batch.

    Its losses average over the regions that it samples in a micro-batch. They are weighted by images, so that every
    image counts alike; but the gradient does depend on how a global batch is split, unlike the other models'.

    Detections are the net's own: scores above 0.05, overlaps (of one class) up to 0.5, as many of an image as a job's
    `inference` asks for, though of no more boxes than the net's proposals, 1,000.
    """

    head_prefixes = tuple(f"net.{name}" for name in HEADS)
    backbone_prefixes = ("net.backbone.body.",)
    takes_any_sizes = True

    def __init__(self, name: str, net: MaskRCNN, classes: ClassMap) -> None:
        super().__init__(classes, "instance", MEAN, STD)
        self.name = name
        self.net = net

    def set_limits(self, inference: Inference) -> None:
        """See SegModel: masks are drawn for so many boxes."""
        self.net.roi_heads.detections_per_img = inference.max_instances

    def work_most(self) -> None:
        """See SegModel: no proposal falls away, and of those sampled, as many show regions as the sampler lets in."""
        self.net.rpn.nms_thresh = 1.0
        self.net.roi_heads.assign_targets_to_proposals = _every_fourth

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Images."""
        return {"images": targets.weights.sum(dtype=torch.float64)}

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """See SegModel.

        In training mode targets are needed, and there are losses alone. In evaluation mode there are values alone, and
        targets are left aside: the net samples no regions there.

            boxes: (D, 4) xyxy in pixels of the input.
            labels: (D,) class indices.
            scores: (D,).
            masks: (D, 1, 28, 28) probabilities over the box.
            image: (D,) place in the batch.
            sizes: (B, 2) height and width of the inputs.
        """
        if self.training:
            assert targets is not None
            return Outputs({}, self._losses(images, targets, normalisers or self.normalisers(targets)))
        batch, features = self._encode(images)
        proposals, _ = self.net.rpn(batch, features)
        found, _ = self.net.roi_heads(features, proposals, batch.image_sizes)
        values = {name: torch.cat([each[name] for each in found]) for name in ("boxes", "labels", "scores", "masks")}
        values["labels"] = values["labels"] - 1  # 0 is the background
        values["image"] = torch.cat([torch.full_like(each["labels"], i) for i, each in enumerate(found)])
        values["sizes"] = torch.tensor(batch.image_sizes, device=values["boxes"].device)
        return Outputs(values)

    def _encode(self, images: Images) -> tuple[ImageList, dict[str, Tensor]]:
        """Images in one batch, and their pyramid; boxes take the precision of its maps, hence no less than float32."""
        normalised = [self.normalise(image[None])[0] for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in normalised]
        batch = ImageList(self.net.transform.batch_images(normalised, STRIDE), sizes)
        return batch, {name: _at_least_float32(level) for name, level in self.net.backbone(batch.tensors).items()}

    def _losses(self, images: Images, targets: Targets, normalisers: dict[str, Tensor]) -> dict[str, Tensor]:
        """The five terms, each weighted by this micro-batch's share of the images."""
        is_learnt = (targets.weights > 0) & (targets.labels != self.classes.ignore).flatten(1).any(1)
        rows = is_learnt.nonzero()[:, 0].tolist()
        share = len(rows) / normalisers["images"].clamp(min=1e-12)
        truth = [_to_truth(targets, row, self.classes.ignore) for row in rows]
        if not rows:  # all ranks need a gradient of every parameter: an empty image gives one, of 0
            rows, truth = [0], [_nothing(targets.labels[0])]
        batch, features = self._encode([images[row] for row in rows])
        proposals, losses = self.net.rpn(batch, features, truth)
        proposals = [_worth_sampling(boxes, each) for boxes, each in zip(proposals, truth, strict=True)]
        _, more = self.net.roi_heads(features, proposals, batch.image_sizes, truth)
        return {name.removeprefix("loss_"): share * loss for name, loss in (losses | more).items()}

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        """Instances by falling score, at each image's (height, width); those without a pixel are left out."""
        values = {name: value.detach().cpu() for name, value in outputs.values.items()}
        return [self._to_masks(values, i, size, inference) for i, size in enumerate(sizes)]

    def _to_masks(
        self, values: Mapping[str, Tensor], image: int, size: tuple[int, int], inference: Inference
    ) -> MaskSet:
        is_kept = (values["image"] == image) & (values["scores"] >= inference.score_threshold)
        rows = is_kept.nonzero()[:, 0]
        rows = rows[values["scores"][rows].argsort(descending=True, stable=True)][: inference.max_instances]
        height, width = values["sizes"][image].tolist()
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        boxes = values["boxes"][rows].float() * scale
        shown: list[int] = []
        rles: list[bytes] = []
        for part in torch.split(torch.arange(len(rows)), max(1, PASTED // (size[0] * size[1]))):
            masks = paste_masks_in_image(values["masks"][rows[part]].float(), boxes[part], size)[:, 0]
            is_inside = masks >= inference.mask_threshold
            has_pixels = is_inside.flatten(1).any(1)
            shown += part[has_pixels].tolist()
            rles += rle.from_masks(is_inside[has_pixels].numpy())
        x0, y0, x1, y1 = boxes[shown].double().numpy().T
        return MaskSet(
            size=size,
            rles=tuple(rles),
            class_ids=values["labels"][rows][shown].numpy(),
            is_crowd=np.zeros(len(shown), np.bool_),
            scores=values["scores"][rows][shown].double().numpy(),
            boxes=np.stack([x0, y0, x1 - x0, y1 - y0], axis=1),
        )

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes the weights and what rebuilds the net; it is `load` that reads them, see the module."""
        save_file({name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}, folder / WEIGHTS)
        frozen = [module.eps for module in self.net.modules() if isinstance(module, FrozenBatchNorm2d)]
        content = {
            "model": self.name,
            "classes": list(self.classes.names),
            "frozen_eps": frozen[0] if frozen else None,
            "size": size,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        (folder / CONFIG).write_text(json.dumps(content, indent=2))


# --- ignored pixels -----------------------------------------------------------------------------------------------


class _ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Takes no anchors for background that lie in ignored pixels, as Detectron does with crowds."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            label[_is_ignored(anchor, label == 0, target["ignored"])] = -1  # is sampled for nothing
        return labels, boxes


def _worth_sampling(proposals: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """The proposals less those that match nothing and lie in ignored pixels: the box head takes all for background."""
    best = box_iou(truth["boxes"], proposals).amax(0) if len(truth["boxes"]) else proposals.new_zeros(len(proposals))
    return proposals[~_is_ignored(proposals, best < 0.5, truth["ignored"])]


def _is_ignored(boxes: Tensor, is_background: Tensor, ignored: Tensor) -> Tensor:
    """Which of the boxes, (N, 4), would be background but lie in ignored pixels, (H, W), by more than half.

    The least ignored one stays, where no other box would: an average over none is not a number.
    """
    height, width = ignored.shape
    limit = torch.tensor([width, height, width, height], device=boxes.device)
    x0, y0, x1, y1 = boxes.round().long().clamp(min=0).minimum(limit).unbind(1)
    sums = nn.functional.pad(ignored.long().cumsum(0).cumsum(1), (1, 0, 1, 0))  # (H + 1, W + 1)
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    share = inside / ((x1 - x0) * (y1 - y0)).clamp(min=1)
    found = is_background & (share > 0.5)
    if found.all() and len(found):
        found[share.argmin()] = False
    return found


def _to_truth(targets: Targets, row: int, ignore: int) -> dict[str, Tensor]:
    """One image's regions as torchvision has them, and `ignored`, (H, W).

    Ignored pixels within a region's box count as not its own, which Detectron's mask loss does too.
    """
    assert targets.regions is not None
    regions = targets.regions[row]
    return {
        "boxes": regions.boxes.float(),
        "labels": regions.class_ids + 1,
        "masks": regions.masks.to(torch.uint8),
        "ignored": targets.labels[row] == ignore,
    }


def _nothing(labels: Tensor) -> dict[str, Tensor]:
    """An image without regions, of these labels' size."""
    return {
        "boxes": torch.zeros((0, 4), device=labels.device),
        "labels": labels.new_zeros(0),
        "masks": torch.zeros((0, *labels.shape), dtype=torch.uint8, device=labels.device),
        "ignored": torch.zeros_like(labels, dtype=torch.bool),
    }


def _every_fourth(
    proposals: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Matches every fourth proposal with an image's first region, whatever it shows; see MaskRcnn.work_most."""
    matched = [torch.zeros_like(each[:, 0], dtype=torch.int64) for each in proposals]
    return matched, [(torch.arange(len(each), device=each.device) % 4 == 0).long() for each in proposals]


# --- building -----------------------------------------------------------------------------------------------------


class _RegionHead(RPNHead):  # type: ignore[misc]
    """Says where regions are, in float32: bf16 has no more than 256 steps between two powers of two."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [_at_least_float32(level) for level in logits], [_at_least_float32(level) for level in deltas]


class _BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """Scores and moves boxes, in float32; see _RegionHead."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return _at_least_float32(logits), _at_least_float32(deltas)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> MaskRcnn:
    """A Mask R-CNN for a class list: from scratch, from a bundle's weights, or from torchvision's.

    `weights: torchvision` is the whole net trained on COCO, `weights: imagenet` the backbone alone; torchvision
    downloads both. Of weights for other classes the last layers are made anew.

    Raises:
        InputError: the weights can't be loaded, or are of another model.
    """
    shape = SHAPES[model.name]
    if model.weights is None:
        net = build_net(shape, len(classes), is_pretrained=False)
    elif model.weights in ("torchvision", "imagenet"):
        net = _from_torchvision(model.name, model.weights, len(classes))
    else:
        net = _from_folder(model.name, model.weights, classes)
    logger.info("the loss averages over the regions that each micro-batch samples: not exact under other splits")
    return MaskRcnn(model.name, net, classes)


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> MaskRcnn:
    """The model of a bundle."""
    frozen_eps = json.loads((folder / CONFIG).read_text())["frozen_eps"]
    net = build_net(SHAPES[name], len(classes), is_pretrained=frozen_eps is not None)
    if frozen_eps is not None:
        overwrite_eps(net, frozen_eps)
    net.load_state_dict(load_file(folder / WEIGHTS))
    return MaskRcnn(name, net, classes)


def outline(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> MaskRcnn:
    """A Mask R-CNN that trains as one with weights does, without them."""
    return MaskRcnn(model.name, build_net(SHAPES[model.name], len(classes), is_pretrained=True), classes)


def build_net(shape: Shape, num_classes: int, *, is_pretrained: bool) -> MaskRCNN:
    """torchvision's net, with random weights.

    Args:
        shape: which one.
        num_classes: less the background.
        is_pretrained: weights will follow: the backbone's BatchNorm is frozen, and so are its stem and first stage.
    """
    head_norm = nn.BatchNorm2d if shape.is_v2 else None
    norm = FrozenBatchNorm2d if is_pretrained and not shape.is_v2 else nn.BatchNorm2d
    if isinstance(shape.backbone, str):
        body = getattr(resnet, shape.backbone)(weights=None, norm_layer=norm)
    else:
        body = resnet.ResNet(resnet.BasicBlock, list(shape.backbone), norm_layer=norm)
    if is_pretrained:
        for part in (body.conv1, body.bn1, body.layer1):
            part.requires_grad_(False)
    channels = shape.channels
    stages = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    widths = [body.inplanes // 8 * factor for factor in (1, 2, 4, 8)]
    pyramid = BackboneWithFPN(body, stages, widths, channels, norm_layer=head_norm)
    anchors = AnchorGenerator(tuple((side,) for side in shape.anchors), ((0.5, 1.0, 2.0),) * len(shape.anchors))
    head = _RegionHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2 if shape.is_v2 else 1)
    if shape.is_v2:
        box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [shape.hidden], norm_layer=head_norm)
    else:
        box_head = TwoMLPHead(channels * 7 * 7, shape.hidden)
    net = MaskRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_head=head,
        box_head=box_head,
        box_batch_size_per_image=shape.sampled,
        box_predictor=_BoxPredictor(shape.hidden, 1 + num_classes),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1, norm_layer=head_norm),
        mask_predictor=MaskRCNNPredictor(channels, channels, 1 + num_classes),
    )
    counts = dict(zip(("training", "testing"), shape.proposals, strict=True))
    # the thresholds of overlap, 256 sampled anchors and half of them regions, are torchvision's
    net.rpn = _ProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, counts, counts, 0.7)
    return net


def _from_torchvision(name: str, weights: str, num_classes: int) -> MaskRCNN:
    """A net with torchvision's COCO weights but for the last layers, or with a backbone trained on ImageNet."""
    shape = SHAPES[name]
    if weights not in shape.downloads:
        allowed = ", ".join([*shape.downloads, "a folder or an s3:// URI with a bundle of this model", "null"])
        raise InputError(f"model.weights: received {weights}; allowed for {name}: {allowed}")
    source = get_weight(shape.downloads[weights])
    try:
        state = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"model.weights: {weights}: {source.url} can't be downloaded: {error}; "
            "give a folder or an s3:// URI with a bundle of this model, or null"
        ) from error
    net = build_net(shape, num_classes, is_pretrained=True)
    if weights == "imagenet":
        _fill(net.backbone.body, state, new=(), surplus=("fc.",))
    else:
        if not shape.is_v2:
            overwrite_eps(net, 0.0)  # which these weights were trained with
        _fill(net, state, new=HEADS, surplus=HEADS)
    return net


def _from_folder(name: str, weights: str, classes: ClassMap) -> MaskRCNN:
    """A net with the weights of a bundle; the last layers are new where the classes are others."""
    folder = storage.fetch_files(weights)
    try:
        content = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"model.weights: {weights} can't be loaded: {error}; give a folder or an s3:// URI with {CONFIG} and "
            f"{WEIGHTS}, as a bundle has them, {', '.join(SHAPES[name].downloads)} or null"
        ) from error
    if content["model"] != name:
        raise InputError(
            f"model.weights: {weights} is of {content['model']}, which is no {name}; name the model that they are of"
        )
    net = build_net(SHAPES[name], len(classes), is_pretrained=True)
    if content["frozen_eps"] is not None:
        overwrite_eps(net, content["frozen_eps"])
    is_same_head = content["classes"] == list(classes.names)
    _fill(net, state, new=() if is_same_head else HEADS, surplus=() if is_same_head else HEADS)
    logger.info("weights: %s; new in this model: %s", weights, "nothing" if is_same_head else ", ".join(HEADS))
    return net


def _fill(module: nn.Module, state: Mapping[str, Tensor], new: tuple[str, ...], surplus: tuple[str, ...]) -> None:
    """Loads parameters: all but the `new` ones of the module must be there, and be used but for the `surplus`."""
    used = {name: tensor for name, tensor in state.items() if not name.startswith(surplus)}
    try:
        missing, unexpected = module.load_state_dict(used, strict=False)
    except RuntimeError as error:
        raise InputError(f"model.weights: {error}") from error
    if odd := [name for name in missing if not name.startswith(new)] + unexpected:
        raise InputError(f"model.weights: don't fit the model: {', '.join(odd[:6])} are missing or not known to it")
