"""The prompt in an answer: its text, and the log probabilities of its tokens.

The first token has no log probability, since nothing precedes it. The engine returns those of all others, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastserve.engine.contract import TokenLogprob
from fastserve.openai.answers import DecodedToken
from fastserve.text.detokenizer import REPLACEMENT_CHARACTER
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import MIN_LOGPROB, decode_token
from fastserve.worker.jobs import Prompt


class Echo:
    """The prompt at the beginning of an answer (OpenAI's `echo`)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, num_top: int) -> None:
        """`num_top`: number of top logprobs at each position."""
        self._tokenizer = tokenizer
        self._token_ids = prompt.token_ids
        self._num_top = num_top
        self._tokens: list[DecodedToken] | None = None
        self.text, self._offsets = _text_and_offsets(tokenizer, prompt)

    def tokens(self, logprobs: Sequence[TokenLogprob]) -> list[DecodedToken]:
        """The tokens of the prompt, with their offsets in `text`. Cached, since all choices share them."""
        if self._tokens is None:
            first, *offsets = self._offsets
            rest = zip(logprobs, offsets, strict=True)
            self._tokens = [
                DecodedToken(self._tokenizer.token_bytes(self._token_ids[0]), None, [], first, self._token_ids[0]),
                *(decode_token(self._tokenizer, entry, offset, self._num_top) for entry, offset in rest),
            ]
        return self._tokens

    def prepend(
        self, text: str, tokens: Sequence[DecodedToken] | None, prompt_logprobs: Sequence[TokenLogprob] | None
    ) -> tuple[str, list[DecodedToken] | None]:
        """Prepend the prompt to the text and tokens of an answer or of its first delta."""
        echoed = None if tokens is None else [*self.tokens(prompt_logprobs or ()), *self.shift(tokens)]
        return self.text + text, echoed

    def shift(self, tokens: Sequence[DecodedToken]) -> list[DecodedToken]:
        """Tokens of the answer, with their offsets moved by the length of the prompt."""
        return [replace(token, text_offset=token.text_offset + len(self.text)) for token in tokens]


def _text_and_offsets(tokenizer: Tokenizer, prompt: Prompt) -> tuple[str, list[int]]:
    """The text of a prompt, and the offset of each token in it, in characters.

    The text of a prompt sent as ids contains the names of special tokens. A prompt sent as text contains only those
    that the client wrote.
    """
    sent_text, special_ids = prompt.text, tokenizer.special_ids
    pieces: list[str] = []
    offsets: list[int] = []
    at, detokenizer = 0, tokenizer.detokenizer()
    for token_id in prompt.token_ids:
        if token_id in special_ids:
            held = detokenizer.finish()
            name = tokenizer.token_bytes(token_id).decode(errors="replace")
            offsets.append(at + len(held))
            text = held + (name if sent_text is None or sent_text.startswith(name, at + len(held)) else "")
        else:
            text = detokenizer.push([token_id])
            offsets.append(at + _broken_before(tokenizer, token_id, text))
        pieces.append(text)
        at += len(text)
    return "".join([*pieces, detokenizer.finish()]) if sent_text is None else sent_text, offsets


def _broken_before(tokenizer: Tokenizer, token_id: int, text: str) -> int:
    """Replacement characters at the start of a token's new text that stand for invalid bytes of earlier tokens."""
    if not text.startswith(REPLACEMENT_CHARACTER):
        return 0
    own = tokenizer.token_bytes(token_id).decode(errors="ignore")
    return len(text) - len(own) if own and text.endswith(own) else 0


def logprobs_by_id(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each position, the prompt's token and the `num_top` most likely ones, by id.

    `rank` is null for a token that is not among the top logprobs of the engine.
    """
    entries: list[dict[str, dict[str, Any]] | None] = [None]
    for entry in logprobs:
        likeliest = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
        own_rank = likeliest.get(entry.token_id, (0.0, None))[1]
        ranked = {entry.token_id: (entry.logprob, own_rank)} | dict(list(likeliest.items())[:num_top])
        entries.append(
            {
                str(token_id): {
                    "logprob": max(value, MIN_LOGPROB),
                    "rank": rank,
                    "decoded_token": tokenizer.token_bytes(token_id).decode(errors="replace"),
                }
                for token_id, (value, rank) in ranked.items()
            }
        )
    return entries
