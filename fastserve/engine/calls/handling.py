"""The engine's end of calls: finds and runs a call's handler, and sends its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from fastserve.engine.contract import AdapterInfo, Call, CallError, CallReply, CallRequest, RequestOutput
from fastserve.engine.pausing import Pausing
from fastserve.engine.updating import WeightUpdates
from fastserve.errors import (
    FastserveError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedCapabilityError,
    UnsupportedParameterError,
)
from fastserve.observability.text import printable

ReplyT = TypeVar("ReplyT")
CallT = TypeVar("CallT", bound=Call[Any])

_encode = msgspec.msgpack.Encoder().encode
_SHOWN_CHARS = 80


class CacheReset(Protocol):
    @property
    def num_blocks(self) -> int: ...

    @property
    def num_preempted(self) -> int: ...


class CacheOwner(Protocol):
    def reset_prefix_cache(self, *, reset_running_requests: bool) -> CacheReset: ...


class Weights(Protocol):
    """Weights by their Hugging Face names (see loading/weight_table.py). Tensors are `Any`: calls import no torch."""

    def names(self) -> list[str]: ...

    def get(self, name: str) -> Any: ...

    def set(self, name: str, tensor: Any) -> None: ...


class Profiler(Protocol):
    """Records steps (see profiling.py)."""

    def start(self, num_steps: int, num_warm_up_steps: int) -> str:
        """Record steps from the next one on; return the path of the future trace. Raises ConflictError while another
        profile is being recorded, InternalError when the folder is not writable."""
        ...

    def stop(self) -> str:
        """Write the trace, if it is not written yet; return its path. Raises ConflictError when there is no trace,
        InternalError when it could not be written."""
        ...

    def step_done(self) -> None: ...

    def close(self) -> None:
        """Write the steps recorded so far."""
        ...


class NoWeights:
    """The weights of an engine without a model."""

    def names(self) -> list[str]:
        return []

    def get(self, name: str) -> Any:
        raise KeyError(f"the model has no weight {name!r}")

    def set(self, name: str, tensor: Any) -> None:
        raise KeyError(f"the model has no weight {name!r}")


class Adapters(Protocol):
    """Adapters by name. The futures are completed on the engine's thread, between two steps."""

    def load(self, name: str, path: str, *, replace: bool) -> Future[AdapterInfo]: ...

    def unload(self, name: str) -> Future[AdapterInfo]: ...

    def infos(self) -> list[AdapterInfo]: ...

    def problem(self, name: str) -> str | None:
        """The reason why no request can use this adapter, or None."""
        ...

    def update(self) -> None:
        """Complete what is done. Called between two steps."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether something is being read, so that `update` has something to do soon."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait until something has been read."""
        ...


class NoAdapters:
    """The adapters of an engine that was started without them."""

    def load(self, name: str, path: str, *, replace: bool) -> Future[AdapterInfo]:
        raise UnsupportedCapabilityError(
            "This worker serves no adapters; start it with --enable-lora, or with --lora-modules."
        )

    def unload(self, name: str) -> Future[AdapterInfo]:
        raise ModelNotFoundError(self.problem(name))

    def infos(self) -> list[AdapterInfo]:
        return []

    def problem(self, name: str) -> str:
        return f"There is no adapter {printable(name, _SHOWN_CHARS)}: this worker serves none."

    def update(self) -> None:
        pass

    @property
    def is_busy(self) -> bool:
        return False

    def wait(self, timeout_s: float) -> None:
        pass


@dataclass(frozen=True)
class CallContext:
    """The engine as handlers see it. They run on its thread, between two steps, with none in flight."""

    scheduler: CacheOwner
    pausing: Pausing
    weights: Weights
    profiler: Profiler
    adapters: Adapters
    updates: WeightUpdates
    send_outputs: Callable[[list[RequestOutput]], None]
    """Sends outputs of requests that the call ends, before its reply."""
    announce: Callable[[float], None]
    """Called before a long operation, with the seconds for which the engine does not count as hung."""


@dataclass(frozen=True)
class CallHandler(Generic[CallT, ReplyT]):
    """A type of call and its handler.

    `handle` returns the reply, or a future of it when it is ready after a later step. A FastserveError means that the
    call failed and left the engine unchanged; any other exception ends the engine, as in a step, because its state is
    then unknown.
    """

    call_type: type[CallT]
    handle: Callable[[CallT, CallContext], ReplyT | Future[ReplyT]]

    @property
    def name(self) -> str:
        return self.call_type.__name__


class CallDispatcher:
    """Finds and runs the handlers of calls."""

    def __init__(self, handlers: Iterable[CallHandler[Any, Any]], context: CallContext) -> None:
        self._context = context
        self._handlers: dict[str, CallHandler[Any, Any]] = {}
        for handler in handlers:
            if self._handlers.setdefault(handler.name, handler) is not handler:
                raise ValueError(f"two calls have the name {handler.name}")

    def dispatch(self, request: CallRequest, send: Callable[[CallReply | CallError], None]) -> None:
        """Run a call's handler. `send` gets its one reply or error, now or in a later step."""
        try:
            found = self._run(request)
        except FastserveError as error:
            send(_failure(request, error))
            return
        if isinstance(found, Future):
            found.add_done_callback(lambda done: send(_outcome(request, done)))
        else:
            send(CallReply(request.call_id, msgspec.Raw(_encode(found))))

    def _run(self, request: CallRequest) -> Any:
        handler = self._handlers.get(request.name)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            raise UnsupportedParameterError(
                f"This engine has no call {printable(request.name, _SHOWN_CHARS)}; it has {known}."
            )
        try:
            call = msgspec.msgpack.decode(request.call, type=handler.call_type)
        except msgspec.MsgspecError as error:
            raise InvalidRequestError(f"The call {handler.name} is malformed: {error}.") from error
        return handler.handle(call, self._context)


def _outcome(request: CallRequest, done: Future[Any]) -> CallReply | CallError:
    try:
        return CallReply(request.call_id, msgspec.Raw(_encode(done.result())))
    except FastserveError as error:
        return _failure(request, error)


def _failure(request: CallRequest, error: FastserveError) -> CallError:
    return CallError(request.call_id, type(error).__name__, error.message, error.param, error.code)
