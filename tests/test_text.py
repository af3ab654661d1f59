from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.observability.text import printable


def test_plain_text_stays() -> None:
    assert printable("Qwen/Qwen3-8B at http://[::1]:20002") == "Qwen/Qwen3-8B at http://[::1]:20002"
    assert printable("通义千问 é") == "通义千问 é"


def test_what_forges_lines_or_steers_terminals_is_escaped() -> None:
    assert printable("a\nb\r\x1b[31m\x00") == "a\\nb\\r\\x1b[31m\\x00"
    assert printable("‮exe.txt⁦\u2028\ud800") == "\\u202eexe.txt\\u2066\\u2028\\ud800"
    assert printable("a\\nb") == "a\\\\nb"


def test_long_text_is_shortened() -> None:
    assert printable("x" * 10, max_chars=4) == "xxxx…"
    assert printable("x" * 4, max_chars=4) == "xxxx"


@given(text=st.text(st.characters()), max_chars=st.integers(1, 50))
def test_all_of_it_can_be_printed_and_encoded(text: str, max_chars: int) -> None:
    shown = printable(text, max_chars)
    assert shown.isprintable()
    shown.encode()
    assert len(shown) <= 10 * max_chars + 1
