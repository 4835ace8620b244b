"""Segment Anything (Kirillov et al. 2023) and its kin, transformers' own: embed an image once, prompt it many times."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from torchvision.ops import nms
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from raysseg import rle
from raysseg.config import Precision
from raysseg.masks import MaskSet
from raysseg.models.base import MEAN, STD, Regions, resolve_precision
from raysseg.models.pretrained import listed, naming, read_kind, source
from raysseg.schema import InputError, Prompt

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""
Part = Literal["encoder", "decoder"]

_FULL_PIXELS = 2**23
"""Of masks at full size that are held at a time, as float32."""
_NUM_TOGETHER = 16
"""Prompts that go through the decoder at a time; each takes some 30 MB there."""


class Family(NamedTuple):
    """What sets the models of one kind apart.

    Attributes:
        net: the name of transformers' class.
        features: names of what the encoder gives, that of the image's embedding first.
        is_square: whether images are squeezed to a square; else their longer side is scaled, and the rest padded.
        mean: of images in the range 0 to 1.
        std: likewise.
        section: of the configuration that the net's own is, where the weights are a larger model's.
    """

    net: str
    features: tuple[str, ...]
    is_square: bool
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    section: str | None = None


_PYRAMID = ("image", "double", "quadruple")  # by their side
_HALF = (0.5, 0.5, 0.5)

FAMILIES: dict[str, Family] = {
    "sam": Family("SamModel", ("image",), is_square=False),
    "sam_hq": Family("SamHQModel", ("image", "early"), is_square=False),
    "sam2": Family("Sam2Model", _PYRAMID, is_square=True),
    "sam2_video": Family("Sam2Model", _PYRAMID, is_square=True),
    "sam3_tracker": Family("Sam3TrackerModel", _PYRAMID, is_square=True, mean=_HALF, std=_HALF),
    "sam3_video": Family("Sam3TrackerModel", _PYRAMID, True, _HALF, _HALF, section="tracker_config"),
}
"""By what transformers calls the model that weights are of."""


@dataclass(frozen=True)
class Embedding:
    """What an encoder makes of an image; all that its decoder needs to know of it.

    Attributes:
        features: by name, each (C, h, w) float16.
        size: (height, width) of the image.
    """

    features: Mapping[str, npt.NDArray[np.float16]]
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(array.nbytes for array in self.features.values())


@dataclass(frozen=True)
class Automatic:
    """How `PromptModel.everything` finds its masks; the defaults are those of SAM's authors.

    Attributes:
        points_per_side: of a grid over the image, each of which is a prompt.
        pred_iou: masks that the model itself scores below are dropped.
        stability: so are those whose IoU between a stricter and a laxer threshold is below this.
        stability_offset: how much stricter and laxer, in logits.
        nms: of two masks whose boxes overlap by more (IoU), the one with the lower score is dropped.
        min_region: holes and islands of fewer pixels are filled and removed; 0: none.
        batch: prompts that go through the decoder at a time.

    Raises:
        InputError: a value that can't be.
    """

    points_per_side: int = 32
    pred_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    nms: float = 0.7
    min_region: int = 0
    batch: int = _NUM_TOGETHER

    def __post_init__(self) -> None:
        for name, least in (("points_per_side", 1), ("batch", 1), ("min_region", 0), ("stability_offset", 0)):
            if getattr(self, name) < least:
                raise InputError(f"automatic.{name}: {getattr(self, name)}; allowed: {least} or more")
        for name in ("pred_iou", "stability", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"automatic.{name}: {getattr(self, name)}; allowed: 0 to 1")


class Found(NamedTuple):
    """Masks that `everything` may keep: boxes (N, 4), as RLE, and scores (N,)."""

    boxes: npt.NDArray[np.float64]
    rles: list[bytes]
    scores: npt.NDArray[np.floating]


class PromptModel:
    """A prompted model, or one half of it; inference only.

    Args:
        weights: a hub id, a local folder or an s3:// URI; of a SAM, HQ-SAM, SAM 2 or SAM 3.
        device: torch's name of it; default: the GPU where there is one, else the CPU.
        precision: of the forward passes; prompts are always encoded in fp32.
        parts: what is held in memory: the encoder serves `embed`, the decoder all else.

    Raises:
        InputError: the weights can't be loaded, or are of another model.
    """

    def __init__(
        self,
        weights: str,
        *,
        device: str | None = None,
        precision: Precision = "auto",
        parts: Sequence[Part] = ("encoder", "decoder"),
    ) -> None:
        kind = read_kind(weights, "weights")
        if kind not in FAMILIES:
            raise InputError(
                f"weights: {weights} is a {kind} model; give weights of a prompted one ({', '.join(FAMILIES)}), "
                "such as facebook/sam-vit-base"
            )
        self._family = FAMILIES[kind]
        self._parts = frozenset(parts)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = resolve_precision(precision, self._device)
        self._net = _read_net(weights, self._family, self._parts).to(self._device).eval()
        self._side: int = self._net.prompt_encoder.input_image_size
        with torch.inference_mode():
            self._positions: Tensor = self._net.get_image_wide_positional_embeddings()

    def embed(self, image: Pixels) -> Embedding:
        """What the encoder makes of an image, (H, W, 3) uint8 RGB of any size."""
        assert "encoder" in self._parts, self._parts
        with torch.inference_mode(), self._autocast():
            found = self._net.get_image_embeddings(self._to_input(image))
        if isinstance(found, Tensor):
            maps = [found]
        elif "early" in self._family.features:
            maps = [found[0], found[1][0].permute(0, 3, 1, 2)]  # HQ's decoder looks at the first of them alone
        else:
            maps = found[::-1]
        arrays = [values[0].half().contiguous().cpu().numpy() for values in maps]
        return Embedding(dict(zip(self._family.features, arrays, strict=True)), (image.shape[0], image.shape[1]))

    def prompt(self, embedding: Embedding, prompt: Prompt) -> MaskSet:
        """The masks that a prompt may mean, at the image's size, that of the best score first.

        Raises:
            InputError: the prompt does not fit the image.
        """
        return self.prompt_many(embedding, [prompt])[0]

    def prompt_many(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[MaskSet]:
        """As `prompt`, for several prompts of one image; those of a kind go through the decoder together."""
        for prompt in prompts:
            prompt.check(embedding.size)
        together: dict[tuple[int, bool, bool, bool], list[int]] = {}
        for i, prompt in enumerate(prompts):  # padding would change what the decoder sees
            kind = (len(prompt.points), prompt.box is None, prompt.mask is None, prompt.is_multimask)
            together.setdefault(kind, []).append(i)
        features = self._to_features(embedding)
        out: dict[int, MaskSet] = {}
        for places in together.values():
            for start in range(0, len(places), _NUM_TOGETHER):
                chosen = places[start : start + _NUM_TOGETHER]
                logits, scores = self._decode(features, [prompts[i] for i in chosen], embedding.size)
                for i, own, score in zip(chosen, logits, scores.cpu(), strict=True):
                    parts = [(full > 0).cpu().numpy() for full in self._iter_full(own, embedding.size)]
                    rles = [encoded for part in parts for encoded in rle.from_masks(part)]
                    out[i] = _to_mask_set(embedding.size, rles, score.numpy())
        return [out[i] for i in range(len(prompts))]

    def everything(self, embedding: Embedding, automatic: Automatic | None = None) -> MaskSet:
        """The masks of all that a grid of points finds, that of the best score first; none of them is empty.

        As SamAutomaticMaskGenerator of SAM's authors, without crops of the image.
        """
        automatic = automatic or Automatic()
        return to_best(list(self.iter_found(embedding, automatic)), embedding.size, automatic)

    def iter_found(self, embedding: Embedding, automatic: Automatic) -> Iterator[list[Found]]:
        """What the grid finds, a batch of its points at a time; `to_best` makes of it what `everything` returns."""
        height, width = embedding.size
        features = self._to_features(embedding)
        axis = (np.arange(automatic.points_per_side) + 0.5) / automatic.points_per_side
        prompts = [Prompt(points=((x * width, y * height),), labels=(1,)) for y in axis for x in axis]
        for start in range(0, len(prompts), automatic.batch):
            logits, scores = self._decode(features, prompts[start : start + automatic.batch], embedding.size)
            yield list(self._iter_certain(logits.flatten(0, 1), scores.flatten(0, 1), embedding.size, automatic))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _input_size(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """What an image of this (height, width) takes of a square of so many pixels."""
        if self._family.is_square:
            return side, side
        height, width = (max(1, int(length * side / max(size) + 0.5)) for length in size)
        return height, width

    def _to_input(self, image: Pixels) -> Tensor:
        """An image as the encoder takes it, (1, 3, side, side); resized as torchvision does."""
        size = self._input_size((image.shape[0], image.shape[1]), self._side)
        pixels = torch.tensor(image).permute(2, 0, 1)[None].to(self._device)
        if pixels.shape[2:] != size:
            if self._device.type != "cpu":  # uint8 is for the CPU alone
                pixels = pixels.float()
            pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (self._family.mean, self._family.std))
        normalised = (pixels.float().round() - 255 * mean) / (255 * std)
        return nn.functional.pad(normalised, (0, self._side - size[1], 0, self._side - size[0]))

    def _to_features(self, embedding: Embedding) -> dict[str, Tensor]:
        """Each (1, C, h, w) float32."""
        assert "decoder" in self._parts, self._parts
        return {name: torch.tensor(a, device=self._device)[None].float() for name, a in embedding.features.items()}

    def _decode(
        self, features: Mapping[str, Tensor], prompts: Sequence[Prompt], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Logits (P, M, h, w) and scores (P, M) of prompts of one kind: all with a box or none, and so on."""
        # prompts share the image as a row, (1, P, ...); with masks each has a row of its own, (P, 1, ...)
        rows = len(prompts) if prompts[0].mask is not None else 1
        own = {name: values.expand(rows, -1, -1, -1) for name, values in features.items()}
        more: dict[str, Any] = {}
        if "early" in own:
            more = {"hq_token_only": False, "intermediate_embeddings": [own["early"].permute(0, 2, 3, 1)]}
        elif "double" in own:
            more = {"high_resolution_features": [own["quadruple"], own["double"]]}
        with torch.inference_mode():
            sparse, dense = self._net.prompt_encoder(*self._to_prompts(prompts, size, rows))
            with self._autocast():
                logits, scores, *_ = self._net.mask_decoder(
                    image_embeddings=own["image"],
                    image_positional_embeddings=self._positions.expand(rows, -1, -1, -1),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=prompts[0].is_multimask,
                    **more,
                )
        return logits.flatten(0, 1).float(), scores.flatten(0, 1).float()

    def _to_prompts(
        self, prompts: Sequence[Prompt], size: tuple[int, int], rows: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Points, labels, boxes and masks of prompts of one kind, as their encoder takes them."""
        columns = len(prompts) // rows
        height, width = self._input_size(size, self._side)
        scale = torch.tensor([width / size[1], height / size[0]], dtype=torch.float64)
        points = labels = boxes = masks = None
        if prompts[0].points:
            pixels = torch.tensor([prompt.points for prompt in prompts], dtype=torch.float64)
            points = (pixels * scale).float().view(rows, columns, -1, 2).to(self._device)
            labels = torch.tensor([prompt.labels for prompt in prompts], device=self._device).view(points.shape[:-1])
        elif prompts[0].box is None and self._family.features == _PYRAMID:  # as SAM 2's authors: a point that is none
            points = torch.zeros(rows, columns, 1, 2, device=self._device)
            labels = torch.full((rows, columns, 1), -1, device=self._device)
        if prompts[0].box is not None:
            pixels = torch.tensor([prompt.box for prompt in prompts], dtype=torch.float64).view(-1, 2)
            boxes = (pixels * scale).float().view(rows, columns, 4).to(self._device)
        if prompts[0].mask is not None:
            masks = torch.stack([self._to_mask_input(prompt.mask or b"", size) for prompt in prompts])
        return points, labels, boxes, masks

    def _to_mask_input(self, encoded: bytes, size: tuple[int, int]) -> Tensor:
        """A mask as low-resolution logits, (1, h, w): from -10 to 10, as SAM 2 feeds masks to its own decoder."""
        try:
            mask = rle.to_mask(rle.to_runs(encoded, size), size)
        except InputError as error:
            raise InputError(f"prompt.mask: {error}") from error
        side = 4 * self._net.prompt_encoder.image_embedding_size[0]
        height, width = self._input_size(size, side)
        share = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        logits = np.full((1, side, side), -10, np.float32)
        logits[0, :height, :width] = 20 * share - 10
        return torch.from_numpy(logits).to(self._device)

    def _iter_certain(
        self, logits: Tensor, scores: Tensor, size: tuple[int, int], automatic: Automatic
    ) -> Iterator[Found]:
        """Of logits (N, h, w) and scores (N,) what is likely, steady and not empty, a few at a time."""
        if automatic.pred_iou:
            is_likely = scores > automatic.pred_iou
            logits, scores = logits[is_likely], scores[is_likely]
        for full, score in zip(self._iter_full(logits, size), self._split(scores, size), strict=True):
            is_steady = _stability(full, automatic.stability_offset) >= automatic.stability
            masks = (full[is_steady] > 0).cpu().numpy()
            if automatic.min_region and len(masks):
                masks = np.stack([_without_specks(mask, automatic.min_region) for mask in masks])
            is_there = masks.any((1, 2))
            masks = masks[is_there]
            yield Found(_boxes(masks), rle.from_masks(masks), score[is_steady].cpu().numpy()[is_there])

    def _iter_full(self, logits: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Logits (N, h, w) at the image's (height, width), a few at a time: (n, H, W)."""
        for part in self._split(logits, size):
            full = part[None]
            if not self._family.is_square:
                full = nn.functional.interpolate(full, (self._side, self._side), mode="bilinear", align_corners=False)
                height, width = self._input_size(size, self._side)
                full = full[..., :height, :width]
            yield nn.functional.interpolate(full, size, mode="bilinear", align_corners=False)[0]

    def _split(self, values: Tensor, size: tuple[int, int]) -> Sequence[Tensor]:
        """As many of N masks, or of what belongs to them, as are held at full size at a time; none for none."""
        pixels = max(size[0] * size[1], self._side**2)
        return torch.split(values, max(1, _FULL_PIXELS // pixels)) if len(values) else ()


def _read_net(weights: str, family: Family, parts: frozenset[Part]) -> PreTrainedModel:
    """A net without what its parts don't need, which is never read from the files either."""
    kind = getattr(transformers, family.net)
    dropped = [] if "encoder" in parts else ["vision_encoder"]
    if "decoder" not in parts:  # of SAM 2's, two convolutions belong to the encoder
        heavy = ["mask_decoder.transformer", "mask_decoder.output_hypernetworks_mlps"]
        dropped += heavy if family.features == _PYRAMID else ["mask_decoder"]
    with naming(weights, "weights"):
        values = PreTrainedConfig.get_config_dict(source(weights))[0]
        values = values[family.section] if family.section else values
        config = kind.config_class.from_dict({**values, "model_type": kind.config_class.model_type})
        net, info = _without(kind, dropped).from_pretrained(
            source(weights),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    unread = sorted({*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"])})
    if unread:
        raise InputError(
            f"weights: {weights} has nothing that fits {listed(unread)} of transformers' {family.net}; "
            "give whole weights of the model that config.json describes"
        )
    return net


def _without(kind: type[PreTrainedModel], names: Sequence[str]) -> type[PreTrainedModel]:
    """A class of net that lacks some modules and does not miss their weights."""

    def build(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        kind.__init__(self, config)
        for name in names:
            self.set_submodule(name, nn.Identity())

    unused = [*(kind._keys_to_ignore_on_load_unexpected or ()), *(rf"^{re.escape(name)}\." for name in names)]
    # by its names transformers knows whether to rename the weights of larger models
    own = {"__init__": build, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": unused}
    return type(kind.__name__, (kind,), own)


def to_best(found: Sequence[Sequence[Found]], size: tuple[int, int], automatic: Automatic) -> MaskSet:
    """Of what was found in an image of a (height, width), each object once."""
    none = Found(np.zeros((0, 4)), [], np.zeros(0))
    boxes, parts, known = zip(none, *(one for some in found for one in some), strict=True)
    rles, score = [encoded for part in parts for encoded in part], np.concatenate(known)
    kept = nms(torch.from_numpy(np.concatenate(boxes)), torch.from_numpy(score), automatic.nms).tolist()
    return _to_mask_set(size, [rles[i] for i in kept], score[kept])


def _to_mask_set(size: tuple[int, int], rles: Sequence[bytes], scores: npt.NDArray[np.floating]) -> MaskSet:
    """Masks of no class, by their scores."""
    order = np.argsort(-scores, kind="stable")
    return MaskSet(
        size=size,
        rles=tuple(rles[i] for i in order),
        class_ids=np.zeros(len(order), np.int64),
        is_crowd=np.zeros(len(order), np.bool_),
        scores=scores[order].astype(np.float64).clip(0, 1),
    )


def _stability(logits: Tensor, offset: float) -> Tensor:
    """IoU of what is above the offset and what is above its negative, of each of (N, H, W)."""
    inner, outer = ((logits > threshold).sum((1, 2)) for threshold in (offset, -offset))
    return inner / outer.clamp(min=1)


def _boxes(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """x0, y0, x1, y1 of each of (N, H, W), of which none is empty; up to the last pixel, as SAM has it."""
    boxes = Regions(torch.from_numpy(masks), torch.zeros(len(masks))).boxes.numpy().astype(np.float64)
    boxes[:, 2:] -= 1
    return boxes


def _without_specks(mask: rle.Mask, smallest: int) -> rle.Mask:
    """A mask whose holes of fewer pixels are filled, and whose islands are gone, but for the largest."""
    for is_hole in (True, False):
        _, labels, stats, _ = cv2.connectedComponentsWithStats((mask ^ is_hole).view(np.uint8), connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        is_speck = areas < smallest
        if not is_hole and is_speck.all() and len(areas):
            is_speck[areas.argmax()] = False
        mask = mask ^ np.append(False, is_speck)[labels]
    return mask
