"""`raysseg inspect` over a real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysseg.config import InspectJob
from raysseg.fingerprint import inspect


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("source_format", ["masks", "coco"])
def test_fingerprint_is_the_same_for_any_number_of_workers(example: Path, tmp_path: Path, source_format: str) -> None:
    is_coco = source_format == "coco"
    data = {
        split: {"format": source_format, "images": f"{example}/{split}/images"}
        | ({"annotations": f"{example}/{split}/instances.json"} if is_coco else {"masks": f"{example}/{split}/masks"})
        for split in ("train", "val")
    }
    raw = {"kind": "inspect", "name": "example", "data": data, "task": "instance" if is_coco else "semantic"}
    raw |= {} if is_coco else {"classes": f"{example}/classes.json"}
    files = []
    for workers in (0, 1, 2):
        storage = tmp_path / str(workers)
        inspect(InspectJob.model_validate({**raw, "storage": str(storage), "scaling": {"workers": workers}}))
        files.append((storage / "example/fingerprint.json").read_bytes())
    assert files[0] == files[1] == files[2]
