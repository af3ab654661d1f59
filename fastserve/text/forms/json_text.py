"""Incremental check of JSON text, in linear time and without recursion."""

from __future__ import annotations

import re
from typing import Literal

State = Literal["open", "done", "bad"]
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACES = re.compile(r"[ \t\r\n]+")
_NUMBER_CHARS = re.compile(r"[-+0-9.eE]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_ESCAPES = frozenset('"\\/bfnrtu')
_HEX = frozenset("0123456789abcdefABCDEF")
_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


class JsonText:
    """One JSON value. `feed` returns the text as it came, but for raw control characters in strings, which many models
    write and JSON forbids: they are escaped.
    """

    def __init__(self) -> None:
        self.state: State = "open"
        self._stack: list[str] = []
        """Brackets that close the open arrays and objects, innermost last."""
        self._next = "value"
        """The token that may come next: value, item (value or ]), key, member (key or }), colon, comma; or the inside
        of a token: string, name (a string that is a key), escape, hex, number, word."""
        self._token = ""
        self._is_name = False

    @property
    def in_string(self) -> bool:
        return self._next in ("string", "escape", "hex")

    def feed(self, text: str, at: int, end: int) -> tuple[str, int]:
        """Read text[at:end] up to the end of the value, or to the first character that cannot be part of it. Return
        the text read, and the index after it.
        """
        pieces = []
        while at < end and self.state == "open":
            piece, at = self._step(text, at, end)
            pieces.append(piece)
        return "".join(pieces), at

    def finish(self) -> None:
        """The text has ended: a number that may be complete is."""
        if self._next == "number" and not self._stack and self.state == "open":
            self._end_number()

    def closing(self) -> str | None:
        """The shortest text that completes the value; None if it needs more than the ends of strings and brackets."""
        if self._next in ("value", "key", "colon", "word", "escape", "hex") or self._is_name:
            return None
        if self._next == "number" and not _NUMBER.fullmatch(self._token):
            return None
        return ('"' if self._next == "string" else "") + "".join(reversed(self._stack))

    def _step(self, text: str, at: int, end: int) -> tuple[str, int]:
        char = text[at]
        match self._next:
            case "string":
                return self._in_string(text, at, end)
            case "escape":
                if char not in _ESCAPES:
                    return self._fail(at)
                self._next, self._token = ("hex", "") if char == "u" else ("string", "")
                return char, at + 1
            case "hex":
                if char not in _HEX:
                    return self._fail(at)
                self._token += char
                if len(self._token) == 4:
                    self._next = "string"
                return char, at + 1
            case "word":
                if not self._token.startswith(char):
                    return self._fail(at)
                self._token = self._token[1:]
                if not self._token:
                    self._end_value()
                return char, at + 1
            case "number":
                return self._in_number(text, at, end)
        if (spaces := _SPACES.match(text, at, end)) is not None:
            return spaces[0], spaces.end()
        return self._structure(char, at)

    def _structure(self, char: str, at: int) -> tuple[str, int]:
        expected = self._next
        if expected == "colon" and char == ":":
            self._next = "value"
        elif expected == "comma" and char == ",":
            self._next = "key" if self._stack[-1] == "}" else "value"
        elif (expected in ("comma", "item", "member")) and self._stack and char == self._stack[-1]:
            self._stack.pop()
            self._end_value()
        elif expected in ("key", "member") and char == '"':
            self._next, self._is_name = "string", True
        elif expected in ("value", "item"):
            return self._begin_value(char, at)
        else:
            return self._fail(at)
        return char, at + 1

    def _begin_value(self, char: str, at: int) -> tuple[str, int]:
        if char == "{":
            self._stack.append("}")
            self._next = "member"
        elif char == "[":
            self._stack.append("]")
            self._next = "item"
        elif char == '"':
            self._next = "string"
        elif char in _WORDS:
            self._next, self._token = "word", _WORDS[char][1:]
        elif char == "-" or (char.isdecimal() and char.isascii()):
            self._next, self._token = "number", char
        else:
            return self._fail(at)
        return char, at + 1

    def _in_string(self, text: str, at: int, end: int) -> tuple[str, int]:
        if (plain := _PLAIN.match(text, at, end)) is not None:
            return plain[0], plain.end()
        char = text[at]
        if char == "\\":
            self._next = "escape"
        elif char == '"':
            if self._is_name:
                self._next, self._is_name = "colon", False
            else:
                self._end_value()
        else:
            return _CONTROL.get(char, f"\\u{ord(char):04x}"), at + 1
        return char, at + 1

    def _in_number(self, text: str, at: int, end: int) -> tuple[str, int]:
        if (more := _NUMBER_CHARS.match(text, at, end)) is not None:
            self._token += more[0]
            return more[0], more.end()
        self._end_number()
        return "", at

    def _end_number(self) -> None:
        if _NUMBER.fullmatch(self._token):
            self._end_value()
        else:
            self.state = "bad"

    def _end_value(self) -> None:
        self._next = "comma"
        if not self._stack:
            self.state = "done"

    def _fail(self, at: int) -> tuple[str, int]:
        self.state = "bad"
        return "", at


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    value = JsonText()
    _, at = value.feed(text, 0, len(text))
    value.finish()
    return value.state == "done" and not text[at:].strip(" \t\r\n")


def string_piece(text: str) -> str:
    """Text as a piece of a JSON string, without quotes."""
    return text.translate(_ESCAPED)


_ESCAPED = str.maketrans(
    {chr(code): f"\\u{code:04x}" for code in (*range(32), *range(0xD800, 0xE000))}
    | _CONTROL
    | {'"': '\\"', "\\": "\\\\"}
)
