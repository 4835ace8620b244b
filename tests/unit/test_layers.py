"""Imports point downwards, and Ray is imported by the stages alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.unit.test_recommend import fingerprint

PACKAGE = Path(__file__).parents[2] / "raysseg"
FLOORS = [  # ground first; a module imports from the floors below its own, or from its own package
    {"schema"},
    {"storage", "rle", "catalogue", "link", "section"},
    {"hosting", "space"},
    {"config"},
    {"masks", "losses", "ledger", "trackers", "search"},
    {"data", "models", "metrics"},
    {"loop", "bundle", "tiling"},
    {"checkpoint", "predictor", "report", "runtime"},
    {"standing", "findings", "conductor"},
    {"advice", "saver"},
    {"worker"},
    {"evaluate", "shard", "fingerprint", "export", "importance", "study", "labelling", "serve"},
    {"validation", "inputs", "tuning_page", "predict"},
    {"trainer", "desk", "rehearsal"},
    {"train"},
    {"place"},
    {"trial"},
    {"outcome"},
    {"tune", "submit"},
    {"cli"},
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}
MAY_IMPORT_RAY = {
    "runtime",
    "submit",
    "trainer",
    "conductor",
    "place",
    "trial",
    "tune",
    "data/stream",
    "serve/cluster",
    "serve/embeddings",
    "serve/replica",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("raysseg."):
            other = name.split(".")[1]
            assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"
        if name.split(".")[0] == "ray":
            assert str(path.relative_to(PACKAGE).with_suffix("")) in MAY_IMPORT_RAY


def test_a_job_without_workers_never_loads_ray() -> None:
    stages = "raysseg.train, raysseg.evaluate, raysseg.predict, raysseg.shard, raysseg.fingerprint"
    script = f"import sys, {stages}; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_recommending_by_a_fingerprint_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    (tmp_path / "fingerprint.json").write_text(json.dumps(asdict(fingerprint())))
    arguments = ["recommend", str(tmp_path / "fingerprint.json"), "--write-job", str(tmp_path / "job.yaml")]
    script = f"import sys; from raysseg import cli; assert cli.main({arguments}) == 0"
    heavy = "{'torch', 'ray', 'cv2', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{script}; assert not {heavy}, {heavy}"], check=True, capture_output=True)


def test_a_stage_starts_without_the_models_libraries() -> None:
    script = "import sys, raysseg.train, raysseg.evaluate; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_data_workers_start_without_torch() -> None:
    script = "import sys, raysseg.data.batches; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
