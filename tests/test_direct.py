"""Direct answers over real sockets: the same as by the normal path."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.serving import direct
from fastserve.serving.direct import DirectProtocol, DirectQueue, offer_direct_answers
from tests.apps import until
from tests.keys import UNGUARDED

Answer = tuple[int, bytes]


class Service:
    """Answers a POST with its body, and counts direct and normal answers. `allowed` stands for a guard's check."""

    def __init__(self) -> None:
        self.usual = 0
        self.direct = 0
        self.allowed: Callable[[Scope], bool] = lambda _: True
        self.refuse_directly = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message: Any = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if not self.allowed(scope):
            await _answer(send, 401, b"no")
            return
        self.usual += 1
        offer_direct_answers(scope, self._directly)
        await _answer(send, 200, b"usual " + body)

    def _directly(self, body: bytes) -> bytes | None:
        if self.refuse_directly or body == b"wait":
            return None
        self.direct += 1
        return b"direct " + body


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, protocol: type[DirectProtocol] | None = None, **options: Any) -> AsyncIterator[int]:
    class Protocol(DirectProtocol):
        direct_queue = DirectQueue(asyncio.get_running_loop())

    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(app, log_config=None, lifespan="off", http=protocol or Protocol, **options)
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.ensure_future(server._serve([sock]))
        await until(lambda: server.started)
        yield sock.getsockname()[1]
        server.should_exit = True
        await task


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0.01 if len(pieces) > 1 else 0)

    async def answer(self) -> Answer:
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 5)
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        return int(head[9:12]), await asyncio.wait_for(self._reader.readexactly(int(length[1])), 5)

    async def ask(self, *pieces: bytes) -> Answer:
        await self.send(*pieces)
        return await self.answer()

    async def is_closed(self) -> bool:
        return await asyncio.wait_for(self._reader.read(1), 5) == b""


def post(body: bytes, *headers: bytes, path: bytes = b"/beat", method: bytes = b"POST") -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: localhost", *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def connection(service: Service) -> AsyncIterator[Connection]:
    async with serve(service) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield Connection(reader, writer)
        writer.close()


async def test_the_first_takes_the_usual_way_and_the_like_are_answered_directly(
    connection: Connection, service: Service
) -> None:
    assert await connection.ask(post(b"1")) == (200, b"usual 1")
    for body in (b"two", b"", b"x" * 5000):
        assert await connection.ask(post(body)) == (200, b"direct " + body)
    assert (service.usual, service.direct) == (1, 3)


@pytest.mark.parametrize(
    "other",
    [
        post(b"2", path=b"/other"),
        post(b"2", b"Authorization: Bearer else"),
        post(b"2", b"Origin: http://evil"),
        post(b"2").replace(b"Host: localhost", b"Host: y"),
        post(b"2", method=b"PUT"),
        post(b"2").replace(b"Content-Length: 1", b"Content-Length: 1\r\nX-More: 1"),
        b"POST /beat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n2\r\n0\r\n\r\n",
    ],
)
async def test_a_request_with_another_head_takes_the_usual_way(
    connection: Connection, service: Service, other: bytes
) -> None:
    await connection.ask(post(b"1"))
    assert await connection.ask(other) == (200, b"usual 2")
    assert service.direct == 0


async def test_what_a_check_refuses_is_never_answered_directly(connection: Connection, service: Service) -> None:
    service.allowed = lambda scope: (b"authorization", b"Bearer good") in scope["headers"]
    for _ in range(2):
        assert (await connection.ask(post(b"1")))[0] == 401
    assert await connection.ask(post(b"1", b"Authorization: Bearer good")) == (200, b"usual 1")
    assert await connection.ask(post(b"2", b"Authorization: Bearer good")) == (200, b"direct 2")
    assert (await connection.ask(post(b"3", b"Authorization: Bearer bad!")))[0] == 401
    assert (await connection.ask(post(b"4")))[0] == 401


async def test_checks_are_made_again_after_a_while(
    connection: Connection, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "REPEAT_S", 0.2)
    await connection.ask(post(b"1"))
    assert await connection.ask(post(b"2")) == (200, b"direct 2")
    service.allowed = lambda _: False
    await asyncio.sleep(0.25)
    assert (await connection.ask(post(b"3")))[0] == 401
    assert (await connection.ask(post(b"4")))[0] == 401


