from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.text.stop import StopStrings

texts = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reference implementation: try ever longer prefixes until one ends in a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(texts, stop_lists, st.lists(st.integers(0, 5), max_size=20), st.booleans())
def test_any_chunking_gives_the_same(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    window = StopStrings(stops, include=include)
    out, at = "", 0
    expected, stop = first_stop(text, stops, include)
    for cut in [*cuts, len(text)]:
        out += window.push(text[at : at + cut])
        at += cut
        assert expected.startswith(out), "nothing may be sent that has to be taken back"
    out += window.finish()
    assert (out, window.stopped) == (expected, stop)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    window = StopStrings(["</end>"])
    assert window.push("hello <") == "hello "
    assert window.push("/en") == ""
    assert window.push("ough</e") == "</enough"
    assert window.push("nd> more") == ""
    assert window.stopped == "</end>"
    assert window.push("later") == ""
    assert window.finish() == ""


def test_no_stops_hold_nothing_back() -> None:
    window = StopStrings([])
    assert window.push("abc") == "abc"
    assert window.finish() == ""


def test_an_empty_stop_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_repetitive_strings_are_found_where_a_plain_search_finds_them(data: st.DataObject) -> None:
    word = st.text(alphabet="ab", min_size=1, max_size=6)
    stops = data.draw(st.lists(word, min_size=1, max_size=3))
    pieces = data.draw(st.lists(st.text(alphabet="ab", max_size=5), max_size=8))
    text = "".join(pieces)
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    window = StopStrings(stops)
    sent = "".join(window.push(piece) for piece in pieces)
    if found:
        _, start, stop = min(found)
        assert (sent, window.stopped) == (text[:start], stop)
    else:
        assert (sent + window.finish(), window.stopped) == (text, None)


def test_the_longest_stop_strings_cost_each_character_a_bounded_amount_of_work() -> None:
    """Strings that nearly match at every character: a search that restarts each time would take minutes."""
    window = StopStrings(["a" * 1000 + str(i) for i in range(16)])
    sent = "".join(window.push("a") for _ in range(5_000))
    assert len(sent) == 5_000 - 1000
    assert len(window.finish()) == 1000


def first_stop_with_hidden(segments: list[tuple[str, bool]], stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reference implementation: try ever longer prefixes, with and without the hidden text."""
    visible, full, visible_at = "", "", [0]
    for text, hidden in segments:
        for char in text:
            full += char
            visible += "" if hidden else char
            visible_at.append(len(visible))
            ending = [s for s in stops if full.endswith(s) or (not hidden and visible.endswith(s))]
            if ending:
                stop = max(ending, key=len)
                is_seen = not hidden and visible.endswith(stop)  # as clients see it goes before as the model wrote it
                start = len(visible) - len(stop) if is_seen else visible_at[len(full) - len(stop)]
                return visible[:start] + (stop if include else ""), stop
    return visible, None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.text(alphabet="ab<", min_size=1, max_size=4), st.booleans()), max_size=8),
    st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_hidden_text_is_searched_but_not_sent(
    segments: list[tuple[str, bool]], stops: list[str], include: bool
) -> None:
    window = StopStrings(stops, include=include)
    expected, stop = first_stop_with_hidden(segments, stops, include)
    out = ""
    for text, hidden in segments:
        out += window.push(text, hidden=hidden)
        assert expected.startswith(out), "nothing may be sent that has to be taken back"
    assert (out + window.finish(), window.stopped) == (expected, stop)
