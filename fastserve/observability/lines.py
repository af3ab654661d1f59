"""Escapes for text printed on one line: characters that would end the line or move the cursor."""

from __future__ import annotations

import codecs

# Looked up at import: the first look-up of a codec opens a file, which fails when no file descriptor is free.
_escape = codecs.getencoder("unicode_escape")


def escape_controls(line: str, *others: str) -> str:
    """`line` with unprintable characters (line ends, terminal codes, lone surrogates) and those in `others` escaped."""
    if line.isprintable() and not any(char in line for char in others):
        return line
    return "".join(char if char.isprintable() and char not in others else _escape(char)[0].decode() for char in line)
