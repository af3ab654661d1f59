"""Text on lines of its own: what would end a line early or move the cursor is written as an escape."""

from __future__ import annotations

import codecs

# Found now: the first look-up of a codec opens a file, and lines are wanted most when no file can be opened.
_escape = codecs.getencoder("unicode_escape")


def escape_controls(line: str, *others: str) -> str:
    """`line` with what is not printable (line ends, terminal codes, lone surrogates) written as escapes, and so are the
    printable characters in `others`."""
    if line.isprintable() and not any(char in line for char in others):
        return line
    return "".join(char if char.isprintable() and char not in others else _escape(char)[0].decode() for char in line)
