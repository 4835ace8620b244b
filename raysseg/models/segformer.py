"""SegFormer (Xie et al. 2021), transformers' own, B0 to B5 and a tiny one for tests."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.models.segformer.configuration_segformer import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

from raysseg import storage
from raysseg.config import Inference, Loss, Model
from raysseg.masks import View
from raysseg.models.base import Images, Outputs, SegModel, Targets, to_label_map
from raysseg.models.dense import DenseLoss
from raysseg.schema import ClassMap, InputError, Task

logger = logging.getLogger(__name__)
disable_progress_bar()  # of loading and saving: a small model takes no time

# depths, hidden sizes, decoder width: table 6 of the paper, and one for tests
SIZES: dict[str, tuple[list[int], list[int], int]] = {
    "segformer-tiny": ([1, 1, 1, 1], [16, 32, 80, 128], 64),
    "segformer-b0": ([2, 2, 2, 2], [32, 64, 160, 256], 256),
    "segformer-b1": ([2, 2, 2, 2], [64, 128, 320, 512], 256),
    "segformer-b2": ([3, 4, 6, 3], [64, 128, 320, 512], 768),
    "segformer-b3": ([3, 4, 18, 3], [64, 128, 320, 512], 768),
    "segformer-b4": ([3, 8, 27, 3], [64, 128, 320, 512], 768),
    "segformer-b5": ([3, 6, 40, 3], [64, 128, 320, 512], 768),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as the authors


class SegFormer(SegModel):
    """SegformerForSemanticSegmentation with the house's losses."""

    head_prefixes = ("net.decode_head.",)
    is_exportable = True

    def __init__(
        self,
        net: SegformerForSemanticSegmentation,
        classes: ClassMap,
        loss: Loss,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(classes, "semantic", MEAN, STD)
        self.net = net
        self.criterion = DenseLoss(classes, loss, class_weights)

    def normalisers(self, targets: Targets) -> dict[str, Tensor]:
        """Class-weighted labelled pixels, and images."""
        return self.criterion.normalisers(targets)

    def forward(
        self, images: Images, targets: Targets | None = None, normalisers: dict[str, Tensor] | None = None
    ) -> Outputs:
        """See SegModel; logits are a quarter of the image's size."""
        assert isinstance(images, Tensor)
        logits = self.net(pixel_values=self.normalise(images)).logits
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
        """Writes transformers' files; `from_pretrained(folder)` reads them."""
        self.net.save_pretrained(folder)
        preprocessing = {
            "image_processor_type": "SegformerImageProcessor",
            "do_resize": size is not None,
            "size": {"height": (size or (512, 512))[0], "width": (size or (512, 512))[1]},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "do_reduce_labels": False,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> SegFormer:
    """A SegFormer for a class list, from scratch or from weights whose head is rebuilt.

    Raises:
        InputError: the weights can't be loaded, or are of another size.
    """
    depths, hidden_sizes, decoder_size = SIZES[model.name]
    if model.weights is None:
        config = SegformerConfig(depths=depths, hidden_sizes=hidden_sizes, decoder_hidden_size=decoder_size)
        return SegFormer(SegformerForSemanticSegmentation(_with_labels(config, classes)), classes, loss, class_weights)
    source = str(storage.fetch_files(model.weights)) if storage.is_remote(model.weights) else model.weights
    try:
        config = SegformerConfig.from_pretrained(source)
        names_before = dict(config.id2label)
        if (config.depths, config.hidden_sizes) != (depths, hidden_sizes):
            raise InputError(
                f"model.weights: {model.weights} has depths {config.depths} and hidden sizes {config.hidden_sizes}, "
                f"which is no {model.name}; name the model that the weights are of"
            )
        net, info = SegformerForSemanticSegmentation.from_pretrained(
            source, config=_with_labels(config, classes), ignore_mismatched_sizes=True, output_loading_info=True
        )
    except OSError as error:
        raise InputError(
            f"model.weights: {model.weights} can't be loaded: {error}; "
            "give a hub id, a folder with config.json and model.safetensors, an s3:// URI, or null"
        ) from error
    is_same_head = [names_before.get(i) for i in range(len(names_before))] == list(classes.names)
    if not is_same_head:
        nn.init.normal_(net.decode_head.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(net.decode_head.classifier.bias)
    _log_unused(model.weights, info, is_same_head)
    return SegFormer(net, classes, loss, class_weights)


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> SegFormer:
    """The model of a bundle."""
    return SegFormer(SegformerForSemanticSegmentation.from_pretrained(folder), classes, Loss())


def _with_labels(config: SegformerConfig, classes: ClassMap) -> SegformerConfig:
    config.id2label = dict(enumerate(classes.names))
    config.label2id = {name: i for i, name in enumerate(classes.names)}
    config.semantic_loss_ignore_index = classes.ignore
    return config


def _log_unused(weights: str, info: Mapping[str, Any], is_same_head: bool) -> None:
    """Says which of the weights were not used, and which of the model's are new."""
    unused = sorted(info["unexpected_keys"])
    new = sorted({*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"])})
    if not is_same_head:
        new = sorted({*new, "decode_head.classifier.weight", "decode_head.classifier.bias"})
    logger.info("weights: %s; not used: %s; new in this model: %s", weights, _listed(unused), _listed(new))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"
