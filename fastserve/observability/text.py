"""Foreign text, made safe to print in logs and error messages."""

from __future__ import annotations

import unicodedata

_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: controls, formats (among them those that turn the direction of writing), surrogates, private use,
unassigned, line and paragraph separators."""


def printable(text: str, max_chars: int = 200) -> str:
    """`text` on one line: at most `max_chars` characters of it, an ellipsis in place of the rest, and what is not
    printable (line ends, terminal codes, bidirectional controls) or is a backslash written as an escape.
    """
    kept = text[:max_chars]
    if not (kept.isascii() and kept.isprintable() and "\\" not in kept):
        kept = "".join(_escape(char) for char in kept)
    return kept if len(text) <= max_chars else kept + "…"


def _escape(char: str) -> str:
    if char == "\\" or unicodedata.category(char) in _UNPRINTABLE:
        return char.encode("unicode_escape").decode("ascii")
    return char
