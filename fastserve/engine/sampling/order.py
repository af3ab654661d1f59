"""All logits processors in the order in which they are applied, which affects the result.

Those of `Stage.LOGITS` come first: temperature and sorting are applied between the stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.engine.contract import SamplingParams
from fastserve.engine.sampling.allowed_tokens import AllowedTokens
from fastserve.engine.sampling.bad_words import BadWords
from fastserve.engine.sampling.logit_bias import LogitBias
from fastserve.engine.sampling.min_p import MinP
from fastserve.engine.sampling.min_tokens import MinTokens
from fastserve.engine.sampling.output_penalties import OutputPenalties
from fastserve.engine.sampling.processor import LogitsProcessor
from fastserve.engine.sampling.repetition_penalty import RepetitionPenalty
from fastserve.engine.sampling.top_k import TopK
from fastserve.engine.sampling.top_p import TopP
from fastserve.engine.sampling.typical_p import TypicalP

LOGITS_PROCESSORS: tuple[LogitsProcessor, ...] = (
    LogitBias(),
    AllowedTokens(),
    BadWords(),
    MinTokens(),
    RepetitionPenalty(),
    OutputPenalties(),
    TopK(),
    TopP(),
    MinP(),
    TypicalP(),
)


def needs_last_token(processors: Sequence[LogitsProcessor], params: SamplingParams) -> bool:
    """Whether the next token of a request can be sampled only once the host knows the one before."""
    return any(processor.concerns(params) and processor.needs_last_token(params) for processor in processors)
