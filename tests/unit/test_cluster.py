"""What cluster/ holds is valid to KubeRay, Kubernetes, Ray and Docker, and what it names is there; no cluster."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from botocore.validate import validate_parameters

from raysseg import cli, config
from raysseg.section import seconds_of
from raysseg.serve import read_job
from raysseg.submit import Submission, pack

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = Path(os.environ.get("RAYSSEG_SCHEMAS", ROOT / "../shared/schemas")).resolve()
README = (CLUSTER / "README.md").read_text()

Keys = dict[str, Any]


def documents(name: str) -> list[Keys]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


RESOURCES: list[Keys] = [
    one for path in sorted(CLUSTER.glob("*.yaml")) for one in documents(path.name) if "kind" in one
]
KUBERAY = [one for one in RESOURCES if one["apiVersion"] == "ray.io/v1"]
OWN = [one for one in RESOURCES if one["apiVersion"] in ("v1", "networking.k8s.io/v1")]  # Kubernetes' own
RAY_SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}


def of_kind(kind: str) -> list[Keys]:
    return [one for one in RESOURCES if one["kind"] == kind]


def named(one: Keys) -> str:
    return f"{one['kind']}-{one['metadata']['name']}"


def cluster_of(resource: Keys) -> Keys:
    spec: Keys = resource["spec"]
    for key in RAY_SPEC[resource["kind"]]:
        spec = spec[key]
    return spec


def groups(resource: Keys) -> list[Keys]:
    """The head's group, then the workers'."""
    cluster = cluster_of(resource)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates(resource: Keys) -> list[Keys]:
    submitter = resource["spec"].get("submitterPodTemplate")
    return [*(group["template"] for group in groups(resource)), *([submitter] if submitter else [])]


def ray_container(group: Keys) -> Keys:
    container: Keys = group["template"]["spec"]["containers"][0]
    return container


def gpus_of(group: Keys) -> int:
    return int(ray_container(group)["resources"]["limits"].get("nvidia.com/gpu", 0))


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings(part)


# --- KubeRay's and Kubernetes' schemas ----------------------------------------------------------------------------


def check_kuberay(resource: Keys) -> None:
    path = SCHEMAS / f"kuberay/{resource['kind'].lower()}-v1.json"
    if not path.exists():
        pytest.skip(f"{path} is not at hand; RAYSSEG_SCHEMAS names the folder that holds kuberay/")
    jsonschema.Draft7Validator(json.loads(path.read_text())).validate(resource)


def check_kubernetes(resource: Keys) -> None:
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def check_template(template: Keys) -> None:
    check_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_kuberay_takes_its_resources(resource: Keys) -> None:
    check_kuberay(resource)


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_kubernetes_takes_the_pods(resource: Keys) -> None:
    for template in pod_templates(resource):
        check_template(template)


@pytest.mark.parametrize("resource", OWN, ids=named)
def test_kubernetes_takes_its_own(resource: Keys) -> None:
    check_kubernetes(resource)


def test_every_resource_is_checked_by_someone() -> None:
    assert {one["kind"] for one in RESOURCES} - {one["kind"] for one in (*KUBERAY, *OWN)} == {"PodMonitor"}
    assert len(KUBERAY) == 4


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_what_kuberay_does_not_know_is_refused(resource: Keys) -> None:
    planted = copy.deepcopy(resource)
    cluster_of(planted)["workerGroupSpecs"][0]["maxReplica"] = 8
    with pytest.raises(jsonschema.ValidationError, match="'maxReplica' was unexpected"):
        check_kuberay(planted)
    container = copy.deepcopy(ray_container(groups(resource)[0]))
    template = {"spec": {"containers": [{**container, "imag": "x"}]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="'imag' was unexpected"):
        check_template(template)


def test_the_commented_out_lines_would_be_taken_too() -> None:
    text = (CLUSTER / "rayservice.yaml").read_text()
    lines = re.sub(r"^    # (gcsFaultToleranceOptions:|  redis)", r"    \1", text, flags=re.MULTILINE)
    (resource,) = yaml.safe_load_all(lines)
    assert cluster_of(resource)["gcsFaultToleranceOptions"]["redisAddress"].startswith("rediss://")
    check_kuberay(resource)


# --- clusters -----------------------------------------------------------------------------------------------------


def test_jobs_bring_the_cluster_that_stays() -> None:
    (cluster,) = of_kind("RayCluster")
    for job in of_kind("RayJob"):
        assert cluster_of(job) == cluster_of(cluster)


def num_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", quantity).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** ("KMGT".index(unit[0]) + 1 if unit else 0)


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_pods_have_what_ray_promises(resource: Keys) -> None:
    for group in groups(resource):
        resources, promised = ray_container(group)["resources"], group["rayStartParams"]
        assert resources["requests"] == resources["limits"]
        (shm,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in ray_container(group)["volumeMounts"]
        shm_bytes = num_bytes(shm["emptyDir"]["sizeLimit"])
        assert shm["emptyDir"]["medium"] == "Memory"
        assert int(promised["object-store-memory"]) < shm_bytes
        assert int(promised["memory"]) + shm_bytes == num_bytes(resources["limits"]["memory"])
        if "groupName" in group:
            assert promised["num-cpus"] == resources["limits"]["cpu"]
            assert group["minReplicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_heads_take_no_work(resource: Keys) -> None:
    head, *workers = groups(resource)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert gpus_of(head) == 0
    assert "nodeSelector" not in head["template"]["spec"]  # of spot machines, for one
    assert any(gpus_of(worker) for worker in workers)


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_workers_tell_ray_when_they_go(resource: Keys) -> None:
    from ray.scripts.scripts import drain_node

    for group in groups(resource)[1:]:
        *shell, script = ray_container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["bash", "-c"]
        first, _, then = script.partition(" && ")
        program, verb, *arguments = shlex.split(first)
        assert (program, verb) == ("ray", drain_node.name)
        told = drain_node.make_context(verb, arguments).params
        assert told["node_id"] is None  # this one
        assert then == f"sleep {told['deadline_remaining_seconds']}"
        assert told["deadline_remaining_seconds"] < group["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_pods_run_without_privileges_as_the_images_user(resource: Keys) -> None:
    (user,) = re.findall(r"^USER (\d+):\1$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    for template in pod_templates(resource):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == int(user)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            locked = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == locked
    assert cluster_of(resource)["autoscalerOptions"]["securityContext"] == locked


@pytest.mark.parametrize("resource", KUBERAY, ids=named)
def test_clusters_grow_and_ask_for_a_token(resource: Keys) -> None:
    cluster = cluster_of(resource)
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    images = {container["image"] for one in pod_templates(resource) for container in one["spec"]["containers"]}
    assert len(images) == 1
    assert f":{version('raysseg')}-" in images.pop()


# --- what is named is there ---------------------------------------------------------------------------------------


def references(resource: Keys) -> Iterator[tuple[str, str]]:
    """The kinds and names of what its pods need to be there."""
    for template in pod_templates(resource):
        spec = template["spec"]
        if "serviceAccountName" in spec:
            yield "ServiceAccount", spec["serviceAccountName"]
        yield from (
            ("ConfigMap", volume["configMap"]["name"]) for volume in spec.get("volumes", ()) if "configMap" in volume
        )
        for container in spec["containers"]:
            yield from (("Secret", entry["secretRef"]["name"]) for entry in container.get("envFrom", ()))


def test_what_pods_need_is_in_the_folder_or_said_to_be_needed() -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in RESOURCES}
    needed = {reference for resource in KUBERAY for reference in references(resource)}
    assert ("ServiceAccount", "raysseg") in needed & there
    for kind, name in needed - there:
        command = {"ConfigMap": "create configmap", "Secret": "create secret generic"}[kind]
        assert f"{command} {name}" in README
    assert {one["metadata"]["namespace"] for one in RESOURCES if one["kind"] != "Namespace"} == {"raysseg"}
    (namespace,) = of_kind("Namespace")
    assert namespace["metadata"]["name"] == "raysseg"


def test_services_that_kuberay_makes_have_names_of_their_own() -> None:
    names = [one["metadata"]["name"] for one in KUBERAY]  # NAME-head-svc, NAME-serve-svc
    assert len(set(names)) == len(names)
    (service,) = of_kind("RayService")
    (cluster,) = of_kind("RayCluster")
    for name in (f"{service['metadata']['name']}-serve-svc", f"{cluster['metadata']['name']}-head-svc"):
        assert f"port-forward service/{name}" in README


def test_ports_agree() -> None:
    open_ports = {
        (port["name"], port["containerPort"])
        for resource in KUBERAY
        for group in groups(resource)
        for port in ray_container(group)["ports"]
    }
    assert len(dict(open_ports)) == len(open_ports)
    (policy,) = of_kind("NetworkPolicy")
    let_in = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
    assert let_in == {dict(open_ports)[name] for name in ("dashboard", "serve", "metrics")}
    (monitor,) = of_kind("PodMonitor")
    for resource in KUBERAY:
        for group in groups(resource):
            names = {port["name"] for port in ray_container(group)["ports"]}
            assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names
            assert ("serve" in names) == (resource["kind"] == "RayService")


def test_only_who_should_reaches_the_dashboard() -> None:
    (policy,) = of_kind("NetworkPolicy")
    for rule in policy["spec"]["ingress"]:
        assert rule["from"]  # else everyone
        for peer in rule["from"]:
            assert peer != {"podSelector": {}}
            if "ports" not in rule:  # everything
                assert peer["podSelector"]["matchLabels"] == policy["spec"]["podSelector"]["matchLabels"]
    (rule,) = [rule for rule in policy["spec"]["ingress"] if {"port": 8265} in rule.get("ports", ())]
    operator, submitter = rule["from"]
    assert operator.keys() == {"namespaceSelector", "podSelector"}
    for job in of_kind("RayJob"):
        labels = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
        assert submitter["podSelector"]["matchLabels"].items() <= labels.items()


# --- entry points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", of_kind("RayJob"), ids=named)
def test_a_jobs_entry_point_is_a_job_that_a_cluster_can_run(resource: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resource["spec"]
    program, *arguments = shlex.split(spec["entrypoint"])
    assert program == "raysseg"
    options = cli._parser().parse_args(arguments)
    assert options.json
    head = groups(resource)[0]
    (mount,) = [mount for mount in ray_container(head)["volumeMounts"] if mount["name"] == "jobs"]
    path = ROOT / "jobs" / Path(options.job).relative_to(mount["mountPath"])
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pack(Submission(str(path), options.overrides)) as packed:
        job = packed.job
        files = [file.name for file in packed.folder.iterdir()]
    assert job.kind == options.verb
    assert variables.items() <= packed.variables.items()
    assert set(variables) == set().union(*(config.variables((ROOT / "jobs" / file).read_text()) for file in files))
    for file in files:
        assert f"--from-file=jobs/{file}" in README or "--from-file=jobs/ " in README
    scaling = job.train_job({}).scaling if isinstance(job, config.TuneJob) else job.scaling  # type: ignore[union-attr]
    assert scaling.gpus_per_worker == 1  # by itself it would be 0, as long as there are none
    most = sum(gpus_of(group) * group["maxReplicas"] for group in groups(resource)[1:])
    trials = job.search.concurrent if isinstance(job, config.TuneJob) else 1
    assert trials is not None
    assert trials * scaling.max_workers <= most
    assert spec["shutdownAfterJobFinishes"]
    assert spec["activeDeadlineSeconds"] > 0


def check_serve(text: str) -> Keys:
    """A serveConfigV2, if Ray knows all of its keys."""
    from ray.serve.schema import ServeDeploySchema

    keys: Keys = yaml.safe_load(text)
    known = ServeDeploySchema.model_validate(keys).model_dump(mode="json", exclude_unset=True)
    if known != keys:
        raise ValueError(f"Serve leaves out some of {keys}")
    return keys


def test_what_is_served_is_a_serve_job() -> None:
    (resource,) = of_kind("RayService")
    keys = check_serve(resource["spec"]["serveConfigV2"])
    (application,) = keys["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), name))
    job = read_job(application["args"])
    assert job.name == application["name"]
    assert keys["http_options"]["request_timeout_s"] == seconds_of(job.http.timeout)
    for group in groups(resource):
        assert {"name": "serve", "containerPort": keys["http_options"]["port"]} in ray_container(group)["ports"]
    assert job.http.token_variable is not None
    assert job.http.token_variable in README
    for served in job.models.values():
        for half in (served,) if isinstance(served, config.ServedBundle) else (served.encoder, served.decoder):
            assert half.gpus_per_replica is not None  # by itself it would be 0, as long as there are none
    for uri in strings(application["args"]["models"]):
        assert "://" in uri or "/" not in uri  # no paths of one machine


def test_what_serve_does_not_know_is_refused() -> None:
    (resource,) = of_kind("RayService")
    text = resource["spec"]["serveConfigV2"].replace("route_prefix:", "route_prefx:")
    with pytest.raises(ValueError, match="leaves out"):
        check_serve(text)


# --- the launcher -------------------------------------------------------------------------------------------------


def keys_of_provider() -> set[str]:
    """What Ray's launcher reads of `provider` where that is AWS."""
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private"
    sources = [*(folder / "aws").rglob("*.py"), folder / "util.py", folder / "autoscaler.py", folder / "commands.py"]
    reads = r"""(?:\bprovider_config|\["provider"\])(?:\[|\.get\(\s*)"(\w+)\""""
    return {"type"}.union(*(re.findall(reads, path.read_text()) for path in sources))


