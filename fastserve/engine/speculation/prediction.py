"""Drafts from a predicted answer: the tokens that follow the place in it that the answer has reached."""

from __future__ import annotations

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
        self.num_matched = 0
        """Predicted tokens that the answer has."""

    def follow(self, token_ids: Sequence[int]) -> None:
        """Compare further tokens. `token_ids`: prompt and answer so far."""
        for end in range(self._num_seen, len(token_ids)):
            token_id = int(token_ids[end])
            if (
                self._at is not None
                and self._at < len(self._predicted_ids)
                and self._predicted_ids[self._at] == token_id
            ):
                self._at += 1
                self.num_matched += 1
                continue
            if self._at is not None:
                self._last_at, self._at = self._at, None
            self._at = self._meet(token_ids[end - 1], token_id)
        self._num_seen = len(token_ids)

    def drafts(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        """The predicted tokens after those of the sequence; empty where the answer has left the prediction."""
        self.follow(token_ids)
        return [] if self._at is None else list(self._predicted_ids[self._at : self._at + max_drafts])

    def _meet(self, before: int, last: int) -> int | None:
        """The place after the next occurrence of the last two tokens, from where the answer left the prediction."""
        ids = self._predicted_ids
        begin = max(0, self._last_at - 1)
        for at in range(begin, min(len(ids) - 1, begin + _MAX_SKIPPED)):
            if ids[at] == before and ids[at + 1] == last:
                self.num_matched += 2 if at >= self._last_at else 1
                return at + 2
        return None
