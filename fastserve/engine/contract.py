"""The contract between a worker and any engine: typed messages and the `Engine` protocol. No torch here.

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


class ThinkingBudget(msgspec.Struct, frozen=True):
    """Bound on the reasoning at the beginning of an answer with a grammar."""

    max_tokens: int
    begins: tuple[str, ...]
    """Marks that begin it; empty: the prompt has begun it."""
    ends: tuple[str, ...]
    """Marks that end it. The first one is forced, which the grammar must allow."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters of one request, with all defaults filled in by the worker.

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
    allowed_token_ids: tuple[int, ...] = ()
    """Only these are sampled; empty: all."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens, none of them empty, that the answer does not contain."""
    seed: int = 0
    min_tokens: int = 0
    """No stop token is sampled before this many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of them ends the answer with finish reason "stop". Includes the model's end tokens unless ignored."""
    logprobs: int | None = None
    """None: no logprobs. k: logprobs of the sampled token and of the k likeliest, before temperature and filters."""
    prompt_logprobs: int | None = None
    """The same for each prompt token, given the tokens before it."""
    grammar: str = ""
    """Grammar of the whole answer, in llguidance's dialect of Lark; empty: any text."""
    thinking: ThinkingBudget | None = None
    """None: the reasoning has no bound of its own, or the grammar has it."""


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    """Unique among the requests of one engine, also among the choices of one client request."""
    prompt_ids: list[int]
    """At least one token; with params.max_tokens it fits EngineInfo.max_model_len."""
    params: SamplingParams
    choice: int = 0
    """Index among all choices of the client's request. Each of a list of equal prompts has noise of its own."""
    emitted_ids: list[int] = []
    """Tokens of the answer that another engine has already emitted; they are not emitted again."""
    priority: int = 0
    """Lower runs first."""
    adapter: str = ""
    """Name of the LoRA adapter; empty: the bare base model."""
    cache_salt: str = ""
    """Only requests with the same one share blocks of the prefix cache."""
    predicted_ids: list[int] = []
    """Tokens that the answer is expected to have, as drafts for speculation; they do not change it."""


PoolingKind = Literal["embed", "classify"]
"""Kind of a model's results: vectors (embed), or scores of labels (classify)."""
PoolingTask = Literal["embed", "token_embed", "similarity", "classify"]


class PoolingRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Texts to turn into vectors or scores. All of them get one answer."""

    request_id: str
    token_ids: bytes
    """The tokens of all pieces, one after the other: 32-bit integers, little-endian. A piece is a text, or a part of
    one that is too long."""
    lengths: list[int]
    """Number of tokens of each piece."""
    task: PoolingTask = "embed"
    """embed: a vector for each text. token_embed: one for each token. similarity: the cosine of two texts' vectors for
    each of `pairs`. classify: scores of all labels for each text."""
    first_lengths: list[int] = []
    """For pieces that are pairs of texts: number of tokens that have token type 0."""
    piece_counts: list[int] = []
    """Number of pieces of each text, whose vectors are averaged by length; empty: one."""
    pairs: list[tuple[int, int]] = []
    """Indices of texts, for similarity."""
    dimensions: int | None = None
    """Cut vectors to so many numbers, and normalise them again if they were."""
    normalize: bool | None = None
    """None: as the model does."""
    activate: bool | None = None
    """Whether scores are probabilities; None and true: yes, false: logits."""
    num_prompt_tokens: int = 0
    """Leading tokens of each piece that are not pooled."""
    priority: int = 0
    """Lower runs first."""


class PoolingResult(msgspec.Struct, omit_defaults=True):
    """The answer to a PoolingRequest."""

    request_id: str
    values: bytes = b""
    """Rows of numbers, 32-bit floats, little-endian."""
    width: int = 0
    """Numbers in a row."""
    row_counts: list[int] = []
    """Number of rows of each text (token_embed); empty: one."""
    error: str | None = None
    """Error message; there are no values then."""
    error_kind: str | None = None
    """Name of the error class in fastserve/errors.py if the request is at fault; None: InternalError."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The requested number of likeliest tokens with their logprobs, best first."""


