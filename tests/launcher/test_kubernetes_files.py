"""The Kubernetes manifests: valid by Kubernetes' own schemas, with command lines that the services read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastserve.access.addresses import parse_networks
from fastserve.config import ApiServerConfig, ControllerConfig, ServerConfig, WorkerConfig
from fastserve.distributed.environment import read_environment
from fastserve.errors import RequestError
from fastserve.options import parse_config

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.34")
FILES = sorted(path for path in (FOLDER / "base").glob("*.yaml") if path.name != "kustomization.yaml")
Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    return [item for path in FILES for item in yaml.safe_load_all(path.read_text())]


def find(kind: str, name: str) -> Manifest:
    (found,) = [item for item in manifests() if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def container_of(kind: str, name: str) -> dict[str, Any]:
    (container,) = find(kind, name)["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


PODS = [("Deployment", "controller"), ("Deployment", "api-server"), ("StatefulSet", "worker")]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for item in manifests():
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_find_a_misspelt_field() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    item = find("StatefulSet", "worker")
    item["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(item, VERSIONS[0], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("folder", "flag"), [("cpu", "--device=cpu"), ("gpu", "--device=cuda")])
def test_each_variant_is_rendered_and_valid(folder: str, flag: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, timeout=60, check=True
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    for item in rendered:
        kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "fastserve"
    (worker,) = [item for item in rendered if item["kind"] == "StatefulSet"]
    assert flag in worker["spec"]["template"]["spec"]["containers"][0]["args"]


def test_command_lines_are_read_and_services_find_each_other() -> None:
    args = {name: container_of(kind, name)["args"] for kind, name in PODS}
    for (_, name), module in zip(PODS, ("controller", "openai_api_server", "model_worker"), strict=True):
        assert args[name][:3] == ["python", "-m", f"fastserve.{module}"]
    controller = parse_config(ControllerConfig, args["controller"][3:], "x", {})
    server = parse_config(ApiServerConfig, args["api-server"][3:], "x", {})
    worker = parse_config(WorkerConfig, args["worker"][3:], "x", {})
    (port,) = find("Service", "controller")["spec"]["ports"]
    assert controller.port == port["port"] == 21001
    assert server.controller_address == worker.controller_address == "http://controller:21001"
    assert controller.allowed_hosts == ("controller",)
    assert controller.cluster_key_file == server.cluster_key_file == worker.cluster_key_file
    networks = parse_networks(controller.allowed_worker_networks)
    for address in ("10.1.2.3", "172.20.0.5", "192.168.4.4", "fd00::5"):
        networks.check(address, [address])  # such as pods have
    with pytest.raises(RequestError):
        networks.check("8.8.8.8", ["8.8.8.8"])
    assert [controller.insecure, server.insecure, worker.insecure] == [False] * 3
    configs: list[ServerConfig] = [controller, server, worker]
    for (kind, name), config in zip(PODS, configs, strict=True):
        spec = find(kind, name)["spec"]["template"]["spec"]
        (port,) = container_of(kind, name)["ports"]
        assert config.port == port["containerPort"]
        paused = 5 if name == "api-server" else 0
        assert spec["terminationGracePeriodSeconds"] > config.drain_timeout_s + paused, "killed before its drain ends"


def test_pods_have_no_rights_and_the_folders_that_they_write_to() -> None:
    for kind, name in PODS:
        spec = find(kind, name)["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        container = container_of(kind, name)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/secrets/cluster"} <= mounts
        volumes = {volume["name"] for volume in spec["volumes"]}
        claims = {item["metadata"]["name"] for item in find(kind, name)["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes | claims
    (shm,) = [
        volume
        for volume in find("StatefulSet", "worker")["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "shm"
    ]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}


def test_probes_use_routes_that_need_no_key() -> None:
    for kind, name in PODS:
        container = container_of(kind, name)
        paths = {
            container[probe]["httpGet"]["path"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
            if probe in container
        }
        # /ready of controller and worker asks for the cluster key, which a probe cannot send.
        assert paths <= ({"/health", "/ready"} if name == "api-server" else {"/health"})
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"


def test_only_the_api_server_is_open_to_everybody() -> None:
    policies = [item for item in manifests() if item["kind"] == "NetworkPolicy"]
    everything = [item for item in policies if item["spec"]["podSelector"] == {}]
    assert len(everything) == 1
    assert "ingress" not in everything[0]["spec"], "nothing is allowed but by the other policies"
    open_to_all = {
        item["metadata"]["name"] for item in policies for rule in item["spec"].get("ingress", []) if "from" not in rule
    }
    assert open_to_all == {"api-server"}
    names = {item["metadata"]["name"] for item in policies}
    assert {name for _, name in PODS} <= names


# ---- one model over several machines ----------------------------------------------------------------------------

GANGS = ("two-machines", "leader-worker-set")


def gang_manifests(folder: str) -> list[Manifest]:
    return list(yaml.safe_load_all((FOLDER / folder / "ranks.yaml").read_text()))


def gang_pod(folder: str) -> Manifest:
    owner = gang_manifests(folder)[0]["spec"]
    found: Manifest = owner["template"] if "template" in owner else owner["leaderWorkerTemplate"]["workerTemplate"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", GANGS)
def test_manifests_of_ranks_are_valid(folder: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for item in gang_manifests(folder):
        if item["kind"] != "LeaderWorkerSet":  # no part of Kubernetes: its pods are checked below
            kubernetes_validate.validate(item, version, strict=True)
    pod: Manifest = {"apiVersion": "v1", "kind": "Pod", **gang_pod(folder)}
    pod["metadata"] = pod["metadata"] | {"name": "ranks"}
    kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", GANGS)
def test_a_variant_with_ranks_replaces_the_workers_of_one_pod(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, timeout=60, check=True
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    owners = [(item["kind"], item["metadata"]["name"]) for item in rendered if item["kind"].endswith("Set")]
    assert owners == [("StatefulSet" if folder == "two-machines" else "LeaderWorkerSet", "ranks")]
    assert "image: fastserve-worker:latest" in done.stdout


def environment_of_pod(folder: str, part: int, tmp_path: Path) -> tuple[dict[str, str], list[str]]:
    """The environment and the worker's command line that a pod's container ends up with, with a stand-in for Python."""
    (container,) = gang_pod(folder)["spec"]["containers"]
    given = {
        "two-machines": {"POD_INDEX": str(part)},
        "leader-worker-set": {"LWS_LEADER_ADDRESS": "ranks-3.ranks.fastserve", "LWS_WORKER_INDEX": str(part)},
    }[folder]
    environ = {item["name"]: item.get("value", "") for item in container["env"]}
    environ |= given | {"POD_IP": "10.1.2.3", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "machines").mkdir()
    for item in gang_manifests(folder):
        if item["kind"] == "ConfigMap":
            (tmp_path / "machines" / "machines.json").write_text(item["data"]["machines.json"])
            environ["DISTRIBUTE_CONFIG_FILE"] = str(tmp_path / "machines" / "machines.json")
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{shutil.which('python3')}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    stand_in.chmod(0o755)
    script = [part.replace("/tmp/", f"{tmp_path}/") for part in container["args"]]
    if folder == "leader-worker-set":
        environ["DISTRIBUTE_CONFIG_FILE"] = environ["DISTRIBUTE_CONFIG_FILE"].replace("/tmp/", f"{tmp_path}/")
    done = subprocess.run(script, env=environ, capture_output=True, text=True, timeout=30, check=True)
    arguments, found = json.loads(done.stdout)
    assert arguments[:2] == ["-m", "fastserve.start_server"]
    return found | {"CHECKPOINT_PATH": str(model)}, arguments[2:]


@pytest.mark.parametrize("folder", GANGS)
def test_each_pod_knows_its_rank_and_the_addresses_of_all(folder: str, tmp_path: Path) -> None:
    names = {
        "two-machines": ["ranks-0.ranks.fastserve.svc", "ranks-1.ranks.fastserve.svc"],
        "leader-worker-set": ["ranks-3.ranks.fastserve", "ranks-3-1.ranks.fastserve"],
    }[folder]
    for part in (0, 1):
        home = tmp_path / str(part)
        home.mkdir()
        environ, flags = environment_of_pod(folder, part, home)
        world = read_environment(environ).world
        assert (world.size, world.local_size, world.first_rank, world.port) == (2, 1, part, 21002)
        assert [machine.ip for machine in world.machines] == names
        assert {machine.port for machine in world.machines} == {21002}
        config = parse_config(WorkerConfig, ["--model-path", "x", *flags], "x", {})
        assert config.worker_address == "http://10.1.2.3:21002"
        assert config.device == "cuda"
        assert gang_pod(folder)["spec"]["terminationGracePeriodSeconds"] > config.drain_timeout_s


@pytest.mark.parametrize("folder", GANGS)
def test_pods_of_ranks_are_on_machines_of_their_own_and_as_closed_as_workers(folder: str) -> None:
    pod, worker = gang_pod(folder), find("StatefulSet", "worker")["spec"]["template"]
    assert pod["metadata"]["labels"]["app"] == worker["metadata"]["labels"]["app"], "the network policies go by it"
    spec = pod["spec"]
    assert spec["securityContext"] == worker["spec"]["securityContext"]
    assert spec["automountServiceAccountToken"] is False
    (container,), (plain,) = spec["containers"], worker["spec"]["containers"]
    assert container["securityContext"] == plain["securityContext"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (rule,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert rule["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    # Rank 0 answers 503 on /health while a rank is missing: it must not be ended for that.
    assert "httpGet" not in container["livenessProbe"]
