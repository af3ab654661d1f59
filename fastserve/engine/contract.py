"""What the worker and any engine say to each other: typed messages and the `Engine` protocol. No torch here.

The messages are msgspec structs, sent as msgpack over ZeroMQ (no pickle: bytes from a socket can never become code).
An engine knows token ids only; text, templates, stop strings and parsers belong to the worker.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Generic, Literal, Protocol, TypeVar, get_args, get_origin

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token of one request is sampled. Resolved by the worker: no field is left to be guessed.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and typical_p 1 are off. `seed`, the choice's index and the
    position key the noise, so the same request gives the same tokens whatever else is in the batch.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    min_tokens: int = 0
    """No stop token is sampled before this many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of them ends the answer with "stop"; the end tokens of the model are among them unless ignored."""
    logprobs: int | None = None
    """None: no logprobs. k: the sampled token's, and those of the k likeliest, before temperature and filters."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, each given those before it."""


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    """Unique among the requests of one engine, also among the choices of one client request."""
    prompt_ids: list[int]
    """At least one token; with params.max_tokens it fits EngineInfo.max_model_len."""
    params: SamplingParams
    choice: int = 0
    emitted_ids: list[int] = []
    """Tokens of the answer that another engine has already emitted: taken as given, not emitted again."""
    priority: int = 0
    """Lower runs first."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their logprobs, best first; as many as asked for."""


class RequestOutput(msgspec.Struct, omit_defaults=True):
    """What one step brought to one request. The one with a finish_reason is the last."""

    request_id: str
    token_ids: list[int]
    """New tokens, in order. The stop token that ended the answer is the last of them."""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens from the second on, once all are computed; with the first output that has tokens."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""
    error: str | None = None
    """With finish_reason "error": what went wrong."""


class FusedLayers(msgspec.Struct, frozen=True, array_like=True):
    """How many layers of a kind are computed by fused kernels, and why the others are not."""

    kind: str
    """norm, gated_mlp, attention; whole_step: all layers of a step in one call (on CPUs)"""
    fused: int
    total: int
    reason: str = ""
    """Why some are not; empty when all are."""

    def __str__(self) -> str:
        name = self.kind.replace("_", " ")
        return f"{name}: {self.fused} of {self.total} fused" + (f" ({self.reason})" if self.reason else "")


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine tells once it is ready."""

    architecture: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Longest prompt and answer together, in tokens. Never more than the KV cache holds."""
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    load_s: float
    fused_layers: tuple[FusedLayers, ...] = ()
    """By kind. What a release of transformers keeps from being recognised shows here."""


STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_SIZE_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
"""Of tokens and of sequences."""