class RequestOutput(msgspec.Struct, omit_defaults=True):
    """Output of one step for one request. The last one has a finish_reason."""

    request_id: str
    token_ids: list[int]
    """New tokens, in order. The stop token that ended the answer is the last of them."""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """For the prompt tokens from the second on. Sent once, with the first output that has tokens."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""
    error: str | None = None
    """Error message, with finish_reason "error"."""
    error_kind: str | None = None
    """Name of the error class in fastserve/errors.py if the request is at fault; None: InternalError."""
    weight_versions: tuple[str, ...] = ()
    """The versions of the weights that computed the answer's tokens so far, in order. Sent with the first token of each
    version."""


class FusedLayers(msgspec.Struct, frozen=True, array_like=True):
    """Number of layers of one kind that fused kernels compute, and why the others are not fused."""

    kind: str
    """norm, gated_mlp or attention; whole_step: all layers of a step in one call (on CPUs)"""
    fused: int
    total: int
    reason: str = ""
    """Why some layers are not fused; empty when all are."""

    def __str__(self) -> str:
        name = self.kind.replace("_", " ")
        return f"{name}: {self.fused} of {self.total} fused" + (f" ({self.reason})" if self.reason else "")


class PoolingInfo(msgspec.Struct, frozen=True):
    """Kind and size of the result that a pooling model computes for a text."""

    kind: PoolingKind
    width: int
    """Numbers in a vector, or number of labels."""
    labels: tuple[str, ...] = ()
    is_normalized: bool = False


class EngineInfo(msgspec.Struct, frozen=True):
    """Facts about an engine, sent once it is ready."""

    architecture: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Maximum length of prompt and answer together, in tokens. Never more than the KV cache holds."""
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    load_s: float
    num_ranks: int = 1
    """Processes that the model is divided over."""
    fused_layers: tuple[FusedLayers, ...] = ()
    """By kind. Shows when a new release of transformers keeps layers from being recognised."""
    pooling: PoolingInfo | None = None
    """None: the model generates."""


STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_SIZE_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
"""Bounds for numbers of tokens and of sequences in a step."""


