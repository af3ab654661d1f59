"""Incremental state over the tokens of a sequence: an update costs what changed, not the whole sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


class TokenHistory:
    """The tokens that a state reflects."""

    def __init__(self) -> None:
        self._token_ids: TokenIds = np.empty(64, dtype=np.int32)
        self._length = 0

    def follow(self, token_ids: TokenIds) -> tuple[TokenIds, TokenIds]:
        """Update to a row's tokens; return the removed tokens (rejected drafts at the end) and the added ones."""
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
    """Counts of each token in a growing sequence."""

    def __init__(self) -> None:
        self._history = TokenHistory()
        self._index_of: dict[int, int] = {}
        self._token_ids: TokenIds = np.empty(64, dtype=np.int32)
        self._counts: npt.NDArray[np.int32] = np.zeros(64, dtype=np.int32)

    def update(self, all_ids: TokenIds) -> tuple[TokenIds, npt.NDArray[np.int32]]:
        """Distinct token ids and their counts; both arrays are valid until the next call."""
        removed, added = self._history.follow(all_ids)
        for token_id in removed.tolist():
            self._counts[self._index_of[token_id]] -= 1
        if len(added) == 1:
            self._add(int(added[0]), 1)
        else:
            for token_id, count in zip(*(part.tolist() for part in np.unique(added, return_counts=True)), strict=True):
                self._add(token_id, count)
        ids, counts = self._token_ids[: len(self._index_of)], self._counts[: len(self._index_of)]
        is_there = counts > 0
        return (ids, counts) if is_there.all() else (ids[is_there], counts[is_there])

    def _add(self, token_id: int, count: int) -> None:
        index = self._index_of.setdefault(token_id, len(self._index_of))
        if index == len(self._counts):
            self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[index] = token_id
        self._counts[index] += count
