"""One choice of an answer: engine outputs in, deltas of text out. Pure: a function of the ids so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.engine.contract import RequestOutput, SamplingParams, TokenLogprob
from fastserve.openai.answers import TokenText
from fastserve.text.stop import StopStrings
from fastserve.text.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0
"""Written for a probability of zero, as OpenAI does: JSON has no infinity."""


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


class Choice:
    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        stops: Sequence[str],
        *,
        include_stop: bool,
        interval: int,
    ) -> None:
        """`interval`: tokens between two deltas; the first token and the end are given at once."""
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(stops, include=include_stop)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._interval = interval
        self._logprobs = params.logprobs is not None
        # Token by token where something depends on which token brought which text.
        self._one_by_one = bool(stops) or self._logprobs
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
        ids = output.token_ids
        stopped_by_token = output.finish_reason == "stop" and bool(ids) and ids[-1] in self._stop_token_ids
        told = ids[:-1] if stopped_by_token else ids
        if self._one_by_one:
            for at, token_id in enumerate(told):
                self._take([token_id], output.logprobs[at] if self._logprobs and output.logprobs else None)
                if self._stops.stopped is not None:
                    return self._delta("stop")
        else:
            self._take(told, None)
        self._num_tokens += stopped_by_token
        if output.finish_reason is not None:
            self._pass(self._detokenizer.finish())
            finish_reason = "stop" if self._stops.stopped is not None else output.finish_reason
            self._let_through(self._stops.finish())
            return self._delta(finish_reason)
        if self._num_told == 0 or self._num_tokens - self._num_told >= self._interval:
            return self._delta(None)
        return None

    def _take(self, ids: Sequence[int], logprob: TokenLogprob | None) -> None:
        self._num_tokens += len(ids)
        if logprob is not None:
            self._tokens.append(self._token_text(logprob))
        self._pass(self._detokenizer.push(ids))

    def _pass(self, text: str) -> None:
        self._written += len(text)
        # As long as the answer must not end, a stop string in it is text like any other.
        self._let_through(text if self._num_tokens < self._min_tokens else self._stops.push(text))

    def _let_through(self, text: str) -> None:
        self._passed += len(text)
        self._text += text

    def _token_text(self, logprob: TokenLogprob) -> TokenText:
        data = self._tokenizer.token_bytes
        top = [(data(token_id), max(value, _LEAST_LOGPROB)) for token_id, value in logprob.top]
        return TokenText(data(logprob.token_id), max(logprob.logprob, _LEAST_LOGPROB), top, self._written)

    def _delta(self, finish_reason: str | None) -> Delta:
        text, self._text = self._text, ""
        tokens = self._leaving_tokens(ended=finish_reason is not None) if self._logprobs else None
        self._num_told = self._num_tokens
        return Delta(self._index, text, tokens, finish_reason, self._num_tokens, self._cached_tokens)

    def _leaving_tokens(self, *, ended: bool) -> list[TokenText]:
        """A token leaves with the text that it begins in; what a stop string cut off does not leave at all."""
        if ended and self._stops.stopped is None:
            leaving = self._tokens
        else:
            leaving = [token for token in self._tokens if token.text_offset < self._passed]
        self._tokens = self._tokens[len(leaving) :]
        return leaving
