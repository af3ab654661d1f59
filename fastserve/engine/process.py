"""The engine process: one loop of commands, schedule, launch, commit. No asyncio, no HTTP.

Where steps overlap (core.py), commands are received and outputs are sent while a step runs. A call (calls/) is handled
when it is received, once the step in flight is done.

Started by `client.EngineProcess` as `python -m fastserve.engine.process ENDPOINT CONFIG PARENT_PID`. It ends at a
Shutdown, or when its parent is gone, however that died.
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
from collections.abc import Callable, Iterable
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
from fastserve.engine.ranks.processes import (
    MAX_START_SILENCE_S,
    MAX_STEP_SILENCE_S,
    RANK_LOST_EXIT_CODE,
    OtherRanks,
    SharedProgress,
    other_ranks,
)
from fastserve.engine.settings import EngineConfig
from fastserve.errors import EngineDeadError, FastserveError
from fastserve.observability.logging import setup_logging

logger = logging.getLogger("fastserve.engine")

_IDLE_REPORT_S = 1.0
_READING_WAIT_S = 0.005
"""Between two looks at whether an adapter has been read."""
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
    ) -> None:
        self._core = core
        self._profiler = profiler
        self._socket = socket
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._outputs: list[RequestOutput] = []
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
        the worker fails its requests and starts it again."""
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
        if not busy:
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
        self._send(Outputs(self._outputs, self._core.stats))
        self._outputs.clear()

    def _send(self, event: Event) -> None:
        self._socket.send(self._encode(event))


def main(handlers: Iterable[CallHandler[Any, Any]] = ALL_CALLS) -> None:
    """Run an engine that knows the calls of these handlers."""
    use_one_heap()
    endpoint, config_json, parent = sys.argv[1:]
    # Ctrl-C at a terminal reaches the whole process group; the parent drains and then sends Shutdown.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    config = msgspec.json.decode(config_json, type=EngineConfig)
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
    with contextlib.ExitStack() as ranks:
        _serve_beside(ranks, config, socket, handlers)


def _serve_beside(
    ranks: contextlib.ExitStack,
    config: EngineConfig,
    socket: zmq.Socket[bytes],
    handlers: Iterable[CallHandler[Any, Any]],
) -> None:
    """`ranks` ends the other ranks of the model, which this starts, when it is left."""
    encode = msgspec.msgpack.Encoder().encode
    last = [0.0]

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done in (0, total) or now - last[0] >= _PROGRESS_INTERVAL_S:
            last[0] = now
            send(LoadProgress(what, done, total))

    def send(event: Event) -> None:
        socket.send(encode(event))

    free = free_host_memory()
    if free.num_bytes < config.num_local_ranks * _LIBRARIES_BYTES:
        # Some libraries abort the process when they run out of memory.
        libraries = f"the libraries alone take {config.num_local_ranks * _LIBRARIES_BYTES / 1e6:.0f} MB"
        send(StartFailed(_no_memory_to_start(config, libraries)))
        sys.exit(1)
    others: OtherRanks | GangRanks | None = None
    try:
        begin_loading()
        # torch and transformers take seconds to import: meanwhile other ranks start, and a compiler builds the kernels.
        if config.gang is None:
            others = ranks.enter_context(other_ranks(config, socket.context))
        else:
            others = ranks.enter_context(contextlib.closing(GangRanks(config, config.gang)))
        if config.device in (None, "cpu") or config.cpu_offloading:
            build_ahead("float32", config.dtype or "bfloat16")
        core = _build(config, progress, others, ranks)
        from fastserve.engine.profiling import StepProfiler

        profiler = StepProfiler(Path(config.profile_dir), lambda max_silence_s: send(Busy(max_silence_s)))
        if config.profile_steps > 0:
            profiler.start(config.profile_steps, _STARTING_STEPS)
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
    end_loading()
    send(Ready(core.info))
    if others is not None:
        others.serving()
    try:
        EngineLoop(core, socket, profiler, handlers).run()
    except EngineDeadError:
        logger.exception("another rank of the model is lost, and the engine ends")
        sys.exit(RANK_LOST_EXIT_CODE)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.exception("the engine ran out of memory in a step, and ends")
        sys.exit(OUT_OF_MEMORY_EXIT_CODE)


def _build(
    config: EngineConfig,
    progress: Callable[[str, int, int], None],
    others: OtherRanks | GangRanks | None,
    ranks: contextlib.ExitStack,
) -> EngineCore:
    """Load the model, alone or beside the other ranks, whose group is left with `ranks`."""
    if others is not None:
        use_own_devices(config, 0)
    # What they make stays, so looking for garbage in it would take a tenth of their time.
    gc.disable()
    from fastserve.engine.build import build_core

    gc.freeze()
    gc.enable()
    if others is None:
        return build_core(config, progress)
    from fastserve.engine.ranks.join import join_machines, join_ranks, uses_nccl

    if isinstance(others, GangRanks):
        nccl = uses_nccl(config)
        between = join_machines(others.gang, 0, others.hub.wait_formed(), others.keys, others.folder, nccl=nccl)
        ranks.enter_context(contextlib.closing(between))
        core = build_core(config, others.shared_progress(progress), collectives=between, send_to_ranks=others.send)
        between.set_timeout(MAX_STEP_SILENCE_S)
        return core
    collectives = join_ranks(config.device, others.segment, others.meeting_file, 0, MAX_START_SILENCE_S)
    shared = SharedProgress(others.segment, 0, progress)
    core = build_core(config, shared, collectives=collectives, send_to_ranks=others.send)
    shared.update()  # the others may have been slower
    collectives.set_timeout(MAX_STEP_SILENCE_S)
    return core


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
