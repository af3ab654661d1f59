"""The worker's routes for administrators, on the fake engine: access, bodies, and the effects on clients."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.fake import noise
from fastserve.worker.keeper import RestartPolicy
from tests.worker.conftest import MODEL, Running, RunWorker, until

LONG: dict[str, Any] = {"model": MODEL, "prompt": "one", "max_tokens": 150}
ROUTES = ("/reset_prefix_cache", "/pause", "/resume", "/start_profile", "/stop_profile")


async def call(running: Running, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    async with running.http.post(running.url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


async def health(running: Running) -> str:
    async with running.http.get(running.url + "/health") as response:
        assert response.status == 200
        state: str = (await response.json())["status"]
        return state


async def test_streams_are_kept_alive_through_a_pause_and_lose_nothing(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.01) as running:
        _, free = await running.post("/v1/completions", LONG | {"temperature": 0})
        async with running.http.post(
            running.url + "/v1/completions", json=LONG | {"temperature": 0, "stream": True}
        ) as response:
            await response.content.readline()
            status, state = await call(running, "/pause", {"mode": "keep"})
            assert (status, state["paused"], state["num_running"]) == (200, True, 1)
            assert await health(running) == "paused"
            assert running.runtime.status().paused
            assert running.runtime.status().ready, "requests are accepted, and wait"
            async with running.http.get(running.url + "/metrics") as metrics:
                assert "fastserve_engine_paused 1.0" in await metrics.text()
            waits = asyncio.create_task(running.post("/v1/completions", LONG | {"max_tokens": 2}))
            lines: list[bytes] = []
            async with asyncio.timeout(5):
                while not any(line.startswith(b":") for line in lines):
                    lines.append(await response.content.readline())
            assert not waits.done()
            assert (await call(running, "/resume"))[0] == 200
            assert await health(running) == "ready"
            lines += (await response.read()).splitlines()
        assert (await waits)[0] == 200
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith(b"data: {")]
        whole = free["choices"][0]["text"]
        assert whole.endswith("".join(texts))
        assert len(whole) - len("".join(texts)) < len(whole) / 10, "all but the first event"
        assert b"data: [DONE]" in lines


async def test_aborted_requests_end_with_an_error_that_asks_to_retry(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.01) as running:
        whole = asyncio.create_task(running.post("/v1/completions", LONG))
        async with running.http.post(running.url + "/v1/completions", json=LONG | {"stream": True}) as response:
            await response.content.readline()
            await until(lambda: running.engine.stats.num_running == 2)
            _, state = await call(running, "/pause", {"mode": "abort"})
            assert (state["num_aborted"], state["num_running"]) == (2, 0)
            *_, error, done, _ = (await response.text()).split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(error.strip().removeprefix("data: "))["error"]["code"] == "request_aborted"
        status, answer = await whole
        assert (status, answer["error"]["code"]) == (503, "request_aborted")


async def test_a_pause_that_waits_can_have_a_deadline(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.005) as running:
        runs = asyncio.create_task(running.post("/v1/completions", LONG))
        await until(lambda: running.engine.stats.num_running == 1)
        status, answer = await call(running, "/pause", {"mode": "wait", "timeout_s": 0.05})
        assert (status, answer["error"]["code"]) == (504, "engine_timeout")
        assert await health(running) == "pausing"
        status, state = await call(running, "/pause", {"mode": "wait", "timeout_s": 30})
        assert (status, state["paused"], state["num_running"]) == (200, True, 0)
        assert (await runs)[0] == 200


async def test_a_call_is_carried_out_though_the_administrator_disconnects(run_worker: RunWorker) -> None:
    async with run_worker(noise, token_s=0.005) as running:
        runs = asyncio.create_task(running.post("/v1/completions", LONG))
        await until(lambda: running.engine.stats.num_running == 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await call(running, "/pause", {"mode": "wait"})
        assert (await runs)[0] == 200
        await until(lambda: running.engine.stats.paused)


async def test_an_engine_that_is_started_again_is_not_paused(run_worker: RunWorker) -> None:
    async with run_worker(restart_policy=RestartPolicy(first_pause_s=0.01)) as running:
        await call(running, "/pause")
        running.engine.die("crashed")
        await until(lambda: running.engine.starts == 2 and running.worker.keeper.ready)
        assert await health(running) == "ready"
        assert (await running.post("/v1/completions", LONG))[0] == 200


async def test_the_other_calls_answer(run_worker: RunWorker) -> None:
    async with run_worker() as running:
        assert await call(running, "/reset_prefix_cache", {"reset_running_requests": True}) == (
            200,
            {"num_blocks": 0, "num_preempted": 0},
        )
        status, answer = await call(running, "/stop_profile")
        assert (status, answer["error"]["code"]) == (409, "conflict")
        status, started = await call(running, "/start_profile", {"num_steps": 5, "num_warm_up_steps": 2})
        assert status == 200
        assert (await call(running, "/start_profile"))[0] == 409
        assert await call(running, "/stop_profile", {}) == (200, started)


@pytest.mark.parametrize(
    ("path", "body", "field", "remedy"),
    [
        ("/pause", {"mode": "stop"}, "mode", '"stop". Give one of "keep", "wait" or "abort".'),
        ("/pause", {"mode": 3}, "mode", "Give one of"),
        ("/pause", {"mod\n": "keep"}, "mod", 'Unknown field "mod\\n". This route knows: timeout_s, mode.'),
        ("/pause", {"timeout_s": 0}, "timeout_s", "greater than 0"),
        ("/resume", {"timeout_s": 1e9}, "timeout_s", "less than or equal to 86400"),
        ("/resume", {"timeout_s": "soon"}, "timeout_s", "Give a number."),
        ("/resume?mode=keep", None, "mode", "no query parameters"),
        ("/reset_prefix_cache", {"reset_running_requests": 1}, "reset_running_requests", "Give true or false."),
        ("/start_profile", {"num_steps": 0}, "num_steps", "greater than or equal to 1"),
        ("/start_profile", {"num_steps": 10**6}, "num_steps", "less than or equal to 200"),
        ("/start_profile", {"num_warm_up_steps": 1.5}, "num_warm_up_steps", "Give an integer."),
        ("/start_profile", {"output_dir": "/etc"}, "output_dir", "Unknown field"),
        ("/stop_profile", [], None, "not a JSON object"),
        ("/stop_profile", "now", None, "not a JSON object"),
    ],
)
async def test_an_invalid_body_gets_an_error_that_names_the_field(
    one_worker: Running, path: str, body: Any, field: str | None, remedy: str
) -> None:
    status, answer = await call(one_worker, path, body)
    error = answer["error"]
    assert status == 400
    assert remedy in error["message"]
    assert (error["param"] or "").strip() == (field or "")
    assert not one_worker.engine.stats.paused, "nothing was done"


@pytest.fixture
async def one_worker(run_worker: RunWorker) -> Any:
    async with run_worker() as running:
        yield running


async def test_only_administrators_may(run_worker: RunWorker, tmp_path: Path) -> None:
    key_file = tmp_path / "admin.key"
    key_file.write_text("an-admin-key-of-these-tests\n")
    key_file.chmod(0o600)
    key = {"Authorization": "Bearer an-admin-key-of-these-tests"}
    async with run_worker(admin_key_file=str(key_file), api_keys=("sk-client",)) as running:
        for path in ROUTES:
            assert (await call(running, path))[0] == 401
            status, answer = await call(running, path, Authorization="Bearer sk-client")
            assert (status, answer["error"]["code"]) == (403, "permission_denied")
        assert not running.engine.stats.paused
        assert (await call(running, "/pause", **key))[0] == 200
        assert (await call(running, "/resume", **key))[0] == 200
    async with run_worker() as running:
        for path in ROUTES:
            assert (await call(running, path, **{"X-Forwarded-For": "10.0.0.7"}))[0] == 403
        assert (await call(running, "/pause"))[0] == 200, "this machine may, where there is no key"
