"""Drafts by prompt lookup: the tokens that followed an earlier occurrence of the last tokens (Saxena, 2023).

Positions are chained by the pair of tokens that ends there, as in LZ77 compressors: a dictionary from a pair to its
latest position, and for each position the previous one with the same pair. So a new token costs one entry, and a lookup
visits a few positions, of which the one with the longest match is used. Rejected: a dictionary for each length of
n-gram, which takes as many times the memory and finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.engine.speculation.prediction import Prediction

_MAX_VISITS = 8
_MAX_MATCH = 16
"""Tokens compared at each position; a longer match is no better."""
_MAX_INDEXED = 1024
"""Tokens indexed in one call: a long prompt is indexed over several steps, to delay none of them."""


class PairIndex:
    """Index of the token pairs of one sequence."""

    __slots__ = ("_before", "_latest")

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}
        """pair -> the latest position at which it ends"""
        self._before: list[int] = [-1]
        """position -> the latest one before it at which the same pair ends, or -1; as far as indexed"""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Index further tokens, without the last one: matches are searched for it."""
        latest, before = self._latest, self._before
        begin = len(before)
        end = min(len(token_ids) - 1, begin + _MAX_INDEXED)
        for position, (left, right) in enumerate(
            zip(token_ids[begin - 1 : end - 1], token_ids[begin:end], strict=True), begin
        ):
            pair = left << 32 | right
            before.append(latest.get(pair, -1))
            latest[pair] = position

    def longest_match(self, token_ids: Sequence[int]) -> int:
        """The earlier position with the longest match of the sequence's end, the latest among equals; -1: none."""
        last = len(token_ids) - 1
        found, longest = -1, 0
        position = self._latest.get(token_ids[last - 1] << 32 | token_ids[last], -1)
        for _ in range(_MAX_VISITS):
            if position < 0:
                break
            length = _common_past(token_ids, position, last)
            if length > longest:
                found, longest = position, length
            if length == _MAX_MATCH:
                break
            position = self._before[position]
        return found


def _common_past(token_ids: Sequence[int], position: int, last: int) -> int:
    length = 2
    while length < _MAX_MATCH and position >= length and token_ids[position - length] == token_ids[last - length]:
        length += 1
    return length


class NgramProposer:
    """A `Proposer` (see speculator.py). A sequence is indexed from its first request for drafts on."""

    def __init__(self) -> None:
        self._indices: dict[int, PairIndex] = {}
        self._predictions: dict[int, Prediction] = {}

    def expect(self, seq_id: int, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self._predictions[seq_id] = Prediction(predicted_ids, num_prompt_tokens)

    def propose(self, seq_id: int, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        prediction = self._predictions.get(seq_id)
        if prediction is not None and (drafts := prediction.drafts(token_ids, max_drafts)):
            return drafts
        if len(token_ids) < 3:
            return []
        index = self._indices.get(seq_id)
        if index is None:
            index = self._indices[seq_id] = PairIndex()
        index.extend(token_ids)
        position = index.longest_match(token_ids)
        if position < 0:
            return []
        drafts = list(token_ids[position + 1 : position + 1 + max_drafts])
        # If they reach the end of the sequence, the text repeats itself, and so do the drafts.
        period = len(drafts)
        while len(drafts) < max_drafts:
            drafts.append(drafts[-period])
        return drafts

    def forget(self, seq_id: int) -> None:
        self._indices.pop(seq_id, None)
        self._predictions.pop(seq_id, None)