def check_launcher(keys: Keys) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(keys)
    validate_config(prepare_config(copy.deepcopy(keys)))
    if unknown := keys["provider"].keys() - keys_of_provider():
        raise ValueError(f"provider: the launcher reads no {unknown}")
    machine = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in keys["available_node_types"].values():
        validate_parameters({**node_type["node_config"], "MinCount": 1, "MaxCount": 1}, machine)


def test_the_launcher_takes_its_file() -> None:
    (keys,) = documents("aws.yaml")
    check_launcher(keys)
    head = keys["available_node_types"].pop(keys["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "--num-cpus=0" in keys["head_start_ray_commands"][-1]
    workers = keys["available_node_types"].values()
    assert all(worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for worker in workers)
    assert all(worker["min_workers"] == 0 for worker in workers)
    assert sum(worker["max_workers"] for worker in workers) == keys["max_workers"]
    for start in (keys["head_start_ray_commands"], keys["worker_start_ray_commands"]):
        assert start[-1].startswith("RAY_AUTH_MODE=token ray start ")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((), "'max_wrkers' was unexpected"),
        (("provider",), r"reads no \{'max_wrkers'\}"),
        (("available_node_types", "gpu", "node_config"), 'Unknown parameter in input: "max_wrkers"'),
    ],
)
def test_what_the_launcher_does_not_know_is_refused(place: tuple[str, ...], message: str) -> None:
    (keys,) = documents("aws.yaml")
    part = keys
    for key in place:
        part = part[key]
    part["max_wrkers"] = 1
    with pytest.raises((jsonschema.ValidationError, ParamValidationError, ValueError), match=message):
        check_launcher(keys)


