"""The API server's interface: keys, errors as the OpenAI SDK sees them, models, request ids, and the process."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from starlette.requests import Request
from starlette.routing import Route

from fastserve.access.api_keys import PUBLIC_PATHS
from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from fastserve.config import ApiServerConfig
from fastserve.gateway.app import create_app
from fastserve.gateway.routes import router
from tests.gateway.cluster import (
    CHAT,
    DONE,
    EVENTS,
    MODEL,
    Cluster,
    StubController,
    answer_well,
    respond,
    start_cluster,
    stream,
)
from tests.keys import CLUSTER, CLUSTER_KEY


def sdk(cluster: Cluster, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key=key, max_retries=0)


async def chat(client: openai.AsyncOpenAI, model: str = MODEL) -> Any:
    return await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])


async def chat_stream(client: openai.AsyncOpenAI) -> list[str | None]:
    chunks = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
    )
    return [chunk.choices[0].delta.content async for chunk in chunks]


# ---- the OpenAI SDK ---------------------------------------------------------------------------------------------


async def test_the_sdk_gets_answers_streams_and_models(cluster: Cluster) -> None:
    await cluster.worker(answer_well)
    async with sdk(cluster) as client:
        assert (await chat(client)).choices[0].message.content == "12"
        assert await chat_stream(client) == ["0", "1", "2", "3", "4"]
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "fastserve"


async def test_the_sdk_sees_each_error_as_its_kind(cluster: Cluster) -> None:
    async with sdk(cluster) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await chat(client, "nobody")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as nameless:
            await client.post("/chat/completions", body={"messages": []}, cast_to=object)
        assert nameless.value.param == "model"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/nobody")
        worker = await cluster.worker(respond(429, {"error": {"message": "full", "code": "overloaded"}}))
        with pytest.raises(openai.RateLimitError) as full:
            await chat(client)
        assert full.value.code == "overloaded"
        worker.script = stream(EVENTS[0], delay_s=0.03, then="reset")
        with pytest.raises(openai.APIError, match="went away") as lost:
            await chat_stream(client)
        assert lost.value.code == "worker_lost"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b"\xff\xfe", None),
        (b'{"model":"a\xff"}', None),
        (b"[" * 100_000, None),
        (b'{"messages":[]}', "model"),
        (b'{"model":null}', "model"),
        (b'{"model":""}', "model"),
        (b'{"model":7}', "model"),
        (b'{"model":"demo","stream":"yes"}', "stream"),
    ],
)
async def test_a_malformed_body_is_400_in_openai_shape(cluster: Cluster, body: bytes, param: str | None) -> None:
    async with cluster.http.post(cluster.url + "/v1/chat/completions", data=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not cluster.controller.acquired


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
async def test_unknown_routes_answer_in_openai_shape(cluster: Cluster, method: str, path: str, status: int) -> None:
    async with cluster.http.request(method, cluster.url + path) as response:
        assert response.status == status
        assert (await response.json())["error"]["type"] == "invalid_request_error"


# ---- keys -------------------------------------------------------------------------------------------------------

KEYS = ("sk-first-secret", "sk-second-secret")


@asynccontextmanager
async def guarded() -> AsyncIterator[Cluster]:
    async with start_cluster(api_keys=KEYS) as cluster:
        await cluster.worker(answer_well)
        await cluster.in_table()
        yield cluster


async def test_every_route_but_three_needs_a_key() -> None:
    paths = {route.path for route in router.routes if isinstance(route, Route)}
    assert paths > PUBLIC_PATHS
    async with guarded() as cluster:
        cluster.http.headers.clear()
        for path in sorted(paths | {"/v1/nothing", "/docs", "/", "/health/", "/metrics/x"}):
            for method in ("GET", "POST", "OPTIONS"):
                async with cluster.http.request(method, cluster.url + path) as response:
                    if path in PUBLIC_PATHS:
                        assert response.status == (200 if method == "GET" else 405)
                    else:
                        assert response.status == 401, path
                        assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_right_keys_open_and_wrong_ones_do_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with guarded() as cluster:
        for key in KEYS:
            async with sdk(cluster, key) as client:
                assert (await chat(client)).choices[0].message.content == "12"
        for key in ("sk-wrong-secret", KEYS[0] + "x", KEYS[0][:-1], ",".join(KEYS)):
            async with sdk(cluster, key) as client:
                with pytest.raises(openai.AuthenticationError) as refused:
                    await chat(client)
                assert refused.value.code == "invalid_api_key"
        for header in (KEYS[0], f"Basic {KEYS[0]}", "Bearer", "Bearer "):
            async with cluster.post(headers={"Authorization": header}) as response:
                assert response.status == 401
                assert response.headers["www-authenticate"] == "Bearer"
        async with cluster.post(headers={"Authorization": f"bearer  {KEYS[1]}"}) as response:
            assert response.status == 200
        # The client's key is not forwarded: workers get the cluster key.
        sent = {headers["authorization"] for _, headers, _ in cluster.workers[0].requests}
        assert sent == {CLUSTER["Authorization"]}
    assert "secret" not in caplog.text


async def test_cors_preflight_needs_no_key() -> None:
    async with start_cluster(api_keys=KEYS, allowed_origins=("http://a.example",), allow_credentials=True) as cluster:
        asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
        async with cluster.http.options(cluster.url + "/v1/chat/completions", headers=asked) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == "http://a.example"
            assert response.headers["access-control-allow-credentials"] == "true"
        async with cluster.post(headers={"Origin": "http://a.example", "Authorization": ""}) as response:
            assert response.status == 401
            assert response.headers["access-control-allow-origin"] == "http://a.example"
        asked["Origin"] = "http://b.example"
        async with cluster.http.options(cluster.url + "/v1/chat/completions", headers=asked) as response:
            assert response.status == 400


# ---- models, ids, metrics ---------------------------------------------------------------------------------------


async def test_models_are_sorted_unique_and_described_as_in_fastchat(cluster: Cluster) -> None:
    await cluster.worker(answer_well, "b", "org/a")
    await cluster.worker(answer_well, "b", "c")

    async def cards() -> list[dict[str, Any]]:
        async with cluster.http.get(cluster.url + "/v1/models") as response:
            body = await response.json()
        assert body["object"] == "list"
        return list(body["data"])

    seen = await cards()
    assert [card["id"] for card in seen] == ["b", "c", "org/a"]
    card = seen[2]
    assert card["root"] == "org/a"
    assert card["parent"] is None
    assert isinstance(card["created"], int)
    assert re.fullmatch(r"modelperm-\w+", card["permission"][0]["id"])
    assert card["permission"][0]["allow_sampling"] is True
    assert card["permission"][0]["organization"] == "*"
    async with cluster.http.get(cluster.url + "/v1/models/org/a") as response:
        assert await response.json() == card
    await cluster.controller.kill()
    assert await cards() == seen


async def test_request_ids_are_kept_made_and_passed_on(cluster: Cluster) -> None:
    worker = await cluster.worker(answer_well)
    seen = []
    for given in ("my/id=7", None, "x" * 129, "a\tb", "my id"):
        async with cluster.post(headers={} if given is None else {"x-request-id": given}) as response:
            seen.append(response.headers["x-request-id"])
    assert seen[0] == "my/id=7"
    assert all(re.fullmatch(r"req-[0-9a-f]{24}", request_id) for request_id in seen[1:])
    assert len(set(seen)) == 5
    assert [headers["x-request-id"] for _, headers, _ in worker.requests] == seen
    for path in ("/health", "/v1/nothing", "/v1/models"):
        async with cluster.http.get(cluster.url + path) as response:
            assert response.headers["x-request-id"]


async def test_metrics_count_requests_and_time_first_tokens(cluster: Cluster) -> None:
    await cluster.worker(stream(b": alive\n\n", *EVENTS, DONE))
    async with cluster.post({**CHAT, "stream": True}) as response:
        await response.read()
    await cluster.all_released()
    assert await cluster.metric('fastserve_gateway_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert await cluster.metric("fastserve_gateway_time_to_first_token_seconds_count") == 1
    assert await cluster.metric('fastserve_gateway_request_duration_seconds_count{route="/v1/chat/completions"}') == 1


# ---- the process ------------------------------------------------------------------------------------------------


async def test_the_process_is_small_has_no_torch_and_ends_cleanly(tmp_path: Path) -> None:
    controller = StubController()
    await controller.start()
    keys = tmp_path / "keys"
    keys.write_text("sk-file-secret\n")
    keys.chmod(0o600)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fastserve.openai_api_server", "--port=0", "--host=127.0.0.1"),
        *(f"--controller-address={controller.address}", f"--api-keys-file={keys}"),
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "", "FASTSERVE_API_KEYS": "sk-env-secret", ENV_CLUSTER_KEY: CLUSTER_KEY},
    )
    lines: list[str] = []
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while not any("Uvicorn running on" in line for line in lines):
                lines.append((await process.stderr.readline()).decode())
        url = next(match[1] for line in lines if (match := re.search(r"base_url (http\S+)/v1", line)))
        for key in ("sk-file-secret", "sk-env-secret"):
            async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=key) as client:
                assert [model.id async for model in client.models.list()] == []
        info = psutil.Process(process.pid)
        assert info.memory_info().rss < 120e6
        assert not [file.path for file in info.memory_maps() if "torch" in file.path]
        process.terminate()
        _, rest = await asyncio.wait_for(process.communicate(), 10)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await controller.kill()
    log = "".join(lines) + rest.decode()
    assert process.returncode == 0, log
    assert "Application shutdown complete" in log
    assert "secret" not in log
    assert "Traceback" not in log


async def test_an_unexpected_error_is_a_500_with_its_request_id(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(ApiServerConfig())

    async def broken(_: Request) -> None:
        raise ZeroDivisionError

    app.add_route("/broken", broken)  # type: ignore[arg-type]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/broken",
        "headers": [(b"x-request-id", b"mine")],
        "query_string": b"",
        "server": ("test", 80),
        "scheme": "http",
    }
    with pytest.raises(ZeroDivisionError):
        await app(scope, receive, send)
    assert sent[0]["status"] == 500
    assert (b"x-request-id", b"mine") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["type"] == "internal_error"
