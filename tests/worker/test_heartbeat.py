from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fastserve.engine.fake import FakeOptions
from fastserve.worker.heartbeat import MAX_JITTER, pauses_s
from fastserve.worker.keeper import RestartPolicy
from tests.worker.conftest import MODEL, RunWorker, until

FAST = 0.03


class StubController:
    """Records its calls. `fastchat`: like FastChat's, it knows only workers from /register_worker."""

    def __init__(self, *, fastchat: bool = False) -> None:
        self.fastchat = fastchat
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.known: set[str] = set()
        """Registered workers that are ready."""
        self.announced: set[str] = set()
        """Workers that are not ready: the model is loading or the engine restarting."""
        self.strange: tuple[int, bytes] | None = None
        """HTTP status and body to send instead of its replies."""
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/{path}", self._take)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.known.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    async def _take(self, request: web.Request) -> web.Response:
        path, body = request.match_info["path"], await request.json()
        self.calls.append((path, body))
        if self.strange is not None:
            return web.Response(status=self.strange[0], body=self.strange[1])
        name = body["worker_name"]
        if path == "deregister_worker":
            self.known.discard(name)
        elif path == "register_worker" or not self.fastchat:
            is_ready = body.get("status", body.get("worker_status"))["ready"]
            (self.known if is_ready else self.announced).add(name)
            (self.announced if is_ready else self.known).discard(name)
        exist = name in self.known or name in self.announced
        return web.json_response({"exist": exist} if path == "receive_heart_beat" else None)


@contextlib.asynccontextmanager
async def controller(*, fastchat: bool = False) -> AsyncIterator[StubController]:
    stub = StubController(fastchat=fastchat)
    await stub.start()
    try:
        yield stub
    finally:
        await stub.stop()


@pytest.fixture
def settings() -> dict[str, Any]:
    return {"no_register": False, "heartbeat_interval_s": FAST}


async def test_full_status_in_every_interval_and_deregistration(
    run_worker: RunWorker, settings: dict[str, Any]
) -> None:
    async with controller() as stub:
        async with run_worker(controller_address=stub.url + "/", model_names=("a", "b"), **settings) as running:
            # The first ones may be sent while the model loads.
            await until(lambda: len(stub.calls) >= 3 and stub.calls[-1][1]["status"]["ready"])
            assert set(stub.paths()) == {"receive_heart_beat"}
            body = stub.calls[-1][1]
            assert body["worker_name"] == running.url
            assert body["queue_length"] == 0
            status = body["status"]
            assert status["model_names"] == ["a", "b"]
            assert status["heartbeat_interval_s"] == FAST
            assert status["context_length"] == 2048
            assert status["leases"] == []
            assert stub.known == {running.url}
        assert stub.known == set()
        assert stub.paths()[-1] == "deregister_worker"


def test_workers_started_together_do_not_send_in_lockstep() -> None:
    workers = [list(islice(pauses_s(2.0, random.Random(seed)), 20)) for seed in range(1000)]
    for num_pauses in (1, 20):
        phases = [sum(pauses[:num_pauses]) % 2.0 for pauses in workers]
        assert all(60 < sum(tenth <= 5 * phase < tenth + 1 for phase in phases) < 140 for tenth in range(10))
    assert all(2.0 * (1 - MAX_JITTER) <= pause <= 2.0 for pauses in workers for pause in pauses[1:])


async def test_a_fastchat_controller_is_registered_with(run_worker: RunWorker, settings: dict[str, Any]) -> None:
    async with controller(fastchat=True) as stub, run_worker(controller_address=stub.url, **settings) as running:
        await until(lambda: stub.known == {running.url})
        await until(lambda: len(stub.calls) >= 5)
        assert stub.paths().count("register_worker") == 1
        body = next(body for path, body in stub.calls if path == "register_worker")
        assert body["check_heart_beat"] is True
        assert body["worker_status"].keys() >= {"model_names", "speed", "queue_length"}


STRANGE = {
    "nested too deep": b"[" * 60_000,
    "objects nested too deep": b'{"error":' * 7_000,
    "html": b"<html>It works!</html>",
    "another shape": b'{"error": {"message": ["no"]}, "exist": 10}',
    "a string": b'"exist"',
    "a long number": b"1" * 60_000,
    "no text": b"\xff\xfe\x00",
    "too much": b" " * 200_000,
}


async def test_the_worker_serves_on_whatever_answers_at_the_controllers_address(
    run_worker: RunWorker, settings: dict[str, Any]
) -> None:
    async with controller() as stub, run_worker(controller_address=stub.url, **settings) as running:
        await until(lambda: stub.known == {running.url})
        for body in STRANGE.values():
            for status in (200, 400):
                stub.strange = (status, body)
                before = len(stub.calls)
                await until(lambda seen=before: len(stub.calls) >= seen + 4)  # type: ignore[misc]
        stub.known.clear()
        stub.strange = None
        await until(lambda: stub.known == {running.url})


