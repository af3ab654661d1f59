"""The scheduler: decides which tokens of which sequences the next step computes. No phases, no tensors.

Each step maps sequences to token counts under one token budget. Running sequences come first (decodes before prefills,
so a long prompt never delays a decode), then waiting ones, in the order of a policy (scheduling/). When blocks run out,
the running sequence that the policy names is preempted: it frees its blocks and waits again, keeping its tokens; its
KV cache is recomputed, mostly from the prefix cache. One sequence can always finish, because none needs more than the
whole pool.

The default policy's order is that of arrival, where each level of priority counts as arriving PRIORITY_LEVEL_S later.
So a request goes before waiting ones of lower priority, requests of higher priority pass it for a bounded time only,
and none starves under any load. The order of two requests never changes.

Drafts (speculation/) use the budget and blocks that the step has left, and hold no block after it. So they never
preempt or delay another sequence, and a sequence has the same blocks with and without them.

A step may be planned while the one before is in flight (`can_run_ahead`). A sequence whose next token is pending counts
as having it, and as going on unless it then has its maximum length. No id is needed until it is known: only then is a
stop token found, a row computed after it dropped, and the block registered in the prefix cache. The blocks of a
finished sequence may be reused at once, because steps run in the order in which they were planned. Nothing is preempted
while a step is in flight.

The idea of one counter chasing another instead of prefill and decode phases is vLLM's (its v1 scheduler).
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from fastserve.engine.adapters.manager import Adapter, AdapterManager, Place, root_of
from fastserve.engine.contract import EngineRequest, FinishReason, RequestOutput, SamplingParams
from fastserve.engine.grammars import GrammarStore
from fastserve.engine.kv_cache import BlockPool, block_key
from fastserve.engine.plan import Chunk, NewSequence, StepPlan, StepResult
from fastserve.engine.scheduling import SchedulingPolicy
from fastserve.engine.sequence import Sequence, Status
from fastserve.engine.weight_messages import DEFAULT_VERSION
from fastserve.errors import FastserveError, FirstTokenLateError, InvalidRequestError, ModelNotFoundError
from fastserve.observability.text import printable

_TOO_MANY = 0
"""Key of parked sequences; numbers of adapters begin at 1."""
_COMPILING = -1
"""Key of parked sequences whose grammar is being compiled."""
_YIELDING_SHARE = 4
"""A running sequence's prompt gets one part of this many of a step's tokens at least, whatever the policy says."""
PRIORITY_LEVEL_S = 10.0
"""A request passes requests one level lower that arrived up to this many seconds earlier."""


class Drafting(Protocol):
    """The source of drafts (speculation/speculator.py)."""

    def draft(self, sequences: list[Sequence], limits: list[int], budget: int) -> dict[int, list[int]]:
        """Drafts by sequence id for sequences where they pay, at most `limits` each and `budget` in all."""
        ...

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        """Called after a step with the number of sequences that could have had drafts, and (drafts, accepted drafts) of
        those that had some."""
        ...

    def expect(self, seq_id: int, predicted_ids: list[int], num_prompt_tokens: int) -> None:
        """Take drafts of a new sequence from its predicted answer first."""
        ...

    def forget(self, seq_id: int) -> None: ...


@dataclass(slots=True)
class _Step:
    """A plan that is being built."""

    budget: int
    """Tokens that may be added."""
    extra_rows: int
    """Rows of logits that may be added beyond one for each sequence."""
    chunks: dict[int, Chunk] = field(default_factory=dict)
    prefills: dict[int, Sequence] = field(default_factory=dict)
    """Sequences with tokens in the step that are not the last one alone, by id."""

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.seq_id] = chunk
        self.budget -= chunk.num_tokens
        self.extra_rows -= chunk.num_scored

    @property
    def prefill_tokens(self) -> list[tuple[Sequence, int]]:
        """Those sequences, each with its number of tokens in the step."""
        return [(item, self.chunks[seq_id].num_tokens) for seq_id, item in self.prefills.items()]

    def remove(self, seq_id: int) -> None:
        chunk = self.chunks.pop(seq_id, None)
        if chunk is not None:
            self.budget += chunk.num_tokens
            self.extra_rows += chunk.num_scored
            self.prefills.pop(seq_id, None)


@dataclass(frozen=True, slots=True)
class CacheReset:
    num_blocks: int
    """Blocks removed from the prefix cache."""
    num_preempted: int


class Scheduler:
    """Owns the queues and the block pool. Plans are committed in order; `add` and `abort` may be called at any time."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        policy: SchedulingPolicy,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        max_extra_rows: int,
        needs_last_token: Callable[[SamplingParams], bool],
        rope_switch_length: int | None = None,
        drafting: Drafting | None = None,
        adapters: AdapterManager | None = None,
        grammars: GrammarStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`policy`: the order of waiting sequences and of preemption.
        `max_extra_rows` bounds the rows of logits for prompt logprobs and drafts in a step, and so its memory.
        `needs_last_token`: whether a request's next token can be sampled only once the host knows the one before.
        `rope_switch_length`: length in tokens beyond which the model computes all tokens of a sequence with other
        rotary frequencies; a sequence that grows beyond it is computed anew.
        `grammars`: None where requests with one are refused."""
        if max_model_len > pool.num_blocks * pool.block_size:
            raise ValueError("one sequence of max_model_len tokens must fit the block pool")
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_extra_rows = max_extra_rows
        self._needs_last_token = needs_last_token
        self._rope_switch_length = rope_switch_length
        self._drafting = drafting
        self._adapters = adapters
        self._grammars = grammars
        self._parked: dict[int, list[Sequence]] = {}
        """Waiting sequences whose adapter is being read, by its number, those under _TOO_MANY whose adapter would be
        one too many, and those under _COMPILING."""
        self._clock = clock
        self._policy = policy
        self._refused: list[RequestOutput] = []
        self.running: list[Sequence] = []
        self._holds_new = False
        self._held: dict[int, Sequence] = {}
        """Sequences that have never been scheduled, by id, while new requests are held."""
        self._sequences: dict[str, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}
        self._dropped: list[int] = []
        self._next_id = 0
        self._num_in_flight = 0
        """Plans that are not committed yet."""
        self.weight_version = DEFAULT_VERSION
        """Version of the weights that compute the next step."""
        self.preemptions = 0
        self.finished = 0
        self.aborted = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self.running)

    @property
    def num_requests(self) -> int:
        return len(self._sequences)

    @property
    def num_begun(self) -> int:
        """Running and preempted requests."""
        return sum(1 for sequence in self._sequences.values() if sequence.is_begun)

    @property
    def has_work(self) -> bool:
        """Whether any request may be scheduled."""
        return len(self._sequences) > len(self._held)

    # ---- arrival and departure ----------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request. If it cannot run, or is finished already, return its last output at once."""
        problem = self._problem(request)
        if problem is not None:
            return RequestOutput(request.request_id, [], finish_reason="error", error=problem)
        refusal = self._adapter_problem(request)
        if refusal is not None:
            return refusal
        if request.params.grammar and self._grammars is None:
            return refused(request.request_id, InvalidRequestError("This engine takes no grammars.", param="grammar"))
        adapter = self._adapters.find(request.adapter) if self._adapters is not None and request.adapter else None
        if adapter is not None:
            request = self._lowered(request, adapter)
        now_s = self._clock()
        sequence = Sequence.of(
            self._next_id,
            request,
            now_s + request.priority * PRIORITY_LEVEL_S,
            needs_last_token=self._needs_last_token(request.params),
        )
        sequence.arrived_s = now_s
        self._next_id += 1
        reason = self._finish_reason(sequence) if request.emitted_ids else None
        if reason is not None:
            return RequestOutput(request.request_id, [], finish_reason=reason)
        self._sequences[request.request_id] = sequence
        self._by_id[sequence.seq_id] = sequence
        if self._drafting is not None and request.predicted_ids:
            self._drafting.expect(sequence.seq_id, request.predicted_ids, len(request.prompt_ids))
        if self._adapters is not None and adapter is not None:
            sequence.adapter = adapter
            self._adapters.enter(adapter)
        if self._grammars is not None and request.params.grammar:
            self._grammars.enter(request.params.grammar)
        if self._holds_new:
            self._held[sequence.seq_id] = sequence
        else:
            self._policy.add(sequence)
        return None

    def _problem(self, request: EngineRequest) -> str | None:
        if request.request_id in self._sequences:
            return f"a request with the id {request.request_id!r} is running already"
        if not request.prompt_ids:
            return "the prompt has no tokens"
        needed = len(request.prompt_ids) + request.params.max_tokens
        if request.params.max_tokens < 1 or needed > self.max_model_len:
            return (
                f"prompt ({len(request.prompt_ids)} tokens) and max_tokens ({request.params.max_tokens}) do not fit "
                f"the longest sequence of this engine ({self.max_model_len} tokens)"
            )
        return None

    def _adapter_problem(self, request: EngineRequest) -> RequestOutput | None:
        """The last output of a request that can never run with its adapter."""
        if not request.adapter:
            return None
        kind = ModelNotFoundError.__name__
        if self._adapters is None:
            problem: str | None = f"There is no adapter {printable(request.adapter)}: this worker serves none."
            return RequestOutput(request.request_id, [], finish_reason="error", error=problem, error_kind=kind)
        problem = self._adapters.problem(request.adapter)
        adapter = self._adapters.find(request.adapter)
        if adapter is not None and self._max_tokens_beside(adapter) <= len(request.prompt_ids):
            kind = InvalidRequestError.__name__
            problem = (
                f"The prompt ({len(request.prompt_ids)} tokens), one token of the answer and the adapter "
                f"{printable(adapter.name)} together need more than the {self.pool.num_blocks} blocks of memory "
                f"({adapter.shape.num_blocks} for the adapter, one for each {self.pool.block_size} tokens): shorten "
                "the prompt, or start the worker with a larger --max-total-tokens or --pool-size-lora."
            )
        if problem is None:
            return None
        return RequestOutput(request.request_id, [], finish_reason="error", error=problem, error_kind=kind)

    def _max_tokens_beside(self, adapter: Adapter) -> int:
        """Longest sequence that fits the pool with its adapter."""
        return (self.pool.num_blocks - adapter.shape.num_blocks) * self.pool.block_size

    def _lowered(self, request: EngineRequest, adapter: Adapter) -> EngineRequest:
        """The request with a max_tokens that fits the pool with its adapter. Workers lower max_tokens to what the
        context leaves, and do not know the adapter's size."""
        fits = self._max_tokens_beside(adapter) - len(request.prompt_ids)
        if request.params.max_tokens <= fits:
            return request
        params = msgspec.structs.replace(
            request.params, max_tokens=fits, min_tokens=min(request.params.min_tokens, fits)
        )
        return msgspec.structs.replace(request, params=params)

    def abort(self, request_id: str) -> None:
        """Remove a request and free its blocks. Unknown ids, of requests that have just finished, are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)
            self.aborted += 1

    def hold_new(self) -> None:
        """Schedule only requests that have begun, until `release_new`; new ones wait."""
        self._holds_new = True
        self._unpark(list(self._parked))
        for sequence in self._sequences.values():
            if sequence.status is Status.WAITING and not sequence.is_begun:
                self._policy.remove(sequence)
                self._held[sequence.seq_id] = sequence

    def release_new(self) -> None:
        """Let held requests run, in order."""
        self._holds_new = False
        for sequence in self._held.values():
            self._policy.add(sequence)
        self._held.clear()

    def abort_begun(self) -> list[RequestOutput]:
        """Abort all requests that have begun; return the last output of each. No step may be in flight."""
        begun = [sequence for sequence in self._sequences.values() if sequence.is_begun]
        for sequence in begun:
            self._remove(sequence)
        self.aborted += len(begun)
        return [RequestOutput(sequence.request.request_id, [], finish_reason="abort") for sequence in begun]

    def refuse_all(self, error: FastserveError) -> list[RequestOutput]:
        """End all requests with an error; return the last output of each. No step may be in flight."""
        ended = list(self._sequences.values())
        for sequence in ended:
            self._remove(sequence)
        self.aborted += len(ended)
        return [refused(sequence.request.request_id, error) for sequence in ended]

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> CacheReset:
        """Remove all blocks from the prefix cache. Running requests keep their blocks, or are preempted and recomputed
        with `reset_running_requests`. No step may be in flight.
        """
        preempted = list(self.running) if reset_running_requests else []
        for sequence in reversed(preempted):
            self._preempt(sequence)
        return CacheReset(num_blocks=self.pool.clear(), num_preempted=len(preempted))

    def take_refused(self) -> list[RequestOutput]:
        """Last outputs of requests that ended without being scheduled, since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def _refuse_late(self) -> None:
        """End waiting requests that the policy gives up."""
        for sequence in self._policy.too_late(self._clock()):
            self._remove(sequence)
            self.aborted += 1
            message = "The server is overloaded: the first token would come too late. Send the request again later."
            self._refused.append(refused(sequence.request.request_id, FirstTokenLateError(message)))

    def _remove(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self._policy.remove(sequence)
        if self._adapters is not None and sequence.adapter is not None:
            self._adapters.leave(sequence.adapter)
        if self._grammars is not None and sequence.request.params.grammar:
            self._grammars.leave(sequence.request.params.grammar)
        self._policy.ended(sequence)
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request.request_id]
        del self._by_id[sequence.seq_id]
        self._held.pop(sequence.seq_id, None)
        if self._drafting is not None:
            self._drafting.forget(sequence.seq_id)

    def _release(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks, and have the runner drop it."""
        self.pool.free(sequence.block_ids)
        if self._adapters is not None and sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
        sequence.block_ids = []
        sequence.num_computed = 0
        sequence.num_registered = 0
        if sequence.in_runner:
            self._dropped.append(sequence.seq_id)
            sequence.in_runner = False

    # ---- one step -----------------------------------------------------------------------------------------------

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences whose last token alone is still to be computed."""
        return [item for item in self.running if item.num_uncomputed == 1 and not item.has_max_tokens]

    def can_run_ahead(self) -> bool:
        """Whether the next step can be planned while one is in flight: sampling needs no pending ids, and there are
        blocks for all sequences, and none is to be preempted."""
        needed = 0
        for sequence in self.running:
            if sequence.num_drafts or (sequence.num_pending and sequence.needs_last_token):
                return False
            if self._outgrew_rope(sequence):
                return False
            if not sequence.has_max_tokens:
                needed += self._blocks_needed(sequence, min(sequence.num_uncomputed, self.max_num_batched_tokens))
        return needed <= self.pool.num_free and self._yielding() is None

    def schedule(self) -> StepPlan:
        """Plan the next step. A plan without chunks means that there is nothing to compute."""
        for sequence in [item for item in self.running if self._outgrew_rope(item)]:
            self._requeue(sequence)
        self._refuse_late()
        step = _Step(self.max_num_batched_tokens, self.max_extra_rows)
        preempted = self._schedule_running(step)
        if not preempted:
            self._schedule_waiting(step)
        if not step.chunks:
            return StepPlan([], [], [])
        if self._drafting is not None and not self._num_in_flight:
            self._add_drafts(step, self._drafting)
        for chunk in step.chunks.values():
            self._count_scheduled(chunk)
        self._num_in_flight += 1
        new = [self._new_sequence(self._by_id[seq_id]) for seq_id in step.chunks if not self._by_id[seq_id].in_runner]
        dropped, self._dropped = self._dropped, []
        return StepPlan(dropped, new, list(step.chunks.values()))

    def _yielding(self) -> Sequence | None:
        """The running sequence whose place the first waiting one gets, when all places are taken."""
        if len(self.running) < self.max_num_seqs:
            return None
        first = self._policy.first(self.running)
        # One whose adapter has not been read could not use the place at once.
        if first is None or (first.adapter is not None and not first.adapter.slot and first.adapter.host is None):
            return None
        return self._policy.yields_to(first, self.running)

    def _make_place(self, step: _Step) -> bool:
        """Whether one more sequence may run; preempts one if the policy says so."""
        if len(self.running) < self.max_num_seqs:
            return True
        victim = None if self._num_in_flight else self._yielding()
        if victim is None:
            return False
        self._preempt(victim)
        step.remove(victim.seq_id)
        return True

    def _schedule_running(self, step: _Step) -> bool:
        """Add chunks of running sequences; return whether one was preempted."""
        decoding = self.decoding
        prefilling = [item for item in self.running if item.num_uncomputed != 1 and not item.has_max_tokens]
        first = self._policy.first(self.running) if prefilling else None
        preempted = False
        for sequence in decoding + prefilling:
            if step.budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue
            count = self._count(sequence, sequence.num_computed, step)
            if sequence.num_uncomputed != 1:
                beside = step.prefill_tokens if first is None else [*step.prefill_tokens, (first, 0)]
                least = max(1, self.max_num_batched_tokens // _YIELDING_SHARE)
                count = min(count, max(least, self._policy.max_prefill_tokens(sequence, beside)))
            while self._blocks_needed(sequence, count) > self.pool.num_free:
                if self._evict_idle_adapter():
                    continue
                victim = self._policy.victim(self.running)
                self._preempt(victim)
                preempted = True
                step.remove(victim.seq_id)
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING and count > 0:
                if sequence.num_uncomputed != 1:
                    step.prefills[sequence.seq_id] = sequence
                step.add(self._chunk(sequence, count))
        return preempted

    def _schedule_waiting(self, step: _Step) -> None:
        """Start waiting sequences in order while budget, max_num_seqs and blocks allow."""
        self._unpark_ready()
        self._unpark_compiled()
        while step.budget > 0 and self._make_place(step):
            sequence = self._policy.first(self.running)
            if sequence is None:
                break
            room = self._policy.max_prefill_tokens(sequence, step.prefill_tokens)
            if room <= 0:
                break
            if not self._is_compiled(sequence):
                continue
            # The last token is always computed, because the next one is sampled from its logits. So are tokens whose
            # logits score prompt tokens.
            place = self._prepare_adapter(sequence)
            if place is Place.NO_BLOCKS:
                break
            if place is not Place.READY:
                if not self._park(sequence, place):
                    break
                continue
            is_long = self._is_long(sequence)
            root = is_long if sequence.adapter is None else root_of(sequence.adapter, is_long=is_long)
            salt, max_cached = sequence.request.cache_salt, sequence.num_tokens - 1 - sequence.num_unscored
            match = self.pool.match(sequence.token_ids, max_cached, root, salt)
            cached = len(match.block_ids) * self.pool.block_size
            count = min(room, self._count(sequence, cached, step))
            needed = self._blocks_for(sequence.num_tokens) - len(match.block_ids)
            # One block for each running sequence is reserved, or the next steps would preempt the admitted sequence.
            # Alone, it needs blocks for this chunk only: those of idle adapters are enough.
            wanted = (
                needed + len(self.running) if self.running else self._blocks_for(cached + count) - len(match.block_ids)
            )
            while self.pool.num_free_after(match) < wanted and self._evict_idle_adapter(but=sequence.adapter):
                pass
            if count == 0 or (self.running and self.pool.num_free_after(match) - needed < len(self.running)):
                break
            self._policy.remove(sequence)
            self.pool.take(match)
            if self._adapters is not None and sequence.adapter is not None:
                self._adapters.hold(sequence.adapter)
            sequence.is_long = is_long
            sequence.block_ids = list(match.block_ids)
            sequence.num_registered = len(match.block_ids)
            sequence.parent = match.parent
            sequence.num_computed = cached
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=lambda item: item.order)
            if sequence.num_cached is None:
                if sequence.adapter is not None:
                    sequence.adapter.hits += not sequence.waited_for_adapter
                sequence.num_cached = min(cached, sequence.num_prompt_tokens)
                self.cached_tokens += sequence.num_cached
                self.prompt_tokens += sequence.num_prompt_tokens
                self._policy.served(sequence, sequence.num_prompt_tokens - sequence.num_cached, 0)
            step.prefills[sequence.seq_id] = sequence
            step.add(self._chunk(sequence, count))

    # ---- adapters -----------------------------------------------------------------------------------------------

    def _prepare_adapter(self, sequence: Sequence) -> Place:
        """Put a waiting sequence's adapter on the device."""
        if self._adapters is None or sequence.adapter is None:
            return Place.READY
        sequence.waited_for_adapter |= not sequence.adapter.slot
        return self._adapters.prepare(sequence.adapter, len(self.running))

    def _evict_idle_adapter(self, but: Adapter | None = None) -> bool:
        """Free the blocks of an adapter that no sequence uses; False if there is none."""
        return self._adapters is not None and self._adapters.evict_idle(but, is_needed=not self.running)

    def _park(self, sequence: Sequence, place: Place) -> bool:
        """Take the first waiting sequence out of the queue until its adapter can be put on the device, so that others
        go on. Without prefetch they wait behind it: return False."""
        if self._adapters is None or sequence.adapter is None:
            return False
        if place is Place.READING and not self._adapters.is_prefetching:
            return False
        self._policy.remove(sequence)
        key = _TOO_MANY if place is Place.TOO_MANY else sequence.adapter.number
        self._parked.setdefault(key, []).append(sequence)
        return True

    def _unpark_ready(self) -> None:
        """Queue parked sequences again whose adapter can be put on the device; refuse those whose adapter could not be
        read."""
        if self._adapters is None:
            return
        self._unpark([adapter.number for adapter in self._adapters.arrived])
        self._adapters.arrived.clear()
        if not self._adapters.has_max_distinct:
            self._unpark([_TOO_MANY])
        for adapter, message in self._adapters.failed:
            self._unpark([adapter.number])
            for sequence in [item for item in self._sequences.values() if item.adapter is adapter]:
                if sequence.status is Status.WAITING:
                    self._remove(sequence)
                    request_id, kind = sequence.request.request_id, InvalidRequestError.__name__
                    self._refused.append(
                        RequestOutput(request_id, [], finish_reason="error", error=message, error_kind=kind)
                    )
        self._adapters.failed.clear()

    # ---- grammars -----------------------------------------------------------------------------------------------

    def _is_compiled(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence has no grammar or one that can be used. If not, it is parked or ends."""
        text = sequence.request.params.grammar
        if self._grammars is None or not text:
            return True
        if not self._grammars.is_compiled(text):
            self._policy.remove(sequence)
            self._parked.setdefault(_COMPILING, []).append(sequence)
            return False
        problem = self._grammars.problem(text)
        if problem is not None:
            self._remove(sequence)
            self._refused.append(refused(sequence.request.request_id, problem))
        return problem is None

    def _unpark_compiled(self) -> None:
        """Queue parked sequences again whose grammar has been compiled."""
        parked = self._parked.pop(_COMPILING, None)
        if parked is None or self._grammars is None:
            return
        for sequence in parked:
            if sequence.status is Status.WAITING:  # else it was aborted
                if self._grammars.is_compiled(sequence.request.params.grammar):
                    self._policy.add(sequence)
                else:
                    self._parked.setdefault(_COMPILING, []).append(sequence)

    def _unpark(self, keys: list[int]) -> None:
        for key in keys:
            for sequence in self._parked.pop(key, ()):
                if sequence.status is Status.WAITING:  # else it was aborted
                    self._policy.add(sequence)

    def _add_drafts(self, step: _Step, drafting: Drafting) -> None:
        """Add drafts after the single tokens of decoding sequences, as far as budget and blocks allow."""
        sequences = [
            self._by_id[chunk.seq_id] for chunk in step.chunks.values() if chunk.sample and chunk.num_tokens == 1
        ]
        budget = min(step.budget, step.extra_rows)
        if not sequences or budget == 0:
            return
        limits = [
            # A step samples one token more than it accepts drafts.
            min(
                sequence.request.params.max_tokens - sequence.num_generated - 1,
                self.max_model_len - sequence.num_tokens - 1,
                self._max_length(sequence) - sequence.num_tokens,
            )
            for sequence in sequences
        ]
        for seq_id, draft_ids in drafting.draft(sequences, limits, budget).items():
            sequence = self._by_id[seq_id]
            room = (len(sequence.block_ids) + self.pool.num_free) * self.pool.block_size - sequence.num_tokens
            draft_ids = draft_ids[:room]
            if draft_ids:
                more = self.pool.allocate(self._blocks_needed(sequence, 1 + len(draft_ids)))
                sequence.block_ids += more
                chunk = step.chunks[seq_id]
                step.chunks[seq_id] = msgspec.structs.replace(
                    chunk, new_block_ids=chunk.new_block_ids + more, draft_ids=draft_ids
                )

    def _count_scheduled(self, chunk: Chunk) -> None:
        """Count a scheduled chunk's tokens as computed and its sampled token as pending."""
        sequence = self._by_id[chunk.seq_id]
        sequence.num_computed += chunk.num_tokens
        sequence.num_unscored -= chunk.num_scored
        sequence.num_drafts = len(chunk.draft_ids)
        sequence.num_pending += chunk.sample

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether its rotary frequencies are those of long sequences."""
        return self._rope_switch_length is not None and sequence.num_tokens > self._rope_switch_length

    def _outgrew_rope(self, sequence: Sequence) -> bool:
        """Whether its next token needs other rotary frequencies than those in its KV cache."""
        return self._is_long(sequence) != sequence.is_long and not sequence.has_max_tokens

    def _max_length(self, sequence: Sequence) -> int:
        """Maximum length in tokens, drafts included, at which its KV cache is valid."""
        if self._rope_switch_length is None or sequence.is_long:
            return self.max_model_len
        return self._rope_switch_length

    def _count(self, sequence: Sequence, computed: int, step: _Step) -> int:
        """Number of tokens to compute next, for a sequence with `computed` computed tokens."""
        count = min(sequence.num_tokens - computed, step.budget)
        if sequence.num_unscored > step.extra_rows:
            count = min(count, max(computed, sequence.score_begin) + step.extra_rows - computed)
        return count

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _blocks_needed(self, sequence: Sequence, count: int) -> int:
        return self._blocks_for(sequence.num_computed + count) - len(sequence.block_ids)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        num_held = len(sequence.block_ids) if sequence.in_runner else 0
        sequence.block_ids += self.pool.allocate(self._blocks_needed(sequence, count))
        start, end = sequence.num_computed, sequence.num_computed + count
        score_begin = max(start, sequence.score_begin)
        return Chunk(
            sequence.seq_id,
            start,
            count,
            sequence.block_ids[num_held:],
            sample=end == sequence.num_tokens,
            num_held_blocks=num_held,
            score_begin=score_begin,
            score_end=max(score_begin, min(end, sequence.num_prompt_tokens - 1)),
        )

    def _new_sequence(self, sequence: Sequence) -> NewSequence:
        sequence.in_runner = True
        request = sequence.request
        return NewSequence(
            sequence.seq_id, list(sequence.token_ids), sequence.num_prompt_tokens, request.params, request.choice,
            0 if sequence.adapter is None else sequence.adapter.slot,
        )  # fmt: skip

    def _preempt(self, sequence: Sequence) -> None:
        self._requeue(sequence)
        self.preemptions += 1

    def _requeue(self, sequence: Sequence) -> None:
        """Have a running sequence wait, to be computed anew."""
        assert not self._num_in_flight, "the tokens of a step in flight cannot be given to the runner again"
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        self._policy.add(sequence)

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Update the sequences with a step's result and return the outputs. Called in the order of the plans."""
        if not plan.chunks:
            return []
        self._num_in_flight -= 1
        if self._drafting is not None:
            self._report_drafts(self._drafting, plan, result)
        outputs: list[RequestOutput] = []
        for chunk in plan.chunks:
            sequence = self._by_id.get(chunk.seq_id)
            if sequence is None:  # it ended while the step was in flight
                continue
            scores = result.prompt_logprobs.get(chunk.seq_id)
            if scores is not None and sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += scores
            num_accepted = 0
            failure = result.failed.get(chunk.seq_id)
            if failure is not None:
                self._remove(sequence)
                self.aborted += 1
                outputs.append(refused(sequence.request.request_id, InvalidRequestError(failure, param="grammar")))
                continue
            if chunk.sample:
                outputs.append(self._take_tokens(sequence, result))
                num_accepted = len(outputs[-1].token_ids) - 1
            self._settle_blocks(sequence, chunk.start + chunk.num_tokens + num_accepted)
            if chunk.sample and outputs[-1].finish_reason is not None:
                self._remove(sequence)
                self.finished += 1
        return outputs

    def _report_drafts(self, drafting: Drafting, plan: StepPlan, result: StepResult) -> None:
        num_sequences = sum(1 for chunk in plan.chunks if chunk.sample and chunk.num_tokens == 1)
        tried = {
            seq_id: (count, len(result.token_ids[seq_id]) - 1)
            for seq_id, count in result.num_drafts.items()
            if seq_id in self._by_id
        }
        drafting.learn(num_sequences, tried)

    def _take_tokens(self, sequence: Sequence, result: StepResult) -> RequestOutput:
        """Append the tokens that the step sampled for a sequence, up to the one that ends it."""
        sampled = result.token_ids[sequence.seq_id]
        output = RequestOutput(sequence.request.request_id, [], num_cached_tokens=sequence.num_cached or 0)
        sequence.num_pending -= 1
        sequence.num_drafts = 0
        for token_id in sampled:
            sequence.token_ids.append(token_id)
            output.token_ids.append(token_id)
            output.finish_reason = self._finish_reason(sequence)
            if output.finish_reason is not None:
                break
        if self.weight_version not in sequence.weight_versions[-1:]:
            sequence.weight_versions.append(self.weight_version)
            output.weight_versions = tuple(sequence.weight_versions)
        count = len(output.token_ids)
        # All but the last of them were drafts, so they are computed already.
        sequence.num_computed += count - 1
        self.generated_tokens += count
        self._policy.served(sequence, 0, count)
        if sequence.seq_id in result.logprobs:
            output.logprobs = result.logprobs[sequence.seq_id][:count]
        output.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        return output

    def _settle_blocks(self, sequence: Sequence, num_filled: int) -> None:
        """Free blocks of rejected drafts; register those that the first `num_filled` tokens fill."""
        needed = self._blocks_for(sequence.num_computed)
        self.pool.free(sequence.block_ids[needed:])
        del sequence.block_ids[needed:]
        size = self.pool.block_size
        for index in range(sequence.num_registered, num_filled // size):
            start, salt = index * size, sequence.request.cache_salt
            tokens = block_key(sequence.token_ids[start : start + size], salt, start)
            sequence.parent = self.pool.register(sequence.block_ids[index], sequence.parent, tokens)
            sequence.num_registered = index + 1

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.request.params
        if sequence.num_generated >= params.min_tokens and sequence.token_ids[-1] in params.stop_token_ids:
            return "stop"
        if sequence.num_generated >= params.max_tokens:
            return "length"
        return None

    def check(self) -> None:
        """Raise RuntimeError when the state is inconsistent. For tests."""
        adapters = [] if self._adapters is None else self._adapters.held_blocks
        self.pool.check([*(sequence.block_ids for sequence in self._sequences.values()), *adapters])
        for sequence in self._sequences.values():
            if sequence.status is not Status.RUNNING and sequence.block_ids:
                raise RuntimeError(f"sequence {sequence.seq_id} waits but holds blocks")
            if len(sequence.block_ids) != self._blocks_for(sequence.num_computed + sequence.num_drafts):
                raise RuntimeError(f"sequence {sequence.seq_id} does not hold the blocks of its computed tokens")


def refused(request_id: str, error: FastserveError) -> RequestOutput:
    """The last output of a request that ends with an error."""
    return RequestOutput(request_id, [], finish_reason="error", error=error.message, error_kind=type(error).__name__)
