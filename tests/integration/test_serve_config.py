"""The serveConfigV2 of cluster/rayservice.yaml on a real Ray, with tiny models: as KubeRay hands it over."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import yaml
from ray import serve
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from benchmarks.commands import free_port
from tests.tiny_bundles import write_bundle
from tests.tiny_sam import write_tiny_sam

ROOT = Path(__file__).parents[2]
SMALL = {"cpus_per_replica": 0.2, "gpus_per_replica": 0, "replicas": 1}
TOKEN = {"Authorization": "Bearer a-token-of-the-test"}


def _wait(name: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        application = serve.status().applications.get(name)
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        time.sleep(0.5)
    raise AssertionError(serve.status())


def test_what_rayservice_deploys_answers(ray_cluster: None, example: Path, tmp_path: Path) -> None:
    (resource,) = yaml.safe_load_all((ROOT / "cluster/rayservice.yaml").read_text())
    keys = yaml.safe_load(resource["spec"]["serveConfigV2"])
    (application,) = keys["applications"]
    write_bundle("semantic", example, str(tmp_path / "bundle"))
    write_tiny_sam(tmp_path / "sam")
    models, http = application["args"]["models"], application["args"]["http"]
    models["scenes"] |= {**SMALL, "bundle": str(tmp_path / "bundle")}
    models["sam"] |= {"prompt": "sam-vit-base", "weights": str(tmp_path / "sam"), "encoder": SMALL, "decoder": SMALL}
    models["sam"] |= {"cache_mib": 16}
    keys["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    application["runtime_env"] = {"env_vars": {http["token_variable"]: "a-token-of-the-test"}}

    serve.start(http_options=keys["http_options"])
    try:
        client = serve.context._get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(keys))  # what the dashboard does with it
        _wait(application["name"])
        url = f"http://127.0.0.1:{keys['http_options']['port']}"
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
        cards = httpx.get(f"{url}/v1/models", headers=TOKEN, timeout=60).json()["models"]
        assert [card["name"] for card in cards] == ["scenes", "sam"]
        image = next((example / "val/images").iterdir()).read_bytes()
        for path, data in (("scenes/segment", {}), ("sam/prompt", {"prompt": '{"points": [[20, 30]]}'})):
            files = {"image": ("a", image)}
            answer = httpx.post(f"{url}/v1/models/{path}", files=files, data=data, headers=TOKEN, timeout=60)
            assert answer.status_code == 200, answer.text
    finally:
        serve.shutdown()
