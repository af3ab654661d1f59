"""One request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fastserve.engine.contract import EngineRequest, TokenLogprob
from fastserve.engine.kv_cache import ROOT


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens sampled and tokens computed: `num_computed` chases `num_tokens`, and nothing else says what is to be done.
    Both count what a step that is planned and not yet committed is going to bring.

    Prefill, chunked prefill, decode, a hit in the prefix cache, the way back from preemption and the takeover of
    another engine's half-done answer differ only in how far apart the two are.
    """

    seq_id: int
    """Order of arrival; unique in the engine."""
    request: EngineRequest
    token_ids: list[int]
    """Those that are known."""
    num_prompt_tokens: int
    due: float
    """Arrival on the scheduler's clock in seconds, and what the priority adds: who goes first."""
    needs_last_token: bool
    """Its next token can be sampled only once the one before is known."""
    num_computed: int = 0
    num_pending: int = 0
    """Tokens that steps in flight sample: how many is known, and not yet which."""
    num_drafts: int = 0
    """Drafts in the step in flight."""
    status: Status = Status.WAITING
    block_ids: list[int] = field(default_factory=list)
    num_registered: int = 0
    """Leading blocks that the prefix cache knows."""
    parent: int = ROOT
    """Number of the last of them."""
    num_cached: int | None = None
    """Prompt tokens found in the cache when first scheduled; None before."""
    in_runner: bool = False
    prompt_logprobs: list[TokenLogprob] | None = None
    """Found so far; None when not wanted, or when they have been sent."""
    num_unscored: int = 0
    """Prompt tokens whose logprobs are still to be found, always the last ones."""

    @classmethod
    def of(cls, seq_id: int, request: EngineRequest, due: float, *, needs_last_token: bool) -> Sequence:
        token_ids = request.prompt_ids + request.emitted_ids
        sequence = cls(seq_id, request, token_ids, len(request.prompt_ids), due, needs_last_token)
        # With the first of its tokens, another engine has sent the prompt's logprobs too.
        if request.params.prompt_logprobs is not None and not request.emitted_ids:
            sequence.prompt_logprobs = []
            sequence.num_unscored = sequence.num_prompt_tokens - 1
        return sequence

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Known ones."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_begun(self) -> bool:
        """It has been scheduled at least once, also when it was preempted since."""
        return self.num_cached is not None

    @property
    def has_max_tokens(self) -> bool:
        """With the pending tokens the answer has its greatest length."""
        return self.num_tokens - self.num_prompt_tokens >= self.request.params.max_tokens

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def score_begin(self) -> int:
        """Position whose logits score the first unscored prompt token; the last prompt position when none is left."""
        return self.num_prompt_tokens - 1 - self.num_unscored

    @property
    def order(self) -> tuple[float, int]:
        """Who goes first. The last in this order is preempted first."""
        return (self.due, self.seq_id)
