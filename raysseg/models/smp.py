"""U-Net and DeepLabV3+ of segmentation_models.pytorch, over any of its encoders and timm's.

U-Net is Ronneberger et al. 2015 with an encoder that can be pretrained; DeepLabV3+ is Chen et al. 2018.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raysseg import storage
from raysseg.config import Inference, Loss, Model
from raysseg.masks import View
from raysseg.models.base import MEAN, STD, Images, Outputs, SegModel, Targets, to_label_map
from raysseg.models.dense import DenseLoss
from raysseg.schema import ClassMap, InputError, Task

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, PREPROCESSING = "model.safetensors", "config.json", "preprocessor_config.json"
Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation of an encoder's images, of the range 0 to 1."""
STRIDE = 32  # of the deepest features that any encoder has
MIN_SIDE = 2 * STRIDE  # BatchNorm can't train on one value, which 32 pixels would come to
HEAD = "segmentation_head."


class Kind(NamedTuple):
    """What a name stands for: the class of smp, the default encoder, and the widths of U-Net's decoder."""

    architecture: str
    encoder: str
    settings: Mapping[str, Any] = {}


KINDS = {
    "unet": Kind("Unet", "resnet34"),
    "unet-tiny": Kind("Unet", "tu-test_resnet", {"decoder_channels": (64, 48, 32, 24, 16)}),
    "deeplabv3plus": Kind("DeepLabV3Plus", "resnet34"),
}


class Smp(SegModel):
    """One of smp's nets with the house's losses; images of any size are padded for it, logits are of their size."""

    is_exportable = True
    head_prefixes = ("net.decoder.", "net.segmentation_head.")
    backbone_prefixes = ("net.encoder.",)

    def __init__(
        self,
        net: smp.base.SegmentationModel,
        classes: ClassMap,
        loss: Loss,
        class_weights: Sequence[float] | None = None,
        statistics: Statistics = (MEAN, STD),
    ) -> None:
        super().__init__(classes, "semantic", *statistics)
        self.net = net
        self.criterion = DenseLoss(classes, loss, class_weights)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Class-weighted labelled pixels, and images."""
        return self.criterion.normalisers(targets)

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """See SegModel."""
        assert isinstance(images, Tensor)
        height, width = images.shape[-2:]
        if isinstance(self.net, smp.DeepLabV3Plus):
            _guard_pooling(self.net, self.training and len(images) > 1)
        logits = self.net(_padded(self.normalise(images)))[..., :height, :width]
        return Outputs({"logits": logits}, self.criterion(logits, targets, normalisers) if targets is not None else {})

    def decode(self, outputs: Outputs, sizes: Sequence[tuple[int, int]], inference: Inference) -> list[View]:
        """One label map an image, at its (height, width)."""
        pairs = zip(outputs.values["logits"], sizes, strict=True)
        return [to_label_map(logits, size, self.classes) for logits, size in pairs]

    def class_scores(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        """Softmax over the logits at this size."""
        logits = outputs.values["logits"].float()
        return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1)

    def save(self, folder: Path, size: tuple[int, int] | None) -> None:
        """Writes smp's files; `smp.from_pretrained(folder)` reads them, and takes sides that are multiples of 32."""
        self.net.save_pretrained(folder)
        (folder / "README.md").unlink()  # smp's model card; it would put the user's model under smp's licence
        config = json.loads((folder / CONFIG).read_text())
        names = list(self.classes.names)  # smp leaves keys with an underscore alone
        (folder / CONFIG).write_text(json.dumps({**config, "_class_names": names}, indent=2))
        preprocessing = {
            "do_resize": size is not None,
            "size": {"height": size[0], "width": size[1]} if size is not None else None,
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": (self.mean / 255).flatten().tolist(),
            "image_std": (self.std / 255).flatten().tolist(),
        }
        (folder / PREPROCESSING).write_text(json.dumps(preprocessing, indent=2))


