"""A scripted engine: deterministic, no model, no torch. Everything above the engine is tested on it.

It passes the same contract tests as the real one. Its answer is a function of the request (`Script`). Its speed and its
failures are set in `FakeOptions`, or triggered while it runs (`die`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

from fastserve.engine.calls.all_calls import ALL_CALLS
from fastserve.engine.calls.handling import (
    Adapters,
    CallContext,
    CallDispatcher,
    CallHandler,
    NoAdapters,
    NoWeights,
    Weights,
)
from fastserve.engine.calls.pending import PendingCalls, refusal
from fastserve.engine.contract import (
    AdapterInfo,
    Call,
    CallRequest,
    EngineInfo,
    EngineRequest,
    EngineStats,
    LoadProgress,
    PoolingInfo,
    PoolingRequest,
    PoolingResult,
    ReplyT,
    RequestOutput,
    RequestStream,
    TokenLogprob,
)
from fastserve.engine.occupation import NoMemory, Occupation
from fastserve.engine.pausing import Pausing
from fastserve.engine.pooling.pending import PendingPooling
from fastserve.engine.settings import PoolingOptions
from fastserve.engine.updating import WeightUpdates
from fastserve.engine.weight_messages import (
    DEFAULT_VERSION,
    FromDisk,
    FromGroup,
    GroupSettings,
    GroupState,
    Received,
    WeightSource,
    WeightValues,
)
from fastserve.errors import (
    ConflictError,
    EngineDeadError,
    FastserveError,
    InvalidRequestError,
    ModelNotFoundError,
    StartupError,
    UnsupportedCapabilityError,
    WeightGroupNotFoundError,
    WeightNotFoundError,
    WeightsIncompleteError,
)

Script = Callable[[EngineRequest, EngineInfo], Sequence[int]]
"""Returns the whole answer to a request, stop token included. If shorter than max_tokens, end tokens follow."""


def echo(request: EngineRequest, info: EngineInfo) -> list[int]:
    """The prompt's tokens without those that would end the answer, then the end token."""
    ends = {*request.params.stop_token_ids, *info.eos_token_ids}
    return [token_id for token_id in request.prompt_ids if token_id not in ends]


def noise(request: EngineRequest, info: EngineInfo) -> list[int]:
    """max_tokens tokens that depend on seed, choice and position only; never the model's end tokens."""
    key = b"" if request.params.temperature == 0 else f"{request.params.seed}:{request.choice}".encode()
    allowed = [token_id for token_id in range(info.vocab_size) if token_id not in info.eos_token_ids]
    digests = (hashlib.blake2b(b"%d:%b" % (at, key), digest_size=8).digest() for at in range(request.params.max_tokens))
    return [allowed[int.from_bytes(digest, "big") % len(allowed)] for digest in digests]


@dataclass
class FakeOptions:
    """Delays in seconds. The next starts fail with the messages in `start_failures`, one each."""

    script: Script = echo
    vocab_size: int = 256
    max_model_len: int = 4096
    block_size: int = 16
    num_blocks: int = 4096
    max_num_seqs: int = 256
    eos_token_ids: tuple[int, ...] = ()
    start_s: float = 0.0
    first_token_s: float = 0.0
    token_s: float = 0.0
    """Duration of a step; each running request gets one token in a step."""
    start_failures: list[str] = field(default_factory=list)
    calls: tuple[CallHandler[Any, Any], ...] = ALL_CALLS
    weights: Weights = field(default_factory=NoWeights)
    adapters: dict[str, str] | None = field(default_factory=dict)
    """Paths by name of the adapters at start; None: adapters are not served. Any path can be loaded but those whose
    last part is "bad"."""
    pooling: PoolingInfo | None = None
    """For an engine that embeds or classifies. A vector counts the tokens by their remainder;
    a text's score is the share of tokens that come again, so a pair of like texts has a high one."""
    transfer_s: float = 0.0
    """Duration of a weight update's transfer. Names and paths whose last part is "bad" are refused."""


