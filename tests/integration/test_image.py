"""The steps of cluster/Dockerfile that need no Docker, in a folder that stands for the image's root."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def stages() -> Iterator[list[tuple[str, str]]]:
    """Each stage's instructions, less its FROM: word and rest."""
    text = re.sub(r"^#.*\n", "", (ROOT / "cluster/Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for stage in re.split(r"^FROM .*\n", text, flags=re.MULTILINE)[1:]:
        yield [(line.split()[0], line.split(maxsplit=1)[1]) for line in stage.splitlines() if line]


class Image:
    """A folder in which instructions are carried out; absolute paths in them are below it."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.workdir = root, root
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = {**kept, "PATH": f"{python.parent}:{os.environ['PATH']}"}

    def carry_out(self, word: str, rest: str) -> None:
        rest = re.sub(r"/(opt|build|package)\b", rf"{self.root}/\1", rest)
        match word:
            case "ARG":
                self.environment.setdefault(*rest.split("="))
            case "ENV":
                self.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
            case "WORKDIR":
                self.workdir = Path(rest)
                self.workdir.mkdir(exist_ok=True)
            case "COPY":
                *sources, target = rest.split()
                for source in sources:
                    self._copy(ROOT / source, self.workdir / target)
            case "RUN":
                self.run(rest)

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["/bin/sh", "-ec", command], cwd=self.workdir, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


@pytest.mark.slow
def test_the_images_steps_make_a_raysseg_that_trains(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "python"], check=True)
    image = Image(tmp_path / "image", tmp_path / "python/bin/python")
    image.root.mkdir()
    dependencies, package, _ = stages()
    for word, rest in (*dependencies, *package):
        image.carry_out(word, rest)

    venv = image.root / "opt/venv"
    shutil.copytree(image.root / "package", venv, dirs_exist_ok=True)  # COPY --from=package /package /opt/venv
    home = tmp_path / "home"
    home.mkdir()
    image.workdir = home
    image.environment |= {"PATH": f"{venv}/bin:/usr/bin:/bin", "HOME": str(home)}
    del image.environment["VIRTUAL_ENV"]
    assert "raysseg" in image.run("raysseg --help")
    assert f"version {next(iter(pinned('ray')))}" in image.run("ray --version")
    assert not re.search("pytest|moto|mypy", " ".join(path.name for path in installed(venv)))

    image.run("raysseg example data --train 8 --val 4 --size 64 96")
    (home / "jobs").mkdir()
    shutil.copy2(ROOT / "jobs/example-segformer-semantic.yaml", home / "jobs")
    overrides = "scaling.workers=0 schedule.epochs=1 'data.crop=[64, 64]'"
    job = f"EXAMPLE=data RUNS=runs raysseg train jobs/example-segformer-semantic.yaml {overrides} --json"
    assert 0 <= json.loads(image.run(job))["metrics"]["val/miou"] <= 1

    modules = [*installed(venv, "torch/nn/*.py"), *installed(venv, "raysseg/*.py")]
    assert modules
    for module in modules:  # compiled, and taken as it is: flags 1 of PEP 552
        compiled = module.parent / f"__pycache__/{module.stem}.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"
        assert compiled.read_bytes()[4:8] == b"\1\0\0\0"


def installed(venv: Path, pattern: str = "*") -> list[Path]:
    """What its packages hold."""
    return sorted(venv.glob(f"lib/python3*/site-packages/{pattern}"))


def pinned(name: str) -> Iterator[str]:
    """The version in constraints.txt."""
    yield from re.findall(rf"^{name}==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
