"""What is told of a prompt: its text, and the log probabilities of its tokens.

The first token has none, since nothing comes before it; the engine gives those of the others, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastserve.engine.contract import TokenLogprob
from fastserve.openai.answers import TokenText
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import LEAST_LOGPROB, Delta, tell_token
from fastserve.worker.jobs import Prompt
from fastserve.worker.service import ChoiceAnswer


class Echo:
    """The prompt as the beginning of an answer (OpenAI's `echo`)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, num_top: int) -> None:
        """`num_top`: how many of the likeliest tokens are told at each place."""
        self.text = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        self._tokenizer = tokenizer
        self._token_ids = prompt.token_ids
        self._num_top = num_top
        self._tokens: list[TokenText] | None = None

    def tokens(self, logprobs: Sequence[TokenLogprob]) -> list[TokenText]:
        """Every token of the prompt, at its place in `text`. Made once: all choices of a prompt have the same."""
        if self._tokens is None:
            first, *offsets = self._offsets()
            rest = zip(logprobs, offsets, strict=True)
            self._tokens = [
                TokenText(self._tokenizer.token_bytes(self._token_ids[0]), None, [], first),
                *(tell_token(self._tokenizer, entry, offset, self._num_top) for entry, offset in rest),
            ]
        return self._tokens

    def shift(self, tokens: Sequence[TokenText]) -> list[TokenText]:
        """Tokens of the answer, at their place behind the prompt."""
        return [replace(token, text_offset=token.text_offset + len(self.text)) for token in tokens]

    def _offsets(self) -> list[int]:
        offsets, at, detokenizer = [], 0, self._tokenizer.detokenizer()
        for token_id in self._token_ids:
            offsets.append(at)
            text = detokenizer.push([token_id])
            if not text:
                # A special token stands in the text only if the client wrote it there.
                name = self._tokenizer.token_bytes(token_id).decode(errors="ignore")
                text = name if self.text.startswith(name, at) else ""
            at += len(text)
        return offsets


def with_echo(echo: Echo | None, told: ChoiceAnswer | Delta) -> tuple[str, list[TokenText] | None]:
    """Text and tokens of an answer, or of its first delta, with the prompt before them where it is to be echoed."""
    if echo is None:
        return told.text, told.tokens
    tokens = None if told.tokens is None else [*echo.tokens(told.prompt_logprobs or []), *echo.shift(told.tokens)]
    return echo.text + told.text, tokens


def logprobs_by_id(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: at each place of the prompt, by id, its own token and the `num_top` likeliest.

    `rank` is null where it is not known: the engine tells the order of the likeliest only.
    """
    told: list[dict[str, dict[str, Any]] | None] = [None]
    for entry in logprobs:
        likeliest = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
        own_rank = likeliest.get(entry.token_id, (0.0, None))[1]
        ranked = {entry.token_id: (entry.logprob, own_rank)} | dict(list(likeliest.items())[:num_top])
        told.append(
            {
                str(token_id): {
                    "logprob": max(value, LEAST_LOGPROB),
                    "rank": rank,
                    "decoded_token": tokenizer.token_bytes(token_id).decode(errors="replace"),
                }
                for token_id, (value, rank) in ranked.items()
            }
        )
    return told
