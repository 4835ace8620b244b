"""SegFormer (Xie et al. 2021), transformers' own, B0 to B5 and a tiny one for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers.models.segformer.configuration_segformer import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerForSemanticSegmentation

from raysseg.config import Inference, Loss, Model
from raysseg.masks import View
from raysseg.models.base import MEAN, STD, Images, Outputs, SegModel, Targets, to_label_map
from raysseg.models.dense import DenseLoss
from raysseg.models.pretrained import read_config, read_net, repeated_layers, set_classes, write_preprocessing
from raysseg.schema import ClassMap, InputError, Task

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

    def repeated_layers(self) -> Sequence[nn.Module]:
        """See SegModel: the encoder's blocks."""
        return repeated_layers(self.net)

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
        write_preprocessing(folder, "SegformerImageProcessor", size, {"do_reduce_labels": False})


def build(model: Model, classes: ClassMap, task: Task, loss: Loss, class_weights: Sequence[float] | None) -> SegFormer:
    """A SegFormer for a class list, from scratch or from weights whose head is rebuilt.

    Raises:
        InputError: the weights can't be loaded, or are of another size.
    """
    depths, hidden_sizes, decoder_size = SIZES[model.name]
    if model.weights is None:
        config = SegformerConfig(
            depths=depths,
            hidden_sizes=hidden_sizes,
            decoder_hidden_size=decoder_size,
            semantic_loss_ignore_index=classes.ignore,
        )
        set_classes(config, classes)
        return SegFormer(SegformerForSemanticSegmentation(config), classes, loss, class_weights)
    config = read_config(SegformerConfig, model.weights)
    if (config.depths, config.hidden_sizes) != (depths, hidden_sizes):
        raise InputError(
            f"model.weights: {model.weights} has depths {config.depths} and hidden sizes {config.hidden_sizes}, "
            f"which is no {model.name}; name the model that the weights are of"
        )
    config.semantic_loss_ignore_index = classes.ignore
    net = read_net(SegformerForSemanticSegmentation, model.weights, config, classes, ["decode_head.classifier"])
    return SegFormer(net, classes, loss, class_weights)


def load(name: str, folder: Path, classes: ClassMap, task: Task) -> SegFormer:
    """The model of a bundle."""
    return SegFormer(SegformerForSemanticSegmentation.from_pretrained(folder), classes, Loss())
