"""The images match the package, and only the API server is reachable from outside the containers."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastserve.config import ApiServerConfig, ControllerConfig, WorkerConfig
from fastserve.options import parse_config

ROOT = Path(__file__).parents[2]


def test_control_image_installs_a_part_of_the_packages_dependencies() -> None:
    lines = (ROOT / "docker" / "requirements-control.txt").read_text().splitlines()
    wanted = {line for line in lines if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wanted <= set(project["dependencies"])
    assert not any(line.startswith(("torch", "transformers")) for line in wanted)


@pytest.fixture
def services() -> dict[str, Any]:
    """The services of compose.yaml, with each variable at its default."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docker" / "compose.yaml").read_text()
    filled = re.sub(r"(?<!\$)\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")
    services: dict[str, Any] = yaml.safe_load(filled)["services"]
    return services


def flags_of(service: dict[str, Any], module: str) -> list[str]:
    """The arguments after the module in the service's command."""
    command: list[str] = service["command"]
    words = shlex.split(command[2].replace("\\\n", " ")) if command[0] == "sh" else command
    return words[words.index(f"fastserve.{module}") + 1 :]


def test_only_the_api_server_is_published_and_that_on_this_machine(services: dict[str, Any]) -> None:
    assert {name: service.get("ports") for name, service in services.items()} == {
        "controller": None,
        "worker": None,
        "api": ["127.0.0.1:8888:8000"],
    }
    assert services["controller"]["networks"] == ["cluster"]
    networks = pytest.importorskip("yaml").safe_load((ROOT / "docker" / "compose.yaml").read_text())["networks"]
    assert networks["cluster"] == {"internal": True}
    shared = {name: set(service["networks"]) for name, service in services.items()}
    assert shared["worker"] & shared["api"] == {"cluster"}


def test_containers_have_no_rights_and_bounds(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert service["pids_limit"] <= 4096
        assert service["mem_limit"]


def test_their_command_lines_are_read_and_share_one_key(services: dict[str, Any]) -> None:
    controller = parse_config(ControllerConfig, flags_of(services["controller"], "controller"), "x", {})
    worker = parse_config(WorkerConfig, flags_of(services["worker"], "model_worker"), "x", {})
    server = parse_config(ApiServerConfig, flags_of(services["api"], "openai_api_server"), "x", {})
    assert controller.allowed_hosts == ("controller",)
    assert server.allowed_hosts == ("localhost",)
    assert not controller.insecure
    folder = "/home/fastserve/cluster"
    assert worker.cluster_key_file == server.cluster_key_file == f"{folder}/cluster.key"
    for name, mount in {"controller": folder, "worker": f"{folder}:ro", "api": f"{folder}:ro"}.items():
        assert f"cluster-key:{mount}" in services[name]["volumes"]
        assert folder in (ROOT / "docker" / "Dockerfile").read_text()
