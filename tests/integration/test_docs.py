"""The Python of README and the docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_python_of_readme_and_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    for name in ("EXAMPLE", "RUNS", "BUNDLE", "OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 12
    exec(compile(block, "README.md", "exec"), {})
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "runs/example-segformer/bundle/model.safetensors").exists()
    for page in sorted((ROOT / "docs").glob("*.md")):  # with what README's has left behind
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, page.name, "exec"), {})