def _padded(images: Tensor) -> Tensor:
    """Images with their right and lower edges repeated, so that every stage of an encoder halves them evenly."""
    # as sums of positive numbers: ONNX, other than Python, divides negative ones towards zero
    height, width = (max(MIN_SIDE, (side + STRIDE - 1) // STRIDE * STRIDE) for side in images.shape[-2:])
    below, right = height - images.shape[-2], width - images.shape[-1]
    if not (torch.compiler.is_exporting() or below or right):  # a graph for any size always pads
        return images
    return nn.functional.pad(images, (0, right, 0, below), mode="replicate")


def _guard_pooling(net: smp.DeepLabV3Plus, has_statistics: bool) -> None:
    """The pooled branch has one value a channel and image: of one image, its BatchNorm takes the running statistics.

    SyncBatchNorm needs no help, since it counts the other ranks' images; and it would hang if a rank stayed out.
    """
    for module in net.decoder.aspp[0].convs[-1]:
        if isinstance(module, nn.BatchNorm2d):
            module.train(has_statistics)


# --- building -----------------------------------------------------------------------------------------------------


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> Smp:
    """A net for a class list, over `model.encoder`: an encoder of smp's, else any of timm's that gives features.

    `weights: imagenet` is the encoder's, which smp or timm downloads. Of weights for other classes, the last layer is
    made anew.

    Raises:
        InputError: there is no such encoder, it does not fit the net, or the weights can't be loaded or don't fit.
    """
    if model.weights is None or model.weights == "imagenet":
        encoder = find_encoder(model.encoder) if model.encoder is not None else KINDS[model.name].encoder
        net = _build_net(model.name, encoder, classes, model.weights)
        statistics = (MEAN, STD) if model.weights is None else _statistics(encoder)
    else:
        net, statistics = _from_files(model, model.weights, classes)
    _freeze_unused(net, model.name)
    return Smp(net, classes, loss, class_weights, statistics)


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> Smp:
    """The model of a bundle."""
    net, statistics = _read_net(name, folder, classes)
    return Smp(net, classes, Loss(), None, statistics)


def find_encoder(name: str) -> str:
    """What smp calls an encoder: its own names come first, timm's are taken with or without smp's `tu-` before them.

    Raises:
        InputError: neither has it.
    """
    bare = name.removeprefix("tu-")
    if name in smp.encoders.get_encoder_names():
        return name
    if timm.is_model(bare):
        return f"tu-{bare}"
    known = [*smp.encoders.get_encoder_names(), *timm.list_models()]
    near = ", ".join(difflib.get_close_matches(bare, known, n=5, cutoff=0.5)) or "resnet34, resnet50, efficientnet-b0"
    raise InputError(f"model.encoder: received {name}, which neither smp nor timm has; near to it: {near}")


def _build_net(name: str, encoder: str, classes: ClassMap, weights: str | None) -> smp.base.SegmentationModel:
    """A net with random weights, but for an encoder that was trained on ImageNet."""
    kind = KINDS[name]
    given: bool | str | None = weights if weights is None or not encoder.startswith("tu-") else True
    settings = {"encoder_name": encoder, "classes": len(classes), **kind.settings}
    try:
        net = getattr(smp, kind.architecture)(encoder_weights=given, **settings)
    except OSError as error:
        raise InputError(
            f"model.weights: {weights}: can't be downloaded for the encoder {encoder}: {error}; "
            "give a folder or an s3:// URI with weights of the whole net, or null"
        ) from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"model.encoder: {encoder} can't be used for {name}: {error}; take another one") from error
    net.config["encoder_weights"] = None  # else smp downloads them before it reads the saved ones
    return net


def _statistics(encoder: str) -> Statistics:
    """Of the images that an encoder was trained on."""
    found = smp.encoders.get_preprocessing_params(encoder)
    if found["input_space"] != "RGB":
        raise InputError(f"model.encoder: {encoder} was trained on {found['input_space']} images; take another one")
    top = found["input_range"][1]
    return [value / top for value in found["mean"]], [value / top for value in found["std"]]


def _read_net(name: str, folder: Path, classes: ClassMap) -> tuple[smp.base.SegmentationModel, Statistics]:
    """A net from smp's files, and its images' statistics; the last layer is new for other classes.

    smp's own `from_pretrained` prints to stdout, which is for results, and takes pickles where there is nothing else.
    """
    config = json.loads((folder / CONFIG).read_text())
    state = load_file(folder / WEIGHTS)
    if config.get("_model_class") != KINDS[name].architecture:
        raise InputError(f"model.weights: {folder} is of {config.get('_model_class')}, which is no {name}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    fixed = {"encoder_weights": None, "classes": len(classes), "activation": None, "aux_params": None}
    net = getattr(smp, KINDS[name].architecture)(**{**settings, **fixed})
    is_same_head = config.get("_class_names") == list(classes.names)
    dropped = ("classification_head.",) if is_same_head else ("classification_head.", HEAD)
    used = {key: tensor for key, tensor in state.items() if not key.startswith(dropped)}
    missing, unexpected = net.load_state_dict(used, strict=False)
    if odd := [key for key in missing if is_same_head or not key.startswith(HEAD)] + unexpected:
        raise InputError(f"model.weights: don't fit {config['encoder_name']}: {', '.join(odd[:6])}")
    logger.info("weights: %s; new in this model: %s", folder, "nothing" if is_same_head else HEAD)
    content = json.loads(path.read_text()) if (path := folder / PREPROCESSING).is_file() else {}
    return net, (content.get("image_mean", MEAN), content.get("image_std", STD))


def _from_files(model: Model, weights: str, classes: ClassMap) -> tuple[smp.base.SegmentationModel, Statistics]:
    """A net from a folder, S3 or the hub."""
    try:
        if storage.is_remote(weights) or Path(weights).is_dir():
            folder = storage.fetch_files(weights)
        else:
            folder = Path(snapshot_download(weights, allow_patterns=[CONFIG, WEIGHTS, PREPROCESSING]))
        net, statistics = _read_net(model.name, folder, classes)
    except (OSError, HFValidationError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(
            f"model.weights: {weights} can't be loaded: {error}; give imagenet, a hub id, or a folder or an s3:// URI "
            f"with {CONFIG} and {WEIGHTS}, or null"
        ) from error
    encoder = net.config["encoder_name"]
    if model.encoder is not None and find_encoder(model.encoder) != encoder:
        raise InputError(
            f"model.encoder: received {model.encoder}, but {weights} has {encoder}; leave one of the two out"
        )
    return net, statistics


def _freeze_unused(net: smp.base.SegmentationModel, name: str) -> None:
    """Freezes the parameters that a pass does not reach, since DDP waits for a gradient of every other one.

    Raises:
        InputError: the encoder does not fit the net, or takes images of one size alone.
    """
    net.eval()
    try:
        net(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE)).sum().backward()
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        encoder = net.config["encoder_name"]
        raise InputError(f"model.encoder: {encoder} can't be used for {name}: {error}; take another one") from error
    net.train()
    unused = [key for key, parameter in net.named_parameters() if parameter.grad is None]
    for key, parameter in net.named_parameters():
        if key in unused:
            parameter.requires_grad_(False)
    net.zero_grad(set_to_none=True)
    if unused:
        logger.info("parameters that %s does not use stay as they are: %s", name, ", ".join(unused))
