"""The scheduler's decision for one step, as a plain message that any number of ranks can execute, and its result."""

from __future__ import annotations

import msgspec

from fastserve.engine.contract import SamplingParams, TokenLogprob

DRAFT_PLACEHOLDER = -1
"""Draft id that the draft model replaces when the step is executed."""
MAX_EXTRA_ROWS = 256
"""Rows of logits in a step beyond one for each sequence, for drafts and prompt logprobs."""
MAX_EXTRA_LOGITS = 1 << 24
"""Entries of these rows together: 64 MiB in float32."""


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence that the runner does not hold yet: new, or resumed after preemption."""

    seq_id: int
    token_ids: list[int]
    """The prompt and all tokens generated so far."""
    num_prompt_tokens: int
    params: SamplingParams
    choice: int
    adapter: int = 0
    """Slot of its adapter on the device; 0: none."""


class Chunk(msgspec.Struct, frozen=True):
    """Compute tokens [start, start + num_tokens) of a sequence, and the drafts after them."""

    seq_id: int
    start: int
    num_tokens: int
    new_block_ids: list[int]
    """Blocks that this step appends to the first `num_held_blocks` of the sequence's block table."""
    sample: bool
    """The chunk reaches the last token, so the next one is sampled. The runner appends it to its own copy; a later plan
    may have it computed before its id is known on the host, because plans name tokens by their positions."""
    num_held_blocks: int = 0
    """Blocks in the runner's copy of the block table before this step."""
    draft_ids: list[int] = []
    """Draft tokens after the last known one (speculation): after each accepted one, one more token is sampled."""
    score_begin: int = 0
    score_end: int = 0
    """The prompt tokens after positions [score_begin, score_end) get logprobs; these positions are in the chunk."""

    @property
    def num_rows(self) -> int:
        """Rows of the packed batch."""
        return self.num_tokens + len(self.draft_ids)

    @property
    def num_sampled(self) -> int:
        """Tokens that are sampled if `sample`."""
        return 1 + len(self.draft_ids)

    @property
    def num_scored(self) -> int:
        return self.score_end - self.score_begin


class StepPlan(msgspec.Struct, frozen=True):
    dropped: list[int]
    """Sequences that the runner removes first: finished, aborted or preempted."""
    new: list[NewSequence]
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        """Drafts included."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def has_drafts(self) -> bool:
        return any(chunk.draft_ids for chunk in self.chunks)


class StepResult(msgspec.Struct, frozen=True):
    """The result of a step, by sequence id."""

    token_ids: dict[int, list[int]] = {}
    """For each chunk that samples: the accepted drafts, in order, and the token sampled after them."""
    logprobs: dict[int, list[TokenLogprob]] = {}
    """Logprobs of `token_ids`, for sequences that requested them."""
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    """For each chunk that scores prompt tokens."""
    num_drafts: dict[int, int] = {}
    """Number of drafts that were checked, for each chunk that had any."""
    failed: dict[int, str] = {}
    """Sequences that cannot go on, with the reason; their `token_ids` are void."""
    draft_s: float = 0.0
    """Part of the step's time that the draft model took, in seconds."""