class Histogram(msgspec.Struct, array_like=True):
    """Values counted in buckets since the engine started. The bounds are a constant of each histogram."""

    counts: list[int] = []
    """Values up to and including the first bound, the second, ..., and above the last; empty before any value."""
    total: float = 0.0
    """Sum of the values."""

    def add(self, value: float, bounds: tuple[float, ...]) -> None:
        if not self.counts:
            self.counts = [0] * (len(bounds) + 1)
        self.counts[bisect_left(bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(self.counts.copy(), self.total)


class AdapterStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """LoRA adapters of an engine. Counters only grow."""

    num_adapters: int = 0
    num_on_device: int = 0
    num_on_host: int = 0
    """Copies in host memory, also of those on the device."""
    num_running: int = 0
    """Different adapters of running requests."""
    loads: int = 0
    """Copies to the device."""
    evictions: int = 0
    """Adapters that gave up their place on the device to others."""


class EngineStats(msgspec.Struct, omit_defaults=True):
    """A snapshot, sent with every batch of outputs and at least every second while idle. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    paused: bool = False
    """Nothing is computed until the engine is resumed."""
    pausing: bool = False
    """A pause waits for the requests that run; new ones wait already."""
    weight_version: str = "default"
    """Version of the base model's weights, which updates change."""
    weight_updates: int = 0
    weights_incomplete: bool = False
    """A weight update failed halfway: requests are refused until a whole set of weights has come."""
    num_blocks: int = 0
    num_used_blocks: int = 0
    """Blocks held by running requests and by adapters on the device; cached blocks that nobody holds are free."""
    adapters: AdapterStats | None = None
    """None: the engine serves none."""
    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of requests that have been scheduled."""
    cached_tokens: int = 0
    """Those of `prompt_tokens` that were found in the prefix cache."""
    generated_tokens: int = 0
    draft_tokens: int = 0
    """Draft tokens that were checked (speculative decoding)."""
    accepted_tokens: int = 0
    """Accepted draft tokens, which are also generated tokens."""
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    tokens_per_s: float = 0.0
    """Decode speed of the reference batch: measured at start, updated with each step; 0: unknown."""
    step_s: float = 0.0
    """Duration of the last step."""
    step_seconds: Histogram = msgspec.field(default_factory=Histogram)
    """Durations of all steps, in buckets of STEP_SECONDS_BOUNDS. Counted here because readers miss snapshots."""
    step_tokens: Histogram = msgspec.field(default_factory=Histogram)
    """Tokens of each step, in buckets of STEP_SIZE_BOUNDS."""
    step_sequences: Histogram = msgspec.field(default_factory=Histogram)
    """Sequences of each step, in buckets of STEP_SIZE_BOUNDS."""


class AdapterInfo(msgspec.Struct, frozen=True):
    """A LoRA adapter that the engine serves beside the bare base model."""

    name: str
    path: str
    rank: int
    """The largest of its layers."""
    targets: tuple[str, ...]
    """Last parts of the names of the layers that it changes, such as q_proj."""
    num_bytes: int
    """Memory of its weights on the device."""
    location: Literal["device", "host", "disk"]
    """The fastest memory that holds it."""
    num_running: int
    hits: int
    """Requests that found it on the device when they were first scheduled."""
    loads: int
    """How often it was copied to the device."""


class AdapterList(msgspec.Struct, frozen=True):
    adapters: list[AdapterInfo]


# ---- worker to engine -------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: EngineRequest


class Pool(msgspec.Struct, frozen=True, tag=True):
    request: PoolingRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


class CallRequest(msgspec.Struct, frozen=True, tag=True):
    """A `Call` on the wire. Its handler runs between two steps, with none in flight; one reply or error follows."""

    call_id: int
    name: str
    """Name of the call's class."""
    call: msgspec.Raw
    """The call in msgpack."""


Command = Submit | Pool | Abort | CallRequest | Shutdown

# ---- engine to worker -------------------------------------------------------------------------------------------


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """`done` of `total` bytes of weights are in memory."""

    what: str
    """Description of the current activity."""
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start; `message` is for the user at the terminal."""

    message: str


class Outputs(msgspec.Struct, tag=True):
    outputs: list[RequestOutput]
    stats: EngineStats
    pooled: list[PoolingResult] = []


class CallReply(msgspec.Struct, frozen=True, tag=True):
    """The reply to a call. All outputs of earlier steps have been sent before."""

    call_id: int
    reply: msgspec.Raw


class CallError(msgspec.Struct, frozen=True, tag=True):
    """A call failed and left the engine unchanged."""

    call_id: int
    kind: str
    """Name of the error class in fastserve/errors.py."""
    message: str
    param: str | None = None
    code: str | None = None


class Busy(msgspec.Struct, frozen=True, tag=True):
    """The engine runs a long operation: it does not count as hung before `max_silence_s`."""

    max_silence_s: float
    """Maximum time until the next event; the engine's timeout holds if it is longer."""


class RankLost(msgspec.Struct, frozen=True, tag=True):
    """A rank of the model was lost, and all requests and calls with it. The engine has kept its weights, and sends
    Ready once that rank is back."""

    reason: str
    """A sentence."""


Event = LoadProgress | Ready | StartFailed | Outputs | CallReply | CallError | Busy | RankLost


# ---- calls ------------------------------------------------------------------------------------------------------

ReplyT = TypeVar("ReplyT")


class Call(msgspec.Struct, Generic[ReplyT], frozen=True):
    """An operation of the engine other than generating. A subclass, such as `class Sleep(Call[SleepReply])`, has the
    arguments as fields and is defined with its handler in a file of engine/calls/. Its class name is its name on the
    wire.
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
        """Load the model. Raises StartupError with a message for the user when that fails.

        May be called again after `wait_dead` has returned: the engine is then started anew.
        """
        ...

    def generate(self, request: EngineRequest) -> AbstractContextManager[RequestStream]:
        """Submit the request on entry; iterate over or listen to the outputs inside; on exit, abort it if unfinished.

        Outputs that arrive between two reads are merged into one. The stream raises EngineDeadError when the engine
        dies, and InternalError when the engine reports an error for this request.
        """
        ...

    async def pool(self, request: PoolingRequest) -> PoolingResult:
        """Compute vectors or scores. A call that is cancelled aborts the request.

        Raises UnsupportedCapabilityError for an engine that generates, EngineDeadError when the engine dies, and the
        errors of RequestStream.
        """
        ...

    async def call(self, call: Call[ReplyT], *, timeout_s: float | None = None) -> ReplyT:
        """Run a call between two steps. Requests submitted meanwhile wait.

        Calls, requests and aborts are handled in the order in which they were sent. Raises the handler's
        FastserveError, EngineDeadError when the engine dies before the reply, and EngineTimeoutError after `timeout_s`:
        the engine still finishes the call then, and its reply is dropped.
        """
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    async def wait_dead(self) -> str:
        """Wait until the engine has died by itself (not by `close`), and return the reason."""
        ...

    async def close(self) -> None:
        """End the engine and wait until it is gone. Running requests get EngineDeadError. May be called twice."""
        ...


class RequestStream:
    """Outputs of one request, for all engines: a queue of one slot that merges outputs until they are read.

    The reader iterates, or registers a callback, which saves waking a task for each output.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.finished = False
        self._pending: RequestOutput | None = None
        self._failure: Exception | None = None
        # A bare future: an Event looks up the running loop at each wait, which is a system call (getpid).
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._on_ready: Callable[[], None] | None = None

    def listen(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready`, which must not raise, as soon as `take` has something to return or to raise."""
        self._on_ready = on_ready
        if self._pending is not None or self._failure is not None:
            on_ready()

    def take(self) -> RequestOutput | None:
        """Output since the last call, or None. Raises the same errors as iterating."""
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
            pending.weight_versions = output.weight_versions or pending.weight_versions
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
