"""Clients of the API server that record exactly what happened to each of their requests."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from fastserve.protocol import RoutingTable

from .processes import Trio

MODEL = "fastserve-demo"
ERROR_TYPES = {"service_unavailable_error", "timeout_error", "internal_error"}
T = TypeVar("T")


def chat(text: str, *, stream: bool, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "stream": stream, **more}


async def eventually(check: Callable[[], Awaitable[T]], what: str, timeout_s: float) -> T:
    """Wait until `check` returns a true value, and return it."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = await check()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.02)


@dataclass
class Outcome:
    """The outcome of one request."""

    question: str
    stream: bool
    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    has_data: bool = False
    """Whether any part of the answer came."""
    is_done: bool = False
    """Whether a stream ended with `[DONE]`, or a whole answer came with status 200."""
    error: Any = None
    """The error object of a stream's error event."""
    trouble: str | None = None
    """Anything else that went wrong: a status other than 200, a lost connection, a malformed stream."""
    ids: set[str] = field(default_factory=set)

    @property
    def is_complete(self) -> bool:
        ended = self.is_done and self.finish_reason in ("stop", "length")
        return ended and self.error is None and self.trouble is None and len(self.ids) == 1

    @property
    def is_cut(self) -> bool:
        """Whether a stream that had begun ended with a typed error, as it may when its worker dies."""
        typed = isinstance(self.error, dict) and {"message", "type", "param", "code"} <= self.error.keys()
        ended = self.stream and self.has_data and self.is_done and self.trouble is None
        return ended and typed and self.error["type"] in ERROR_TYPES and bool(self.error["message"])


class Client:
    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url + "/v1/chat/completions"
        self.num_whole = 0
        """Requests without streaming that wait for their answer now."""

    async def ask(self, text: str, *, stream: bool, leave_after: int | None = None, **more: Any) -> Outcome:
        """Never raises for errors of the servers. `leave_after`: disconnect after this many data events of a stream."""
        outcome = Outcome(text, stream)
        self.num_whole += not stream
        try:
            async with self._http.post(self._url, json=chat(text, stream=stream, **more)) as response:
                if response.status != 200:
                    outcome.trouble = f"status {response.status}: {(await response.text())[:300]}"
                elif stream:
                    await _read_stream(response, outcome, leave_after)
                else:
                    _read_answer(await response.json(), outcome)
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            outcome.trouble = f"{type(error).__name__}: {error}"
        finally:
            self.num_whole -= not stream
        return outcome


def _read_answer(answer: Any, outcome: Outcome) -> None:
    [choice] = answer["choices"]
    outcome.text, outcome.finish_reason = choice["message"]["content"], choice["finish_reason"]
    outcome.num_tokens = answer["usage"]["completion_tokens"]
    outcome.has_data = outcome.is_done = True
    outcome.ids.add(answer["id"])


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, leave_after: int | None) -> None:
    num_events = 0
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if not line or line.startswith(":"):
            continue
        if outcome.is_done or not line.startswith("data: "):
            raise ValueError(f"the stream says {line!r}")
        outcome.has_data = True
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            outcome.is_done = True
            continue
        event = json.loads(data)
        if "error" in event:
            outcome.error = event["error"]
            continue
        outcome.ids.add(event["id"])
        for choice in event["choices"]:
            outcome.text += choice["delta"].get("content") or ""
            outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason
        if event.get("usage"):
            outcome.num_tokens = event["usage"]["completion_tokens"]
        num_events += 1
        if num_events == leave_after:
            response.close()
            return


@asynccontextmanager
async def steady_load(
    client: Client, questions: Sequence[str], clients: int = 8, pause_s: float = 0.01
) -> AsyncIterator[list[Outcome]]:
    """`clients` clients ask one question after the other, every third one streamed, until the block is left.

    Yields the list of outcomes, which grows as answers end. On leaving, waits for the running requests.
    """
    outcomes: list[Outcome] = []
    stopping = asyncio.Event()

    async def ask_on(start: int) -> None:
        for number in itertools.count(start):
            if stopping.is_set():
                return
            text = questions[(number * clients + start) % len(questions)]
            outcomes.append(await client.ask(text, stream=(number + start) % 3 == 0))
            await asyncio.sleep(pause_s)

    tasks = [asyncio.create_task(ask_on(start)) for start in range(clients)]
    try:
        yield outcomes
        stopping.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Monitor:
    """Reads the state of the processes from their metrics and the routing table."""

    def __init__(self, http: aiohttp.ClientSession, trio: Trio) -> None:
        self._http = http
        self._trio = trio

    async def metrics(self, address: str) -> dict[str, float]:
        """Values by name and labels, as in Prometheus's text format."""
        async with self._http.get(address + "/metrics") as response:
            assert response.status == 200, f"{address}/metrics: status {response.status}"
            lines = (await response.text()).splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    async def table(self) -> RoutingTable | None:
        """The controller's routing table; None while it is away."""
        try:
            async with self._http.get(self._trio.controller.address + "/workers") as response:
                return RoutingTable.model_validate_json(await response.read())
        except (aiohttp.ClientError, OSError):
            return None

    async def in_dispatch(self, address: str) -> bool:
        table = await self.table()
        return table is not None and any(row.address == address for row in table.workers)

    async def dispatched(self) -> dict[str, float]:
        """Requests that the controller has dispatched since it started, by worker."""
        seen = await self.metrics(self._trio.controller.address)
        name = f'fastserve_controller_dispatched_total{{model="{MODEL}",worker="%s"}}'
        return {worker.address: seen.get(name % worker.address, 0.0) for worker in self._trio.workers}

    async def left_over(self) -> Mapping[str, float]:
        """Requests, blocks and leases that running processes still hold, by name; without zeros."""
        server = await self.metrics(self._trio.server.address)
        counts = {"API server in flight": server["fastserve_gateway_requests_in_flight"]}
        for worker in self._trio.workers:
            if not worker.running:
                continue
            seen = await self.metrics(worker.address)
            for name in (
                "worker_requests_running",
                "worker_requests_waiting",
                "engine_num_requests_running",
                "engine_num_requests_waiting",
                "engine_num_used_blocks",
            ):
                counts[f"{worker.name} {name}"] = seen[f"fastserve_{name}"]
        table = await self.table()
        for row in [] if table is None else table.workers:
            counts[f"controller in flight on {row.address}"] = row.in_flight
        return {name: count for name, count in counts.items() if count}

    async def all_zero(self, timeout_s: float = 10.0) -> None:
        """Wait until `left_over` is empty."""
        left: Mapping[str, float] = {}

        async def is_idle() -> bool:
            nonlocal left
            left = await self.left_over()
            return not left

        try:
            await eventually(is_idle, "idle", timeout_s)
        except AssertionError:
            raise AssertionError(f"still held {timeout_s:g} s after the last request: {dict(left)}") from None
