"""From images to masks, with a bundle: the one way in for evaluation, prediction and serving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raysseg import bundle as bundles
from raysseg.config import Inference, Precision
from raysseg.data.augment import resize_image
from raysseg.data.batches import Pair
from raysseg.data.decode import Pixels
from raysseg.data.index import Failure
from raysseg.loop import resolve_precision
from raysseg.masks import View
from raysseg.models import Outputs, SegModel

MIN_SIDE = 64  # pixels; SegFormer's attention reduces sides 32 times


class Predicted(NamedTuple):
    """A sample, and the prediction beside its truth; of one size."""

    pair: Pair
    prediction: View


class Predictor:
    """A bundle, ready to segment images.

    Args:
        bundle_uri: local or s3:// folder.
        device: torch's name of it; default: the GPU where there is one, else the CPU.
        precision: of the forward passes.
        inference: how outputs become masks; default: as the bundle was validated.

    Raises:
        StorageError: there is no whole bundle at the URI.
    """

    def __init__(
        self,
        bundle_uri: str,
        *,
        device: str | None = None,
        precision: Precision = "auto",
        inference: Inference | None = None,
    ) -> None:
        self.bundle = bundles.read(bundle_uri)
        self._inference = inference or self.bundle.inference
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = bundles.load(self.bundle).to(self._device)
        self._dtype = resolve_precision(precision, self._device)

    def predict(self, images: Sequence[Pixels]) -> list[View]:
        """Segments images, each (H, W, 3) uint8 RGB of any size; masks are of the images' own sizes."""
        return predict(self._model, images, self.bundle.preprocessing.size, self._dtype, self._inference)

    def logits(self, image: Pixels) -> Tensor:
        """A semantic model's raw output for one image, (1, C, h, w)."""
        size = _input_size(image, self.bundle.preprocessing.size)
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=_is_mixed(self._dtype)):
            outputs: Outputs = self._model(_to_tensor([image], size, self._device))
            return outputs.values["logits"]


def predict(
    model: SegModel,
    images: Sequence[Pixels],
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    inference: Inference,
) -> list[View]:
    """Segments images with a model in evaluation mode; images of one size go through together, or all where it can.

    Args:
        model: on its device.
        images: each (H, W, 3) uint8 RGB.
        size: (height, width) that they are resized to first; None: as they are.
        dtype: of the forward pass.
        inference: how outputs become masks.
    """
    device = next(model.parameters()).device
    together: dict[tuple[int, int] | None, list[int]] = {}
    for i, image in enumerate(images):
        together.setdefault(None if model.takes_any_sizes else _input_size(image, size), []).append(i)
    out: dict[int, View] = {}
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=_is_mixed(dtype)):
        for input_size, places in together.items():
            chosen = [images[i] for i in places]
            if input_size is not None:
                outputs = model(_to_tensor(chosen, input_size, device))
            else:
                outputs = model([_to_tensor([image], _input_size(image, size), device)[0] for image in chosen])
            sizes = [(images[i].shape[0], images[i].shape[1]) for i in places]
            out |= zip(places, model.decode(outputs, sizes, inference), strict=True)
    return [out[i] for i in range(len(images))]


def predict_pairs(
    predict_images: Callable[[list[Pixels]], list[View]], batches: Iterable[Sequence[Pair | Failure]]
) -> Iterator[list[Predicted | Failure]]:
    """Batches of ground truth with their predictions beside them; a failure keeps its place."""
    for pairs in batches:
        predictions = iter(predict_images([pair.image for pair in pairs if isinstance(pair, Pair)]))
        yield [Predicted(pair, next(predictions)) if isinstance(pair, Pair) else pair for pair in pairs]


def _is_mixed(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _input_size(image: Pixels, size: tuple[int, int] | None) -> tuple[int, int]:
    """The size of an image in the model: the bundle's, or its own, enlarged where a side is too short for models."""
    return size or (max(image.shape[0], MIN_SIDE), max(image.shape[1], MIN_SIDE))


def _to_tensor(images: Sequence[Pixels], size: tuple[int, int], device: torch.device) -> Tensor:
    """Images of any size as (B, 3, H, W) uint8 of one."""
    resized = [resize_image(image, size) for image in images]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in resized]).to(device).contiguous()
