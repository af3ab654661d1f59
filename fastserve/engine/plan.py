"""The scheduler's decision for one step, as a plain message that any number of ranks can execute, and its result."""

from __future__ import annotations

import msgspec

from fastserve.engine.contract import SamplingParams, TokenLogprob

OPEN_DRAFT = -1
"""A draft that the draft model fills in when the step is executed."""
MAX_EXTRA_ROWS = 256
"""Rows of logits that a step may have beyond one for each sequence, for drafts and prompt logprobs."""
MAX_EXTRA_LOGITS = 1 << 24
"""Entries of these rows: 64 MiB in float32."""


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence that the runner does not hold: new, or back after preemption. Sent in full, once."""

    seq_id: int
    token_ids: list[int]
    """The prompt and all tokens generated so far."""
    num_prompt_tokens: int
    params: SamplingParams
    choice: int


class Chunk(msgspec.Struct, frozen=True):
    """Compute tokens [start, start + num_tokens) of a sequence, and the drafts behind them."""

    seq_id: int
    start: int
    num_tokens: int
    new_block_ids: list[int]
    """Blocks that come behind the first `num_held_blocks` of the sequence's block table, before this step."""
    sample: bool
    """The chunk reaches the last token, so the next one is sampled. The runner appends it to its own copy, and may be
    asked to compute it before its id is known: a plan names tokens by their positions."""
    num_held_blocks: int = 0
    draft_ids: list[int] = []
    """Guesses at the tokens after the last known one (speculation): after each right one, one more token is sampled."""
    score_begin: int = 0
    score_end: int = 0
    """The prompt tokens after positions [score_begin, score_end), which lie in the chunk, get logprobs."""

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
    """Sequences that the runner forgets before anything else: finished, aborted or preempted."""
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
    """What a step brought, keyed by sequence."""

    token_ids: dict[int, list[int]] = {}
    """For each chunk that samples: the drafts that were right, in order, and the token sampled after them."""
    logprobs: dict[int, list[TokenLogprob]] = {}
    """Of these tokens, for the sequences that asked for them."""
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    """For each chunk that scores."""
    num_drafts: dict[int, int] = {}
    """Drafts that were tried, for each chunk that had any."""
    draft_s: float = 0.0
    """Of the step's time, what the draft model took."""
