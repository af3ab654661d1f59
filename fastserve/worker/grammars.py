"""From the format that a request asks for to the grammar of its answer, which is compiled once to see that it can be.

Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.observability.text import printable
from fastserve.openai.body import join, shown
from fastserve.openai.structured import AnswerFormat
from fastserve.openai.tools import FunctionTool
from fastserve.text import grammar
from fastserve.text.grammar_tokenizer import in_words, parser_limits, require_grammars, small_grammar_tokenizer
from fastserve.text.json_schema import DATA_KEYWORDS, MAP_KEYWORDS
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.prompt_pool import INLINE_BYTES

_REASON_CHARS = 300
_MAX_FIRST_TOKENS = 4
"""First tokens of an answer that are tried, as long as there is no choice."""
_MAX_LOCATING = 64
"""Parts of a schema that are compiled to find the one with the error."""
_FIELDS = (
    *(b'format"', b'"structured_outputs"', b'"guided_', b'"grammar"', b'"json_schema"', b'"regex"', b'"ebnf"'),
    *(b'"tool_choice"', b'"function_call"', b'"strict"', b'"thinking_token_budget"', b'"budget_tokens"'),
    b"\\u00",  # may hide any of them
)
"""Parts of a body that asks for a grammar."""


def preparing_bytes(body: bytes) -> int:
    """Size of a body for the prompt pool: one that asks for a format always gets a thread, since compiling takes time
    that its size does not show."""
    return max(len(body), INLINE_BYTES + 1) if any(name in body for name in _FIELDS) else len(body)


class GrammarMaker:
    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        max_bytes: int,
        fuel: int,
        max_cached_bytes: int,
    ) -> None:
        """`max_bytes`: longest grammar; `fuel`: see `parser_limits`; `max_cached_bytes`: of grammars that are known to
        compile."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._max_bytes = max_bytes
        self._limits = parser_limits(fuel)
        self._max_cached_bytes = max_cached_bytes
        self._small: LLTokenizer | None = None
        self._known: OrderedDict[str, None] = OrderedDict()
        self._known_bytes = 0
        self._lock = threading.Lock()

    def of(self, wanted: AnswerFormat) -> str:
        """The grammar of answers of a format. Raises as `check` does, with the place that is wrong."""
        if wanted.kind == "json_schema":
            self._check_references(wanted.value, wanted.param)
        text = self._write(wanted)
        self.check(text, wanted.param, lambda reason: self._located(wanted, reason))
        return text

    def check(self, text: str, param: str, explain: Callable[[str], FastserveError] | None = None) -> None:
        """Compile a grammar. Raises InvalidRequestError if that fails, by default for the field `param`, and
        UnsupportedCapabilityError if the model's answers cannot have a grammar."""
        require_grammars(self._tokenizer, self._end_token_ids)
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return
        if len(text) > self._max_bytes:
            raise InvalidRequestError(
                f"Invalid value for '{param}': its grammar has {len(text)} characters; give at most {self._max_bytes} "
                "(--max-grammar-bytes sets this bound).",
                param=param,
            )
        reason = self._reason(text)
        if reason is not None:
            raise _error(param, reason) if explain is None else explain(reason)
        with self._lock:
            self._known[text] = None
            self._known_bytes += len(text)
            while self._known_bytes > self._max_cached_bytes:
                self._known_bytes -= len(self._known.popitem(last=False)[0])

    def check_calls(self, text: str, functions: Sequence[FunctionTool], param: str) -> None:
        """Compile the grammar of an answer that may have calls of `functions`. Raises as `check` does: for the schema
        that cannot be compiled alone, if there is one, else for the field `param`."""

        def explain(reason: str) -> FastserveError:
            for function in functions:
                self.of(AnswerFormat("json_schema", {"type": "object", **function.parameters}, function.param))
            return _error(param, reason)

        self.check(text, param, explain)

    def _write(self, wanted: AnswerFormat) -> str:
        value = wanted.value
        if wanted.kind == "json_schema":
            return grammar.of_json_schema(value, wanted.whitespace_pattern)
        if wanted.kind == "choice":
            return grammar.of_choices(value)
        try:
            return grammar.of_regex(value) if wanted.kind == "regex" else grammar.of_grammar(value)
        except ValueError as error:
            raise _error(wanted.param, str(error), value) from error

    def _reason(self, text: str) -> str | None:
        """Why a grammar cannot be compiled; None if it can."""
        if self._small is None:
            self._small = small_grammar_tokenizer(self._tokenizer, self._vocab_size, self._end_token_ids)
        matcher = LLMatcher(self._small, text, limits=self._limits, log_level=0)
        for _ in range(_MAX_FIRST_TOKENS):  # some are too large only now
            if matcher.is_error():
                break
            allowed = int.from_bytes(matcher.compute_bitmask(), "little")
            if allowed.bit_count() != 1:
                break
            matcher.consume_token(allowed.bit_length() - 1)
        return _first_lines(matcher.get_error()) if matcher.is_error() else None

    # ---- schemas ------------------------------------------------------------------------------------------------

    def _check_references(self, schema: Any, param: str) -> None:
        """Refuse references to other documents, which are never fetched."""
        if not isinstance(schema, dict):
            return
        for keyword in ("$ref", "$dynamicRef"):
            reference = schema.get(keyword)
            if isinstance(reference, str) and not reference.startswith("#"):
                where = join(param, keyword)
                raise InvalidRequestError(
                    f"Invalid value for '{where}': {shown(reference)}. Only references within the schema, such as "
                    '"#/$defs/name", are followed; nothing is fetched.',
                    param=where,
                )
        for path, part in _subschemas(schema):
            self._check_references(part, _joined(param, path))

    def _located(self, wanted: AnswerFormat, reason: str) -> FastserveError:
        """The error for a format that cannot be compiled; for a schema it names the innermost part with the error."""
        if wanted.kind != "json_schema" or not isinstance(wanted.value, dict):
            return _error(wanted.param, reason, wanted.value)
        root = wanted.value
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        schema: Mapping[str, Any] = root
        param, tries = wanted.param, _MAX_LOCATING
        is_inner = True
        while is_inner:
            is_inner = False
            for path, part in _subschemas(schema):
                if tries == 0 or not isinstance(part, dict):
                    continue
                tries -= 1
                if self._reason(grammar.of_json_schema({**shared, **part})) == reason and part != shared:
                    schema, param, is_inner = part, _joined(param, path), True
                    break
        return _error(param, reason, schema)


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The schemas directly inside a schema, with their paths."""
    for keyword, value in schema.items():
        if keyword in DATA_KEYWORDS:
            continue
        if keyword in MAP_KEYWORDS and isinstance(value, dict):
            yield from (((keyword, name), part) for name, part in value.items())
        elif isinstance(value, dict):
            yield (keyword,), value
        elif isinstance(value, list):
            yield from (((keyword, at), part) for at, part in enumerate(value) if isinstance(part, dict))


def _joined(param: str, path: tuple[str | int, ...]) -> str:
    for part in path:
        param = join(param, part)
    return param


def _first_lines(message: str) -> str:
    """The part of llguidance's message that says what is wrong, without the grammar's text."""
    lines = []
    for line in message.split("\n"):
        if line.startswith("<") or line.lstrip().startswith("1 |"):
            break
        lines.append(line.strip())
    text = " ".join(line for line in lines if line)
    for prefix in ("failed to compile JSON schema: ",):
        if prefix in text:
            text = text.split(prefix, 1)[1]
    return in_words(text)


def _error(param: str, reason: str, value: Any = None) -> InvalidRequestError:
    given = "" if value is None else f": {shown(value)}"
    cause = printable(reason, _REASON_CHARS).rstrip(". ")
    return InvalidRequestError(
        f"Invalid value for '{param}'{given}. It cannot be made into a grammar: {cause}. Change it, or leave it out.",
        param=param,
    )
