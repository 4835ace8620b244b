"""Jobs that are sent to a head with two nodes, one of which is killed with all that runs on it, and replaced.

benchmarks/bench_nodes.py does it, in network namespaces where this machine has them, else on addresses of loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.nodes import MARK, kill_marked

LIMIT_S = 560


def measured(part: str) -> dict[str, float]:
    """What a part of the benchmark has found; nothing that it has started outlives this."""
    with TemporaryDirectory(prefix="rs-") as folder:  # short: the paths of sockets have a limit
        rows, mark = Path(folder, "rows.json"), f"{folder}/"
        bound = ["setpriv", "--pdeathsig", "KILL"]  # it ends with this process, however that ends
        command = ["-m", "benchmarks.bench_nodes", "--part", part, "--folder", folder, "--rows", str(rows)]
        process = subprocess.Popen(
            [*bound, sys.executable, *command],
            env={**os.environ, MARK: mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            kill_marked(mark)
        sys.stdout.write(output)  # pytest shows it where something fails
        assert process.returncode == 0
        return {row["what"]: row["value"] for row in json.loads(rows.read_text())["rows"]}


@pytest.mark.slow
def test_a_train_job_that_loses_the_node_of_its_first_rank_uses_each_sample_once() -> None:
    found = measured("train")
    assert found["steps that the model descends from"] == 192
    assert (found["samples missing"], found["samples used twice"]) == (0, 0)
    assert found["the bundle is there"]
    assert (found["nodes of the first group"], found["nodes of the last group"]) == (2, 2)
    assert found["the new node is one of them"]
    assert found["steps done again"] <= 9, "from the middle of an epoch"


def test_requests_outlive_a_node() -> None:
    found = measured("serve")
    assert found["nodes of the model's replicas"] == 2
    assert found["requests"] > 50
    assert (found["lost after one retry"], found["wrong answers"], found["other answers than 200"]) == (0, 0, 0)
    assert found["a replica runs on the new node"]
    assert found["right answers by the new node"] == 8
