"""A logits processor that the project does not have: which tokens are possible is a bit mask over the vocabulary, made
anew for each token from those before it, as a grammar's would be. Tests add it to the engine's list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling.history import TokenHistory
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow


class MaskedParams(SamplingParams, frozen=True):
    modulus: int = 3
    """The tokens of an answer, added up to any place, must not be a multiple of it."""


def is_allowed(answer: Sequence[int], modulus: int) -> bool:
    return all(sum(answer[: end + 1]) % modulus != 0 for end in range(len(answer)))


class SumOfTokens:
    """Grows and shrinks with the answer, as the state of a grammar does."""

    def __init__(self) -> None:
        self._history = TokenHistory()
        self._total = 0

    def mask(self, answer: npt.NDArray[np.int32], modulus: int, vocab_size: int) -> npt.NDArray[np.int32]:
        """(words,): a bit for each token id, the lowest bit of a word first."""
        removed, added = self._history.follow(answer)
        self._total += int(added.sum()) - int(removed.sum())
        padded = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
        padded[:vocab_size] = (self._total + np.arange(vocab_size)) % modulus != 0
        return np.packbits(padded, bitorder="little").view(np.int32)


class TokenMask(LogitsProcessor):
    def concerns(self, params: SamplingParams) -> bool:
        return isinstance(params, MaskedParams)

    def needs_last_token(self, params: SamplingParams) -> bool:
        return True

    def start(self, params: SamplingParams) -> SumOfTokens:
        return SumOfTokens()

    def step_inputs(self, rows: Iterable[tuple[int, SamplingRow]], vocab_size: int) -> Arrays | None:
        numbers, masks = [], []
        for at, row in rows:
            assert isinstance(row.params, MaskedParams)
            state: SumOfTokens = row.state.processors[self]
            numbers.append(at)
            masks.append(state.mask(row.token_ids[row.state.num_prompt_tokens :], row.params.modulus, vocab_size))
        return np.array(numbers), np.stack(masks)

    def apply(self, values: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
        rows, masks = inputs
        bits = (masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=masks.device)) & 1
        allowed = bits.flatten(1)[:, : values.shape[1]].bool()
        values[rows] = values[rows].masked_fill(~allowed, -torch.inf)