# --- the image ----------------------------------------------------------------------------------------------------


def lint(text: str) -> list[str]:
    """What hadolint says; Debian's packages have no versions here, as its mirrors drop the old ones."""
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program), "--no-color", "--ignore", "DL3008", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stdout.splitlines()


def test_the_dockerfile_is_clean() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert lint(text) == []
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "dependencies", "${BASE}"]
    assert not re.search(r"^(ADD|ENTRYPOINT|HEALTHCHECK)", text, re.MULTILINE)
    assert text.rindex("\nUSER ") > text.rindex("\nCOPY ")


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        (" \\\n    && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
        ("WORKDIR /home/ray", "WORKDIR home", "DL3000"),
        ("COPY raysseg raysseg", "ADD raysseg raysseg", "DL3020"),
        ("FROM ${BASE}\nARG VERSION", "FROM python:latest\nARG VERSION", "DL3007"),
    ],
)
def test_mistakes_in_the_dockerfile_are_found(good: str, bad: str, rule: str) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert text.count(good) == 1
    assert any(rule in line for line in lint(text.replace(good, bad)))


def test_the_image_is_built_from_what_it_needs() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [name for names in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for name in names.split()]
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert all((ROOT / name).exists() for name in copied)


# --- who may what -------------------------------------------------------------------------------------------------


def policies() -> list[Keys]:
    text = (ROOT / "docs/security.md").read_text()
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


def test_policies_are_iams_and_let_in_no_more_than_one_bucket() -> None:
    from moto.iam.policy_validation import IAMPolicyDocumentValidator

    (policy,) = policies()
    IAMPolicyDocumentValidator(json.dumps(policy)).validate()
    for statement in policy["Statement"]:
        actions, resources = statement["Action"], statement["Resource"]
        assert all(re.fullmatch(r"s3:\w+", action) for action in actions)
        assert all(resource.startswith("arn:aws:s3:::bucket") for resource in resources)
