"""Makes text from outside safe to print in logs and error messages, and numbers short."""

from __future__ import annotations

from fastserve.observability.lines import escape_controls


def printable(text: str, max_chars: int = 200) -> str:
    """`text` on one line, shortened to `max_chars` characters and an ellipsis. Backslashes and unprintable characters
    (line ends, terminal codes, bidirectional controls) are escaped.
    """
    kept = escape_controls(text[:max_chars], "\\")
    return kept if len(text) <= max_chars else kept + "…"


def short_count(number: int) -> str:
    """A number with its unit: 7.2B, 135M, 4.1M."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.1f}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return str(number)