async def test_one_that_would_have_to_wait_takes_the_usual_way(connection: Connection, service: Service) -> None:
    await connection.ask(post(b"1"))
    assert await connection.ask(post(b"wait")) == (200, b"usual wait")
    assert await connection.ask(post(b"2")) == (200, b"direct 2")


async def test_a_request_that_comes_in_pieces_is_answered(connection: Connection, service: Service) -> None:
    await connection.ask(post(b"1"))
    whole = post(b"0123456789")
    for cut in (1, 10, len(whole) - 12, len(whole) - 5, len(whole) - 1):
        assert await connection.ask(whole[:cut], whole[cut:]) == (200, b"usual 0123456789")
        await connection.ask(whole)
        assert await connection.ask(whole) == (200, b"direct 0123456789")


async def test_requests_in_one_piece_are_answered_in_order(connection: Connection, service: Service) -> None:
    await connection.ask(post(b"0"))
    await connection.send(b"".join(post(b"%d" % n) for n in range(10)) + post(b"wait") + post(b"10") + post(b"11")[:-1])
    answers = [await connection.answer() for _ in range(12)]
    assert [answer.split()[1] for _, answer in answers] == [*(b"%d" % n for n in range(10)), b"wait", b"10"]
    assert await connection.ask(b"1") == (200, b"usual 11") or service.usual > 1


@pytest.mark.parametrize("length", [b"+1", b"-1", b"1 ", b"0x1", b"", b"\xb9", b"99999999999999999999", b"1\r\nX: "])
async def test_a_length_that_is_none_is_left_to_the_parser(
    connection: Connection, service: Service, length: bytes
) -> None:
    await connection.ask(post(b"1"))
    request = post(b"2").replace(b"Content-Length: 1", b"Content-Length: " + length)
    await connection.send(request)
    with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
        await asyncio.wait_for(connection.answer(), 0.2)
    assert service.direct == 0


async def test_the_body_may_look_like_a_request(connection: Connection, service: Service) -> None:
    await connection.ask(post(b"1"))
    inner = post(b"smuggled")
    assert await connection.ask(post(inner)) == (200, b"direct " + inner)
    assert (service.usual, service.direct) == (1, 1)


