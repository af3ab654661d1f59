"""The loop of an engine process that pools: take commands, compute a step, send results."""

from __future__ import annotations

import msgspec
import zmq

from fastserve.engine.contract import (
    Abort,
    CallError,
    CallRequest,
    Command,
    Event,
    Outputs,
    Pool,
    PoolingResult,
    RequestOutput,
    Shutdown,
    Submit,
)
from fastserve.engine.pooling.core import PoolingCore
from fastserve.errors import UnsupportedCapabilityError

_IDLE_REPORT_S = 1.0
NOT_GENERATING = "This model embeds or classifies texts and generates none, so it has no such operation"


class PoolingLoop:
    def __init__(self, core: PoolingCore, socket: zmq.Socket[bytes]) -> None:
        self._core = core
        self._socket = socket
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._pooled: list[PoolingResult] = []
        self._outputs: list[RequestOutput] = []

    def run(self) -> None:
        """Run until Shutdown. Raises what a step raises: the process must end then, and is started again."""
        while self._take_commands():
            self._pooled += self._core.step()
            self._report()

    def _take_commands(self) -> bool:
        """Handle all commands received so far; wait for one only when there is nothing else to do. False: Shutdown."""
        if not self._core.has_work and not self._pooled and not self._outputs:
            self._socket.poll(int(_IDLE_REPORT_S * 1000))
        while True:
            try:
                command = self._decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return True
            match command:
                case Pool(request):
                    refused = self._core.add(request)
                    if refused is not None:
                        self._pooled.append(refused)
                case Abort(request_ids):
                    for request_id in request_ids:
                        self._core.abort(request_id)
                case Submit(submitted):
                    kind = UnsupportedCapabilityError.__name__
                    self._outputs.append(
                        RequestOutput(submitted.request_id, [], "error", error=NOT_GENERATING, error_kind=kind)
                    )
                case CallRequest(call_id, name):
                    message = f"{NOT_GENERATING} as {name}."
                    self._send(CallError(call_id, UnsupportedCapabilityError.__name__, message))
                case Shutdown():
                    return False

    def _report(self) -> None:
        self._send(Outputs(self._outputs, self._core.stats, self._pooled))
        self._pooled.clear()
        self._outputs.clear()

    def _send(self, event: Event) -> None:
        self._socket.send(self._encode(event))