class _Sequence:
    def __init__(self, request: EngineRequest, answer: Sequence[int], ready_at: float) -> None:
        self.request = request
        self.stream = RequestStream(request.request_id)
        self.answer = answer
        self.num_emitted = len(request.emitted_ids)
        self.ready_at = ready_at
        self.is_begun = False
        self.weight_versions: list[str] = []


@dataclass(frozen=True)
class _CacheReset:
    num_blocks: int
    num_preempted: int


class _Scheduler:
    """Runs the first `max_num_seqs` sequences that are not held, in order of arrival. It has no prefix cache."""

    def __init__(self, options: FakeOptions) -> None:
        self.sequences: dict[str, _Sequence] = {}
        self._options = options
        self._holds_new = False
        self.weight_version = DEFAULT_VERSION

    @property
    def num_requests(self) -> int:
        return len(self.sequences)

    @property
    def num_begun(self) -> int:
        return sum(sequence.is_begun for sequence in self.sequences.values())

    @property
    def has_work(self) -> bool:
        return bool(self.scheduled())

    def scheduled(self) -> list[_Sequence]:
        """Sequences of the next step."""
        allowed = [item for item in self.sequences.values() if item.is_begun or not self._holds_new]
        return allowed[: self._options.max_num_seqs]

    def hold_new(self) -> None:
        self._holds_new = True

    def release_new(self) -> None:
        self._holds_new = False

    def abort_begun(self) -> list[RequestOutput]:
        outputs = []
        for request_id in [item for item, sequence in self.sequences.items() if sequence.is_begun]:
            outputs.append(RequestOutput(request_id, [], finish_reason="abort"))
            self.sequences.pop(request_id).stream.put(outputs[-1])
        return outputs

    def refuse_all(self, error: FastserveError) -> list[RequestOutput]:
        for sequence in self.sequences.values():
            sequence.stream.fail(error)
        self.sequences.clear()
        return []

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> _CacheReset:
        return _CacheReset(0, self.num_begun if reset_running_requests else 0)


class _Profiler:
    """Records nothing."""

    def __init__(self) -> None:
        self._num_left: int | None = None

    def start(self, num_steps: int, num_warm_up_steps: int) -> str:
        if self._num_left:
            raise ConflictError("A profile is being recorded already.")
        self._num_left = num_warm_up_steps + num_steps
        return "fake"

    def stop(self) -> str:
        if self._num_left is None:
            raise ConflictError("There is no trace: no profile was started.")
        self._num_left = 0
        return "fake"

    def step_done(self) -> None:
        if self._num_left:
            self._num_left -= 1

    def close(self) -> None:
        self._num_left = 0


class _Adapters:
    """Adapters without weights: all are on the device."""

    def __init__(self, paths: dict[str, str], scheduler: _Scheduler) -> None:
        self._paths = dict(paths)
        self._scheduler = scheduler
        self._unloading: dict[str, Future[AdapterInfo]] = {}

    def _info(self, name: str) -> AdapterInfo:
        users = [item for item in self._scheduler.sequences.values() if item.request.adapter == name]
        num_running = sum(item.is_begun for item in users)
        return AdapterInfo(name, self._paths[name], 8, ("q_proj", "v_proj"), 1024, "device", num_running, 0, 1)

    def load(self, name: str, path: str, *, replace: bool) -> Future[AdapterInfo]:
        if name in self._paths and not replace:
            raise ConflictError(f"There is an adapter {name} already.")
        if path.rpartition("/")[2] == "bad":
            raise InvalidRequestError(f"{path} is not the folder of an adapter.")
        self._paths[name] = path
        done: Future[AdapterInfo] = Future()
        done.set_result(self._info(name))
        return done

    def unload(self, name: str) -> Future[AdapterInfo]:
        problem = self.problem(name)
        if problem is not None:
            raise ModelNotFoundError(problem)
        self._unloading[name] = Future()
        done = self._unloading[name]
        self.update()
        return done

    def infos(self) -> list[AdapterInfo]:
        return [self._info(name) for name in self._paths]

    def problem(self, name: str) -> str | None:
        """The reason why no request can use this adapter, or None."""
        if name in self._unloading:
            return f"The adapter {name} is being unloaded."
        known = ", ".join(sorted(self._paths)) or "none"
        return None if name in self._paths else f"There is no adapter {name}; there are: {known}."

    def update(self) -> None:
        """Finish unloading adapters that no request uses any more."""
        used = {item.request.adapter for item in self._scheduler.sequences.values()}
        for name in [name for name in self._unloading if name not in used]:
            info = self._info(name)
            del self._paths[name]
            self._unloading.pop(name).set_result(info)

    @property
    def is_busy(self) -> bool:
        return False

    def wait(self, timeout_s: float) -> None:
        pass


