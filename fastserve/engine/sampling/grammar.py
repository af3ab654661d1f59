"""`grammar`: masks all tokens with which the answer could not go on under its grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

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
        return _State(GrammarState(self._grammars, params.grammar, params.thinking))

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        numbers: list[int] = []
        sequences: list[tuple[SamplingRow, int, list[int]]] = []
        for at, row in rows:
            if sequences and sequences[-1][0].state is row.state:
                sequences[-1][2].append(int(row.token_ids[-1]))  # a draft
            else:
                sequences.append((row, len(numbers), []))
            numbers.append(at)
        masks = np.full((len(numbers), -(-self._grammars.vocab_size // _BITS)), -1, dtype=np.int32)
        wanted = []
        for row, index, drafts in sequences:
            state: _State = row.state.processors[self]
            answer = row.token_ids[row.state.num_prompt_tokens :]
            removed, added = state.history.follow(answer)
            if len(removed):
                state.grammar.restart(answer.tolist())
            else:
                state.grammar.extend(added.tolist())
            wanted.append((state.grammar.matcher, index, drafts))
        self._fill(wanted, masks)
        for row, index, _ in sequences:
            grammar: GrammarState = row.state.processors[self].grammar
            if grammar.forced_id is not None:
                _force(masks[index], grammar.forced_id)
            problem = grammar.problem
            if problem is not None:
                row.state.failures.append(problem)
        return np.array(numbers), masks

    def _fill(self, wanted: list[tuple[LLMatcher, int, list[int]]], masks: npt.NDArray[np.int32]) -> None:
        """Fill the masks of each matcher, from its index on: one now, and one after each draft that fits."""
        if self._executor is None:
            self._executor = LLExecutor()
        # Drafts are tried on copies, because not all grammars can be rolled back.
        drafted = [(matcher.deep_copy(), index, drafts) for matcher, index, drafts in wanted if drafts]
        rows = [(matcher, index) for matcher, index, _ in wanted if not matcher.is_error()]
        place = 0
        while rows:
            fill_next_token_bitmask_par(self._executor, rows, masks)
            drafted = [
                item for item in drafted if place < len(item[2]) and item[0].try_consume_tokens([item[2][place]])
            ]
            place += 1
            rows = [(copy, index + place) for copy, index, _ in drafted]

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, masks = inputs
        is_masked = ~_unpack(masks, values.shape[1])
        if values.device.type == "cpu":
            for at, row_is_masked in zip(rows.tolist(), is_masked, strict=True):
                values[at].masked_fill_(row_is_masked, -torch.inf)
        else:
            values[rows] = values[rows].masked_fill(is_masked, -torch.inf)


def _force(mask: npt.NDArray[np.int32], token_id: int) -> None:
    """Leave one token in a mask, if it is in it: none may begin within a character."""
    word, bit = divmod(token_id, _BITS)
    kept = mask[word] & np.array(1 << bit, dtype=np.uint32).view(np.int32)
    if kept:
        mask[:] = 0
        mask[word] = kept


def _unpack(masks: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(rows, vocab_size): whether each token is allowed; those beyond the masks are not."""
    if masks.device.type == "cpu":
        words: npt.NDArray[np.int32] = masks.numpy()
        allowed = torch.from_numpy(np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").view(np.bool_))
    else:
        shifts = torch.arange(_BITS, dtype=torch.int32, device=masks.device)
        allowed = ((masks.unsqueeze(-1) >> shifts) & 1).flatten(1).bool()
    missing = vocab_size - allowed.shape[1]
    return torch.nn.functional.pad(allowed, (0, missing)) if missing > 0 else allowed[:, :vocab_size]
