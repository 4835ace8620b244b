"""Weights that a model starts from, and files that it leaves, in transformers' layout; what its families share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from raysseg import storage
from raysseg.config import Model
from raysseg.models.base import MEAN, STD
from raysseg.schema import ClassMap, InputError

logger = logging.getLogger(__name__)
disable_progress_bar()  # of loading and saving: a small model takes no time

_KEY = "model.weights"

Config = TypeVar("Config", bound=PreTrainedConfig)
Net = TypeVar("Net", bound=PreTrainedModel)


def read_kind(weights: str, key: str = _KEY) -> str:
    """What transformers calls the model that weights are of.

    Args:
        weights: a hub id, a local folder or an s3:// URI.
        key: what errors name.

    Raises:
        InputError: no configuration lies beside them.
    """
    with naming(weights, key):
        return str(PreTrainedConfig.get_config_dict(source(weights))[0].get("model_type"))


def read_config(kind: type[Config], weights: str) -> Config:
    """The configuration that lies beside weights.

    Args:
        kind: transformers' class of it.
        weights: a hub id, a local folder or an s3:// URI.

    Raises:
        InputError: there is none, or of another model.
    """
    if (found := read_kind(weights)) != kind.model_type:
        raise InputError(f"model.weights: {weights} is a {found} model; give weights of a {kind.model_type} model")
    with naming(weights):
        config: Config = kind.from_pretrained(source(weights))
    return config


def check_size(model: Model, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raises InputError where weights are of another size than the model's; each value is told by its name."""
    if found != wanted:
        described = ", ".join(f"{name} {value}" for name, value in found.items())
        raise InputError(
            f"model.weights: {model.weights} has {described}, which is no {model.name}; "
            "name the model that the weights are of"
        )


def read_net(
    kind: type[Net],
    weights: str,
    config: PreTrainedConfig,
    classes: ClassMap,
    heads: Sequence[str],
    bias: float = 0.0,
) -> Net:
    """A net with weights, whose class layers are new where the weights are of other classes; the log says what is new.

    Args:
        kind: transformers' class of it.
        weights: as read_config.
        config: of the weights; takes over the classes.
        classes: that the net is for.
        heads: names of the linear or convolution layers that have an output a class.
        bias: what these begin with where they are new.

    Raises:
        InputError: the weights can't be loaded.
    """
    names = [config.id2label.get(i) for i in range(len(config.id2label))]
    is_same = names == list(classes.names)
    set_classes(config, classes)
    net: Net
    with naming(weights):
        net, info = kind.from_pretrained(
            source(weights), config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    for head in heads:
        if not is_same:
            layer = net.get_submodule(head)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            nn.init.normal_(layer.weight, std=0.02)  # as transformers does
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)
    _log_unused(weights, info, () if is_same else [f"{head}.{part}" for head in heads for part in ("weight", "bias")])
    return net


def set_classes(config: PreTrainedConfig, classes: ClassMap) -> None:
    """Names the classes in a configuration, which decides the size of heads."""
    config.id2label = dict(enumerate(classes.names))
    config.label2id = {name: i for i, name in enumerate(classes.names)}


def write_preprocessing(folder: Path, kind: str, size: tuple[int, int] | None, more: Mapping[str, object]) -> None:
    """Writes preprocessor_config.json, which AutoImageProcessor reads.

    Args:
        folder: of the net's files.
        kind: the class of image processor.
        size: (height, width) that images are resized to first; None: they are taken as they are.
        more: keys that this class has beside.
    """
    preprocessing = {
        "image_processor_type": kind,
        "do_resize": size is not None,
        "size": {"height": (size or (512, 512))[0], "width": (size or (512, 512))[1]},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        **more,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))


def repeated_layers(net: PreTrainedModel, more: tuple[type[nn.Module], ...] = ()) -> list[nn.Module]:
    """The layers of a net that transformers can compute twice, and those of more classes; the innermost."""
    kinds = (GradientCheckpointingLayer, *more)
    found = [module for module in net.modules() if isinstance(module, kinds)]
    return [layer for layer in found if not any(isinstance(inner, kinds) for inner in list(layer.modules())[1:])]


def source(weights: str) -> str:
    """What transformers takes: a local folder or a hub id."""
    return str(storage.fetch_files(weights)) if storage.is_remote(weights) else weights


@contextmanager
def naming(weights: str, key: str = _KEY) -> Iterator[None]:
    """Errors of loading name the weights, and the key that they are given by."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{key}: {weights} can't be loaded: {error}; "
            f"give a hub id, a folder with config.json and model.safetensors, an s3:// URI{', or null' * (key == _KEY)}"
        ) from error


def _log_unused(weights: str, info: Mapping[str, Any], made_new: Sequence[str]) -> None:
    """Says which of the weights were not used, and which of the model's are new."""
    unused = sorted(info["unexpected_keys"])
    new = sorted({*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"]), *made_new})
    logger.info("weights: %s; not used: %s; new in this model: %s", weights, listed(unused), listed(new))


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"