class _Weights:
    """Receives weights that nobody keeps, and "checks" them."""

    is_complete = True

    def __init__(self, transfer_s: float) -> None:
        self._transfer_s = transfer_s
        self._groups: set[str] = set()

    def join(self, settings: GroupSettings) -> Future[GroupState]:
        if settings.group_name in self._groups:
            raise ConflictError(f"There is a group {settings.group_name} already.", param="group_name")
        self._groups.add(settings.group_name)
        return self._later(GroupState(True, "joined"))

    def leave(self, name: str) -> GroupState:
        self._require(name)
        self._groups.remove(name)
        return GroupState(True, "left the group")

    def _require(self, group_name: str) -> None:
        if group_name not in self._groups:
            raise WeightGroupNotFoundError(f"There is no group {group_name}.", param="group_name")

    def receive(self, source: WeightSource, *, is_direct: bool = False) -> Future[Received]:
        names = [source.path.rpartition("/")[2]] if isinstance(source, FromDisk) else []
        if isinstance(source, FromGroup):
            self._require(source.group_name)
            names = [tensor.name for tensor in source.tensors]
        bad = "bad" in names
        error = InvalidRequestError("The model has no weight bad.", param="names") if bad else None
        return self._later(Received(len(names)), error)

    def _later(self, result: Any, error: FastserveError | None = None) -> Future[Any]:
        done: Future[Any] = Future()

        def complete() -> None:
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        if self._transfer_s:
            asyncio.get_running_loop().call_later(self._transfer_s, complete)
        else:
            complete()
        return done

    def commit(self) -> None:
        pass

    def discard(self) -> None:
        pass

    def values(self, name: str, num_rows: int) -> WeightValues:
        if name == "bad":
            raise WeightNotFoundError("The model has no weight bad.", param="name")
        return WeightValues(name, "float32", (2,), [0.5, 1.5][:num_rows])

    def checksum(self) -> str:
        return "0" * 64

    def snapshot(self) -> None:
        pass

    def compare(self) -> list[str]:
        return []

    def randomize(self) -> None:
        pass


