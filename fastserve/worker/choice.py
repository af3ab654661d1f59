"""One choice of an answer: from engine outputs to typed parts. Pure: a function of the token ids so far.

Three stages: the detokenizer turns token ids into text, the stop window cuts it at a stop string, and the parser splits
it into parts. Each stage holds back what it cannot decide yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fastserve.engine.contract import RequestOutput, SamplingParams, TokenLogprob
from fastserve.openai.answers import DecodedToken
from fastserve.text.parts import ParserFactory, Part, TextParser, joined
from fastserve.text.stop import StopStrings
from fastserve.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for log 0, as in OpenAI's API: JSON has no infinity."""


@dataclass(frozen=True)
class OutputOptions:
    """Content and granularity of a choice's deltas."""

    stops: tuple[str, ...] = ()
    """Stop strings."""
    skip_special_tokens: bool = True
    """Whether special tokens have no text in the answer."""
    continues_prompt: bool = False
    """Whether the answer is the continuation of the prompt's text; else it is a text of its own (a chat's message)."""
    include_stop: bool = False
    """Whether the answer contains the stop string."""
    interval: int = 1
    """Tokens between two deltas. The first token and the end are sent at once."""
    logprobs: bool = False
    token_ids: bool = False
    """Whether deltas have the ids of their tokens."""
    stop_token_logprob: bool = False
    """Whether the logprobs include the stop token."""
    prompt_only: bool = False
    """Return only the prompt (max_tokens=0) and drop the one token that the engine generates."""
    parser: ParserFactory = TextParser
    mark_ids: frozenset[int] = frozenset()
    """Special tokens whose names the parser needs as text."""
    calls_finish_reason: str = "tool_calls"
    """In place of "stop", of an answer with calls."""


