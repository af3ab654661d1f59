"""A rank other than 0 of a model: it executes the plans of rank 0, in order, and samples nothing."""

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
from typing import TYPE_CHECKING, NoReturn

from fastserve.engine.calls.handling import Weights
from fastserve.engine.memory import OUT_OF_MEMORY_EXIT_CODE, is_out_of_memory, use_one_heap
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
    ReadWeight,
    ReceiveWeights,
    WriteWeight,
)
from fastserve.engine.ranks.processes import CHECK_INTERVAL_S
from fastserve.engine.ranks.step_deadline import StepDeadline
from fastserve.errors import EngineDeadError
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


def follow(collectives: Collectives, model: RankModel, receive: Callable[[], RankCommand]) -> int:
    """Do what rank 0 says until it says that this rank ends; return the process's exit code. Raises EngineDeadError
    when the group is lost."""
    rank = collectives.rank
    from fastserve.engine.weight_updates.ranked import RankWeights

    new_weights = RankWeights(model.receiver, collectives)
    deadline = StepDeadline(collectives, may_compile=model.may_compile)
    follower = Follower(model.runner, model.loaded.weights, deadline, new_weights)
    try:
        while follower.handle(receive()):
            pass
    except EngineDeadError:
        raise
    except (MemoryError, RuntimeError) as error:
        logger.exception("rank %d failed in a step, and ends: what it holds is in doubt", rank)
        return OUT_OF_MEMORY_EXIT_CODE if is_out_of_memory(error) else 1
    return 0


def end_with(parent: int) -> None:
    """A parent that was killed cannot end this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_INTERVAL_S)
    os._exit(1)
