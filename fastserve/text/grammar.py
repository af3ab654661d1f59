"""Grammars of answers, in llguidance's dialect of Lark, the one form in which an engine gets them.

Response formats, forms of tool calls and reasoning are all written as such a text. Its rules are those of
llguidance's syntax.md: `start` is the whole answer, `%json {...}` a value of a JSON schema, `%lark {...}` another
grammar, `/.../` a regular expression of Rust's crate, `<[7]>` the token 7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from fastserve.text.json_schema import with_followed_keywords
from fastserve.text.tokenizer import Tokenizer

_MAX_WHITESPACE_CHARS = 40
DEFAULT_WHITESPACE = rf"[\x20\x0A\x0D\x09]{{1,{_MAX_WHITESPACE_CHARS}}}"
"""Whitespace between two tokens of JSON. Bounded, because small models may never end it."""
UNFORCED = '%llguidance {"no_forcing": true}\n'
"""First line of a grammar in which no text is looked for that must come next. The search takes as long as that text is,
and has no end where the grammar has none."""
_MAX_FORCED_BYTES = 8192
_LONG_REPEAT = re.compile(r"\{\d{3,}|\{\d*,\d{3,}")
_HEADER = re.compile(r"^\s*%llguidance\b.*$", re.MULTILINE)
_IS_LARK = re.compile(r"^\s*(%llguidance\b|start\s*:)", re.MULTILINE)
_CODE_POINT = re.compile(r"\\\\|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")
ANY_JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
_OPTIONS = "x-guidance"
"""Field of a schema with llguidance's options, among them one to ignore keywords that it does not know."""
_AFTER_REASONING = r"/[ \t\r\n]{0,4}/"


def json_value(schema: Mapping[str, Any] | bool, whitespace_pattern: str | None = None) -> str:
    """Lark expression for a value of a JSON schema, to be used in a rule.

    `whitespace_pattern`: regular expression of the whitespace between two tokens of JSON; empty: none.
    """
    options: dict[str, Any] = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": DEFAULT_WHITESPACE}
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    if whitespace_pattern == "":
        options = {"lenient": False, "whitespace_flexible": False}
    plain = {} if schema is True else {"not": {}} if schema is False else with_followed_keywords(schema)
    return "%json " + json.dumps({**plain, _OPTIONS: options})


def of_json_schema(schema: Mapping[str, Any] | bool, whitespace_pattern: str | None = None) -> str:
    """The grammar of a value of a JSON schema."""
    return unforced_if_long(f"start: {json_value(schema, whitespace_pattern)}\n")


def unforced_if_long(grammar: str) -> str:
    """A grammar of our own making, with UNFORCED where the search for forced text may take long."""
    is_short = len(grammar) <= _MAX_FORCED_BYTES and _LONG_REPEAT.search(grammar) is None
    return grammar if is_short else UNFORCED + grammar


def of_regex(pattern: str) -> str:
    """The grammar of a text that matches a regular expression as a whole. `\\d` is a digit of ASCII."""
    return f"{UNFORCED}start: /{regex_to_lark(pattern, 'd')}/\n"


def of_choices(choices: Iterable[str]) -> str:
    """The grammar of one of some texts."""
    text = "start: " + " | ".join(map(literal, choices)) + "\n"
    return text if len(text) <= _MAX_FORCED_BYTES else UNFORCED + text


def of_grammar(text: str) -> str:
    """The grammar that is written in Lark (it has `start:` or `%llguidance`) or in llama.cpp's GBNF.

    Raises ValueError if GBNF cannot be read.
    """
    try:
        if _IS_LARK.search(text) is None:
            text = _CODE_POINT.sub(_character, text)
        return UNFORCED + _HEADER.sub("", str(any_to_lark(text)))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except Exception as error:  # the converter raises nothing narrower
        raise ValueError(str(error)) from error


def _character(escape: re.Match[str]) -> str:
    """The character of an escape in GBNF, which the converter would read wrongly; ASCII as the escape that it knows."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code < 0x80:
        return f"\\x{code:02x}"
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise ValueError(f"{escape[0]} is no character")
    return chr(code)


def literal(text: str) -> str:
    """Lark expression for a text, which may be made of any tokens but special ones."""
    return json.dumps(text, ensure_ascii=False)


def mark(text: str, tokenizer: Tokenizer) -> str:
    """Lark expression for a mark such as `</think>`: its special tokens, and its text around them."""
    ids = tokenizer.special_ids.intersection(tokenizer.encode(text, add_special_tokens=False))
    names = {tokenizer.token_bytes(token_id).decode(errors="replace"): token_id for token_id in ids}
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return " ".join(f"<[{names[piece]}]>" if piece in names else literal(piece) for piece in pieces if piece)


def single_token(text: str, tokenizer: Tokenizer) -> int | None:
    """The token that alone is this text; None if it takes several."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return token_ids[0] if len(token_ids) == 1 else None


def nested(grammar: str) -> str:
    """Lark expression for a whole grammar, to be used in a rule of another one, which must begin with its `header`."""
    return f"%lark {{\n{grammar.removeprefix(UNFORCED)}\n}}"


def header(*grammars: str) -> str:
    """The first line of a grammar that contains others."""
    return UNFORCED if any(grammar.startswith(UNFORCED) for grammar in grammars) else ""


def after_reasoning(
    grammar: str,
    tokenizer: Tokenizer,
    *,
    begin: str,
    end: str,
    is_open: bool,
    is_required: bool = False,
    max_tokens: int | None = None,
    excluded: Iterable[str] = (),
) -> str:
    """The grammar of an answer that follows reasoning: `begin`, any text, `end`, a few blanks, then `grammar`.

    `is_open`: the prompt ends within the reasoning, so `begin` is not part of the answer. `is_required`: whether an
    answer that is not within reasoning must begin with it. `max_tokens`: tokens of the reasoning, after which `end` is
    forced; it needs an `end` that is one token. `excluded`: texts that the reasoning does not contain.
    """
    end_token = single_token(end, tokenizer)
    if end_token is not None:
        attributes = "" if max_tokens is None else f"[max_tokens={max_tokens}]"
        thought = f"thought{attributes}: THOUGHT\nTHOUGHT: {text_without((end, *excluded))}\n"
        closing = f" <[{end_token}]>"
    else:
        thought = f"thought[suffix={literal(end)}]: {text_without(excluded)}\n"
        closing = ""
    reasoning = f"thought{closing} blanks"
    if not is_open:
        reasoning = f"{mark(begin, tokenizer)} {reasoning}"
        if not is_required:
            reasoning = f"({reasoning})?"
    return (
        f"{header(grammar)}start: {reasoning} answer\n{thought}blanks: {_AFTER_REASONING}\nanswer: {nested(grammar)}\n"
    )


def text_without(excluded: Iterable[str]) -> str:
    """Expression of a terminal for any text, even none, that does not contain certain ones."""
    absent = (f" & ~/(?s:.*){regex_to_lark(_escaped(text), '')}(?s:.*)/" for text in excluded)
    return "/(?s:.*)/" + "".join(absent)


def _escaped(text: str) -> str:
    """A regular expression for a text."""
    return "".join(char if char.isalnum() or char in " _<>" else f"\\x{{{ord(char):x}}}" for char in text)
