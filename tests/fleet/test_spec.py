"""Which services a fleet has, by its options."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.config import ApiServerConfig, ControllerConfig, WorkerConfig
from fastserve.errors import StartupError
from fastserve.fleet.spec import FleetSpec, RayConfig, ServiceSpec, make_spec, with_controller
from fastserve.options import parse_config


def spec_of(*flags: str, has_gpus: bool = False, api_keys: str | None = None) -> FleetSpec:
    return make_spec(parse_config(RayConfig, flags, "x", {}), "the-cluster-key", api_keys, has_gpus=has_gpus)


def settings_of(service: ServiceSpec, config_class: Any, address: str | None = "http://10.0.0.1:21001") -> Any:
    command = service.command if address is None else with_controller(service.command, address)
    return parse_config(config_class, command.flags, "x", {})


def test_controller_api_servers_and_replicas_of_each_model() -> None:
    spec = spec_of(
        "--model-path-address", "org/a@any@1", "b@any@1?dtype=bfloat16", "--replicas", "2", "--api-servers=2"
    )
    assert [service.name for service in spec.services] == [
        *("controller", "api-server-0", "api-server-1", "worker-a-0", "worker-a-1", "worker-b-0", "worker-b-1"),
    ]
    controller, server, *_, worker = spec.services
    assert settings_of(controller, ControllerConfig, None).allowed_worker_networks == ("any",)
    assert settings_of(server, ApiServerConfig).controller_address == "http://10.0.0.1:21001"
    found = settings_of(worker, WorkerConfig)
    assert (found.model_path, found.dtype, found.controller_address) == ("b", "bfloat16", "http://10.0.0.1:21001")


def test_the_same_model_twice_has_names_of_its_own() -> None:
    spec = spec_of("--model-path-address", "x/a@any@1", "y/a@any@1")
    names = [service.name for service in spec.services]
    assert names[2:] == ["worker-a-0", "worker-a-1"]


def test_a_fleet_of_other_size_leaves_the_commands_of_the_others_alone() -> None:
    small, large = (spec_of("--model-path-address", "a@any@1", "--replicas", count) for count in ("1", "3"))
    assert set(small.services) < set(large.services)


@pytest.mark.parametrize(
    ("flags", "has_gpus", "num_gpus"),
    [
        ([], False, 0),
        ([], True, 1),
        (["--device", "cpu"], True, 0),
        (["--device", "cuda", "--num-gpus", "2"], False, 2),
    ],
)
def test_gpus_are_reserved_where_they_are_used(flags: list[str], has_gpus: bool, num_gpus: int) -> None:
    spec = spec_of(*flags, has_gpus=has_gpus)
    assert [service.num_gpus for service in spec.services] == [0, 0, num_gpus]


def test_keys_are_in_no_command_line_and_api_keys_at_api_servers_only() -> None:
    spec = spec_of("--api-keys", "for-clients", api_keys="for-clients")
    for service in spec.services:
        assert "key" not in " ".join(service.command.flags)
        environ = dict(service.command.environ)
        assert environ["FASTSERVE_CLUSTER_KEY"] == "the-cluster-key"
        assert ("FASTSERVE_API_KEYS" in environ) == service.name.startswith("api-server")
    assert "the-cluster-key" not in repr(spec).replace(repr(spec.services), "")


@pytest.mark.parametrize("flag", ["--ssl", "--tls-cert=x", "--cluster-key-file=x", "--insecure", "--no-register"])
def test_what_cannot_be_on_ray_is_refused_by_name(flag: str) -> None:
    with pytest.raises(StartupError, match=flag.partition("=")[0]):
        spec_of(flag)
