"""One choice of an answer: engine outputs in, deltas of text out. Pure: a function of the ids so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.engine.contract import RequestOutput, SamplingParams, TokenLogprob
from fastserve.openai.answers import TokenText
from fastserve.text.stop import StopStrings
from fastserve.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Written for a probability of zero, as OpenAI does: JSON has no infinity."""


@dataclass(frozen=True)
class Telling:
    """What is told of a choice, and when."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    interval: int = 1
    """Tokens between two deltas; the first token and the end are told at once."""
    logprobs: bool = False
    stop_token: bool = False
    """Among the logprobs, also that of the token that ended the answer."""
    answer: bool = True
    """False: nothing but what is known of the prompt (max_tokens 0). The engine's one token is kept back."""


@dataclass(slots=True)
class Delta:
    """What is new in one choice. The one with a finish_reason is the last."""

    choice: int
    text: str
    tokens: list[TokenText] | None
    """The tokens that begin in this text, when logprobs were asked for."""
    finish_reason: str | None
    num_tokens: int
    """Tokens generated so far, the stop token included."""
    cached_tokens: int
    logprob_sum: float = 0.0
    """Of the tokens generated so far, when the engine was asked for logprobs."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """With the first delta, when the engine was asked for them."""


def tell_token(tokenizer: Tokenizer, entry: TokenLogprob, text_offset: int, most: int | None = None) -> TokenText:
    """`most`: how many of the likeliest tokens to tell; None: all that there are."""
    data = tokenizer.token_bytes
    top = [(data(token_id), max(value, LEAST_LOGPROB)) for token_id, value in entry.top[:most]]
    return TokenText(data(entry.token_id), max(entry.logprob, LEAST_LOGPROB), top, text_offset)


class Choice:
    def __init__(self, index: int, tokenizer: Tokenizer, params: SamplingParams, telling: Telling) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(telling.stops, include=telling.include_stop)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._telling = telling
        # Token by token where something depends on which token brought which text.
        self._one_by_one = bool(telling.stops) or telling.logprobs
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._logprob_sum = 0.0
        self._num_tokens = 0
        self._num_told = 0
        self._cached_tokens = 0
        self._written = 0  # characters that came out of the detokenizer
        self._passed = 0  # characters that passed the stop window
        self._text = ""
        self._tokens: list[TokenText] = []

    def push(self, output: RequestOutput) -> Delta | None:
        """Take an output; return a delta when it is time for one. After one with finish_reason nothing may follow."""
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if not self._telling.answer:
            return self._delta("length")
        ids, logprobs = output.token_ids, output.logprobs or []
        stopped_by_token = output.finish_reason == "stop" and bool(ids) and ids[-1] in self._stop_token_ids
        told = ids[:-1] if stopped_by_token else ids
        if self._one_by_one:
            for at, token_id in enumerate(told):
                self._take([token_id], logprobs[at : at + 1])
                if self._stops.stopped is not None:
                    return self._delta("stop")
        else:
            self._take(told, logprobs[: len(told)])
        if stopped_by_token:
            self._count(1, logprobs[-1:])
        if output.finish_reason is not None:
            self._pass(self._detokenizer.finish())
            if stopped_by_token and self._telling.stop_token:
                self._tokens += [tell_token(self._tokenizer, entry, self._written) for entry in logprobs[-1:]]
            finish_reason = "stop" if self._stops.stopped is not None else output.finish_reason
            self._let_through(self._stops.finish())
            return self._delta(finish_reason)
        if self._num_told == 0 or self._num_tokens - self._num_told >= self._telling.interval:
            return self._delta(None)
        return None

    def _take(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        self._count(len(ids), logprobs)
        if self._telling.logprobs:
            self._tokens += [tell_token(self._tokenizer, entry, self._written) for entry in logprobs]
        self._pass(self._detokenizer.push(ids))

    def _count(self, num_tokens: int, logprobs: Sequence[TokenLogprob]) -> None:
        self._num_tokens += num_tokens
        for entry in logprobs:
            self._logprob_sum += max(entry.logprob, LEAST_LOGPROB)

    def _pass(self, text: str) -> None:
        self._written += len(text)
        # As long as the answer must not end, a stop string in it is text like any other.
        self._let_through(text if self._num_tokens < self._min_tokens else self._stops.push(text))

    def _let_through(self, text: str) -> None:
        self._passed += len(text)
        self._text += text

    def _delta(self, finish_reason: str | None) -> Delta:
        text, self._text = self._text, ""
        tokens = self._leaving_tokens(ended=finish_reason is not None) if self._telling.logprobs else None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        self._num_told = self._num_tokens
        return Delta(
            self._index,
            text,
            tokens,
            finish_reason,
            self._num_tokens,
            self._cached_tokens,
            self._logprob_sum,
            prompt_logprobs,
        )

    def _leaving_tokens(self, *, ended: bool) -> list[TokenText]:
        """A token leaves with the text that it begins in; what a stop string cut off does not leave at all."""
        if ended and self._stops.stopped is None:
            leaving = self._tokens
        else:
            leaving = [token for token in self._tokens if token.text_offset < self._passed]
        self._tokens = self._tokens[len(leaving) :]
        return leaving
