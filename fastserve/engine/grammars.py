"""Grammars of answers, compiled in a thread: the step loop never waits for one.

A grammar is compiled once for all requests with the same text, and stays as long as any of them has not ended. Those
that no request uses are kept up to a number of bytes of their texts, the least recently used are dropped first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fastserve.engine.contract import ThinkingBudget
from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.observability.text import printable
from fastserve.text.grammar_tokenizer import in_words

logger = logging.getLogger(__name__)

_SHOWN_CHARS = 300


@dataclass(slots=True, eq=False)
class _Grammar:
    text: str
    compiling: Future[LLMatcher]
    num_users: int = 0


class GrammarStore:
    """Called by the engine's thread alone."""

    def __init__(self, limits: LLParserLimits, max_idle_bytes: int) -> None:
        self.load: Callable[[], LLTokenizer] | None = None
        """Makes the tokenizer; it is called in the thread, when the first grammar comes. It may raise a
        FastserveError."""
        self._limits = limits
        self._max_idle_bytes = max_idle_bytes
        self._tokenizer: LLTokenizer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._grammars: OrderedDict[str, _Grammar] = OrderedDict()
        """Grammars by their text; those without users are in the order of their last use."""
        self._idle_bytes = 0

    def enter(self, text: str) -> None:
        """A request with this grammar waits: begin to compile it, if that has not been done."""
        grammar = self._grammars.get(text)
        if grammar is None:
            grammar = self._grammars[text] = _Grammar(text, self._thread.submit(self._compile, text))
        elif not grammar.num_users:
            self._idle_bytes -= len(text)
        grammar.num_users += 1

    def leave(self, text: str) -> None:
        """A request with this grammar has ended."""
        grammar = self._grammars[text]
        grammar.num_users -= 1
        if grammar.num_users:
            return
        if not grammar.compiling.done() or grammar.compiling.exception() is not None:
            grammar.compiling.cancel()
            del self._grammars[text]
            return
        self._grammars.move_to_end(text)
        self._idle_bytes += len(text)
        for idle in [item for item in self._grammars.values() if not item.num_users]:
            if self._idle_bytes <= self._max_idle_bytes:
                break
            del self._grammars[idle.text]
            self._idle_bytes -= len(idle.text)

    def is_compiled(self, text: str) -> bool:
        """Whether requests with this grammar may run, or must be refused (`problem`)."""
        return self._grammars[text].compiling.done()

    def problem(self, text: str) -> FastserveError | None:
        """Why a grammar that was compiled cannot be used."""
        error = self._grammars[text].compiling.exception()
        if error is None or isinstance(error, FastserveError):
            return error
        logger.error("a grammar could not be compiled", exc_info=error)
        return InvalidRequestError(f"The grammar cannot be compiled ({type(error).__name__}).", param="grammar")

    def start(self, text: str) -> LLMatcher:
        """A matcher at the beginning of an answer, for one user of the grammar."""
        return self._grammars[text].compiling.result().deep_copy()

    @property
    def vocab_size(self) -> int:
        """Tokens in a mask. Known once a grammar has been compiled."""
        return 0 if self._tokenizer is None else self._tokenizer.vocab_size

    @property
    def tokenizer(self) -> LLTokenizer:
        """Known once a grammar has been compiled."""
        if self._tokenizer is None:
            raise RuntimeError("no grammar has been compiled")
        return self._tokenizer

    @property
    def is_busy(self) -> bool:
        """Whether a grammar is being compiled."""
        return any(not grammar.compiling.done() for grammar in self._grammars.values() if grammar.num_users)

    def wait(self, timeout_s: float) -> None:
        """Wait until a grammar has been compiled."""
        pending = [item.compiling for item in self._grammars.values() if not item.compiling.done()]
        wait(pending, timeout_s, return_when="FIRST_COMPLETED")

    def _compile(self, text: str) -> LLMatcher:
        if self._tokenizer is None:
            if self.load is None:
                raise RuntimeError("a grammar came before the tokenizer")
            self._tokenizer = self.load()
        matcher = LLMatcher(self._tokenizer, text, limits=self._limits, log_level=0)
        if matcher.is_error():
            reason = printable(matcher.get_error().split("\n")[0], _SHOWN_CHARS)
            raise InvalidRequestError(f"The grammar of the answer cannot be compiled: {reason}", param="grammar")
        return matcher

    def close(self) -> None:
        """Compile no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Thinking:
    """Where an answer is in its reasoning. Marks are found in the bytes, since they may be cut into tokens anyhow."""

    def __init__(self, budget: ThinkingBudget, tokenizer: LLTokenizer) -> None:
        self._max_tokens = budget.max_tokens
        self._tokenizer = tokenizer
        self._begins = [mark.encode() for mark in budget.begins]
        self._ends = [mark.encode() for mark in budget.ends]
        self._end_ids = tokenizer.tokenize_str(budget.ends[0])
        self._keeps = max(map(len, self._ends))
        self._text = b""
        self._num_tokens = self._num_ended = 0
        self._phase: Literal["start", "open", "over"] = "start" if self._begins else "open"

    def extend(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if self._phase == "over":
                return
            self._text += self._tokenizer.decode_bytes([token_id])
            if self._phase == "start":
                said = self._text.lstrip()
                if any(said.startswith(mark) for mark in self._begins):
                    self._phase, self._text = "open", b""
                elif not any(mark.startswith(said) for mark in self._begins):
                    self._phase = "over"
                continue
            self._num_tokens += 1
            self._num_ended = self._num_ended + 1 if token_id == self.forced_id else 0
            if any(mark in self._text for mark in self._ends):
                self._phase = "over"
            self._text = self._text[-self._keeps :]

    @property
    def forced_id(self) -> int | None:
        """The token of the end that must come next."""
        if self._phase != "open" or self.room:
            return None
        return self._end_ids[self._num_ended % len(self._end_ids)]

    @property
    def room(self) -> int | None:
        """Tokens up to the budget; None: there is no bound now."""
        return None if self._phase == "over" else max(0, self._max_tokens - self._num_tokens)


class GrammarState:
    """The position of an answer in its grammar."""

    def __init__(self, grammars: GrammarStore, text: str, budget: ThinkingBudget | None = None) -> None:
        self._grammars = grammars
        self._text = text
        self._budget = budget
        self._thinking = self._start_thinking()
        self.num_tokens = 0
        """Tokens of the answer that it has seen."""
        self.matcher = grammars.start(text)

    def extend(self, token_ids: list[int]) -> None:
        """Go on by some tokens. If they do not fit the grammar, `problem` says so from then on."""
        self.num_tokens += len(token_ids)
        if token_ids:
            self.matcher.consume_tokens(token_ids)
            if self._thinking is not None:
                self._thinking.extend(token_ids)

    def restart(self, token_ids: list[int]) -> None:
        """Start anew with the tokens of an answer. Rollback is not used: not all grammars support it."""
        self.matcher, self.num_tokens = self._grammars.start(self._text), 0
        self._thinking = self._start_thinking()
        self.extend(token_ids)

    def _start_thinking(self) -> _Thinking | None:
        return None if self._budget is None else _Thinking(self._budget, self._grammars.tokenizer)

    @property
    def forced_id(self) -> int | None:
        """The token that must come next, because the reasoning is over its budget."""
        return None if self._thinking is None else self._thinking.forced_id

    def max_drafts(self) -> int | None:
        """Tokens that may be drafted; None: any number."""
        room = None if self._thinking is None else self._thinking.room
        return None if room is None else max(0, room - 1)

    @property
    def problem(self) -> str | None:
        """Why the answer cannot go on, or None."""
        if not self.matcher.is_error():
            return None
        reason = printable(in_words(self.matcher.get_error().split("\n")[0]), _SHOWN_CHARS)
        return f"The answer cannot go on under its grammar: {reason}."
