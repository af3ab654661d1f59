"""The scheduler: which tokens of which sequences the next step computes. No phases, no tensors.

Each step is a map from sequences to token counts under one token budget. Running sequences come first (those that
decode before those that still prefill, so a long prompt never holds up an answer), then waiting ones in the order of
priority and arrival. When blocks run out, the running sequence that is last in that order gives up its blocks and waits
again, keeping its tokens: its KV is computed anew, mostly from the prefix cache. The first in order can always finish,
because one sequence never needs more than the whole pool, so nobody starves.

The idea of one counter chasing another instead of prefill and decode phases is vLLM's (its v1 scheduler).
"""

from __future__ import annotations

import heapq
from bisect import insort

from fastserve.engine.contract import EngineRequest, FinishReason, RequestOutput
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.plan import Chunk, NewSequence, StepPlan, StepResult
from fastserve.engine.sequence import Sequence, Status


class Scheduler:
    """Owns the queues and the block pool. `add`, `abort`, `schedule`, `commit` run between steps, never during one."""

    def __init__(self, pool: BlockPool, *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> None:
        if max_model_len > pool.num_blocks * pool.block_size:
            raise ValueError("one sequence of max_model_len tokens must fit the block pool")
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._sequences: dict[str, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}
        self._dropped: list[int] = []
        self._next_id = 0
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
    def has_work(self) -> bool:
        return bool(self._sequences)

    # ---- arrival and departure ----------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request. Returns its last output at once when it cannot run or has nothing left to do."""
        problem = self._problem(request)
        if problem is not None:
            return RequestOutput(request.request_id, [], finish_reason="error", error=problem)
        sequence = Sequence.of(self._next_id, request)
        self._next_id += 1
        reason = self._finish_reason(sequence) if request.emitted_ids else None
        if reason is not None:
            return RequestOutput(request.request_id, [], finish_reason=reason)
        self._sequences[request.request_id] = sequence
        self._by_id[sequence.seq_id] = sequence
        heapq.heappush(self._waiting, (sequence.order, sequence))
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

    def abort(self, request_id: str) -> None:
        """Forget a request at once and free its blocks. An unknown id is one that has finished meanwhile."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)
            self.aborted += 1

    def _remove(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        # A waiting one stays in the heap until it surfaces; its status tells that it is gone.
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request.request_id]
        del self._by_id[sequence.seq_id]

    def _release(self, sequence: Sequence) -> None:
        """Give up a running sequence's blocks, and have the runner forget it."""
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        sequence.num_registered = 0
        if sequence.in_runner:
            self._dropped.append(sequence.seq_id)
            sequence.in_runner = False

    # ---- one step -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step. The plan may have no chunks: then nothing is to be computed."""
        budget = self.max_num_batched_tokens
        chunks: dict[int, Chunk] = {}
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_uncomputed != 1]
        preempted = False
        for sequence in decoding + prefilling:
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING:
                continue
            count = min(sequence.num_uncomputed, budget)
            while self._blocks_needed(sequence, count) > self.pool.num_free:
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                undone = chunks.pop(victim.seq_id, None)
                budget += undone.num_tokens if undone else 0
                if victim is sequence:
                    break
            if sequence.status is Status.RUNNING:
                chunks[sequence.seq_id] = self._chunk(sequence, count)
                budget -= count
        if not preempted:
            self._admit(chunks, budget)
        new = [self._introduce(self._by_id[seq_id]) for seq_id in chunks if not self._by_id[seq_id].in_runner]
        dropped, self._dropped = self._dropped, []
        return StepPlan(dropped, new, list(chunks.values()))

    def _admit(self, chunks: dict[int, Chunk], budget: int) -> None:
        """Start waiting sequences in order while budget, places and blocks last."""
        while self._waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self._waiting[0][1]
            if sequence.status is not Status.WAITING:
                heapq.heappop(self._waiting)
                continue
            # The last token is always computed: its logits are what the next one is drawn from.
            match = self.pool.match(sequence.token_ids, sequence.num_tokens - 1)
            cached = len(match.block_ids) * self.pool.block_size
            needed = self._blocks_for(sequence.num_tokens) - len(match.block_ids)
            # One block for each running sequence is kept back, or the next steps would preempt what was just admitted.
            if self.running and self.pool.num_free_after(match) - needed < len(self.running):
                break
            heapq.heappop(self._waiting)
            self.pool.take(match)
            sequence.block_ids = list(match.block_ids)
            sequence.num_registered = len(match.block_ids)
            sequence.parent = match.parent
            sequence.num_computed = cached
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=lambda item: item.order)
            if sequence.num_cached is None:
                sequence.num_cached = min(cached, sequence.num_prompt_tokens)
                self.cached_tokens += sequence.num_cached
                self.prompt_tokens += sequence.num_prompt_tokens
            count = min(sequence.num_uncomputed, budget)
            chunks[sequence.seq_id] = self._chunk(sequence, count)
            budget -= count

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _blocks_needed(self, sequence: Sequence, count: int) -> int:
        return self._blocks_for(sequence.num_computed + count) - len(sequence.block_ids)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        new_block_ids = self.pool.allocate(self._blocks_needed(sequence, count))
        sequence.block_ids += new_block_ids
        if not sequence.in_runner:
            new_block_ids = list(sequence.block_ids)
        return Chunk(
            sequence.seq_id, sequence.num_computed, count, new_block_ids, sample=count == sequence.num_uncomputed
        )

    def _introduce(self, sequence: Sequence) -> NewSequence:
        sequence.in_runner = True
        request = sequence.request
        return NewSequence(
            sequence.seq_id, list(sequence.token_ids), sequence.num_prompt_tokens, request.params, request.choice
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.order, sequence))
        self.preemptions += 1

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in what the step computed; return what there is to tell."""
        outputs: list[RequestOutput] = []
        for chunk in plan.chunks:
            sequence = self._by_id[chunk.seq_id]
            sequence.num_computed += chunk.num_tokens
            self._register_full_blocks(sequence)
            if not chunk.sample:
                continue
            token_id = result.token_ids[chunk.seq_id]
            sequence.token_ids.append(token_id)
            self.generated_tokens += 1
            output = RequestOutput(sequence.request.request_id, [token_id], num_cached_tokens=sequence.num_cached or 0)
            if chunk.seq_id in result.logprobs:
                output.logprobs = [result.logprobs[chunk.seq_id]]
            output.finish_reason = self._finish_reason(sequence)
            if output.finish_reason is not None:
                self._remove(sequence)
                self.finished += 1
            outputs.append(output)
        return outputs

    def _register_full_blocks(self, sequence: Sequence) -> None:
        size = self.pool.block_size
        for index in range(sequence.num_registered, sequence.num_computed // size):
            tokens = tuple(sequence.token_ids[index * size : (index + 1) * size])
            sequence.parent = self.pool.register(sequence.block_ids[index], sequence.parent, tokens)
            sequence.num_registered = index + 1

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params = sequence.request.params
        if sequence.num_generated >= params.min_tokens and sequence.token_ids[-1] in params.stop_token_ids:
            return "stop"
        if sequence.num_generated >= params.max_tokens or sequence.num_tokens >= self.max_model_len:
            return "length"
        return None

    def check(self) -> None:
        """Raise RuntimeError when the books are wrong. For tests and idle times."""
        self.pool.check([sequence.block_ids for sequence in self._sequences.values()])
        for sequence in self._sequences.values():
            if sequence.status is not Status.RUNNING and sequence.block_ids:
                raise RuntimeError(f"sequence {sequence.seq_id} waits but holds blocks")
            if len(sequence.block_ids) < self._blocks_for(sequence.num_computed):
                raise RuntimeError(f"sequence {sequence.seq_id} has computed more tokens than its blocks hold")
