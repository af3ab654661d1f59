"""Drafts from a predicted answer: the tokens that follow the place in it that the answer has reached."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

_MAX_SKIPPED = 1024
"""Predicted tokens that are searched for the place where the answer meets the prediction again."""


class Prediction:
    """A predicted answer and the place in it that the answer has reached."""

    def __init__(self, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self._predicted_ids = predicted_ids
        self._num_seen = num_prompt_tokens
        """Tokens of the sequence that have been compared."""
        self._at: int | None = 0
        """Index of the predicted token that comes next; None: the answer has left the prediction."""
        self._last_at = 0
        """The same for when it left it last."""
        self._is_last_counted = True
        """Whether the last token was counted as matched, or is the prompt's."""
        self.num_matched = 0
        """Predicted tokens that the answer has."""

    def follow(self, token_ids: Sequence[int]) -> None:
        """Compare further tokens. `token_ids`: prompt and answer so far."""
        for end in range(self._num_seen, len(token_ids)):
            token_id = int(token_ids[end])
            at = self._at
            if at is not None and at < len(self._predicted_ids) and self._predicted_ids[at] == token_id:
                self._at = at + 1
                self._count(1)
                continue
            if at is not None:
                self._last_at = at
            self._meet(int(token_ids[end - 1]), token_id)
        self._num_seen = len(token_ids)

    def _count(self, num_tokens: int) -> None:
        self.num_matched += num_tokens
        self._is_last_counted = num_tokens > 0

    def drafts(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        """The predicted tokens after those of the sequence; empty where the answer has left the prediction."""
        self.follow(token_ids)
        return [] if self._at is None else list(self._predicted_ids[self._at : self._at + max_drafts])

    def _meet(self, before: int, last: int) -> None:
        """Go on after the next occurrence of the last two tokens, from where the answer left the prediction."""
        ids = self._predicted_ids
        at = max(0, self._last_at - 1)
        end = min(len(ids) - 1, at + _MAX_SKIPPED)
        with contextlib.suppress(ValueError):  # `before` does not come again
            while ids[at := ids.index(before, at, end) + 1] != last:
                pass
            self._at = at + 1
            self._count(1 if self._is_last_counted or at <= self._last_at else 2)
            return
        self._at = None
        self._count(0)
