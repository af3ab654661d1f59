"""A fleet on a local Ray cluster with two nodes beside the head."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import psutil
import pytest

from fastserve import on_ray
from fastserve.errors import StartupError
from fastserve.fleet.service_process import ServiceState
from fastserve.fleet.spec import RayConfig
from fastserve.launching.console import Console
from fastserve.options import parse_config
from tests.processes import is_alive

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ray = pytest.importorskip("ray")
NAMESPACE = "fastserve-test"


def run(*flags: str) -> str:
    out = io.StringIO()
    common = ["--ray-namespace", NAMESPACE, "--cpus-per-worker", "1", "--wait-timeout-s", "240"]
    if "--tp-size" not in flags:
        common += ["--engine", "fake"]
    config = parse_config(RayConfig, [*common, "--device", "cpu", *flags], "x", {})
    on_ray.run(config, {}, Console(out))
    return out.getvalue()


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, Any]]:
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 * 2**20, "num_cpus": 2}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        found = {"cluster": cluster, "nodes": [cluster.add_node(**small) for _ in range(2)]}
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


def until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def states() -> dict[str, ServiceState]:
    manager = ray.get_actor("fleet-manager", namespace=NAMESPACE)
    found = ray.get(manager.states.remote(), timeout=60)
    return {name: state for name, state in found.items() if isinstance(state, ServiceState) and state.is_running}


def ask() -> str:
    address = states()["api-server-0"].address
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=5) as client:
        answer = client.completions.create(model="fastserve-demo", prompt="hello", max_tokens=5)
    return answer.choices[0].text


def pids(module: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"fastserve.{module}" in words and "fastserve.fleet.child" not in words and is_alive(process.pid):
            found.append(process.pid)
    return found


def test_a_fleet_starts_scales_heals_and_ends(nodes: dict[str, Any]) -> None:
    said = run("--model-path-address", "fastserve-demo@any@1", "--replicas", "2")
    assert "base_url" in said
    assert set(states()) == {"controller", "api-server-0", "worker-fastserve-demo-0", "worker-fastserve-demo-1"}
    assert ask()

    # More replicas of what runs: the others are left alone.
    before = states()
    run("--model-path-address", "fastserve-demo@any@1", "--replicas", "3")
    after = states()
    assert len(after) == 5
    assert {name: after[name] for name in before} == before

    # A process that dies.
    victim = pids("model_worker")[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: sum(state.num_starts for state in states().values()) == 6)
    until(lambda: len(pids("model_worker")) == 3)
    assert ask()

    # Fewer replicas: they drain and go.
    run("--model-path-address", "fastserve-demo@any@1", "--replicas", "1")
    until(lambda: len(pids("model_worker")) == 1)
    assert ask()

    # A machine that dies takes its services along; they come back on another.
    nodes["cluster"].remove_node(nodes["nodes"][0], allow_graceful=False)
    nodes["cluster"].add_node(num_cpus=2, object_store_memory=100 * 2**20)

    def serves() -> bool:
        try:
            return len(states()) == 3 and bool(ask())
        except (openai.OpenAIError, ray.exceptions.RayError, KeyError, ValueError):
            return False

    until(serves)

    run("--down")
    assert not pids("model_worker")
    assert not pids("controller")
    assert "No fleet runs" in run("--down")


def test_a_fleet_that_does_not_fit_says_what_it_waits_for(nodes: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match=r"worker-fastserve-demo-0: waiting for a machine with room"):
        run("--model-path-address", "fastserve-demo@any@1", "--cpus-per-worker", "50", "--wait-timeout-s", "20")
    run("--down")


def test_a_model_over_two_machines_starts_and_comes_back(nodes: dict[str, Any]) -> None:
    flags = ("--model-path-address", "fastserve-demo@any@1", "--tp-size", "2", "--cpus-per-worker", "2")
    said = run(*flags)
    parts = [f"worker-fastserve-demo-0-2x1-part{number}" for number in (0, 1)]
    assert all(f"{part} runs at" in said for part in parts)
    text = ask()
    assert text
    os.kill(pids("gang_worker")[1], signal.SIGKILL)

    def serves() -> bool:
        try:
            return sum(states()[part].num_starts for part in parts) >= 3 and ask() == text
        except (openai.OpenAIError, ray.exceptions.RayError, KeyError):
            return False

    until(serves)
    run("--down")
    assert not pids("gang_worker")
    groups = ray.util.placement_group_table().values()
    assert all(group["state"] == "REMOVED" for group in groups)
