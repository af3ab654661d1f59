"""A fleet on a Ray cluster: `python -m fastserve.on_ray --model-path-address MODEL@any@1 --replicas 3`.

Places a controller, API servers and model workers on the cluster's machines and returns when they serve. The same
command with other numbers changes the fleet that runs; `--down` ends it. What dies with its machine is started again.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve import dispatch
from fastserve.access.cluster_key import ENV_CLUSTER_KEY, make_keys
from fastserve.errors import StartupError
from fastserve.fleet.division import NodeRoom
from fastserve.fleet.service_process import ServiceState
from fastserve.fleet.spec import RayConfig, make_spec
from fastserve.launching.console import Console
from fastserve.launching.plan import common_config
from fastserve.options import parse_config

_POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    try:
        config = parse_config(RayConfig, argv, "fastserve.on_ray", os.environ, {"dispatch_method": dispatch.names()})
        run(config, os.environ, Console(sys.stdout))
    except StartupError as error:
        Console(sys.stderr).say(error.message)
        sys.exit(error.exit_code)


def run(config: RayConfig, environ: Mapping[str, str], console: Console) -> None:
    """Make or change the fleet and wait until it serves. Raises StartupError."""
    try:
        import ray
    except ImportError as error:
        raise StartupError("Ray is not installed: pip install 'fastserve[ray]', on every machine.") from error
    from fastserve.fleet import actors

    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=config.ray_address, namespace=config.ray_namespace, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise StartupError(f"--ray-address {config.ray_address}: no Ray cluster answers there: {reason}") from error
    try:
        if config.down:
            _end(config, console)
            return
        key = _cluster_key(config, environ)
        client_keys = ",".join(config.api_keys) if config.api_keys else None
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [NodeRoom(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in found]
        spec = make_spec(config, key, client_keys, nodes)
        manager = actors.replace_manager(spec, config.ray_namespace)
        _wait(manager, config, console)
    finally:
        if own:
            ray.shutdown()


def _cluster_key(config: RayConfig, environ: Mapping[str, str]) -> str:
    """The key in the environment, else that of the fleet that runs, else a new one."""
    import ray

    from fastserve.fleet.actors import ANSWER_TIMEOUT_S, find_manager

    given = environ.get(ENV_CLUSTER_KEY, "").strip()
    if given:
        make_keys(given.split(","), ENV_CLUSTER_KEY)
        return given
    manager = find_manager(config.ray_namespace)
    if manager is None:
        return secrets.token_urlsafe(32)
    try:
        key: str = ray.get(manager.cluster_key.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise StartupError("The manager of the fleet that runs does not answer. End the fleet with --down.") from error
    return key


def _end(config: RayConfig, console: Console) -> None:
    from fastserve.fleet.actors import end_manager, remove_groups, service_names, stop_service

    end_manager(config.ray_namespace)
    names = service_names(config.ray_namespace)
    # API servers first: they get no new requests once the workers leave. The controller last.
    for name in sorted(names, key=lambda item: ("api-server" not in item, "controller" in item)):
        console.say(f"ending {name.partition(':')[2]}")
        stop_service(name, config.ray_namespace, common_config(config).drain_timeout_s + 10)
    remove_groups(config.ray_namespace, set())
    console.say("The fleet has ended." if names else f"No fleet runs in the namespace {config.ray_namespace}.")


def _wait(manager: Any, config: RayConfig, console: Console) -> None:
    """Wait until every service runs and every API server can serve a model. Raises StartupError when it is too late."""
    import ray

    deadline = time.monotonic() + config.wait_timeout_s
    states: Mapping[str, ServiceState | str] = {}
    said: set[str] = set()
    while time.monotonic() < deadline:
        states = ray.get(manager.states.remote(), timeout=60)
        for name, state in states.items():
            if isinstance(state, ServiceState) and state.address is not None and name not in said:
                said.add(name)
                console.say(f"{name} runs at {state.address}")
        if all(_serves(name, state, config.replicas > 0) for name, state in states.items()):
            addresses = [state.address for state in states.values() if isinstance(state, ServiceState)]
            console.say(f"The fleet serves. base_url for the OpenAI SDK: {addresses[1]}/v1")
            return
        time.sleep(_POLL_S)
    late = "; ".join(f"{name}: {_described(state)}" for name, state in states.items())
    raise StartupError(
        f"The fleet does not serve after {config.wait_timeout_s:g} s (--wait-timeout-s), and goes on starting: {late}. "
        "`ray status` shows what the cluster lacks, `ray logs` what services say; --down ends the fleet."
    )


def _described(state: ServiceState | str) -> str:
    if isinstance(state, str):
        return state
    if state.is_running:
        return f"runs at {state.address}"
    return f"ended with code {state.exit_code}, started {state.num_starts} times"


def _serves(name: str, state: ServiceState | str, has_workers: bool) -> bool:
    if not isinstance(state, ServiceState) or state.address is None:
        return False
    path = "/ready" if name.startswith("api-server") and has_workers else "/health"
    try:
        urllib.request.urlopen(state.address + path, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


if __name__ == "__main__":
    main()
