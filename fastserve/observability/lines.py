"""Text on lines of its own: what would end a line early or move the cursor is written as an escape."""

from __future__ import annotations


def escape_controls(line: str) -> str:
    """`line` with what is not printable (line ends, terminal codes, lone surrogates) written as escapes."""
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)
