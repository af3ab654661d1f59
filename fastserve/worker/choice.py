"""One choice of an answer: engine outputs in, typed parts out. Pure: a function of the token ids so far.

Token ids become text (detokenizer), the text ends at a stop string (stop window), and what is left becomes parts
(parser). Each of the three holds back what is not certain yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fastserve.engine.contract import RequestOutput, SamplingParams, TokenLogprob
from fastserve.openai.answers import DecodedToken
from fastserve.text.parts import ParserFactory, Part, TextParser
from fastserve.text.stop import StopStrings
from fastserve.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Written for a probability of zero, as OpenAI does: JSON has no infinity."""


@dataclass(frozen=True)
class OutputOptions:
    """What is put out for a choice, and when."""

    stops: tuple[str, ...] = ()
    """Stop strings."""
    include_stop: bool = False
    """The stop string itself is part of the answer."""
    interval: int = 1
    """Tokens between two deltas; the first token and the end make one at once."""
    logprobs: bool = False
    stop_token_logprob: bool = False
    """Among the logprobs, also that of the token that ended the answer."""
    prompt_only: bool = False
    """Nothing but what is known of the prompt (max_tokens 0): the engine's one token is dropped."""
    parser: ParserFactory = TextParser


class ChoiceDelta(msgspec.Struct):
    """The news of one choice: its next parts, and counts so far. The one with a finish_reason is the last."""

    choice: int
    parts: list[Part]
    tokens: list[DecodedToken] | None
    """The tokens that begin in the text that has passed the stop window since the last delta; None without logprobs.

    A parser may hold some of their text back, so these can come before the parts that they belong to.
    """
    finish_reason: str | None
    num_tokens: int
    """Tokens generated so far, the stop token included."""
    cached_tokens: int
    """Tokens of the prompt that were found in the prefix cache."""
    logprob_sum: float = 0.0
    """Sum over the tokens generated so far, when the engine was asked for logprobs."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """With the first delta, when the engine was asked for them."""


def decode_token(
    tokenizer: Tokenizer, entry: TokenLogprob, text_offset: int, max_top: int | None = None
) -> DecodedToken:
    """`max_top`: how many of the likeliest tokens to keep; None: all that there are."""
    data = tokenizer.token_bytes
    top = [(data(token_id), max(value, MIN_LOGPROB)) for token_id, value in entry.top[:max_top]]
    return DecodedToken(data(entry.token_id), max(entry.logprob, MIN_LOGPROB), top, text_offset)


class Choice:
    def __init__(self, index: int, tokenizer: Tokenizer, params: SamplingParams, options: OutputOptions) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._parser = options.parser()
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._options = options
        # Token by token where something depends on which token brought which text.
        self._one_by_one = bool(options.stops) or options.logprobs
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._logprob_sum = 0.0
        self._num_tokens = 0
        self._num_tokens_at_delta = 0
        self._cached_tokens = 0
        self._num_decoded_chars = 0
        """Characters that came out of the detokenizer."""
        self._num_passed_chars = 0
        """Characters that passed the stop window."""
        self._text = ""
        """Text that passed the stop window since the last delta."""
        self._tokens: list[DecodedToken] = []

    def push(self, output: RequestOutput) -> ChoiceDelta | None:
        """Take an output; return a delta when it is time for one. After one with finish_reason nothing may follow."""
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if self._options.prompt_only:
            return self._delta("length")
        ids, logprobs = output.token_ids, output.logprobs or []
        ends_by_token = output.finish_reason == "stop" and bool(ids) and ids[-1] in self._stop_token_ids
        num_text_tokens = len(ids) - ends_by_token  # a stop token counts, but is no text
        self._take_tokens(ids[:num_text_tokens] if ends_by_token else ids, logprobs[:num_text_tokens])
        if self._stops.stopped is not None:
            return self._delta("stop")
        if ends_by_token:
            self._count(1, logprobs[-1:])
        if output.finish_reason is not None:
            return self._finish(output.finish_reason, logprobs[-1:] if ends_by_token else ())
        num_new = self._num_tokens - self._num_tokens_at_delta
        return self._delta(None) if not self._num_tokens_at_delta or num_new >= self._options.interval else None

    def _finish(self, finish_reason: str, stop_token: Sequence[TokenLogprob]) -> ChoiceDelta:
        """The engine has ended the choice. `stop_token`: the logprob of the token that ended it, if one did."""
        self._take_text(self._detokenizer.finish())
        if self._options.stop_token_logprob:
            self._tokens += [decode_token(self._tokenizer, entry, self._num_decoded_chars) for entry in stop_token]
        if self._stops.stopped is not None:
            finish_reason = "stop"
        self._pass(self._stops.finish())
        return self._delta(finish_reason)

    def _take_tokens(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Take tokens that are text, up to the first stop string."""
        if not self._one_by_one:
            self._take(ids, logprobs)
            return
        for at, token_id in enumerate(ids):
            self._take((token_id,), logprobs[at : at + 1])
            if self._stops.stopped is not None:
                return

    def _take(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        self._count(len(ids), logprobs)
        if self._options.logprobs:
            self._tokens += [decode_token(self._tokenizer, entry, self._num_decoded_chars) for entry in logprobs]
        self._take_text(self._detokenizer.push(ids))

    def _count(self, num_tokens: int, logprobs: Sequence[TokenLogprob]) -> None:
        self._num_tokens += num_tokens
        for entry in logprobs:
            self._logprob_sum += max(entry.logprob, MIN_LOGPROB)

    def _take_text(self, text: str) -> None:
        self._num_decoded_chars += len(text)
        # As long as the answer must not end, a stop string in it is text like any other.
        self._pass(text if self._num_tokens < self._min_tokens else self._stops.push(text))

    def _pass(self, text: str) -> None:
        self._num_passed_chars += len(text)
        self._text += text

    def _delta(self, finish_reason: str | None) -> ChoiceDelta:
        parts = self._parser.push(self._text)
        if finish_reason is not None:
            parts += self._parser.finish()
        self._text = ""
        tokens = self._take_passed_tokens(ended=finish_reason is not None) if self._options.logprobs else None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        self._num_tokens_at_delta = self._num_tokens
        return ChoiceDelta(
            self._index,
            parts,
            tokens,
            finish_reason,
            self._num_tokens,
            self._cached_tokens,
            self._logprob_sum,
            prompt_logprobs,
        )

    def _take_passed_tokens(self, *, ended: bool) -> list[DecodedToken]:
        """A token goes out with the text that it begins in; those that a stop string cut off do not go out at all."""
        if ended and self._stops.stopped is None:
            passed = self._tokens
        else:
            passed = [token for token in self._tokens if token.text_offset < self._num_passed_chars]
        self._tokens = self._tokens[len(passed) :]
        return passed
