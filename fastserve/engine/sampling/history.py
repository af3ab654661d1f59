"""Following the tokens of a sequence from row to row, so that a state costs what changed and not what is there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


class TokenHistory:
    """The tokens that a state has taken in."""

    def __init__(self) -> None:
        self._token_ids: TokenIds = np.empty(64, dtype=np.int32)
        self._length = 0

    def follow(self, token_ids: TokenIds) -> tuple[TokenIds, TokenIds]:
        """Take in what a row has; return the tokens to take back (the last ones, of wrong drafts) and those to add."""
        common = min(self._length, len(token_ids))
        differs = self._token_ids[:common] != token_ids[:common]
        if differs.any():
            common = int(differs.argmax())
        removed, added = self._token_ids[common : self._length].copy(), token_ids[common:]
        if len(token_ids) > len(self._token_ids):
            self._token_ids = np.concatenate([token_ids, np.empty(len(token_ids), dtype=np.int32)])
        self._token_ids[common : len(token_ids)] = added
        self._length = len(token_ids)
        return removed, added


class TokenCounts:
    """How often each token occurs in a growing sequence."""

    def __init__(self) -> None:
        self._history = TokenHistory()
        self._places: dict[int, int] = {}
        self._token_ids: TokenIds = np.empty(64, dtype=np.int32)
        self._counts: npt.NDArray[np.int32] = np.zeros(64, dtype=np.int32)

    def update(self, all_ids: TokenIds) -> tuple[TokenIds, npt.NDArray[np.int32]]:
        """The different ones among the tokens, and how often each is there, which holds until the next call."""
        removed, added = self._history.follow(all_ids)
        for token_id in removed.tolist():
            self._counts[self._places[token_id]] -= 1
        if len(added) == 1:
            self._add(int(added[0]), 1)
        else:
            for token_id, count in zip(*(part.tolist() for part in np.unique(added, return_counts=True)), strict=True):
                self._add(token_id, count)
        ids, counts = self._token_ids[: len(self._places)], self._counts[: len(self._places)]
        is_there = counts > 0
        return (ids, counts) if is_there.all() else (ids[is_there], counts[is_there])

    def _add(self, token_id: int, count: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._counts):
            self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[place] = token_id
        self._counts[place] += count
