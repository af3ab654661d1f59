"""Makes text from outside safe to print in logs and error messages."""

from __future__ import annotations

from fastserve.observability.lines import escape_controls


def printable(text: str, max_chars: int = 200) -> str:
    """`text` on one line, shortened to `max_chars` characters and an ellipsis. Backslashes and unprintable characters
    (line ends, terminal codes, bidirectional controls) are escaped.
    """
    kept = escape_controls(text[:max_chars], "\\")
    return kept if len(text) <= max_chars else kept + "…"