class FakeEngine:
    """An `Engine` (see contract.py). Policies (scheduling/) have no part in it: requests run in order of arrival, and
    none is given up by itself."""

    def __init__(self, options: FakeOptions | None = None) -> None:
        self.options = options or FakeOptions()
        self.requests: list[EngineRequest] = []
        """All requests ever submitted."""
        self.starts = 0
        self._info: EngineInfo | None = None
        self._counters = EngineStats()
        self._reset()
        self.pooling_requests: list[PoolingRequest] = []
        """All pooling requests ever submitted."""
        self._pooling = PendingPooling(self._pool_later, lambda request_id: None)
        self._calls = PendingCalls(self._handle)
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._dead: asyncio.Future[str] | None = None

    def _reset(self) -> None:
        self._scheduler = _Scheduler(self.options)
        self._pausing = Pausing(self._scheduler)
        self._profiler = _Profiler()
        names = self.options.adapters
        self._adapters: Adapters = NoAdapters() if names is None else _Adapters(names, self._scheduler)
        weights = _Weights(self.options.transfer_s)
        self._updates = WeightUpdates(self._scheduler, self._pausing, weights, weights, self._wake)
        context = CallContext(
            scheduler=self._scheduler,
            pausing=self._pausing,
            weights=self.options.weights,
            profiler=self._profiler,
            adapters=self._adapters,
            updates=self._updates,
            occupation=Occupation(self._scheduler, self._pausing, self._updates, NoMemory(), "fake"),
            send_outputs=self._count_aborted,
            announce=lambda max_silence_s: None,
        )
        self._dispatcher = CallDispatcher(self.options.calls, context)

    async def start(self, on_progress: Callable[[LoadProgress], None]) -> EngineInfo:
        options = self.options
        self.starts += 1
        for done in (0, 50, 100):
            on_progress(LoadProgress("loading nothing", done, 100))
            await asyncio.sleep(options.start_s / 3)
        if options.start_failures:
            raise StartupError(options.start_failures.pop(0))
        self._info = EngineInfo(
            architecture="fake",
            device="none",
            dtype="none",
            vocab_size=options.vocab_size,
            max_model_len=options.max_model_len,
            block_size=options.block_size,
            num_blocks=options.num_blocks,
            eos_token_ids=options.eos_token_ids,
            num_parameters=0,
            load_s=options.start_s,
            pooling=options.pooling,
        )
        self._counters = EngineStats(num_blocks=options.num_blocks)
        self._reset()
        self._dead = asyncio.get_running_loop().create_future()
        self._loop_task = asyncio.create_task(self._loop(self._info))
        return self._info

    @contextlib.contextmanager
    def generate(self, request: EngineRequest) -> Iterator[RequestStream]:
        if self._info is None or self._loop_task is None:
            raise EngineDeadError("The engine is not running.")
        self.requests.append(request)
        ready_at = asyncio.get_running_loop().time() + self.options.first_token_s
        sequence = _Sequence(request, self.options.script(request, self._info), ready_at)
        self._counters.prompt_tokens += len(request.prompt_ids)
        sequences = self._scheduler.sequences
        problem = self._adapters.problem(request.adapter) if request.adapter else None
        if problem is not None:
            sequence.stream.fail(ModelNotFoundError(problem))
            yield sequence.stream
            return
        if self._updates.problem is not None:
            sequence.stream.fail(WeightsIncompleteError(self._updates.problem))
            yield sequence.stream
            return
        sequences[request.request_id] = sequence
        self._work.set()
        try:
            yield sequence.stream
        finally:
            if sequences.pop(request.request_id, None) is not None:
                self._counters.aborted += 1
                self._pausing.update()
                self._adapters.update()
                self._wake()

    async def pool(self, request: PoolingRequest) -> PoolingResult:
        info = self._info
        if info is None or self._loop_task is None:
            raise EngineDeadError("The engine is not running.")
        if info.pooling is None:
            raise UnsupportedCapabilityError("This model generates text.")
        self.pooling_requests.append(request)
        try:
            return await self._pooling.pool(request)
        except asyncio.CancelledError:
            self._counters.aborted += 1
            raise

    def _pool_later(self, request: PoolingRequest) -> None:
        """Settle a request after the duration of a step."""
        info = self.options.pooling
        if info is not None:
            result = fake_result(request, info)
            self._counters.prompt_tokens += sum(request.lengths)
            asyncio.get_running_loop().call_later(self.options.token_s, self._pooling.settle, result)

    async def call(self, call: Call[ReplyT], *, timeout_s: float | None = None) -> ReplyT:
        if self._info is None or self._loop_task is None:
            raise EngineDeadError("The engine is not running.")
        return await self._calls.call(call, timeout_s)

    def _handle(self, request: CallRequest) -> None:
        self._dispatcher.dispatch(request, self._calls.settle)
        self._work.set()

    def _wake(self) -> None:
        self._work.set()

    def _count_aborted(self, outputs: list[RequestOutput]) -> None:
        self._counters.aborted += len(outputs)

    @property
    def stats(self) -> EngineStats:
        counters, scheduler = self._counters, self._scheduler
        running = [sequence for sequence in scheduler.scheduled() if sequence.is_begun]
        return EngineStats(
            num_running=len(running),
            num_waiting=scheduler.num_requests - len(running),
            paused=self._pausing.is_paused,
            pausing=self._pausing.is_pausing,
            weight_version=self._updates.version,
            weight_updates=self._updates.count,
            weights_incomplete=self._updates.problem is not None,
            num_blocks=counters.num_blocks,
            num_used_blocks=sum(map(self._blocks_of, running)),
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            finished=counters.finished,
            aborted=counters.aborted,
        )

    def _blocks_of(self, sequence: _Sequence) -> int:
        return math.ceil((len(sequence.request.prompt_ids) + sequence.num_emitted) / self.options.block_size)

    async def wait_dead(self) -> str:
        if self._dead is None:
            raise RuntimeError("the engine has not been started")
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        task, self._loop_task = self._loop_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._fail_all("The engine was closed.")

    def die(self, reason: str = "The engine was killed.") -> None:
        """Behave as if the engine's process had crashed."""
        task, self._loop_task = self._loop_task, None
        if task is not None and self._dead is not None:
            task.cancel()
            self._fail_all(reason)
            self._dead.set_result(reason)

    def fail(self, request_id: str, reason: str) -> None:
        """End one request with an error of the engine."""
        self.refuse(RequestOutput(request_id, [], finish_reason="error", error=reason))

    def refuse(self, output: RequestOutput) -> None:
        """End one request with an output that has an error, as the scheduler's."""
        sequence = self._scheduler.sequences.pop(output.request_id)
        self._pausing.update()
        sequence.stream.fail(refusal(output))

    def _fail_all(self, reason: str) -> None:
        for sequence in self._scheduler.sequences.values():
            sequence.stream.fail(EngineDeadError(reason))
        self._scheduler.sequences.clear()
        self._pooling.fail_all(reason)
        self._calls.fail_all(lambda: EngineDeadError(reason))

    async def _loop(self, info: EngineInfo) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._work.clear()
            if self._updates.has_news:
                self._updates.update()
            now = loop.time()
            is_still = self._pausing.is_paused or self._updates.blocks_steps
            running = [] if is_still else self._scheduler.scheduled()
            for sequence in running:
                sequence.is_begun = True
            due = [sequence for sequence in running if sequence.ready_at <= now]
            if not running:
                await self._work.wait()
            elif not due:
                await asyncio.sleep(max(0.0, min(sequence.ready_at for sequence in running) - now))
            else:
                self._step(due, info)
                await asyncio.sleep(self.options.token_s)

    def _step(self, sequences: list[_Sequence], info: EngineInfo) -> None:
        self._counters.steps += 1
        for sequence in sequences:
            output = _next_output(sequence, info)
            version = self._scheduler.weight_version
            if version not in sequence.weight_versions[-1:]:
                sequence.weight_versions.append(version)
                output.weight_versions = tuple(sequence.weight_versions)
            self._counters.generated_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                del self._scheduler.sequences[output.request_id]
                self._counters.finished += 1
            sequence.stream.put(output)
        self._profiler.step_done()
        self._pausing.update()
        self._adapters.update()


