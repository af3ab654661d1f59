"""One request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from fastserve.engine.adapters.manager import Adapter
from fastserve.engine.contract import EngineRequest, TokenLogprob
from fastserve.engine.kv_cache import ROOT


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens: `num_computed` of `num_tokens` have their keys and values in the KV cache, and the scheduler
    computes the rest. Both include steps that are planned but not committed.

    Prefill, chunked prefill, decode, prefix cache hits, resuming after preemption and taking over another engine's
    answer differ only in the difference of the two.
    """

    seq_id: int
    """Order of arrival; unique in the engine."""
    request: EngineRequest
    token_ids: list[int]
    """Known tokens of prompt and answer."""
    num_prompt_tokens: int
    due: float
    """Arrival on the scheduler's clock plus the priority's delay, in seconds. Lower goes first."""
    needs_last_token: bool
    """Its next token can be sampled only once the one before is known."""
    arrived_s: float = 0.0
    """Arrival on the scheduler's clock."""
    num_computed: int = 0
    num_pending: int = 0
    """Tokens that steps in flight sample; their ids are not known yet."""
    num_drafts: int = 0
    """Drafts in the step in flight."""
    status: Status = Status.WAITING
    block_ids: list[int] = field(default_factory=list)
    num_registered: int = 0
    """Leading blocks that are registered in the prefix cache."""
    parent: int = ROOT
    """Number of the last registered block (see kv_cache.py)."""
    adapter: Adapter | None = None
    waited_for_adapter: bool = False
    """Its adapter was not on the device when it was first looked at."""
    is_long: bool = False
    """Computed with the rotary frequencies of long sequences (see `Scheduler`)."""
    num_cached: int | None = None
    """Prompt tokens found in the prefix cache when first scheduled; None before."""
    weight_versions: list[str] = field(default_factory=list)
    """Versions of the weights that computed tokens of the answer, in order."""
    in_runner: bool = False
    """Whether the runner holds it."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Those computed so far; None when not requested, or when they have been sent."""
    num_unscored: int = 0
    """Prompt tokens whose logprobs are not computed yet, always the last ones."""

    @classmethod
    def of(cls, seq_id: int, request: EngineRequest, due: float, *, needs_last_token: bool) -> Sequence:
        token_ids = request.prompt_ids + request.emitted_ids
        sequence = cls(seq_id, request, token_ids, len(request.prompt_ids), due, needs_last_token)
        # The engine that emitted its first token has sent the prompt's logprobs too.
        if request.params.prompt_logprobs is not None and not request.emitted_ids:
            sequence.prompt_logprobs = []
            sequence.num_unscored = sequence.num_prompt_tokens - 1
        return sequence

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Known tokens of the answer."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_begun(self) -> bool:
        """Whether it has ever been scheduled."""
        return self.num_cached is not None

    @property
    def is_over(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def has_max_tokens(self) -> bool:
        """Whether the answer, with its pending tokens, has max_tokens."""
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
        """Sort key of arrival and priority: the first goes before others."""
        return (self.due, self.seq_id)
