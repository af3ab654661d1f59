"""A rank other than 0 of a model: it executes the plans of rank 0, in order, and samples nothing.

Started by rank 0 as `python -m fastserve.engine.follower SETTINGS` (ranks/processes.py). It ends at an EndRank, when it
loses another rank, or when rank 0 is gone, however that died. A rank 0 that is stopped is killed: the worker then
starts the engine anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import zmq

from fastserve.engine.calls.handling import Weights
from fastserve.engine.contract import StartFailed
from fastserve.engine.memory import (
    OUT_OF_MEMORY_EXIT_CODE,
    begin_loading,
    end_loading,
    is_out_of_memory,
    use_one_heap,
)
from fastserve.engine.plan import StepPlan
from fastserve.engine.ranks.messages import (
    ClearAdapter,
    CommitWeights,
    DiscardWeights,
    EndRank,
    ExecuteStep,
    JoinGroup,
    LeaveGroup,
    PlaceAdapter,
    RankCommand,
    RankSettings,
    ReadWeight,
    ReceiveWeights,
    WriteWeight,
)
from fastserve.engine.ranks.own_devices import use_own_devices
from fastserve.engine.ranks.processes import (
    CHECK_INTERVAL_S,
    MAX_START_SILENCE_S,
    MAX_STEP_SILENCE_S,
    RANK_LOST_EXIT_CODE,
    SharedProgress,
    StopDetector,
)
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.step_deadline import StepDeadline
from fastserve.errors import EngineDeadError, FastserveError
from fastserve.observability.logging import setup_logging

if TYPE_CHECKING:
    from fastserve.engine.adapters.memory import AdapterMemory
    from fastserve.engine.build import RankModel
    from fastserve.engine.ranks.collectives import Collectives
    from fastserve.engine.runner.runner import ModelRunner
    from fastserve.engine.weight_updates.ranked import RankWeights

logger = logging.getLogger("fastserve.engine")

_PR_SET_PDEATHSIG = 1
_NO_PLAN = StepPlan([], [], [])


class Follower:
    """Does what rank 0 does, on this rank's part of the model."""

    def __init__(self, runner: ModelRunner, weights: Weights, deadline: StepDeadline, new_weights: RankWeights) -> None:
        self._runner = runner
        self._weights = weights
        self._deadline = deadline
        self._new_weights = new_weights
        self._last = _NO_PLAN

    def handle(self, command: RankCommand) -> bool:
        """Execute a command; False: the last one."""
        match command:
            case ExecuteStep(plan, sampled):
                for chunk in self._last.chunks:
                    if chunk.sample:
                        self._runner.correct(chunk.seq_id, chunk.start + chunk.num_tokens, sampled[chunk.seq_id])
                self._last = plan
                with self._deadline.step():
                    self._runner.forward(plan)
            case ReadWeight(name):
                self._weights.get(name)
            case WriteWeight():
                from fastserve.engine.ranks.executor import weight_of

                with contextlib.suppress(ValueError):  # another shape: rank 0 reports it
                    self._weights.set(command.name, weight_of(command))
            case PlaceAdapter():
                from fastserve.engine.adapters.store import place_part

                place_part(self._adapters(), command)
            case ClearAdapter(slot):
                self._adapters().clear(slot)
            case JoinGroup() | LeaveGroup() | ReceiveWeights() | CommitWeights() | DiscardWeights():
                self._new_weights.handle(command)
            case EndRank():
                return False
        return True

    def _adapters(self) -> AdapterMemory:
        if self._runner.adapter_memory is None:
            raise RuntimeError("this rank has no memory for adapters")
        return self._runner.adapter_memory


def run_rank_process(parent: int, log_level: str, run: Callable[[], int]) -> NoReturn:
    """Call `run` in a process that ends with its parent and with nothing else, and end with the exit code that it
    returns."""
    use_one_heap()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    end_with(parent)
    setup_logging(log_level)
    code = 1
    try:
        code = run()
    except Exception:
        logger.exception("a rank ends by an unexpected error")
    finally:
        # Without the interpreter's own end, at which the threads of a broken process group may crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=RankSettings)
    run_rank_process(settings.parent, settings.config.log_level, lambda: _connect_and_follow(settings))


def _connect_and_follow(settings: RankSettings) -> int:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(settings.endpoint)
    try:
        return _follow(settings, socket)
    finally:
        context.destroy(linger=1000)


def _follow(settings: RankSettings, socket: zmq.Socket[bytes]) -> int:
    """Load and serve; return the process's exit code."""
    config = settings.config
    use_own_devices(config, settings.rank)
    segment = Segment(settings.descriptor, config.tp_size)
    try:
        begin_loading()
        from fastserve.engine.build import build_rank
        from fastserve.engine.ranks.join import join_ranks
        from fastserve.engine.sampling.order import LOGITS_PROCESSORS

        meeting_file = Path(settings.meeting_file)
        collectives = join_ranks(config.device, segment, meeting_file, settings.rank, MAX_START_SILENCE_S)
        model = build_rank(config, SharedProgress(segment, settings.rank), LOGITS_PROCESSORS, collectives)
        collectives.set_timeout(MAX_STEP_SILENCE_S)
    except EngineDeadError as error:
        logger.info("rank %d ends while it starts: %s", settings.rank, error.message)
        return RANK_LOST_EXIT_CODE
    except (FastserveError, RuntimeError, OSError, ImportError, MemoryError) as error:
        if not isinstance(error, FastserveError):
            logger.exception("rank %d could not start", settings.rank)
        message = error.message if isinstance(error, FastserveError) else str(error)
        socket.send(msgspec.msgpack.encode(StartFailed(message)))
        return 1
    end_loading()
    decode = msgspec.msgpack.Decoder(RankCommand).decode
    return follow(collectives, model, lambda: decode(socket.recv()))


def follow(collectives: Collectives, model: RankModel, receive: Callable[[], RankCommand]) -> int:
    """Do what rank 0 says until it says that it ends; return the process's exit code."""
    rank = collectives.rank
    from fastserve.engine.weight_updates.ranked import RankWeights

    new_weights = RankWeights(model.receiver, collectives)
    deadline = StepDeadline(collectives, may_compile=model.may_compile)
    follower = Follower(model.runner, model.loaded.weights, deadline, new_weights)
    try:
        while follower.handle(receive()):
            pass
    except EngineDeadError as error:
        logger.info("rank %d ends: %s", rank, error.message)
        return RANK_LOST_EXIT_CODE
    except (MemoryError, RuntimeError) as error:
        logger.exception("rank %d failed in a step, and ends", rank)
        return OUT_OF_MEMORY_EXIT_CODE if is_out_of_memory(error) else 1
    return 0


def end_with(parent: int) -> None:
    """Rank 0 cannot end this process if it was killed, or is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    detector = StopDetector(parent)
    while os.getppid() == parent:
        if detector.is_lost():
            logger.error("Rank 0 (process %d) was stopped for 3 s and is killed; the worker starts it again.", parent)
            os.kill(parent, signal.SIGKILL)
            break
        time.sleep(CHECK_INTERVAL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