def fake_pooling(options: PoolingOptions | None) -> PoolingInfo | None:
    """The description of a fake engine that pools; None: it generates."""
    if options is None:
        return None
    if options.kind == "classify":
        return PoolingInfo("classify", 1, ("relevant",))
    return PoolingInfo("embed", 8, is_normalized=options.normalize)


def fake_result(request: PoolingRequest, info: PoolingInfo) -> PoolingResult:
    """A result without a model (see `FakeOptions.pooling`)."""
    ids = struct.unpack(f"<{len(request.token_ids) // 4}i", request.token_ids)
    pieces = [ids[end - length : end] for end, length in zip(accumulate(request.lengths), request.lengths, strict=True)]
    if request.task == "classify":
        logits = [_fake_logits(piece, info.width) for piece in pieces]
        return _fake_rows(request, logits if request.activate is False else [_softmax(row) for row in logits])
    if request.task == "token_embed":
        tokens = [[_fake_vector([token_id], info.width) for token_id in piece] for piece in pieces]
        rows = [row[: request.dimensions] for own in tokens for row in own]
        return _fake_rows(request, rows, [len(own) for own in tokens])
    ends = list(accumulate(request.piece_counts or [1] * len(pieces)))
    counts = request.piece_counts or [1] * len(pieces)
    texts = [sum(pieces[end - count : end], ()) for end, count in zip(ends, counts, strict=True)]
    vectors = [_fake_vector(text, info.width)[: request.dimensions] for text in texts]
    if request.normalize is not False:
        vectors = [[value / math.hypot(*vector) for value in vector] for vector in vectors]
    if request.task == "similarity":
        return _fake_rows(request, [[math.fsum(map(mul, vectors[a], vectors[b]))] for a, b in request.pairs])
    return _fake_rows(request, vectors)