async def test_a_restarted_controller_knows_it_again(
    run_worker: RunWorker, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for fastchat in (False, True):
        async with controller(fastchat=fastchat) as stub:
            caplog.clear()
            async with run_worker(controller_address=stub.url, **settings) as running:
                await until(lambda: stub.known == {running.url})
                await stub.stop()
                await asyncio.sleep(FAST * 5)
                assert caplog.text.count("cannot be reached") == 1
                await stub.start()
                assert await until(lambda: stub.known == {running.url}) < FAST * 10
                await until(lambda: caplog.text.count("cannot be reached") == 1)


async def test_no_heartbeat_is_sent_before_requests_are_accepted(
    run_worker: RunWorker, settings: dict[str, Any]
) -> None:
    async with controller() as stub, run_worker(controller_address=stub.url, **settings) as running:
        async with running.http.get(running.url + "/ready") as response:
            assert response.status == 200
        await until(lambda: bool(stub.calls))
    async with controller() as stub, run_worker(controller_address=stub.url, no_register=True):
        await asyncio.sleep(FAST * 3)
        assert stub.calls == []


async def test_a_dead_engine_takes_the_worker_out(run_worker: RunWorker, settings: dict[str, Any]) -> None:
    async with controller() as stub:
        policy = RestartPolicy(first_pause_s=0.8)
        async with run_worker(controller_address=stub.url, restart_policy=policy, **settings) as running:
            await until(lambda: stub.known == {running.url})
            running.engine.die("crashed")
            await until(lambda: not running.worker.keeper.ready)
            beats = len(stub.calls)
            await until(lambda: running.worker.keeper.ready)
            not_ready = [body for _, body in stub.calls[beats:] if body["status"]["ready"] is False]
            assert len(not_ready) >= 2, "its models stay known"
            assert "deregister_worker" not in stub.paths()
            await until(lambda: stub.known == {running.url})


async def test_a_loading_model_is_announced_and_clients_are_asked_to_retry(
    run_worker: RunWorker, settings: dict[str, Any]
) -> None:
    async with controller() as stub, aiohttp.ClientSession() as http:

        def load_slowly(options: FakeOptions) -> None:
            options.start_s = 0.9

        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        run = run_worker(controller_address=stub.url, prepare=load_slowly, **settings)
        starting = asyncio.create_task(run.__aenter__())
        await until(lambda: bool(stub.announced))
        (address,) = stub.announced
        assert stub.calls[-1][1]["status"]["model_names"] == [MODEL]
        async with http.get(address + "/health") as response:
            assert (response.status, await response.json()) == (200, {"status": "loading"})
        for method, path, body in (
            ("POST", "/v1/chat/completions", chat),
            ("POST", "/v1/completions", {"model": MODEL, "prompt": "x"}),
            ("GET", "/v1/models", None),
            ("GET", "/ready", None),
            ("POST", "/count_token", {"prompt": "x"}),
        ):
            async with http.request(method, address + path, json=body) as response:
                assert (path, response.status) == (path, 503)
                assert 1 <= int(response.headers["Retry-After"]) <= 60
                assert (await response.json())["error"]["code"] == "model_loading"
        async with http.post(address + "/worker_generate", json={"prompt": "x"}) as response:
            assert (await response.json())["error_code"] == 50001
        async with http.post(address + "/worker_get_status", json={}) as response:
            assert (await response.json())["ready"] is False
        async with http.get(address + "/metrics") as response:
            assert response.status == 200
            refused = 'fastserve_worker_requests_total{outcome="model_loading"} 3.0'
            assert refused in await response.text(), "requests to generate are counted"
        assert stub.known == set()
        running = await starting
        await until(lambda: stub.known == {running.url})
        assert (await running.post("/v1/chat/completions", chat))[0] == 200
        await run.__aexit__(None, None, None)


async def test_a_fastchat_controller_learns_of_a_worker_when_it_is_ready(
    run_worker: RunWorker, settings: dict[str, Any]
) -> None:
    async with controller(fastchat=True) as stub:

        def load_slowly(options: FakeOptions) -> None:
            options.start_s = 0.3

        async with run_worker(controller_address=stub.url, prepare=load_slowly, **settings) as running:
            first = stub.paths().index("register_worker") if "register_worker" in stub.paths() else len(stub.paths())
            assert first >= 2, "heartbeats alone while it loads"
            await until(lambda: stub.known == {running.url})


@pytest.mark.parametrize("lease", ["x" * 129, "with space", "a\tb", ""])
async def test_a_lease_that_the_controller_would_refuse_stays_out_of_the_heartbeat(
    run_worker: RunWorker, settings: dict[str, Any], lease: str
) -> None:
    async with controller() as stub, run_worker(controller_address=stub.url, **settings, token_s=0.02) as running:
        body = {"model": MODEL, "prompt": "one two three four", "max_tokens": 50, "ignore_eos": True}
        headers = {"x-fastserve-lease": lease}
        asking = asyncio.create_task(running.post("/v1/completions", body, **headers))
        await until(lambda: bool(stub.calls) and stub.calls[-1][1].get("queue_length") == 1)
        assert stub.calls[-1][1]["status"]["leases"] == []
        assert (await asking)[0] == 200


async def test_an_absent_controller_holds_nothing_up(
    run_worker: RunWorker, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with run_worker(controller_address="http://127.0.0.1:9", **settings) as running:
        await until(lambda: "cannot be reached" in caplog.text)
        status, _ = await running.post("/v1/completions", {"model": "fastserve-demo", "prompt": "x"})
        assert status == 200
