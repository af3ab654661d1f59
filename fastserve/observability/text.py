"""Foreign text, made safe to print in logs and error messages."""

from __future__ import annotations

from fastserve.observability.lines import escape_controls


def printable(text: str, max_chars: int = 200) -> str:
    """`text` on one line: at most `max_chars` characters of it, an ellipsis in place of the rest, and what is not
    printable (line ends, terminal codes, bidirectional controls) or is a backslash written as an escape.
    """
    kept = escape_controls(text[:max_chars], "\\")
    return kept if len(text) <= max_chars else kept + "…"
