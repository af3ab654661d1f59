"""The engine process: one loop of commands, schedule, launch, commit. No asyncio, no HTTP.

Where steps overlap (core.py), commands are received and outputs are sent while a step runs. A call (calls/) is handled
when it is received, once the step in flight is done.

Started by `client.EngineProcess` as `python -m fastserve.engine.process ENDPOINT PARENT_PID`. It ends at a
Shutdown, or when its parent is gone, however that died. Where it is rank 0 of several and another one is lost, it keeps
its weights and gets ready again with the ranks that are left and a new one (kept_rank.py).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from fastserve.engine.calls.all_calls import ALL_CALLS
from fastserve.engine.calls.handling import CallContext, CallDispatcher, CallHandler, Profiler
from fastserve.engine.contract import (
    Abort,
    Busy,
    CallError,
    CallReply,
    CallRequest,
    Command,
    Event,
    LoadProgress,
    Outputs,
    Pool,
    PoolingResult,
    RankLost,
    Ready,
    RequestOutput,
    Shutdown,
    StartFailed,
    Submit,
)
from fastserve.engine.core import EngineCore
from fastserve.engine.kernels.build import build_ahead
from fastserve.engine.memory import (
    OUT_OF_MEMORY_EXIT_CODE,
    begin_loading,
    end_loading,
    free_host_memory,
    is_out_of_memory,
    use_one_heap,
)
from fastserve.engine.ranks.gang import GangRanks
from fastserve.engine.ranks.own_devices import use_own_devices
from fastserve.engine.ranks.processes import MAX_STEP_SILENCE_S, RANK_LOST_EXIT_CODE, SharedProgress
from fastserve.engine.settings import EngineConfig
from fastserve.engine.start_settings import read_settings
from fastserve.errors import EngineDeadError, FastserveError, UnsupportedCapabilityError
from fastserve.observability.logging import setup_logging

logger = logging.getLogger("fastserve.engine")

_IDLE_REPORT_S = 1.0
_READING_WAIT_S = 0.005
"""Between two looks at whether an adapter has been read."""
_RANKS_INTERVAL_S = 0.2
"""Between two looks of an idle engine at whether another rank is lost."""
_PROGRESS_INTERVAL_S = 0.1
_STARTING_STEPS = 10
"""First steps of an engine, which --profile-steps skips: they compile kernels and allocate buffers."""
_LIBRARIES_BYTES = 256 << 20
"""Memory that torch and transformers take."""


class EngineLoop:
    """Runs a core with commands from a socket, and sends its outputs back."""

    def __init__(
        self,
        core: EngineCore,
        socket: zmq.Socket[bytes],
        profiler: Profiler,
        handlers: Iterable[CallHandler[Any, Any]] = ALL_CALLS,
        require_ranks: Callable[[], None] | None = None,
    ) -> None:
        """`require_ranks` raises EngineDeadError when another rank of the model is lost; None where there is none."""
        self._core = core
        self._profiler = profiler
        self._require_ranks = require_ranks
        self._socket = socket
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._outputs: list[RequestOutput] = []
        self._pooled: list[PoolingResult] = []
        context = CallContext(
            scheduler=core.scheduler,
            pausing=core.pausing,
            weights=core.weights,
            profiler=profiler,
            adapters=core.adapters,
            updates=core.updates,
            occupation=core.occupation,
            send_outputs=self._outputs.extend,
            announce=lambda max_silence_s: self._send(Busy(max_silence_s)),
        )
        self._calls = CallDispatcher(handlers, context)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(core.wakeup, zmq.POLLIN)

    def run(self) -> None:
        """Run until Shutdown. Raises what a step raises: the runner's state is then unknown, so the process must end;
        the worker fails its requests and starts it again. Raises EngineDeadError when another rank is lost."""
        while self._take_commands():
            self._outputs += self._core.update()
            if self._core.has_work:
                self._outputs += self._core.step()
                self._profiler.step_done()
            self._report()
            self._core.pausing.update()
        self._profiler.close()

    def _take_commands(self) -> bool:
        """Handle all commands received so far; wait for one only when there is nothing else to do. False: Shutdown."""
        busy = self._core.has_work or self._outputs or self._core.updates.has_news
        wait_s = _READING_WAIT_S if self._core.adapters.is_busy else _IDLE_REPORT_S
        if self._require_ranks is not None:
            self._require_ranks()
            wait_s = min(wait_s, _RANKS_INTERVAL_S)
        if not busy and not self._pooled:
            self._poller.poll(int(wait_s * 1000))
            self._core.wakeup.clear()
        while True:
            try:
                command = self._decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
            match command:
                case Submit(request):
                    refused = self._core.add(request)
                    if refused is not None:
                        self._outputs.append(refused)
                case Pool(pooling):
                    kind = UnsupportedCapabilityError.__name__
                    self._pooled.append(
                        PoolingResult(pooling.request_id, error="This model generates text", error_kind=kind)
                    )
                case Abort(request_ids):
                    for request_id in request_ids:
                        self._core.abort(request_id)
                case CallRequest():
                    self._outputs += self._core.drain()
                    self._calls.dispatch(command, self._answer)
                case Shutdown():
                    return False

    def _answer(self, outcome: CallReply | CallError) -> None:
        # Outputs of all earlier steps, and stats that show the effect of the call, arrive before the reply.
        self._report()
        self._send(outcome)

    def _report(self) -> None:
        self._send(Outputs(self._outputs, self._core.stats, self._pooled))
        self._outputs.clear()
        self._pooled.clear()

    def _send(self, event: Event) -> None:
        self._socket.send(self._encode(event))


def main(handlers: Iterable[CallHandler[Any, Any]] = ALL_CALLS) -> None:
    """Run an engine that knows the calls of these handlers."""
    use_one_heap()
    endpoint, parent = sys.argv[1:]
    # Ctrl-C at a terminal reaches the whole process group; the parent drains and then sends Shutdown.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    config = read_settings(EngineConfig)
    setup_logging(config.log_level)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(endpoint)
    try:
        _serve(config, socket, handlers)
    finally:
        context.destroy(linger=1000)


def _serve(config: EngineConfig, socket: zmq.Socket[bytes], handlers: Iterable[CallHandler[Any, Any]]) -> None:
    others: GangRanks | None = None
    encode = msgspec.msgpack.Encoder().encode

    def send(event: Event) -> None:
        socket.send(encode(event))

    free = free_host_memory()
    if free.num_bytes < config.num_local_ranks * _LIBRARIES_BYTES:
        # Some libraries abort the process when they run out of memory.
        libraries = f"the libraries alone take {config.num_local_ranks * _LIBRARIES_BYTES / 1e6:.0f} MB"
        send(StartFailed(_no_memory_to_start(config, libraries)))
        sys.exit(1)
    try:
        begin_loading()
        # torch and transformers take seconds to import: meanwhile other ranks start, and a compiler builds the kernels.
        if config.gang is not None:
            others = GangRanks(config, config.gang)
        if config.device in (None, "cpu") or config.cpu_offloading:
            build_ahead("float32", config.dtype or "bfloat16")
        if config.pooling_options is not None:
            _serve_pooling(config, socket, send)
            return
        engine = _Engine(config, send, others)
        try:
            while not engine.serve(socket, handlers):
                pass
        finally:
            engine.close()
        if others is not None:
            others.hub.end_ranks()
    except (FastserveError, RuntimeError, OSError, ImportError, MemoryError) as error:
        elsewhere = None if others is None else others.reason_of_failed_start()
        if elsewhere is not None:
            send(StartFailed(elsewhere))
        elif is_out_of_memory(error):
            send(StartFailed(_no_memory_to_start(config, str(error))))
        elif isinstance(error, FastserveError):
            send(StartFailed(error.message))
        else:
            raise
        sys.exit(1)
    finally:
        if others is not None:
            others.close()


class _Engine:
    """The model of this process, which serves until Shutdown or until another rank is lost."""

    def __init__(self, config: EngineConfig, send: Callable[[Event], None], others: GangRanks | None) -> None:
        self._config = config
        self._send = send
        self._others = others
        if others is not None:
            use_own_devices(config, 0)
        # What they make stays, so looking for garbage in it would take a tenth of their time.
        gc.disable()
        from fastserve.engine.kept_rank import KeptRank

        gc.freeze()
        gc.enable()
        self._kept = KeptRank()
        self._has_served = False
        self._profile_steps = config.profile_steps
        self._report = _progress_report(send)

    def serve(self, socket: zmq.Socket[bytes], handlers: Iterable[CallHandler[Any, Any]]) -> bool:
        """Get ready and serve. Returns True after Shutdown, and False when another rank was lost. Raises what makes a
        start fail."""
        others = self._others
        try:
            self._run(self._loop(socket, handlers))
            return True
        except EngineDeadError as error:
            if others is None or not self._has_served or not self._kept.can_stay:
                raise
            logger.error("another rank of the model is lost: %s", error.message)
            reason = error.message
        if others.has_new_weights:
            logger.error("The weights were changed since they were loaded: all ranks load again.")
            sys.exit(RANK_LOST_EXIT_CODE)
        self._send(RankLost(f"A rank of the model was lost ({reason.rstrip('.')})."))
        others.hub.leave(reason)
        self._kept.leave()
        return False

    def close(self) -> None:
        """Leave the group of ranks."""
        self._kept.close()

    def _loop(self, socket: zmq.Socket[bytes], handlers: Iterable[CallHandler[Any, Any]]) -> EngineLoop:
        core = self._build()
        from fastserve.engine.profiling import StepProfiler

        profiler = StepProfiler(Path(self._config.profile_dir), lambda max_silence_s: self._send(Busy(max_silence_s)))
        if self._profile_steps > 0:
            profiler.start(self._profile_steps, _STARTING_STEPS)
            self._profile_steps = 0
        end_loading()
        self._send(Ready(core.info))
        if self._others is None:
            return EngineLoop(core, socket, profiler, handlers)
        self._has_served = True
        self._others.hub.serving(keeps_weights=self._kept.can_stay)
        return EngineLoop(core, socket, profiler, handlers, self._others.hub.require_group)

    def _run(self, loop: EngineLoop) -> None:
        try:
            with _ending_without_memory():
                loop.run()
        except EngineDeadError:
            if not self._kept.can_stay:
                logger.exception("another rank of the model is lost, and the engine ends")
                sys.exit(RANK_LOST_EXIT_CODE)
            raise

    def _build(self) -> EngineCore:
        """Load the model, alone or beside the other ranks."""
        config, others = self._config, self._others
        from fastserve.engine.build import build_core

        if others is None:
            return build_core(config, self._report)
        from fastserve.engine.ranks.join import join_group
        from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives

        hub = others.hub
        joined = join_group(config, others.gang, 0, hub.wait_formed(), others.keys, lambda: hub.is_lost)
        collectives = self._kept.enter(joined)
        hub.watch(collectives.abort)
        progress = others.shared_progress(self._report)
        update: Callable[[], None] | None = None
        if others.gang.is_one_machine and isinstance(collectives, SharedMemoryCollectives):
            progress = shared = SharedProgress(collectives.segment, 0, self._report)
            update = shared.update
        core = build_core(config, progress, collectives=collectives, send_to_ranks=others.send, load=self._kept.load)
        if update is not None:
            update()  # the others may have been slower
        collectives.set_timeout(MAX_STEP_SILENCE_S)
        return core


def _serve_pooling(config: EngineConfig, socket: zmq.Socket[bytes], send: Callable[[Event], None]) -> None:
    """Load a model that embeds or classifies, and serve until Shutdown. Raises what makes a start fail."""
    from fastserve.engine.pooling.build import build_pooling_core
    from fastserve.engine.pooling.loop import PoolingLoop

    core = build_pooling_core(config, _progress_report(send))
    end_loading()
    send(Ready(core.info))
    with _ending_without_memory():
        PoolingLoop(core, socket).run()


@contextlib.contextmanager
def _ending_without_memory() -> Iterator[None]:
    """End the process with its exit code when memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.exception("the engine ran out of memory in a step, and ends")
        sys.exit(OUT_OF_MEMORY_EXIT_CODE)


def _progress_report(send: Callable[[Event], None]) -> Callable[[str, int, int], None]:
    """Sends progress, at intervals."""
    last_s = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last_s
        now = time.monotonic()
        if done in (0, total) or now - last_s >= _PROGRESS_INTERVAL_S:
            last_s = now
            send(LoadProgress(what, done, total))

    return report


def _no_memory_to_start(config: EngineConfig, reason: str) -> str:
    free = free_host_memory()
    return (
        f"Not enough memory to load the model in {config.model_dir}: {free.num_bytes / 1e6:.0f} MB are left "
        f"{free.where} ({reason}). Free memory, raise the limit, or take a smaller model or --dtype."
    )


def _end_with_parent(parent: int) -> None:
    """A worker that was killed cannot send Shutdown; its engine must not keep memory and cores."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
