"""Drafts by a second, smaller model with the same vocabulary (Leviathan et al., 2023).

It has a KV cache of its own with the same block ids, so the scheduler's block tables are valid for both. Its computed
tokens lag behind: nothing is computed for sequences without drafts until they are so far behind that catching up is as
efficient as a prefill. Wrong or missing entries of its KV cache can only make drafts worse, never an answer.

It samples with the request's own parameters and random numbers. The token at a position is a function of both, so where
its logits are close to the model's, its drafts are accepted for sampled requests too, not only for greedy ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from fastserve.engine.executor import Executor, PendingStep
from fastserve.engine.plan import Chunk, NewSequence, StepPlan, StepResult
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.speed import SpeedMeter

_MAX_LAG = 64
"""Tokens that a sequence without drafts may lag behind."""


@dataclass(slots=True)
class _Draft:
    """The draft model's state of one sequence."""

    num_known: int
    """Known tokens."""
    num_computed: int = 0
    num_filled: int = 0
    """Leading blocks whose tokens are all known and computed."""
    block_ids: list[int] = field(default_factory=list)
    is_new: bool = True


class DraftModel:
    """Replaces draft placeholders in plans by drafts. `speed`: duration of its steps."""

    def __init__(
        self,
        runner: ModelRunner,
        speed: SpeedMeter,
        *,
        num_blocks: int,
        block_size: int,
        max_num_batched_tokens: int,
        context_length: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._speed = speed
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._context_length = context_length
        self._clock = clock
        self._drafts: dict[int, _Draft] = {}
        self._is_filled = np.zeros(num_blocks, dtype=bool)
        """By block id: whether this model has computed the block. Blocks of a prefix cache hit may lack its keys."""

    def step_s(self, num_sequences: int) -> float:
        """Expected duration of a step of one token for each sequence."""
        return self._speed.step_s(num_sequences)

    def fill(self, plan: StepPlan) -> StepPlan:
        """The plan with drafts in place of placeholders. A sequence that lags too far behind gets none."""
        self._update_states(plan)
        budget = self._catch_up(plan)
        lengths: dict[int, int] = {}
        first: list[Chunk] = []
        for chunk in plan.chunks:
            draft = self._drafts[chunk.seq_id]
            length = min(len(chunk.draft_ids), self._context_length - draft.num_known)
            if length > 0 and draft.num_known - draft.num_computed <= budget:
                lengths[chunk.seq_id] = length
                first.append(self._rest(chunk.seq_id, draft.num_known, sample=True))
                budget -= first[-1].num_tokens
        guesses = self._guess(first, lengths)
        chunks = [
            msgspec.structs.replace(chunk, draft_ids=guesses.get(chunk.seq_id, [])) if chunk.draft_ids else chunk
            for chunk in plan.chunks
        ]
        return StepPlan(plan.dropped, plan.new, chunks)

    def learn(self, result: StepResult) -> None:
        """Update with the tokens of a step."""
        for seq_id, token_ids in result.token_ids.items():
            draft = self._drafts[seq_id]
            self._runner.correct(seq_id, draft.num_known, token_ids)
            # The last token was sampled, not a draft: what was computed from there on was of rejected drafts.
            draft.num_computed = min(draft.num_computed, draft.num_known + len(token_ids) - 1)
            draft.num_known += len(token_ids)
        for draft in self._drafts.values():
            num_filled = draft.num_computed // self._block_size
            self._is_filled[draft.block_ids[draft.num_filled : num_filled]] = True
            draft.num_filled = num_filled

    def _update_states(self, plan: StepPlan) -> None:
        for seq_id in plan.dropped:
            del self._drafts[seq_id]
        for new in plan.new:
            self._drafts[new.seq_id] = _Draft(len(new.token_ids))
        for chunk in plan.chunks:
            self._note_blocks(self._drafts[chunk.seq_id], chunk)
        bare = [msgspec.structs.replace(chunk, draft_ids=[]) for chunk in plan.chunks]
        self._runner.update_states(StepPlan(plan.dropped, [_without_logprobs(new) for new in plan.new], bare))

    def _note_blocks(self, draft: _Draft, chunk: Chunk) -> None:
        draft.block_ids[chunk.num_held_blocks :] = chunk.new_block_ids
        num_hits = chunk.start // self._block_size if draft.is_new else chunk.num_held_blocks
        self._is_filled[draft.block_ids[num_hits:]] = False
        if draft.is_new:
            draft.is_new = False
            filled = self._is_filled[draft.block_ids[:num_hits]]
            draft.num_computed = (num_hits if filled.all() else int(filled.argmin())) * self._block_size

    def _catch_up(self, plan: StepPlan) -> int:
        """Compute tokens of sequences that lag too far behind; return how many more tokens this step may compute."""
        budget = self._max_num_batched_tokens
        chunks = []
        for chunk in plan.chunks:
            # The last known token is computed when a draft is sampled from it.
            end = min(chunk.start + chunk.num_tokens - 1, self._context_length)
            lag = end - self._drafts[chunk.seq_id].num_computed
            if budget > 0 and (lag >= _MAX_LAG or (chunk.draft_ids and lag >= budget)):
                chunks.append(self._rest(chunk.seq_id, end, sample=False, max_tokens=budget))
                budget -= chunks[-1].num_tokens
        if chunks:
            self._runner.forward(StepPlan([], [], chunks))
        return budget

    def _rest(self, seq_id: int, end: int, *, sample: bool, max_tokens: int | None = None) -> Chunk:
        """A chunk of the uncomputed tokens up to `end`, which are marked as computed."""
        draft = self._drafts[seq_id]
        start = draft.num_computed
        draft.num_computed = end if max_tokens is None else min(end, start + max_tokens)
        return Chunk(seq_id, start, draft.num_computed - start, [], sample=sample)

    def _guess(self, chunks: list[Chunk], lengths: dict[int, int]) -> dict[int, list[int]]:
        guesses: dict[int, list[int]] = {seq_id: [] for seq_id in lengths}
        while chunks:
            begin = self._clock()
            plan = StepPlan([], [], chunks)
            sampled = self._runner.execute(plan).token_ids
            self._speed.record(plan.num_tokens, self._clock() - begin)
            chunks = []
            for seq_id, token_ids in sampled.items():
                guesses[seq_id] += token_ids
                if len(guesses[seq_id]) < lengths[seq_id]:
                    chunks.append(self._rest(seq_id, self._drafts[seq_id].num_computed + 1, sample=True))
        return guesses


def _without_logprobs(new: NewSequence) -> NewSequence:
    params = msgspec.structs.replace(new.params, logprobs=None, prompt_logprobs=None)
    return msgspec.structs.replace(new, params=params)


class DraftingExecutor:
    """An `Executor`: the draft model proposes, the model verifies. Drafts need the result of the step before, so steps
    must not overlap."""

    def __init__(
        self, draft_model: DraftModel, executor: Executor, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._draft_model = draft_model
        self._executor = executor
        self._clock = clock

    def launch(self, plan: StepPlan) -> DraftedStep:
        begin = self._clock()
        filled = self._draft_model.fill(plan)
        draft_s = self._clock() - begin
        return DraftedStep(self._draft_model, self._executor.launch(filled), draft_s)


@dataclass(frozen=True, slots=True)
class DraftedStep:
    _draft_model: DraftModel
    _pending: PendingStep
    _draft_s: float

    def result(self) -> StepResult:
        result = self._pending.result()
        self._draft_model.learn(result)
        return msgspec.structs.replace(result, draft_s=self._draft_s)
