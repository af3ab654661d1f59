"""The worker's end of an engine process: starts it, talks to it, detects when it dies or hangs. No torch here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from fastserve.distributed.gang import Gang
from fastserve.engine.calls.pending import PendingCalls, refusal
from fastserve.engine.contract import (
    Abort,
    Busy,
    Call,
    CallError,
    CallReply,
    Command,
    EngineInfo,
    EngineRequest,
    EngineStats,
    Event,
    LoadProgress,
    Outputs,
    Pool,
    PoolingRequest,
    PoolingResult,
    RankLost,
    Ready,
    ReplyT,
    RequestOutput,
    RequestStream,
    Shutdown,
    StartFailed,
    Submit,
)
from fastserve.engine.memory import OUT_OF_MEMORY_EXIT_CODE
from fastserve.engine.pooling.pending import PendingPooling
from fastserve.engine.ranks.local_ranks import LocalRanks
from fastserve.engine.ranks.processes import CHECK_INTERVAL_S, RANK_LOST_EXIT_CODE, StopDetector
from fastserve.engine.settings import EngineConfig
from fastserve.engine.socket_folder import SocketFolder
from fastserve.engine.start_settings import settings_file
from fastserve.errors import EngineDeadError, InternalError, StartupError

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
_CHECKS_PER_TIMEOUT = 10
"""Times that the watchdog checks for a sign of life within the timeout."""
ENGINE_ENVIRONMENT = {
    # Threads that spin while they wait for each other take the core from the very thread they wait for as soon as
    # another process wants it too; threads that sleep at once wake too late for the next product (docs/performance.md).
    "GOMP_SPINCOUNT": "1000",
}
"""Environment variables of the engine process; those that the user has set win."""


class EngineProcess:
    """An `Engine` (see contract.py) in a process of its own."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        timeout_s: float = 120.0,
        program: str = "fastserve.engine.process",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`timeout_s`: silence after which the engine counts as hung; it sends events each step and each idle second.
        `program`: the module to run, which calls `process.main`. `environment`: variables for it alone.
        """
        if config.tp_size > 1 and config.gang is None:
            config = replace(config, gang=Gang.of_one_machine(config.tp_size))
        self._config = config
        self._timeout_s = timeout_s
        self._program = program
        self._environment = environment or {}
        self._silent_checks = 0
        self._max_silence_s = timeout_s
        """The timeout, or longer while the engine has announced that it is busy."""
        self._calls = PendingCalls(self._send)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode
        self._streams: dict[str, RequestStream] = {}
        self._pooling = PendingPooling(
            lambda request: self._send(Pool(request)), lambda request_id: self._send(Abort([request_id]))
        )
        self._stats = EngineStats()
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._context: zmq.asyncio.Context | None = None
        self._folder: SocketFolder | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stop_watcher: asyncio.Task[None] | None = None
        self._dead: asyncio.Future[str] | None = None
        self._closing = False
        self._other_ranks: LocalRanks | None = None
        """The processes of this machine's ranks other than rank 0, the engine process."""
        self._lives_on = False
        """The engine process has lost another rank, and waits for it with its weights."""

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None before the start."""
        return self._process.pid if self._process else None

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the other ranks on this machine, in their order."""
        return [] if self._other_ranks is None else self._other_ranks.pids

    async def start(self, on_progress: Callable[[LoadProgress], None]) -> EngineInfo:
        self._stats = EngineStats()
        self._dead = asyncio.get_running_loop().create_future()
        lives_on, self._lives_on = self._lives_on, False
        try:
            if not lives_on or self._process is None:
                self._process = await self._start_process()
            if self._config.gang is not None:
                self._stop_watcher = asyncio.create_task(self._watch_stopped(self._process))
            info = await self._wait_ready(self._process, on_progress)
        except BaseException:
            await self._tear_down()
            await self._end_other_ranks()
            raise
        self._receiver = asyncio.create_task(self._receive(self._process))
        self._watcher = asyncio.create_task(self._watch(self._process))
        return info

    async def _start_process(self) -> asyncio.subprocess.Process:
        if os.name == "nt" and self._config.gang is not None:
            raise StartupError("--tp-size needs Linux or macOS: on Windows leave it out.")
        environment = ENGINE_ENVIRONMENT | os.environ | dict(self._environment)
        endpoint, config = self._open_socket(), self._config
        if config.gang is not None:
            if self._other_ranks is None:
                self._other_ranks = LocalRanks(config.gang.local_ranks[1:], config, environment)
            config = replace(config, gang=self._other_ranks.gang)
        with settings_file(config) as file:
            command = [sys.executable, "-m", self._program, endpoint, str(os.getpid())]
            return await asyncio.create_subprocess_exec(*command, stdin=file, env=environment)

    def _open_socket(self) -> str:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        if os.name == "nt":
            self._socket.bind("tcp://127.0.0.1:*")
            return str(self._socket.get_string(zmq.LAST_ENDPOINT))
        self._folder = SocketFolder(os.environ)
        endpoint = f"ipc://{self._folder.socket}"
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise StartupError(f"The socket between worker and engine, {endpoint}, cannot be made: {error}.") from error
        return endpoint

    async def _wait_ready(
        self, process: asyncio.subprocess.Process, on_progress: Callable[[LoadProgress], None]
    ) -> EngineInfo:
        ended = asyncio.ensure_future(process.wait())
        try:
            while True:
                event = await self._next_event(ended)
                match event:
                    case LoadProgress():
                        on_progress(event)
                    case Ready(info):
                        return info
                    case StartFailed(message):
                        raise StartupError(message)
                    case None:
                        raise StartupError(f"The engine process ended while it started ({_ending(await ended)}).")
                    case Busy() | RankLost():
                        pass
                    case Outputs() | CallReply() | CallError():
                        raise InternalError(f"the engine sent {type(event).__name__} before it was ready")
        finally:
            ended.cancel()

    async def _next_event(self, ended: asyncio.Future[int]) -> Event | None:
        """The next event, or None when the process has ended and no more events came."""
        if self._socket is None:
            return None
        receiving: asyncio.Future[bytes] = asyncio.ensure_future(self._socket.recv())
        either: set[asyncio.Future[Any]] = {receiving, ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            # Its last event may still be on its way through the socket.
            await asyncio.wait({receiving}, timeout=0.2)
        if receiving.done():
            event: Event = self._decode(receiving.result())
            return event
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        return None

    async def _receive(self, process: asyncio.subprocess.Process) -> None:
        """Hand events to the streams until the process ends."""
        ended = asyncio.ensure_future(process.wait())
        ended.add_done_callback(lambda _: self._on_death(process))
        try:
            while self._socket is not None:
                event = self._decode(await self._socket.recv())
                self._silent_checks = 0
                self._max_silence_s = self._timeout_s
                match event:
                    case Outputs(outputs, stats, pooled):
                        self._stats = stats
                        for output in outputs:
                            self._deliver(output)
                        for result in pooled:
                            self._pooling.settle(result)
                    case CallReply() | CallError():
                        self._calls.settle(event)
                    case Busy(max_silence_s):
                        self._max_silence_s = max(self._timeout_s, max_silence_s)
                    case RankLost(reason):
                        self._lives_on = self._declare_dead(process, reason)
                        return
                    case LoadProgress() | Ready() | StartFailed():
                        self._end(process, f"The engine sent {type(event).__name__} while it served, and was killed.")
        finally:
            ended.cancel()

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # aborted while this was on its way
        if output.finish_reason == "error":
            stream.fail(refusal(output))
        else:
            stream.put(output)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that is alive but silent: a step that does not return, a device that does not respond.

        Checks are counted, not time: when this process itself was stopped or busy, that counts as one check.
        """
        self._silent_checks = 0
        self._max_silence_s = self._timeout_s
        interval_s = self._timeout_s / _CHECKS_PER_TIMEOUT
        while self._silent_checks < round(self._max_silence_s / interval_s):
            await asyncio.sleep(interval_s)
            self._silent_checks += 1
        silence = f"{self._timeout_s:g} s (--engine-timeout-s)"
        if self._max_silence_s > self._timeout_s:
            silence = f"{self._max_silence_s:g} s, more than the announced operation may take,"
        self._end(process, f"The engine hung: it gave no sign of life for {silence} and was killed.")

    async def _watch_stopped(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that is stopped (SIGSTOP): the ranks on other machines have given it up."""
        detector = StopDetector(process.pid)
        while not detector.is_lost():  # noqa: ASYNC110 - nobody is notified when a process is stopped
            await asyncio.sleep(CHECK_INTERVAL_S)
        self._end(process, "The engine was stopped for 3 s and was killed.")

    def _end(self, process: asyncio.subprocess.Process, reason: str) -> None:
        if process.returncode is None:
            process.kill()
        self._declare_dead(process, reason)

    def _on_death(self, process: asyncio.subprocess.Process) -> None:
        self._declare_dead(process, f"The engine process died ({_ending(process.returncode)}).")

    def _declare_dead(self, process: asyncio.subprocess.Process, reason: str) -> bool:
        """Fail all requests, once; returns whether it did."""
        if self._closing or process is not self._process or self._dead is None or self._dead.done():
            return False
        self._fail_all(reason)
        self._stats = EngineStats()
        self._dead.set_result(reason)
        return True

    def _fail_all(self, reason: str) -> None:
        for stream in self._streams.values():
            stream.fail(EngineDeadError(reason))
        self._pooling.fail_all(reason)
        self._calls.fail_all(lambda: EngineDeadError(reason))

    @contextlib.contextmanager
    def generate(self, request: EngineRequest) -> Iterator[RequestStream]:
        self._require_running()
        stream = RequestStream(request.request_id)
        self._streams[request.request_id] = stream
        try:
            self._send(Submit(request))
            yield stream
        finally:
            del self._streams[request.request_id]
            if not stream.finished:
                self._send(Abort([request.request_id]))

    async def pool(self, request: PoolingRequest) -> PoolingResult:
        self._require_running()
        return await self._pooling.pool(request)

    async def call(self, call: Call[ReplyT], *, timeout_s: float | None = None) -> ReplyT:
        self._require_running()
        return await self._calls.call(call, timeout_s)

    def _require_running(self) -> None:
        if self._dead is None or self._dead.done() or self._closing:
            raise EngineDeadError("The engine is not running.")

    def _send(self, command: Command) -> None:
        # Called where nothing may be awaited. Returns with the message sent, because the queue has no bound (admission
        # bounds what is in it); only a message to an engine that has just died is lost, which does not matter.
        if self._socket is not None:
            self._socket.send(self._encode(command))

    async def wait_dead(self) -> str:
        if self._dead is None:
            raise RuntimeError("the engine has not been started")
        reason = await asyncio.shield(self._dead)
        if self._lives_on:
            await self._end_tasks()
        else:
            await self._tear_down()
        return reason

    async def close(self) -> None:
        self._closing = True
        self._fail_all("The engine is shutting down.")
        process = self._process
        if self._other_ranks is not None:
            self._other_ranks.end_restarts()
        if process is not None and process.returncode is None:
            self._send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _CLOSE_TIMEOUT_S)
        await self._tear_down()
        await self._end_other_ranks()

    async def _tear_down(self) -> None:
        """Leave nothing of the engine process behind: process, task, socket, folder."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            try:
                await asyncio.wait_for(self._process.wait(), _CLOSE_TIMEOUT_S)
            except TimeoutError:  # it hangs in its device's driver, out of reach even for SIGKILL
                logger.error("the engine process %d cannot be killed; it may keep its memory", self._process.pid)
        await self._end_tasks()
        if self._context is not None:
            self._socket = None
            self._context.destroy(linger=0)
            self._context = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    async def _end_other_ranks(self) -> None:
        if self._other_ranks is not None:
            await asyncio.to_thread(self._other_ranks.close)
            self._other_ranks = None

    async def _end_tasks(self) -> None:
        tasks = [task for task in (self._receiver, self._watcher, self._stop_watcher) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._receiver = self._watcher = self._stop_watcher = None


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}; out of memory is the usual cause of SIGKILL and of SIGABRT"
    if code == OUT_OF_MEMORY_EXIT_CODE:
        return "it ran out of memory in a step"
    if code == RANK_LOST_EXIT_CODE:
        return "another rank of its model was lost; the lines above say which"
    return f"exit code {code}; the lines above say why"
