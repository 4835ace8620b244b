"""A trained model on storage: a folder that needs nothing else. No pickle: loading a bundle runs no code."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from raysseg import storage
from raysseg.config import Inference
from raysseg.models import SegModel, load_model
from raysseg.schema import ClassMap, Task

MANIFEST = "bundle.json"


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it.

    Attributes:
        size: (height, width) that it is resized to; None: it is taken as it is.
    """

    size: tuple[int, int] | None


@dataclass(frozen=True)
class Bundle:
    """A bundle's manifest.

    Attributes:
        uri: its folder.
        task: what it segments.
        classes: what its outputs mean.
        model: name in MODELS.
        preprocessing: see Preprocessing.
        metrics: by name, such as `val/miou`.
        job: the resolved job that trained it.
        fingerprint: of the training data.
        inference: how its outputs became masks in validation.
        versions: of the packages that wrote it.
    """

    uri: str
    task: Task
    classes: ClassMap
    model: str
    preprocessing: Preprocessing
    metrics: dict[str, float]
    job: dict[str, Any]
    fingerprint: dict[str, Any]
    inference: Inference
    versions: dict[str, str]


def write(bundle: Bundle, model: SegModel) -> None:
    """Publishes a bundle at its URI: weights, configuration and preprocessing first, `bundle.json` last."""
    manifest = {key: value for key, value in asdict(bundle).items() if key != "uri"}
    manifest["inference"] = bundle.inference.model_dump(mode="json")
    with tempfile.TemporaryDirectory(prefix="raysseg-") as folder:
        model.save(Path(folder), bundle.preprocessing.size)
        storage.publish_folder(Path(folder), bundle.uri, MANIFEST, manifest)


def read(uri: str) -> Bundle:
    """Reads a bundle's manifest.

    Raises:
        StorageError: there is no whole bundle.
    """
    content: dict[str, Any] = storage.read_manifest(uri, MANIFEST)
    return Bundle(
        uri=uri,
        task=content["task"],
        classes=msgspec.convert(content["classes"], ClassMap),
        model=content["model"],
        preprocessing=Preprocessing(tuple(size) if (size := content["preprocessing"]["size"]) else None),
        metrics=content["metrics"],
        job=content["job"],
        fingerprint=content["fingerprint"],
        inference=Inference.model_validate(content["inference"]),
        versions=content["versions"],
    )


def identify(uri: str) -> str:
    """Tells bundles apart by what they hold, wherever they lie and however they scored.

    Raises:
        StorageError: there is no whole bundle.
    """
    content = {key: value for key, value in storage.read_manifest(uri, MANIFEST).items() if key != "metrics"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load(bundle: Bundle) -> SegModel:
    """The bundle's model, its files verified, on the CPU and in evaluation mode."""
    return load_model(bundle.model, storage.fetch_folder(bundle.uri, MANIFEST), bundle.classes, bundle.task).eval()


def copy(uri: str, to_uri: str, metrics: dict[str, float]) -> None:
    """Publishes a bundle once more elsewhere, file by file and the manifest last, with what is now known of it."""
    manifest = {key: value for key, value in storage.read_manifest(uri, MANIFEST).items() if key != "files"}
    storage.publish_folder(storage.fetch_folder(uri, MANIFEST), to_uri, MANIFEST, manifest | {"metrics": metrics})


def installed_versions() -> dict[str, str]:
    """Of what a bundle's outputs depend on."""
    packages = ("raysseg", "torch", "torchvision", "transformers", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
