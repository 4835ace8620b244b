"""A cluster as cluster/ has them: a head that takes no work, and workers that come when they are needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from benchmarks.commands import free_port
from benchmarks.nodes import LOOPBACK, TOKEN, Cluster, running
from tests.conftest import rows

ROOT = Path(__file__).parents[2]
FAKE = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
OBJECT_STORE = 300 * 2**20
NOTHING_TO_DO = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}


def _autoscaling(address: str) -> str:
    """The configuration of an autoscaler whose machines are processes here."""
    provider = {"type": "external", "module": FAKE, "head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True}
    machine = {"resources": {"CPU": 2, "object_store_memory": OBJECT_STORE}, "node_config": {}}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return json.dumps(
        {
            "cluster_name": "growing",
            "max_workers": 2,
            "idle_timeout_minutes": 10,
            "provider": {**provider, "gcs_address": address},
            "head_node_type": "ray.head.default",
            **{name: [] for name in NOTHING_TO_DO},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            "available_node_types": {
                "ray.head.default": head,
                "cpu": {**machine, "min_workers": 0, "max_workers": 2},
            },
        }
    )


@pytest.fixture
def address() -> Iterator[str]:
    """Of a head without CPUs, and an autoscaler of the second version."""
    port = free_port()
    head = f"{LOOPBACK.address(2)}:{port}"
    with TemporaryDirectory(prefix="rs-") as folder:  # short: the paths of sockets have a limit
        config = Path(folder, "autoscaling.json")
        config.write_text(_autoscaling(head))
        options = {"autoscaling-config": config}
        with running(Cluster(LOOPBACK, Path(folder), {**os.environ, **AUTOSCALER}, options, port=port)):
            yield head


def test_a_run_calls_for_machines_where_there_are_none(address: str, example: Path, tmp_path: Path) -> None:
    overrides = ["scaling={workers: 1, gpus_per_worker: 0}", "schedule.epochs=1", "data.crop=[32, 32]"]
    done = subprocess.run(
        [sys.executable, "-m", "raysseg.cli", "train", "jobs/example-segformer-semantic.yaml", *overrides],
        env={**os.environ, **TOKEN, "RAY_ADDRESS": address, "EXAMPLE": str(example), "RUNS": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "Ray 2" in done.stderr
    assert " 0 CPUs" in done.stderr  # in the beginning
    assert len(rows(str(tmp_path / "example-segformer"))) == 1
