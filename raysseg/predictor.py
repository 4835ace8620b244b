"""From images to masks, with a bundle: the one way in for evaluation, prediction and serving."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raysseg import bundle as bundles
from raysseg import tiling
from raysseg.config import MIN_SIDE, Inference, Precision
from raysseg.data.augment import Windowed, resize_image
from raysseg.data.batches import Pair
from raysseg.data.decode import Pixels
from raysseg.data.index import Failure
from raysseg.masks import IdMap, LabelMap, View
from raysseg.models import Outputs, SegModel
from raysseg.models.base import resolve_precision
from raysseg.schema import InputError
from raysseg.tiling import Block, Grid, Labelled


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
        inference: how outputs become masks; keys that are not set are as the bundle was validated.

    Raises:
        InputError: `inference` has keys that this model has no place for.
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
        self._inference = resolve_inference(self.bundle, inference)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = bundles.load(self.bundle).to(self._device)
        self._dtype = resolve_precision(precision, self._device)

    @property
    def is_on_gpu(self) -> bool:
        """Whether batches gain anything."""
        return self._device.type != "cpu"

    @property
    def sees_whole_images(self) -> bool:
        """Whether what goes through the model grows with the image: it is neither resized nor cut into tiles."""
        return self.bundle.preprocessing.size is None and self._inference.tile is None

    def predict(self, images: Sequence[Pixels | Windowed]) -> list[View]:
        """Segments images, each (H, W, 3) uint8 RGB of any size; masks are of the images' own sizes."""
        return predict(self._model, images, self.bundle.preprocessing.size, self._dtype, self._inference)

    def input_size(self, image: Pixels | Windowed) -> tuple[int, int]:
        """The (height, width) at which the model sees an image; of several `scales`, the largest."""
        return _input_size(image.shape, self.bundle.preprocessing.size, max(self._inference.scales))

    def batch_key(self, image: Pixels | Windowed) -> Hashable:
        """Images of one key go through the model at once; those that it looks at more than once go alone."""
        if not self._inference.is_plain:
            return object()
        return None if self._model.takes_any_sizes else self.input_size(image)

    def grid(self, size: tuple[int, int]) -> Grid:
        """The tiles of an image of a (height, width), and the blocks that it can be cut into."""
        return Grid(size, self._inference.tile, self._inference.overlap)

    def iter_labels(self, image: Pixels | Windowed, block: Block | None = None) -> Iterator[Labelled]:
        """Segments one image of any size a window at a time; with `tile`, what is held does not grow with the image.

        Args:
            image: (H, W, 3) RGB; all that is asked of it is its shape and `image[rows, columns]`.
            block: of the image's grid; default: all of them in turn.

        Returns:
            Class indices with their place; together they cover the block, and are the same to the bit for any cut
            into blocks, on one kind of device with one number of threads.

        Raises:
            InputError: the model is not semantic.
        """
        if self.bundle.task != "semantic":
            raise InputError(
                f"task: the bundle {self.bundle.uri} segments for {self.bundle.task!r}; images go by windows through "
                "semantic models alone: call `predict`"
            )
        size, dtype, blocks = self.bundle.preprocessing.size, self._dtype, [block] if block is not None else None
        return iter_labels(self._model, image, size, dtype, self._inference, blocks)

    def logits(self, image: Pixels) -> Tensor:
        """A semantic model's raw output for one image, (1, C, h, w)."""
        size = _input_size(image.shape, self.bundle.preprocessing.size)
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=_is_mixed(self._dtype)):
            outputs: Outputs = self._model(_to_tensor([image], size, self._device))
            return outputs.values["logits"]


def kept_predictor(bundle_uri: str, precision: Precision, inference: Inference) -> Predictor:
    """A bundle's predictor; the last one of a process is kept, for as long as the bundle stays what it is."""
    return _load_predictor(bundle_uri, bundles.identify(bundle_uri), precision, inference)


@lru_cache(maxsize=1)
def _load_predictor(bundle_uri: str, identity: str, precision: Precision, inference: Inference) -> Predictor:
    return Predictor(bundle_uri, precision=precision, inference=inference)


