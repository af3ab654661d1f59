"""Which services a fleet has, by its options."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fastserve.config import ApiServerConfig, ControllerConfig, WorkerConfig
from fastserve.distributed.gang import Gang
from fastserve.distributed.machines import NUM_PORTS
from fastserve.errors import StartupError
from fastserve.fleet.division import ENV_GANG, NodeRoom, num_machines, with_machines
from fastserve.fleet.spec import FleetSpec, RayConfig, ServiceSpec, make_spec, with_controller
from fastserve.options import parse_config


def spec_of(*flags: str, has_gpus: bool = False, api_keys: str | None = None) -> FleetSpec:
    nodes = [NodeRoom(16.0, 8.0 if has_gpus else 0.0)]
    return make_spec(parse_config(RayConfig, flags, "x", {}), "the-cluster-key", api_keys, nodes)


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


# ---- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "cpus", "gpus", "nodes", "expected"),
    [
        (1, 1.0, 1, [(8, 8)], 1),
        (4, 1.0, 1, [(8, 8), (8, 8)], 1),
        (8, 1.0, 1, [(64, 4), (64, 4), (64, 4)], 2),
        (4, 2.0, 0, [(2, 0), (2, 0), (2, 0), (2, 0)], 4),
        (4, 2.0, 0, [(6, 0), (6, 0)], 2),
        # As many ranks on each machine: 3 + 1 would do, and is not possible.
        (4, 1.0, 1, [(8, 3), (8, 1)], 4),
        (6, 1.0, 0, [(3, 0), (3, 0)], 2),
        # Too few for all: it waits for a machine.
        (8, 1.0, 1, [(8, 1), (8, 1)], 1),
        (2, 0.0, 0, [(1, 0)], 1),
    ],
)
def test_ranks_go_to_as_few_machines_as_hold_them(
    num_ranks: int, cpus: float, gpus: int, nodes: list[tuple[float, float]], expected: int
) -> None:
    assert num_machines(num_ranks, cpus, gpus, [NodeRoom(*node) for node in nodes]) == expected


def test_ranks_of_one_machine_are_one_service_with_their_gpus() -> None:
    spec = spec_of("--tp-size", "4", "--cpus-per-worker", "2", has_gpus=True)
    (worker,) = spec.services[2:]
    assert (worker.num_gpus, worker.num_cpus, worker.part) == (4, 8.0, None)
    assert settings_of(worker, WorkerConfig).tp_size == 4


def test_ranks_of_several_machines_are_services_that_know_each_other() -> None:
    config = parse_config(RayConfig, ["--tp-size", "4", "--replicas", "2"], "x", {})
    spec = make_spec(config, "the-cluster-key", None, [NodeRoom(8.0, 2.0)] * 4)
    first, second = spec.services[2:4]
    assert [(item.num_gpus, item.num_cpus) for item in spec.services[2:]] == [(2, 2.0)] * 4
    assert len({item.name for item in spec.services}) == 6
    assert first.part is not None
    assert second.part is not None
    assert first.part.worker == second.part.worker
    assert first.command == second.command
    addresses = [("10.0.0.1", 4000), ("10.0.0.2", 5000)]
    for part in (first.part, second.part):
        command = with_machines(first.command, part, addresses)
        gang = msgspec.json.decode(dict(command.environ)[ENV_GANG], type=Gang)
        assert gang.size == 4
        assert gang.part == part.number
        assert [(machine.ip, machine.port) for machine in gang.machines] == addresses
        assert gang.relay_port(1) < 5000 + NUM_PORTS, "all ports that it listens on are reserved"
