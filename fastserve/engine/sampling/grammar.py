"""`grammar`: masks all tokens with which the answer could not go on under its grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.grammars import GrammarState, GrammarStore
from fastserve.engine.sampling.history import TokenHistory
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow

_BITS = 32
"""Tokens in a word of a mask, the lowest bit first."""


@dataclass(slots=True)
class _State:
    grammar: GrammarState
    history: TokenHistory = field(default_factory=TokenHistory)


class Grammar(LogitsProcessor):
    """The masks of all rows are computed in threads, without the GIL. A row whose draft breaks the grammar ends the
    masks of its sequence: the draft is rejected, and so are the rows after it."""

    def __init__(self, grammars: GrammarStore) -> None:
        self._grammars = grammars
        self._executor: LLExecutor | None = None

    def concerns(self, params: SamplingParams) -> bool:
        return bool(params.grammar)

    def needs_last_token(self, params: SamplingParams) -> bool:
        return True

    def start(self, params: SamplingParams) -> _State:
        return _State(GrammarState(self._grammars.start(params.grammar)))

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        numbers: list[int] = []
        sequences: list[tuple[SamplingRow, int, list[int]]] = []
        for at, row in rows:
            if sequences and sequences[-1][0].state is row.state:
                sequences[-1][2].append(int(row.token_ids[-1]))  # a draft
            else:
                sequences.append((row, len(numbers), []))
            numbers.append(at)
        masks = np.full((len(numbers), -(-vocab_size // _BITS)), -1, dtype=np.int32)
        plain: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        for row, index, drafts in sequences:
            state: _State = row.state.processors[self]
            removed, added = state.history.follow(row.token_ids[row.state.num_prompt_tokens :])
            problem = state.grammar.follow(len(removed), added.tolist())
            matcher = state.grammar.matcher
            if problem is None and drafts:
                drafted.append((matcher, index, drafts))
            elif problem is None:
                plain.append((matcher, index))
            else:
                row.state.failures.append(f"The answer cannot go on under its grammar: {problem}.")
        if self._executor is None:
            self._executor = LLExecutor()
        if plain:
            fill_next_token_bitmask_par(self._executor, plain, masks)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, masks)
        for row, _, _ in sequences:
            matcher = row.state.processors[self].grammar.matcher
            if not row.state.failures and matcher.is_error():
                reason = matcher.get_error().split("\n")[0]
                row.state.failures.append(f"The answer cannot go on under its grammar: {reason}")
        return np.array(numbers), masks

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, masks = inputs
        is_masked = ~_unpack(masks, values.shape[1])
        if values.device.type == "cpu":
            for at, row_is_masked in zip(rows.tolist(), is_masked, strict=True):
                values[at].masked_fill_(row_is_masked, -torch.inf)
        else:
            values[rows] = values[rows].masked_fill(is_masked, -torch.inf)


def _unpack(masks: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(rows, vocab_size): whether each token is allowed."""
    if masks.device.type == "cpu":
        words: npt.NDArray[np.int32] = masks.numpy()
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    shifts = torch.arange(_BITS, dtype=torch.int32, device=masks.device)
    return ((masks.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :vocab_size].bool()
