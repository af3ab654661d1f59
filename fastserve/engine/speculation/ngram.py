"""Drafts by prompt lookup: what followed when the last tokens stood in the prompt or the answer before (Saxena, 2023).

Positions are chained by the pair of tokens that ends there, as compressors of the LZ77 family find their matches: one
dictionary from a pair to its latest position, and from each position the one before it. So a new token costs one entry,
and a look-up visits a few places, of which the one with the longest common past wins. Rejected: a dictionary for each
length of n-gram, which costs as many times the memory and finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence

_MOST_VISITS = 8
_LONGEST_MATCH = 16
"""Tokens compared at each place; a longer match is no better."""
_MOST_INDEXED = 1024
"""Tokens taken in at one call: a long prompt is indexed over several steps, so none of them waits for it."""


class PairIndex:
    """Of one sequence."""

    __slots__ = ("_before", "_latest")

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}
        """pair -> the latest position at which it ends"""
        self._before: list[int] = [-1]
        """position -> the latest one before it at which the same pair ends, or -1; as far as indexed"""

    def take_in(self, token_ids: Sequence[int]) -> None:
        """Index more of the tokens. The last one is left out: where it stands is where we look from."""
        latest, before = self._latest, self._before
        begin = len(before)
        end = min(len(token_ids) - 1, begin + _MOST_INDEXED)
        for position, (left, right) in enumerate(
            zip(token_ids[begin - 1 : end - 1], token_ids[begin:end], strict=True), begin
        ):
            pair = left << 32 | right
            before.append(latest.get(pair, -1))
            latest[pair] = position

    def longest_match(self, token_ids: Sequence[int]) -> int:
        """The earlier position whose past agrees longest with the sequence's end, the latest among equals; -1: none."""
        last = len(token_ids) - 1
        found, longest = -1, 0
        place = self._latest.get(token_ids[last - 1] << 32 | token_ids[last], -1)
        for _ in range(_MOST_VISITS):
            if place < 0:
                break
            length = _common_past(token_ids, place, last)
            if length > longest:
                found, longest = place, length
            if length == _LONGEST_MATCH:
                break
            place = self._before[place]
        return found


def _common_past(token_ids: Sequence[int], place: int, last: int) -> int:
    length = 2
    while length < _LONGEST_MATCH and place >= length and token_ids[place - length] == token_ids[last - length]:
        length += 1
    return length


class NgramProposer:
    """A `Proposer` (see speculator.py). An index is made for a sequence when drafts are first asked for."""

    def __init__(self) -> None:
        self._indices: dict[int, PairIndex] = {}

    def propose(self, seq_id: int, token_ids: Sequence[int], most: int) -> list[int]:
        if len(token_ids) < 3:
            return []
        index = self._indices.get(seq_id)
        if index is None:
            index = self._indices[seq_id] = PairIndex()
        index.take_in(token_ids)
        place = index.longest_match(token_ids)
        if place < 0:
            return []
        drafts = list(token_ids[place + 1 : place + 1 + most])
        # The match may reach up to the end: then the text repeats itself, and so do the drafts.
        period = len(drafts)
        while len(drafts) < most:
            drafts.append(drafts[-period])
        return drafts

    def forget(self, seq_id: int) -> None:
        self._indices.pop(seq_id, None)
