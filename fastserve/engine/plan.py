"""The scheduler's decision for one step, as a plain message that any number of ranks can execute, and its result."""

from __future__ import annotations

import msgspec

from fastserve.engine.contract import SamplingParams, TokenLogprob


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence that the runner does not hold: new, or back after preemption. Sent in full, once."""

    seq_id: int
    token_ids: list[int]
    """The prompt and all tokens generated so far."""
    num_prompt_tokens: int
    params: SamplingParams
    choice: int


class Chunk(msgspec.Struct, frozen=True):
    """Compute tokens [start, start + num_tokens) of a sequence."""

    seq_id: int
    start: int
    num_tokens: int
    new_block_ids: list[int]
    """Blocks to append to the sequence's block table before this step."""
    sample: bool
    """The chunk reaches the last known token, so the next one is drawn. The runner appends it to its own copy."""


class StepPlan(msgspec.Struct, frozen=True):
    dropped: list[int]
    """Sequences that the runner forgets before anything else: finished, aborted or preempted."""
    new: list[NewSequence]
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class StepResult(msgspec.Struct, frozen=True):
    """One drawn token for each chunk that samples, keyed by sequence."""

    token_ids: dict[int, int]
    logprobs: dict[int, TokenLogprob]
    """For the sequences that asked for them."""
