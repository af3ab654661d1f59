"""Controller and workers refuse requests without the cluster key, and web pages even with it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from starlette.routing import Route

from fastserve.config import ControllerConfig
from fastserve.control.app import create_app
from tests.access.serving import MODEL, eventually, run_controller, run_server, run_worker
from tests.keys import CLUSTER, CLUSTER_KEY

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def ask(http: aiohttp.ClientSession, method: str, url: str, **options: Any) -> tuple[int, str | None]:
    """Status and error code of the answer."""
    async with http.request(method, url, **options) as response:
        body = await response.json() if response.content_type == "application/json" and method != "HEAD" else {}
        error = body.get("error") if isinstance(body, dict) else None
        return response.status, error["code"] if error else None


async def wait_served(http: aiohttp.ClientSession, server: str) -> None:
    async def is_served() -> bool:
        return (await ask(http, "POST", server + "/v1/chat/completions", json=CHAT))[0] == 200

    await eventually(is_served)


async def test_every_route_but_health_needs_the_key_and_the_trio_has_it(http: aiohttp.ClientSession) -> None:
    routes = [route for route in create_app(ControllerConfig()).routes if isinstance(route, Route)]
    assert len(routes) > 15
    async with run_controller() as controller, run_worker(controller) as worker, run_server(controller) as server:
        await wait_served(http, server)
        for route in routes:
            for method in route.methods or ():
                expected = (200, None) if route.path == "/health" else (401, "invalid_cluster_key")
                if method == "HEAD":
                    expected = (expected[0], None)
                assert await ask(http, method, controller + route.path) == expected, route.path
        for path in ("/v1/models", "/ready", "/metrics", "/docs", "/nothing", "/health/", "/worker_get_status"):
            assert await ask(http, "GET", worker + path) == (401, "invalid_cluster_key")
        assert await ask(http, "POST", worker + "/v1/chat/completions", json=CHAT) == (401, "invalid_cluster_key")
        assert await ask(http, "POST", worker + "/health", json={}) == (401, "invalid_cluster_key")
        assert await ask(http, "GET", worker + "/health") == (200, None)
        for url in (controller + "/workers", controller + "/metrics", worker + "/metrics", worker + "/v1/models"):
            assert await ask(http, "GET", url, headers=CLUSTER) == (200, None)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        f"Basic {CLUSTER_KEY}",
        CLUSTER_KEY,
        f"Bearer {CLUSTER_KEY}x",
        f"Bearer {CLUSTER_KEY[:-1]}",
        "Bearer é",
    ],
)
async def test_stand_ins_cannot_register_nor_change_anything(
    http: aiohttp.ClientSession, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    status = {"model_names": [MODEL], "speed": 1, "queue_length": 0}
    async with run_controller(no_worker_probe=True) as controller:
        name = {"worker_name": "http://127.0.0.1:1"}
        for path, body in {
            "/register_worker": name | {"check_heart_beat": True, "worker_status": status},
            "/receive_heart_beat": name | {"queue_length": 0, "status": status},
            "/deregister_worker": name,
            "/report_failure": name,
            "/acquire": {"model": MODEL, "lease": "x"},
            "/release": {"leases": ["x"] * 1000},
            "/get_worker_address": {"model": MODEL},
        }.items():
            sent = {"Authorization": header} if header else {}
            assert await ask(http, "POST", controller + path, json=body, headers=sent) == (401, "invalid_cluster_key")
        async with http.post(controller + "/list_models", headers=CLUSTER) as response:
            assert await response.json() == {"models": []}
        async with http.get(controller + "/metrics", headers=CLUSTER) as response:
            assert "fastserve_refused_cluster_keys_total 7.0" in await response.text()
    assert CLUSTER_KEY[:-1] not in caplog.text
    assert 0 < caplog.text.count("Refused a request with") < 7, "a flood of refusals is no flood of lines"


async def test_two_authorization_headers_are_none(http: aiohttp.ClientSession) -> None:
    async with run_controller() as controller:
        headers = [("Authorization", CLUSTER["Authorization"]), ("Authorization", "Bearer other")]
        assert (await ask(http, "GET", controller + "/workers", headers=headers))[0] == 401


async def test_web_pages_are_kept_out_of_the_cluster_even_with_the_key(http: aiohttp.ClientSession) -> None:
    async with run_controller() as controller, run_worker(controller) as worker:
        for url in (controller + "/list_models", worker + "/worker_get_status"):
            for origin in ("https://evil.example", "null", "http://localhost:3000", controller, ""):
                headers = CLUSTER | {"Origin": origin}
                assert await ask(http, "POST", url, headers=headers) == (403, "origin_not_allowed")
            for host in ("evil.example", "evil.example:21001", "localhost.evil.example", "a@localhost"):
                headers = CLUSTER | {"Host": host}
                assert await ask(http, "POST", url, headers=headers) == (421, "unknown_host")
            for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "a/json"):
                headers = CLUSTER | {"Content-Type": media_type}
                assert await ask(http, "POST", url, data=b"{}", headers=headers) == (415, "unsupported_media_type")
            headers = CLUSTER | {"Content-Type": "application/json; charset=utf-8"}
            assert (await ask(http, "POST", url, data=b"{}", headers=headers))[0] == 200
            assert (await ask(http, "POST", url, headers=CLUSTER))[0] == 200, "an empty body has no type"


async def test_allowed_hosts_are_answered_too(http: aiohttp.ClientSession) -> None:
    async with run_controller(allowed_hosts=("controller", ".svc.example")) as address:
        for host, status in {"controller:21001": 200, "a.svc.example": 200, "svc.example": 421, "other": 421}.items():
            assert (await ask(http, "GET", address + "/workers", headers=CLUSTER | {"Host": host}))[0] == status


async def test_insecure_services_ask_for_no_key_but_still_keep_web_pages_out(http: aiohttp.ClientSession) -> None:
    async with (
        run_controller(insecure=True) as controller,
        run_worker(controller, insecure=True) as worker,
        run_server(controller, insecure=True) as server,
    ):
        await wait_served(http, server)
        assert await ask(http, "GET", worker + "/v1/models") == (200, None)
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            assert (await ask(http, "POST", controller + "/list_models", headers=headers))[0] in (403, 421)
        assert (await ask(http, "POST", controller + "/list_models", data=b"{}"))[0] == 415


async def test_a_key_is_replaced_while_the_cluster_serves(http: aiohttp.ClientSession, tmp_path: Any) -> None:
    old, new = (secrets.token_urlsafe(32) for _ in range(2))
    path = tmp_path / "cluster.key"
    path.write_text(old + "\n")
    path.chmod(0o600)
    key: dict[str, Any] = {"cluster_key_file": str(path)}

    async def is_valid(token: str) -> bool:
        return (await ask(http, "GET", url, headers={"Authorization": f"Bearer {token}"}))[0] == 200

    async def is_invalid(token: str) -> bool:
        return not await is_valid(token)

    async with (
        run_controller(**key) as controller,
        run_worker(controller, **key),
        run_server(controller, **key) as server,
    ):
        url = controller + "/workers"
        await wait_served(http, server)
        assert not await is_valid(new)
        # In the documented steps: a service sends the new key only when all others know it.
        for keys in (f"{old}\n{new}\n", f"{new}\n{old}\n"):
            path.write_text(keys)
            await eventually(lambda: is_valid(new))
            await asyncio.sleep(1.2)  # the others read it within a second too
            assert await is_valid(old)
            assert (await ask(http, "POST", server + "/v1/chat/completions", json=CHAT))[0] == 200
        path.write_text("broken\n")
        await asyncio.sleep(1.2)
        assert await is_valid(new), "a broken file changes nothing"
        path.write_text(f"{new}\n")
        await eventually(lambda: is_invalid(old))
        await wait_served(http, server)