class Histogram(msgspec.Struct, array_like=True):
    """How many values lay between which bounds, since the engine started. The bounds belong to its name."""

    counts: list[int] = []
    """Up to the first bound (itself included), up to the second, ..., beyond the last; empty when there was none."""
    total: float = 0.0

    def add(self, value: float, bounds: tuple[float, ...]) -> None:
        if not self.counts:
            self.counts = [0] * (len(bounds) + 1)
        self.counts[bisect_left(bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(self.counts.copy(), self.total)


class EngineStats(msgspec.Struct, omit_defaults=True):
    """A snapshot, sent with every batch of outputs and at least every second while idle. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    paused: bool = False
    """Nothing is computed until the engine is resumed."""
    pausing: bool = False
    """A pause waits for the requests that run; new ones wait already."""
    num_blocks: int = 0
    num_used_blocks: int = 0
    """Blocks held by running requests; cached blocks that nobody holds are free."""
    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of requests that have been scheduled."""
    cached_tokens: int = 0
    """Of these, found in the prefix cache."""
    generated_tokens: int = 0
    draft_tokens: int = 0
    """Guesses that were checked (speculative decoding)."""
    accepted_tokens: int = 0
    """Of these, the right ones; they are among the generated tokens."""
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    tokens_per_s: float = 0.0
    """Decode speed on the reference batch: measured at start, corrected by the steps since; 0: not known."""
    step_s: float = 0.0
    """Duration of the last step."""
    step_seconds: Histogram = msgspec.field(default_factory=Histogram)
    """Durations of all steps, between STEP_SECONDS_BOUNDS. Counted here, because a reader sees not every snapshot."""
    step_tokens: Histogram = msgspec.field(default_factory=Histogram)
    """Tokens of the steps, between STEP_SIZE_BOUNDS."""
    step_sequences: Histogram = msgspec.field(default_factory=Histogram)
    """Sequences of the steps, between STEP_SIZE_BOUNDS."""


# ---- worker to engine -------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


class CallRequest(msgspec.Struct, frozen=True, tag=True):
    """A `Call` on its way. Its handler runs between two steps, with none in flight; one reply or error comes."""

    call_id: int
    name: str
    call: msgspec.Raw
    """The call in msgpack; its type goes by its name."""


Command = Submit | Abort | CallRequest | Shutdown

# ---- engine to worker -------------------------------------------------------------------------------------------


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """`done` of `total` bytes of weights are in memory; `what` says what is going on."""

    what: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start; `message` is for the person at the terminal."""

    message: str


class Outputs(msgspec.Struct, tag=True):
    outputs: list[RequestOutput]
    stats: EngineStats


class CallReply(msgspec.Struct, frozen=True, tag=True):
    """All outputs of the steps before it have been sent."""

    call_id: int
    reply: msgspec.Raw


class CallError(msgspec.Struct, frozen=True, tag=True):
    """A call that failed, and left the engine as it was."""

    call_id: int
    kind: str
    """Name of the class in fastserve/errors.py."""
    message: str
    param: str | None = None
    code: str | None = None


class Busy(msgspec.Struct, frozen=True, tag=True):
    """The engine works on something that was asked for, and may be silent for so long before the next event, where that
    is longer than its timeout."""

    max_silence_s: float


Event = LoadProgress | Ready | StartFailed | Outputs | CallReply | CallError | Busy


# ---- calls ------------------------------------------------------------------------------------------------------

ReplyT = TypeVar("ReplyT")


class Call(msgspec.Struct, Generic[ReplyT], frozen=True):
    """Something that an engine is asked to do besides generating: a subclass `class Sleep(Call[SleepReply])` has its
    arguments as fields, and lies with its handler in a file of engine/calls/. Its class name is its name on the wire.
    """


def reply_type(call_type: type[Call[ReplyT]]) -> type[ReplyT]:
    """The type of a call's reply."""
    for base in getattr(call_type, "__orig_bases__", ()):
        if get_origin(base) is Call:
            found: type[ReplyT] = get_args(base)[0]
            return found
    raise TypeError(f"{call_type.__name__} must be a direct subclass of Call[its reply]")


# ---- the engine as the worker sees it ---------------------------------------------------------------------------


class Engine(Protocol):
    """An engine behind the worker. All methods run on the event loop's thread; only `async` ones may wait."""

    async def start(self, on_progress: Callable[[LoadProgress], None]) -> EngineInfo:
        """Load the model. Raises StartupError with a sentence for the person when that fails.

        May be called again after `wait_dead` returned: the engine starts afresh.
        """
        ...

    def generate(self, request: EngineRequest) -> AbstractContextManager[RequestStream]:
        """Submit on entering, iterate or listen to the outputs inside, abort on leaving if the last has not come.

        Outputs that came between two looks are merged into one. The stream raises EngineDeadError when the engine
        dies, and InternalError when the engine reports an error for this request.
        """
        ...

    async def call(self, call: Call[ReplyT], *, timeout_s: float | None = None) -> ReplyT:
        """Have the engine do something between two steps. Requests submitted meanwhile wait.

        Calls, requests and aborts are handled in the order in which they were sent. Raises the handler's
        FastserveError, EngineDeadError when the engine dies before the reply, and EngineTimeoutError after `timeout_s`:
        the engine then finishes the call all the same, and its reply is dropped.
        """
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    async def wait_dead(self) -> str:
        """Return the reason once the engine has died on its own (never after `close`)."""
        ...

    async def close(self) -> None:
        """End the engine and wait until it is gone. Running requests get EngineDeadError. May be called twice."""
        ...


class RequestStream:
    """The receiving end of one request, shared by all engines: a one-slot mailbox that merges what piles up.

    Its reader iterates, or listens: then there is no task of its own to be woken for each output.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.finished = False
        self._pending: RequestOutput | None = None
        self._failure: Exception | None = None
        # A bare future: an Event asks for the running loop at each wait, which is a system call (getpid).
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._on_ready: Callable[[], None] | None = None

    def listen(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready`, which must not raise, as soon as `take` has something to return or to raise."""
        self._on_ready = on_ready
        if self._pending is not None or self._failure is not None:
            on_ready()

    def take(self) -> RequestOutput | None:
        """What has come since the last time, if anything. Raises what the iteration raises."""
        output, self._pending = self._pending, None
        if output is None and self._failure is not None:
            raise self._failure
        return output

    def put(self, output: RequestOutput) -> None:
        if self._pending is None:
            self._pending = output
        else:
            pending = self._pending
            pending.token_ids += output.token_ids
            pending.finish_reason = output.finish_reason
            pending.error = output.error
            pending.num_cached_tokens = max(pending.num_cached_tokens, output.num_cached_tokens)
            if output.logprobs is not None:
                pending.logprobs = (pending.logprobs or []) + output.logprobs
        self.finished = output.finish_reason is not None
        self._wake()

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self.finished = True
        self._wake()

    def _wake(self) -> None:
        if self._on_ready is not None:
            self._on_ready()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while (output := self.take()) is None:
            if self.finished:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        return output
