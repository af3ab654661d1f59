"""API servers registered as their own workers: the request ends with a clear error after a few hops."""

from __future__ import annotations

import pytest

from fastserve.config import ApiServerConfig
from fastserve.errors import StartupError
from fastserve.gateway.app import create_app
from fastserve.protocol import HOPS_HEADER
from tests.gateway.cluster import CHAT, Cluster, answer_well, serve_app, start_cluster
from tests.gateway.test_gateway_relay import STREAM, ask

BOTH = pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])


@BOTH
async def test_a_server_among_its_own_workers_ends_with_an_error_that_names_the_loop(
    cluster: Cluster, body: dict[str, object]
) -> None:
    cluster.controller.add(cluster.url)
    async with cluster.post(body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (508, "loop_detected")
        assert cluster.url in error["message"]
    assert len(cluster.controller.granted) == 1


async def test_with_keys_the_loop_is_named_too() -> None:
    async with start_cluster(api_keys=("sk-one",)) as cluster:
        cluster.controller.add(cluster.url)
        async with cluster.post() as response:
            assert (response.status, (await response.json())["error"]["code"]) == (508, "loop_detected")


@BOTH
async def test_a_healthy_worker_beside_the_loop_answers(cluster: Cluster, body: dict[str, object]) -> None:
    cluster.controller.add(cluster.url)
    await cluster.worker(answer_well)
    for _ in range(3):
        assert (await ask(cluster, body))[0] == 200
    await cluster.all_released()
    assert cluster.controller.failed  # so that the controller's breaker takes the worker out of dispatch


async def test_a_loop_over_two_servers_ends_after_a_few_hops(cluster: Cluster) -> None:
    other = create_app(ApiServerConfig(controller_address=cluster.controller.address))
    async with serve_app(other) as url:
        cluster.controller.add(url)
        cluster.controller.add(cluster.url)
        async with cluster.post() as response:
            assert (response.status, (await response.json())["error"]["code"]) == (508, "loop_detected")
        assert len(cluster.controller.granted) <= 6


async def test_a_server_behind_another_one_is_no_loop() -> None:
    async with start_cluster() as back, start_cluster() as front:
        worker = await back.worker(answer_well)
        front.controller.add(back.url)
        assert (await ask(front))[0] == 200
        [(_, headers, _)] = worker.requests
        assert len(headers[HOPS_HEADER].split(",")) == 2


async def test_too_many_hops_are_refused_whoever_counted_them(cluster: Cluster) -> None:
    await cluster.worker(answer_well)
    for value, status in (("a", 200), ("a,b,c", 200), ("a,b,c,d", 508), (",".join(["x"] * 2000), 508)):
        async with cluster.post(headers={HOPS_HEADER: value}) as response:
            assert response.status == status


@pytest.mark.parametrize("address", ["http://localhost:8123", "http://127.0.0.1:8123/", "http://[::1]:8123"])
def test_the_servers_own_address_as_the_controllers_ends_the_start(address: str) -> None:
    with pytest.raises(StartupError, match="own address"):
        create_app(ApiServerConfig(port=8123, controller_address=address))
    create_app(ApiServerConfig(port=8124, controller_address=address))


async def test_a_controller_address_that_leads_to_an_api_server_is_logged(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(ApiServerConfig(controller_address=cluster.url))
    async with serve_app(app) as url, cluster.http.post(url + "/v1/chat/completions", json=CHAT) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "no_worker")
    assert "is it a controller?" in caplog.text