class ChoiceDelta(msgspec.Struct):
    """Increment of one choice: its next parts, and its counts so far. The last one has a finish_reason."""

    choice: int
    parts: list[Part]
    tokens: list[DecodedToken] | None
    """Tokens that begin in the text that left the stop window since the last delta; None without logprobs.

    They may precede the parts with their text, which the parser may hold back.
    """
    finish_reason: str | None
    num_tokens: int
    """Tokens generated so far, including the stop token."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    logprob_sum: float = 0.0
    """Sum of the logprobs of the tokens generated so far; 0 if logprobs were not requested from the engine."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """In the first delta, if requested from the engine."""
    stop_string: str | None = None
    """In the last delta, the stop string that ended the answer, if one did."""
    token_ids: list[int] | None = None
    """Tokens generated since the last delta, including the stop token, if requested."""
    reasoning_tokens: int = 0
    """Those of num_tokens that are reasoning."""
    weight_versions: Sequence[str] = ()
    """In the last delta, of an answer that several versions of the weights computed."""


def decode_token(
    tokenizer: Tokenizer, entry: TokenLogprob, text_offset: int, max_top: int | None = None
) -> DecodedToken:
    """Decode a token and its alternatives. `max_top`: maximum number of alternatives; None: all."""
    data = tokenizer.token_bytes
    top = [(token_id, data(token_id), max(value, MIN_LOGPROB)) for token_id, value in entry.top[:max_top]]
    return DecodedToken(data(entry.token_id), max(entry.logprob, MIN_LOGPROB), top, text_offset, entry.token_id)


class Choice:
    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        options: OutputOptions,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        context = prompt_ids if options.continues_prompt else ()
        self._detokenizer = tokenizer.detokenizer(context, skip_special_tokens=options.skip_special_tokens)
        self._hidden_ids = tokenizer.special_ids - options.mark_ids if options.skip_special_tokens else frozenset()
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._parser = options.parser(index)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._options = options
        # Stop strings, logprobs and the count of reasoning depend on which token each character comes from.
        self._one_by_one = bool(options.stops) or options.logprobs or options.parser is not TextParser
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._weight_versions: Sequence[str] = ()
        self._logprob_sum = 0.0
        self._num_tokens = 0
        self._num_tokens_at_delta = 0
        self._token_ids: list[int] = []
        self._cached_tokens = 0
        self._num_decoded_chars = 0
        """Characters that left the detokenizer."""
        self._num_passed_chars = 0
        """Characters that left the stop window."""
        self._parts: list[Part] = []
        """Those since the last delta."""
        self._reasoning_tokens = 0
        self._tokens: list[DecodedToken] = []

    def push(self, output: RequestOutput) -> ChoiceDelta | None:
        """Process an output and return a delta if one is due. No output may follow one with a finish_reason."""
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        self._weight_versions = output.weight_versions or self._weight_versions
        if self._options.prompt_only:
            return self._delta("length")
        ids, logprobs = output.token_ids, output.logprobs or []
        ends_by_token = output.finish_reason == "stop" and bool(ids) and ids[-1] in self._stop_token_ids
        num_text_tokens = len(ids) - ends_by_token  # a stop token is counted but has no text
        self._take_tokens(ids[:num_text_tokens] if ends_by_token else ids, logprobs[:num_text_tokens])
        if self._stops.stopped is not None or self._parser.is_complete:
            return self._delta("stop")
        if ends_by_token:
            self._count(ids[-1:], logprobs[-1:])
        if output.finish_reason is not None:
            return self._finish(output.finish_reason, ids[-1:] if ends_by_token else (), logprobs[-1:])
        num_new = self._num_tokens - self._num_tokens_at_delta
        return self._delta(None) if not self._num_tokens_at_delta or num_new >= self._options.interval else None

    def _finish(self, finish_reason: str, stop_token: Sequence[int], logprobs: Sequence[TokenLogprob]) -> ChoiceDelta:
        """Flush the text held back, after the engine's last output. `stop_token`: the stop token, if there is one;
        `logprobs`: that of the last token.
        """
        self._take_text(self._detokenizer.finish())
        if stop_token and self._options.stop_token_logprob:
            self._tokens += [decode_token(self._tokenizer, entry, self._num_decoded_chars) for entry in logprobs]
        for token_id in stop_token:
            self._take_hidden(token_id)
        if self._stops.stopped is not None:
            finish_reason = "stop"
        self._pass(self._stops.finish())
        return self._delta(finish_reason)

    def _take_tokens(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Process tokens that have text, up to the first stop string."""
        if not self._one_by_one:
            self._take(ids, logprobs)
            return
        for at, token_id in enumerate(ids):
            self._take((token_id,), logprobs[at : at + 1])
            self._reasoning_tokens += self._parser.is_reasoning
            if self._stops.stopped is not None or self._parser.is_complete:
                return

    def _take(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        self._count(ids, logprobs)
        if self._options.logprobs:
            self._tokens += [decode_token(self._tokenizer, entry, self._num_decoded_chars) for entry in logprobs]
        if self._options.mark_ids and ids[0] in self._options.mark_ids:  # with marks, ids is one token
            name = self._tokenizer.token_bytes(ids[0]).decode(errors="replace")
            self._take_text(self._detokenizer.finish() + name)
        else:
            self._take_text(self._detokenizer.push(ids))
        if self._options.stops and ids[0] in self._hidden_ids:  # with stop strings, ids is one token
            self._take_hidden(ids[0])

    def _count(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        self._num_tokens += len(ids)
        if self._options.token_ids:
            self._token_ids += ids
        for entry in logprobs:
            self._logprob_sum += max(entry.logprob, MIN_LOGPROB)

    def _take_text(self, text: str) -> None:
        self._num_decoded_chars += len(text)
        self._pass(self._stops.push(text, may_stop=self._may_stop))

    def _take_hidden(self, token_id: int) -> None:
        """Process a token that has no text in the answer, but may be part of a stop string."""
        name = self._tokenizer.token_bytes(token_id).decode(errors="replace")
        self._pass(self._stops.push(name, hidden=True, may_stop=self._may_stop))

    @property
    def _may_stop(self) -> bool:
        """Whether a stop string that ends in the last token counts. It may begin before min_tokens."""
        return self._num_tokens >= self._min_tokens

    def _pass(self, text: str) -> None:
        self._num_passed_chars += len(text)
        self._parts += self._parser.push(text)

    def _delta(self, finish_reason: str | None) -> ChoiceDelta:
        parts, self._parts = self._parts, []
        if finish_reason is not None:
            parts += self._parser.finish(cut_off=finish_reason == "length" or self._stops.stopped is not None)
            if finish_reason == "stop" and self._parser.has_calls:
                finish_reason = self._options.calls_finish_reason
        tokens = self._take_passed_tokens(ended=finish_reason is not None) if self._options.logprobs else None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        self._num_tokens_at_delta = self._num_tokens
        token_ids, self._token_ids = self._token_ids, []
        return ChoiceDelta(
            self._index,
            joined(parts),
            tokens,
            finish_reason,
            self._num_tokens,
            self._cached_tokens,
            self._logprob_sum,
            prompt_logprobs,
            self._stops.stopped,
            token_ids if self._options.token_ids else None,
            self._reasoning_tokens,
            () if finish_reason is None or len(self._weight_versions) == 1 else self._weight_versions,
        )

    def _take_passed_tokens(self, *, ended: bool) -> list[DecodedToken]:
        """The tokens that begin in the text that left the stop window; tokens cut off by a stop string are dropped."""
        if ended and self._stops.stopped is None:
            passed = self._tokens
        else:
            passed = [token for token in self._tokens if token.text_offset < self._num_passed_chars]
        self._tokens = self._tokens[len(passed) :]
        return passed