def predict(
    model: SegModel,
    images: Sequence[Pixels | Windowed],
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
        inference: how outputs become masks; what is not plain has its place with semantic models only.
    """
    if not inference.is_plain:
        return [_assemble(iter_labels(model, image, size, dtype, inference), image, model) for image in images]
    model.set_limits(inference)
    device = next(model.parameters()).device
    together: dict[tuple[int, int] | None, list[int]] = {}
    for i, image in enumerate(images):
        together.setdefault(None if model.takes_any_sizes else _input_size(image.shape, size), []).append(i)
    out: dict[int, View] = {}
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=_is_mixed(dtype)):
        for input_size, places in together.items():
            chosen = [images[i][:, :] for i in places]
            if input_size is not None:
                outputs = model(_to_tensor(chosen, input_size, device))
            else:
                outputs = model([_to_tensor([image], _input_size(image.shape, size), device)[0] for image in chosen])
            sizes = [(images[i].shape[0], images[i].shape[1]) for i in places]
            out |= zip(places, model.decode(outputs, sizes, inference), strict=True)
    return [out[i] for i in range(len(images))]


def iter_labels(
    model: SegModel,
    image: Pixels | Windowed,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    inference: Inference,
    blocks: Sequence[Block] | None = None,
) -> Iterator[Labelled]:
    """Segments one image with a semantic model, a window at a time; see `Predictor.iter_labels`.

    Args:
        model: on its device, in evaluation mode.
        image: (H, W, 3) RGB.
        size: (height, width) that images are resized to first; None, which tiles ask for: as they are.
        dtype: of the forward pass.
        inference: tiles and views.
        blocks: of the image's grid; default: all.
    """
    assert inference.misfit(model.task, size) is None, inference
    grid = Grid((image.shape[0], image.shape[1]), inference.tile, inference.overlap)
    score = partial(class_scores, model, size=size, dtype=dtype, inference=inference)
    device = next(model.parameters()).device
    for block in grid.blocks() if blocks is None else blocks:
        yield from tiling.iter_labels(image, grid, block, score, model.classes, inference.blend, device)


def class_scores(
    model: SegModel, image: Pixels, size: tuple[int, int] | None, dtype: torch.dtype, inference: Inference
) -> Tensor:
    """A semantic model's probabilities for an image or tile (H, W, 3), averaged over its views: (C, H, W) float32.

    A view is the image at one of `scales`, as it is and, with `flip`, in the mirror; each goes through on its own.
    """
    device = next(model.parameters()).device
    height, width = image.shape[:2]
    views = [(scale, is_flipped) for scale in inference.scales for is_flipped in (False, True)[: 1 + inference.flip]]
    total = torch.zeros(())
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=_is_mixed(dtype)):
        for i, (scale, is_flipped) in enumerate(views):
            images = _to_tensor([image], _input_size(image.shape, size, scale), device)
            outputs = model(images.flip(-1) if is_flipped else images)
            scores = model.class_scores(outputs, (height, width))[0].float()
            scores = scores.flip(-1) if is_flipped else scores
            total = total.add_(scores) if i else scores
        return total.div_(len(views)) if len(views) > 1 else total


def resolve_inference(bundle: bundles.Bundle, inference: Inference | None) -> Inference:
    """How a bundle's outputs become masks: the keys that are set, and the others as it was validated.

    Raises:
        InputError: a key has no place with this model.
    """
    resolved = inference.over(bundle.inference) if inference is not None else bundle.inference
    if misfit := resolved.misfit(bundle.task, bundle.preprocessing.size):
        raise InputError(f"inference.{misfit[0]}: {misfit[1]}")
    return resolved


def predict_pairs(
    predict_images: Callable[[list[Pixels]], list[View]], batches: Iterable[Sequence[Pair | Failure]]
) -> Iterator[list[Predicted | Failure]]:
    """Batches of ground truth with their predictions beside them; a failure keeps its place."""
    for pairs in batches:
        predictions = iter(predict_images([pair.image for pair in pairs if isinstance(pair, Pair)]))
        yield [Predicted(pair, next(predictions)) if isinstance(pair, Pair) else pair for pair in pairs]


def _is_mixed(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _assemble(parts: Iterable[Labelled], image: Pixels | Windowed, model: SegModel) -> LabelMap:
    labels: IdMap = np.empty(image.shape[:2], model.classes.dtype)
    for rows, columns, part in parts:
        labels[rows, columns] = part
    return LabelMap(labels, model.classes.ignore)


def _input_size(shape: tuple[int, ...], size: tuple[int, int] | None, scale: float = 1.0) -> tuple[int, int]:
    """The size of an image in the model: the bundle's, or its own, enlarged where a side is too short for models."""
    if size is not None and scale == 1:
        return size
    height, width = (max(round(side * scale), MIN_SIDE) for side in size or shape[:2])
    return height, width


def _to_tensor(images: Sequence[Pixels], size: tuple[int, int], device: torch.device) -> Tensor:
    """Images of any size as (B, 3, H, W) uint8 of one."""
    resized = [resize_image(image, size) for image in images]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in resized]).to(device).contiguous()
