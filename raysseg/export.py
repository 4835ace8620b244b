"""A bundle as an ONNX graph: images in, logits of their size out, for runtimes without torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysseg import bundle as bundles
from raysseg import storage
from raysseg.config import MIN_SIDE, ExportJob
from raysseg.data.classes import to_class_list
from raysseg.models import Outputs, SegModel
from raysseg.schema import InputError

logger = logging.getLogger(__name__)

_TRACED = (2, 3, 128, 192)  # sizes that stand for any others: no two alike, none 1
_ODD = (93, 157)  # (height, width) at which a graph for any size is tried
_TOLERANCE = 1e-3  # of the largest logit


@dataclass(frozen=True)
class ExportResult:
    """What `raysseg export` prints.

    Attributes:
        name: of the job.
        bundle: whose model it is.
        output: the ONNX file.
        opset: version of its operators.
        images: its input, uint8 RGB; names stand for sizes that are not fixed.
        logits: its output, float32.
        difference: the largest between its logits, by onnxruntime, and torch's, on one image of noise.
    """

    name: str
    bundle: str
    output: str
    opset: int
    images: list[int | str]
    logits: list[int | str]
    difference: float


class _Graph(nn.Module):
    """What is exported: normalising included, and logits scaled to the images' size as `decode` does."""

    def __init__(self, model: SegModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) uint8
        outputs: Outputs = self.model(images)
        logits = outputs.values["logits"].float()
        return nn.functional.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def export(job: ExportJob) -> ExportResult:
    """Runs an export job. The file's metadata say what its classes are and how images are resized first.

    Raises:
        InputError: the packages are missing, the model has no such graph, or none that gives torch's logits.
        StorageError: there is no whole bundle, or the output can't be written.
    """
    _require_onnx()
    bundle = bundles.read(job.bundle)
    model = bundles.load(bundle)
    if not model.is_exportable:
        raise InputError(
            f"bundle: {job.bundle} holds {bundle.model} for the task {bundle.task}, which has no graph from images to "
            "logits; allowed: semantic models that score every pixel, such as segformer-b0"
        )
    data = to_onnx(model, job.opset, job.size, _properties(bundle, job.size))
    found, expected = _tried(data, model, job.size or _ODD)
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else math.inf
    if difference > _TOLERANCE * np.abs(expected).max():  # exporters can go wrong without a word
        raise InputError(
            f"size: the graph's logits are off by {difference:g} at {list(job.size or _ODD)}, so it was not written; "
            + ("fix one, such as size=[512, 512]" if job.size is None else "try another opset, or versions of torch")
        )
    storage.write_bytes(job.file_uri, data)
    logger.info("export: %.1f MiB", len(data) / 2**20)
    size: list[int | str] = list(job.size) if job.size is not None else ["height", "width"]
    return ExportResult(
        name=job.name,
        bundle=job.bundle,
        output=job.file_uri,
        opset=job.opset,
        images=["batch", 3, *size],
        logits=["batch", len(bundle.classes), *size],
        difference=difference,
    )


def to_onnx(model: SegModel, opset: int, size: tuple[int, int] | None, properties: Mapping[str, str]) -> bytes:
    """A model in evaluation mode as an ONNX file: `images` (B, 3, H, W) uint8 to `logits` (B, C, H, W) float32.

    Args:
        model: with `is_exportable`.
        opset: version of ONNX's operators.
        size: (height, width) that are fixed; None: any.
        properties: for the file's `metadata_props`.

    Raises:
        InputError: the exporter can't keep height and width open, or does not know the version.
    """
    import onnx

    dim = torch.export.Dim
    shape: dict[int, Any] = {0: dim("batch")}
    if size is None:
        shape |= {2: dim("height", min=MIN_SIDE), 3: dim("width", min=MIN_SIDE)}
    images = torch.zeros(*_TRACED[:2], *(size or _TRACED[2:]), dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            _Graph(model).eval(),
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": shape},
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        if size is not None:
            raise
        raise InputError(
            "size: this model's graph can't be exported for images of any size; fix one, such as size=[512, 512]"
        ) from error
    assert program is not None
    proto = program.model_proto
    written = next(entry.version for entry in proto.opset_import if not entry.domain)
    if written != opset:  # the exporter leaves what it can't convert as it was
        raise InputError(f"opset: received {opset}; this torch and onnxscript write {written}, and don't convert to it")
    onnx.helper.set_model_props(proto, dict(properties))
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    return data


def _tried(data: bytes, model: SegModel, size: tuple[int, int]) -> tuple[npt.NDArray[np.float32], ...]:
    """The logits of an image of noise by onnxruntime and by torch."""
    import onnxruntime

    noise = np.random.default_rng(0).integers(0, 256, (1, 3, *size), dtype=np.uint8)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        return session.run(["logits"], {"images": noise})[0], _Graph(model)(torch.from_numpy(noise)).numpy()


def _properties(bundle: bundles.Bundle, size: tuple[int, int] | None) -> dict[str, str]:
    """What a program must know to use the graph; JSON but for words."""
    return {
        "raysseg.task": bundle.task,
        "raysseg.model": bundle.model,
        "raysseg.classes": json.dumps(to_class_list(bundle.classes)),
        "raysseg.size": json.dumps(size or bundle.preprocessing.size),
        "raysseg.versions": json.dumps(bundle.versions),
    }


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"export: the package {error.name} is missing; install it by: pip install 'raysseg[export]'"
        ) from error
