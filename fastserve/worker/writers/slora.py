"""The answers of S-LoRA's routes: {"generated_text": [...], "count_output_tokens"}, or a stream with an event for each
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from fastserve.errors import FastserveError
from fastserve.openai.answers import SLORA_NO_TOKEN, DecodedToken, Usage, encode_json, slora_event, slora_failure
from fastserve.text.parts import plain_text
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.results import JobResult


class SLoraWriter:
    """For jobs of one choice. A stream needs their logprobs."""

    keep_alive = b":\n\n"

    def __init__(self, special_ids: AbstractSet[int], has_details: bool) -> None:
        """`has_details`: whether a whole answer lists its tokens."""
        self._special_ids = special_ids
        self._has_details = has_details
        self._num_written_chars = 0
        self._text = ""
        """Text that waits for the event of its token."""

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(slora_event(token, finished) for delta in deltas for token, finished in self._next(delta))

    def end(self, usage: Usage) -> bytes:
        return b""

    def error(self, error: FastserveError) -> bytes:
        return slora_failure(error.body()["error"])

    def whole(self, result: JobResult) -> bytes:
        choice = result.runs[0]
        text = plain_text(choice.parts)
        answer: dict[str, Any] = {"generated_text": [text], "count_output_tokens": choice.num_tokens}
        if self._has_details:
            answer["tokens"] = self._tokens(choice.tokens or [], text, 0)
        return encode_json(answer)

    def _next(self, delta: ChoiceDelta) -> list[tuple[dict[str, Any], bool]]:
        """The tokens of the next events, each with whether it is the last one."""
        self._text += plain_text(delta.parts)
        tokens = self._tokens(delta.tokens or [], self._text, self._num_written_chars)
        if tokens:
            self._num_written_chars += len(self._text)
            self._text = ""
        elif delta.finish_reason is not None:
            tokens = [SLORA_NO_TOKEN | {"text": self._text}]
        return [(token, delta.finish_reason is not None and at == len(tokens) - 1) for at, token in enumerate(tokens)]

    def _tokens(self, tokens: Sequence[DecodedToken], text: str, num_chars_before: int) -> list[dict[str, Any]]:
        """The tokens, each with its part of `text`, which begins at `num_chars_before`. Together they have all of it.

        A character of several tokens belongs to the last of them.
        """
        starts = [0, *(token.text_offset - num_chars_before for token in tokens[1:]), len(text)]
        return [
            {
                "id": token.token_id,
                "text": text[starts[at] : starts[at + 1]],
                "logprob": token.logprob,
                "special": token.token_id in self._special_ids,
            }
            for at, token in enumerate(tokens)
        ]
