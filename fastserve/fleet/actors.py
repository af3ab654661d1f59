"""The Ray actors of a fleet: one for each service, and a manager that keeps all of them as its spec says.

All are named and detached, so they outlive the command that made them. Ray restarts an actor whose machine died on
another one, by calling its constructor again; the manager then starts its service anew. The manager's spec is the
argument of its constructor, so it survives the death of its machine, too.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fastserve.distributed.machines import NUM_PORTS
from fastserve.fleet.division import Part, with_machines
from fastserve.fleet.service_process import Command, ServiceProcess, ServiceState
from fastserve.fleet.spec import CONTROLLER, FleetSpec, ServiceSpec, with_controller

logger = logging.getLogger("fastserve.fleet")

MANAGER = "fleet-manager"
PREFIX = "service:"
INTERVAL_S = 1.0
ANSWER_TIMEOUT_S = 10.0
_STOP_MARGIN_S = 10.0


class ServiceActor:
    """Runs one service on the machine that Ray chose."""

    def __init__(self, port: int | None) -> None:
        self._process = ServiceProcess(ray.util.get_node_ip_address(), port)

    def run(self, command: Command, stop_timeout_s: float) -> ServiceState:
        return self._process.run(command, stop_timeout_s)

    def reserve(self, num_ports: int) -> tuple[str, int]:
        return self._process.reserve(num_ports)

    def stop(self, timeout_s: float) -> None:
        self._process.stop(timeout_s)


class FleetManager:
    """Compares the services that run with the spec, again and again."""

    def __init__(self, spec: FleetSpec, namespace: str) -> None:
        self._spec = spec
        self._namespace = namespace
        self._states: dict[str, ServiceState | str] = {service.name: "waiting" for service in spec.services}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="fleet manager", daemon=True)
        self._thread.start()

    def cluster_key(self) -> str:
        return self._spec.cluster_key

    def states(self) -> dict[str, ServiceState | str]:
        """State of each service by name, or the reason why it has none."""
        return dict(self._states)

    def end(self) -> None:
        """Stop comparing; the services go on."""
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._ended.is_set():
            try:
                self._compare()
            except Exception:
                logger.exception("comparing the fleet with its spec failed; it is tried again")
            self._ended.wait(INTERVAL_S)

    def _compare(self) -> None:
        wanted = {PREFIX + service.name for service in self._spec.services}
        for name in service_names(self._namespace):
            if name not in wanted:
                stop_service(name, self._namespace, _drain_of(self._spec))
        remove_groups(self._namespace, {_group_name(service, self._namespace) for service in self._spec.services})
        controller, *others = self._spec.services
        self._run([(controller, controller.command)])
        state = self._states[CONTROLLER]
        if isinstance(state, ServiceState) and state.address is not None:
            address = state.address
            commands = [(service, with_controller(service.command, address)) for service in others]
            self._run([(service, command) for service, command in commands if service.part is None])
            self._run(self._with_machines([(service, command) for service, command in commands if service.part]))

    def _with_machines(self, services: list[tuple[ServiceSpec, Command]]) -> list[tuple[ServiceSpec, Command]]:
        """The parts of workers whose machines are all known, with their commands."""
        pending = {}
        for service, _ in services:
            if service.part is not None:
                pending[service.name] = service_actor(service, self._namespace).reserve.remote(NUM_PORTS)
        found = self._answers(pending)
        ready = []
        for service, command in services:
            part = service.part
            if part is None:
                continue
            names = [other.name for other, _ in services if other.part and other.part.worker == part.worker]
            if found.keys() >= set(names):
                ready.append((service, with_machines(command, part, [found[name] for name in names])))
        return ready

    def _run(self, services: list[tuple[ServiceSpec, Command]]) -> None:
        """Have services run, and note their states."""
        pending = {
            service.name: service_actor(service, self._namespace).run.remote(
                command, service.drain_timeout_s + _STOP_MARGIN_S
            )
            for service, command in services
        }
        self._states.update(self._answers(pending))

    def _answers(self, pending: dict[str, Any]) -> dict[str, Any]:
        """The answers of actors, by the service's name. Those that do not answer are left out, and noted with the
        reason."""
        answers = {}
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        for name, reference in pending.items():
            try:
                answers[name] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                self._states[name] = "waiting for a machine with room, or for its last requests"
            except ray.exceptions.RayError as error:
                self._states[name] = f"restarting: {type(error).__name__}"
        return answers


def _drain_of(spec: FleetSpec) -> float:
    return max(service.drain_timeout_s for service in spec.services) + _STOP_MARGIN_S


def service_actor(service: ServiceSpec, namespace: str) -> Any:
    """The actor of a service, made if there is none."""
    # max_task_retries: a call to an actor that Ray moves to another machine is made there again.
    make = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=service.num_cpus, num_gpus=service.num_gpus)(
        ServiceActor
    )
    where: dict[str, Any] = {}
    if service.part is not None:
        group = _group(service, service.part, namespace)
        where["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, service.part.number)
    return make.options(
        name=PREFIX + service.name, namespace=namespace, lifetime="detached", get_if_exists=True, **where
    ).remote(service.port)


def _group(service: ServiceSpec, part: Part, namespace: str) -> Any:
    """The placement group of a worker's parts, made if there is none: close together, and all or none of them."""
    name = _group_name(service, namespace)
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        needs = {"CPU": service.num_cpus, "GPU": float(service.num_gpus)}
        bundle = {kind: number for kind, number in needs.items() if number > 0}
        return ray.util.placement_group([bundle] * part.num_parts, strategy="PACK", name=name, lifetime="detached")


def _group_name(service: ServiceSpec, namespace: str) -> str:
    return "" if service.part is None else f"{namespace}:{service.name.rpartition('-')[0]}"


def remove_groups(namespace: str, wanted: set[str]) -> None:
    """Remove the fleet's placement groups, but for the wanted ones."""
    for found in ray.util.placement_group_table().values():
        name = found["name"]
        if name.startswith(f"{namespace}:") and name not in wanted and found["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(name))


def service_names(namespace: str) -> list[str]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return [item["name"] for item in names if item["namespace"] == namespace and item["name"].startswith(PREFIX)]


def stop_service(name: str, namespace: str, timeout_s: float) -> None:
    """Drain a service and remove its actor."""
    try:
        actor = ray.get_actor(name, namespace=namespace)
    except ValueError:
        return
    try:
        ray.get(actor.stop.remote(timeout_s), timeout=timeout_s + ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        logger.warning("%s could not be drained: %s", name, type(error).__name__)
    finally:
        ray.kill(actor, no_restart=True)


def replace_manager(spec: FleetSpec, namespace: str) -> Any:
    """Start the manager of `spec`, in place of the one that runs."""
    end_manager(namespace)
    make = ray.remote(max_restarts=-1, num_cpus=0, max_concurrency=4)(FleetManager)
    return make.options(name=MANAGER, namespace=namespace, lifetime="detached").remote(spec, namespace)


def find_manager(namespace: str) -> Any | None:
    try:
        return ray.get_actor(MANAGER, namespace=namespace)
    except ValueError:
        return None


def end_manager(namespace: str) -> None:
    manager = find_manager(namespace)
    if manager is None:
        return
    try:
        ray.get(manager.end.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        logger.warning("the old manager does not answer; it is removed")
    ray.kill(manager, no_restart=True)