def _fake_vector(ids: Sequence[int], width: int) -> list[float]:
    """Tokens by their remainder; never all zeros, however it is cut."""
    vector = [1e-3] * width
    for token_id in ids:
        vector[token_id % width] += 1.0
    return vector


def _fake_logits(ids: Sequence[int], width: int) -> list[float]:
    share = 1 - len(set(ids)) / len(ids)
    return [share] if width == 1 else [share * label for label in range(width)]


def _softmax(logits: Sequence[float]) -> list[float]:
    if len(logits) == 1:
        return [1 / (1 + math.exp(-logits[0]))]
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def _fake_rows(
    request: PoolingRequest, rows: Sequence[Sequence[float]], row_counts: list[int] | None = None
) -> PoolingResult:
    values = b"".join(struct.pack(f"<{len(row)}f", *row) for row in rows)
    return PoolingResult(request.request_id, values, len(rows[0]), row_counts or [])


def _next_output(sequence: _Sequence, info: EngineInfo) -> RequestOutput:
    request, params = sequence.request, sequence.request.params
    token_id = _next_token(sequence, info)
    sequence.num_emitted += 1
    output = RequestOutput(request.request_id, [token_id])
    if token_id in params.stop_token_ids:
        output.finish_reason = "stop"
    elif sequence.num_emitted >= params.max_tokens:
        output.finish_reason = "length"
    if params.logprobs is not None:
        output.logprobs = [_logprob(token_id, params.logprobs, info)]
    if params.prompt_logprobs is not None and sequence.num_emitted == 1:
        output.prompt_logprobs = [_logprob(item, params.prompt_logprobs, info) for item in request.prompt_ids[1:]]
    return output


def _logprob(token_id: int, num_top: int, info: EngineInfo) -> TokenLogprob:
    """The token itself is the likeliest; larger ids are less likely."""
    logprob = -0.5 - token_id / info.vocab_size
    others = [(token_id + i) % info.vocab_size for i in range(num_top)]
    return TokenLogprob(token_id, logprob, [(other, logprob - i) for i, other in enumerate(others)])


def _next_token(sequence: _Sequence, info: EngineInfo) -> int:
    at, params = sequence.num_emitted, sequence.request.params
    if at < len(sequence.answer):
        token_id = sequence.answer[at]
    else:
        token_id = next(iter(params.stop_token_ids or info.eos_token_ids), 0)
    if at < params.min_tokens:
        while token_id in params.stop_token_ids:
            token_id = (token_id + 1) % info.vocab_size
    return token_id
