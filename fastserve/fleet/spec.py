"""The services of a fleet: their commands, and the CPUs and GPUs that each needs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from fastserve.config import (
    CONTROLLER_PORT,
    ApiServerConfig,
    ControllerConfig,
    LauncherConfig,
    ServerConfig,
    WorkerConfig,
)
from fastserve.errors import StartupError
from fastserve.fleet.division import NodeRoom, Part, num_machines
from fastserve.fleet.service_process import Command
from fastserve.launching.plan import parse_item, service_config, worker_config
from fastserve.options import option, to_argv

CONTROLLER = "controller"
PACKAGE = "fastserve"


@dataclass(frozen=True)
class RayConfig(LauncherConfig):
    """Starts a controller, API servers and model workers on a Ray cluster, or changes those that run there."""

    title: ClassVar[str] = "Ray"

    replicas: int = option(1, "workers of each item of --model-path-address", added=True, minimum=0, maximum=1000)
    api_servers: int = option(1, "API servers", added=True, minimum=1, maximum=1000)
    cpus_per_worker: float = option(
        1.0, "CPUs that a worker reserves in Ray; with --tp-size: that each rank reserves", added=True, minimum=0
    )
    ray_address: str = option("auto", "address of the Ray cluster", added=True)
    ray_namespace: str = option("fastserve", "Ray namespace; fleets in different ones do not meet", added=True)
    down: bool = option(False, "end the fleet, after its running requests", added=True)


@dataclass(frozen=True)
class ServiceSpec:
    name: str
    command: Command
    port: int | None
    """The wanted port; None for any."""
    num_cpus: float
    num_gpus: int
    drain_timeout_s: float
    part: Part | None = None
    """Of a worker with ranks on several machines."""


@dataclass(frozen=True)
class FleetSpec:
    services: tuple[ServiceSpec, ...]
    """The controller first. Its address is added to the commands of the others."""
    cluster_key: str = dataclasses.field(repr=False)


def make_spec(config: RayConfig, cluster_key: str, api_keys: str | None, nodes: Sequence[NodeRoom]) -> FleetSpec:
    """The fleet that the options describe, on a cluster of these machines. Raises StartupError."""
    has_gpus = any(node.num_gpus > 0 for node in nodes)
    for name in ("tls_cert", "tls_key", "tls_ca", "ssl", "cluster_key_file", "insecure"):
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise StartupError(
                f"{flag} is not supported on Ray: the fleet has a cluster key of its own (or FASTSERVE_CLUSTER_KEY), "
                "and TLS files would have to lie on every machine. Put a proxy with TLS in front of the API servers."
            )
    key = {ENV_CLUSTER_KEY: cluster_key}
    client_keys = {"FASTSERVE_API_KEYS": api_keys} if api_keys else {}
    controller = service_config(ControllerConfig, config, {"allowed_worker_networks": ("any",)})
    services = [_service(CONTROLLER, "controller", controller, key, port=config.controller_port)]
    server = service_config(ApiServerConfig, config, {"api_keys": None})
    services += [
        _service(f"api-server-{at}", "openai_api_server", server, key | client_keys, port=config.server_port)
        for at in range(config.api_servers)
    ]
    numbers: Counter[str] = Counter()
    for item in map(parse_item, config.model_path_address):
        worker = worker_config(config, item)
        if worker.no_register:
            raise StartupError("--no-register is not supported on Ray: its workers belong to the fleet's controller.")
        on_gpus = worker.device == "cuda" or (worker.device is None and has_gpus)
        gpus_per_rank = (worker.num_gpus if worker.tp_size == 1 else 1) if on_gpus else 0
        count = num_machines(worker.tp_size, config.cpus_per_worker, gpus_per_rank, nodes)
        for _ in range(config.replicas):
            label = item.model.rstrip("/").rpartition("/")[2]
            name = f"worker-{label}-{numbers[label]}"
            numbers[label] += 1
            # Ray chooses the GPUs, and any port will do: several workers may come to one machine.
            plain = dataclasses.replace(worker, gpus=None, worker_address=None)
            services += _worker(name, plain, key, count, config.cpus_per_worker, gpus_per_rank)
    return FleetSpec(tuple(services), cluster_key)


def _worker(
    name: str, worker: WorkerConfig, environ: Mapping[str, str], count: int, cpus_per_rank: float, gpus_per_rank: int
) -> list[ServiceSpec]:
    """A worker on `count` machines."""
    share = worker.tp_size // count
    resources: dict[str, Any] = {"num_cpus": share * cpus_per_rank, "num_gpus": share * gpus_per_rank}
    if count == 1:
        return [_service(name, "model_worker", worker, environ, **resources)]
    return [
        dataclasses.replace(
            # The name has all that an actor cannot change.
            _service(f"{name}-{count}x{share}-part{number}", "gang_worker", worker, environ, **resources),
            part=Part(name, number, count, share),
        )
        for number in range(count)
    ]


def _service(
    name: str,
    module: str,
    settings: ServerConfig,
    environ: Mapping[str, str],
    *,
    port: int | None = None,
    num_cpus: float = 0.5,
    num_gpus: int = 0,
) -> ServiceSpec:
    defaults: dict[str, object] = {"host": "localhost", "port": settings.__dataclass_fields__["port"].default}
    if isinstance(settings, ApiServerConfig | WorkerConfig):
        defaults["controller_address"] = f"http://localhost:{CONTROLLER_PORT}"
    flags = to_argv(dataclasses.replace(settings, **defaults))  # type: ignore[arg-type]
    is_worker = isinstance(settings, WorkerConfig)
    command = Command(f"{PACKAGE}.{module}", tuple(flags), tuple(sorted(environ.items())), is_worker)
    return ServiceSpec(name, command, port, num_cpus, num_gpus, settings.drain_timeout_s)


def with_controller(command: Command, address: str) -> Command:
    return dataclasses.replace(command, flags=(*command.flags, f"--controller-address={address}"))
