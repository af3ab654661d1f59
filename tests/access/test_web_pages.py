"""Foreign web pages cannot use an API server or a worker without a controller that have no API keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.access.serving import run_server, run_worker
from tests.access.test_cluster_guard import CHAT, ask

FOREIGN = ("https://evil.example", "null", "http://localhost.evil.example", "http://192.168.0.1")
OWN = ("http://localhost:3000", "https://127.0.0.1:1", "http://[::1]:8888")
KEY = {"Authorization": "Bearer sk-right"}
NOBODY = "http://127.0.0.1:9"
"""No controller is there: the checks come before a worker is acquired."""


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_an_open_server_on_loopback_answers_pages_of_this_machine_only(http: aiohttp.ClientSession) -> None:
    async with run_server(NOBODY) as server, run_worker() as worker:
        for address in (server, worker):
            url = address + "/v1/models"
            for origin in FOREIGN:
                assert await ask(http, "GET", url, headers={"Origin": origin}) == (403, "origin_not_allowed")
            for origin in (*OWN, address):
                assert await ask(http, "GET", url, headers={"Origin": origin}) == (200, None)
            for host in ("rebound.example", "rebound.example:8888"):
                assert await ask(http, "GET", url, headers={"Host": host}) == (421, "unknown_host")
                same = {"Host": host, "Origin": f"http://{host}"}
                assert await ask(http, "GET", url, headers=same) == (421, "unknown_host")
        asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        async with http.options(server + "/v1/chat/completions", headers=asked) as response:
            assert "access-control-allow-origin" not in response.headers
        asked["Origin"] = OWN[0]
        async with http.options(server + "/v1/chat/completions", headers=asked) as response:
            assert response.headers["access-control-allow-origin"] == OWN[0]


async def test_with_keys_or_named_origins_or_hosts_pages_may_come_from_elsewhere(http: aiohttp.ClientSession) -> None:
    foreign = {"Origin": "https://chat.example", "Host": "api.example"}
    async with run_server(NOBODY, api_keys=("sk-right",)) as server:
        assert await ask(http, "GET", server + "/v1/models", headers=foreign) == (401, "invalid_api_key")
        async with http.get(server + "/v1/models", headers=foreign | KEY) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == "*"
    named = {"allowed_origins": ("https://chat.example",), "allowed_hosts": ("api.example",)}
    async with run_server(NOBODY, **named) as server:
        async with http.get(server + "/v1/models", headers=foreign) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == "https://chat.example"
        async with http.get(server + "/v1/models", headers=foreign | {"Origin": "https://other.example"}) as response:
            assert "access-control-allow-origin" not in response.headers
            assert response.status == 403
        # A request that the browser sends without a preflight, only hiding its answer.
        simple = {"Host": "api.example", "Origin": "https://other.example", "Content-Type": "text/plain"}
        url = server + "/v1/chat/completions"
        assert await ask(http, "POST", url, data=b"{}", headers=simple) == (403, "origin_not_allowed")
    async with run_server(NOBODY, allowed_origins=("*",)) as server:
        assert await ask(http, "GET", server + "/v1/models", headers={"Origin": FOREIGN[0]}) == (200, None)
    async with (
        run_server(NOBODY, host="0.0.0.0", allowed_origins=()) as server,
        http.get(server + "/v1/models", headers={"Origin": FOREIGN[0]}) as response,
    ):
        assert "access-control-allow-origin" not in response.headers, "no origin is none, not all"


async def test_named_hosts_are_checked_beyond_loopback_too(http: aiohttp.ClientSession) -> None:
    async with run_server(NOBODY, host="0.0.0.0") as server:
        assert await ask(http, "GET", server + "/v1/models", headers={"Host": "any.example"}) == (200, None)
    async with run_server(NOBODY, host="0.0.0.0", allowed_hosts=("api.example",)) as server:
        for host, status in {"any.example": 421, "api.example": 200, "127.0.0.1:8888": 200}.items():
            assert (await ask(http, "GET", server + "/v1/models", headers={"Host": host}))[0] == status
        foreign = {"Host": "api.example", "Origin": "https://any.example"}
        assert await ask(http, "GET", server + "/v1/models", headers=foreign) == (403, "origin_not_allowed")


async def test_a_lone_worker_asks_for_api_keys_where_they_are_set(http: aiohttp.ClientSession) -> None:
    chat = "/v1/chat/completions"
    async with run_worker() as worker:
        assert (await ask(http, "POST", worker + chat, json=CHAT))[0] == 200
        for media_type in ("text/plain", "application/x-www-form-urlencoded"):
            sent = {"Content-Type": media_type}
            assert (await ask(http, "POST", worker + chat, data=b"{}", headers=sent))[0] == 415
    async with run_worker(api_keys=("sk-right",)) as worker:
        assert await ask(http, "POST", worker + chat, json=CHAT) == (401, "invalid_api_key")
        assert await ask(http, "POST", worker + "/worker_get_status") == (401, "invalid_api_key")
        assert (await ask(http, "POST", worker + chat, json=CHAT, headers=KEY))[0] == 200
        for path in ("/health", "/ready"):
            assert (await ask(http, "GET", worker + path))[0] == 200
        async with http.get(worker + "/metrics") as response:
            assert "fastserve_refused_api_keys_total 2.0" in await response.text()