async def test_an_idle_connection_is_closed_as_any_other(service: Service) -> None:
    async with serve(service, timeout_keep_alive=1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = Connection(reader, writer)
        for body in (b"1", b"2", b"3"):
            await connection.ask(post(body))
            await asyncio.sleep(0.4)
        assert service.direct == 2
        assert await connection.is_closed()
        writer.close()


class FakeLoop:
    """A DirectQueue with a fake event loop and clock; each connection takes `cost_s` for its requests."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.now = 0.0
        self.cost_s = cost_s
        self.answered: list[str] = []
        self.on_answer: Callable[[str], None] = lambda _: None
        self._callbacks: list[Callable[[], None]] = []
        self.queue = DirectQueue(self, lambda: self.now)  # type: ignore[arg-type]

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def put(self, name: str, *, is_routine: bool) -> None:
        fake = self

        class Connection:
            def receive_waiting(self) -> None:
                fake.now += fake.cost_s
                fake.answered.append(name)
                fake.on_answer(name)

        self.queue.put(Connection(), is_routine=is_routine)  # type: ignore[arg-type]

    def run_pass(self) -> list[str]:
        """One iteration of the event loop; returns the connections answered in it."""
        before, callbacks, self._callbacks = len(self.answered), self._callbacks, []
        for callback in callbacks:
            callback()
        return self.answered[before:]


def test_questions_are_answered_before_a_crowd_of_routine_messages() -> None:
    fake = FakeLoop()
    for number in range(3):
        fake.put(f"beat {number}", is_routine=True)
    fake.put("question", is_routine=False)
    assert fake.run_pass() == ["question"], "its answer is sent before the next pass"
    assert fake.run_pass() == ["beat 0", "beat 1", "beat 2"]
    assert fake.run_pass() == []


def test_a_crowd_of_routine_messages_keeps_a_question_waiting_for_a_slice_at_most() -> None:
    fake = FakeLoop(cost_s=direct.MAX_SLICE_S / 4.5)
    for number in range(12):
        fake.put(f"beat {number}", is_routine=True)
    fake.on_answer = lambda name: fake.put("question", is_routine=False) if name == "beat 2" else None
    assert fake.run_pass() == [f"beat {number}" for number in range(5)]
    assert fake.run_pass() == ["question"]
    assert fake.run_pass() == [f"beat {number}" for number in range(5, 10)]
    assert fake.run_pass() == ["beat 10", "beat 11"]


def test_questions_without_end_do_not_keep_routine_messages_waiting_for_ever() -> None:
    fake = FakeLoop(cost_s=direct.MAX_SLICE_S)
    fake.on_answer = lambda name: fake.put(name, is_routine=False) if name == "question" else None
    fake.put("beat 0", is_routine=True)
    fake.put("beat 1", is_routine=True)
    fake.put("question", is_routine=False)
    for _ in range(4):
        fake.run_pass()
    assert fake.answered.count("beat 0") == fake.answered.count("beat 1") == 1


def test_few_requests_are_answered_where_they_are_read_until_the_event_loop_had_its_turn() -> None:
    fake = FakeLoop()
    for _ in range(2):
        assert [fake.queue.may_answer_at_once() for _ in range(direct.MAX_ANSWERED_AT_ONCE + 1)].count(True) == (
            direct.MAX_ANSWERED_AT_ONCE
        )
        fake.put("beat", is_routine=True)
        assert not fake.queue.may_answer_at_once(), "others wait already"
        assert fake.run_pass() == ["beat"]


async def test_a_connection_whose_request_waits_for_its_turn_is_not_idle(service: Service) -> None:
    connections: list[DirectProtocol] = []

    class Protocol(DirectProtocol):
        direct_queue = DirectQueue(asyncio.get_running_loop())

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)

    async with serve(service, protocol=Protocol) as port:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
        await connection.ask(post(b"1"))
        for _ in range(direct.MAX_ANSWERED_AT_ONCE):
            Protocol.direct_queue.may_answer_at_once()
        connections[0].data_received(post(b"2"))
        connections[0].timeout_keep_alive_handler()
        assert await connection.answer() == (200, b"direct 2")
        assert await connection.ask(post(b"3")) == (200, b"direct 3")


async def test_many_requests_at_the_same_time_are_all_answered(service: Service) -> None:
    async with serve(service) as port:
        connections = [Connection(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(50)]
        for connection in connections:
            await connection.ask(post(b"0"))
        for _ in range(3):
            for number, connection in enumerate(connections):
                await connection.send(post(b"%d" % number) + post(b"again"))
            for number, connection in enumerate(connections):
                assert await connection.answer() == (200, b"direct %d" % number)
                assert await connection.answer() == (200, b"direct again")


async def test_the_controllers_messages_are_answered_directly_and_alike() -> None:
    from fastserve.config import ControllerConfig
    from fastserve.control.app import create_app

    app = create_app(ControllerConfig(**UNGUARDED))
    async with app.router.lifespan_context(app), serve(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = Connection(reader, writer)

        async def ask(path: str, **message: Any) -> tuple[int, Any]:
            status, body = await connection.ask(
                post(json.dumps(message).encode(), b"Content-Type: application/json", path=path.encode())
            )
            return status, json.loads(body)

        status = {"model_names": ["m"], "heartbeat_interval_s": 60.0}
        for queue_length in (0, 1, 2):
            beat = {"worker_name": "http://w:1", "queue_length": queue_length}
            answer = await ask("/receive_heart_beat", **beat, status=status | {"queue_length": queue_length})
            assert answer == (200, {"exist": True})
        for number in (1, 2, 3):
            answer = await ask("/acquire", model="m", lease=f"l{number}")
            assert answer == (200, {"address": "http://w:1", "known": True})
        assert (await ask("/acquire", model="unknown", lease="l4")) == (200, {"address": "", "known": False})
        code, error = await ask("/acquire", model="m", lease="")
        assert (code, "'lease'" in error["error"]["message"]) == (400, True)
        for _ in range(2):
            assert await ask("/release", leases=["l1"]) == (200, None)
        await connection.send(b"GET /workers HTTP/1.1\r\nHost: localhost\r\n\r\n")
        _, body = await connection.answer()
        assert [row["in_flight"] for row in json.loads(body)["workers"]] == [4]
        writer.close()
