"""An engine process that launches steps ahead, and knows two more calls than those that ship:
`EngineProcess(..., program=PROGRAM)`.
"""

from __future__ import annotations

import time

from fastserve.engine.calls.all_calls import ALL_CALLS
from fastserve.engine.calls.handling import CallContext, CallHandler
from fastserve.engine.contract import Call
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.process import main
from tests.engine import read_weight

PROGRAM = "tests.engine.engine_with_calls"


class Work(Call[None], frozen=True):
    """Takes its time, and says before how long it may be silent."""

    duration_s: float
    max_silence_s: float | None = None


def _work(call: Work, context: CallContext) -> None:
    if call.max_silence_s is not None:
        context.announce(call.max_silence_s)
    time.sleep(call.duration_s)


if __name__ == "__main__":
    CpuDevice.runs_ahead = True  # steps overlap, as on a GPU
    main((*ALL_CALLS, *read_weight.HANDLERS, CallHandler(Work, _work)))
