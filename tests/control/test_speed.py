from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.control import speed
from fastserve.control.speed import RESCALE_S, SMALL_GROUP, SpeedBook

Said = tuple[tuple[str, ...], float | None, float]
"""Model names, tokens per second, claimed speed."""


def book_of(workers: Mapping[str, Said], now: float = 0.0) -> SpeedBook:
    book = SpeedBook()
    for address, said in workers.items():
        book.set(address, *said, now)
    return book


def speeds(book: SpeedBook) -> dict[str, float]:
    return {address: book.speed(address) for address in book._members}


def by_walking(workers: Mapping[str, Said]) -> dict[str, float]:
    """The same, from the definition."""
    result = {address: claimed for address, (_, _, claimed) in workers.items()}
    groups: list[tuple[set[str], list[str]]] = []
    for address, (names, _, _) in workers.items():
        models, members, separate = set(names), [address], []
        for other_models, other_members in groups:
            if models.isdisjoint(other_models):
                separate.append((other_models, other_members))
            else:
                models |= other_models
                members += other_members
        groups = [*separate, (models, members)]
    for _, members in groups:
        measured = {address: rate for address in members if (rate := workers[address][1])}
        if measured:
            result |= {address: rate / fmean(measured.values()) for address, rate in measured.items()}
    return result


def test_measured_workers_are_compared_with_their_mean() -> None:
    book = book_of({"a": (("m",), 100.0, 1.0), "b": (("m",), 300.0, 1.0)})
    assert speeds(book) == {"a": pytest.approx(0.5), "b": pytest.approx(1.5)}


def test_a_fastchat_worker_counts_as_an_average_one() -> None:
    book = book_of({"a": (("m",), 100.0, 1.0), "b": (("m",), 300.0, 1.0), "f": (("m",), None, 1.0)})
    assert speeds(book)["f"] == 1.0


def test_one_kind_alone() -> None:
    assert speeds(book_of({"a": (("m",), 42.0, 1.0)})) == {"a": 1.0}
    assert speeds(book_of({"f": (("m",), None, 1.0), "g": (("m",), None, 2.0)})) == {"f": 1.0, "g": 2.0}
    assert speeds(book_of({"a": (("m",), 0.0, 1.0)})) == {"a": 1.0}
    assert speeds(book_of({"nameless": ((), 7.0, 1.0)})) == {"nameless": 1.0}


def test_workers_of_other_models_do_not_matter() -> None:
    assert speeds(book_of({"small": (("m",), 900.0, 1.0), "big": (("n",), 9.0, 1.0)})) == {"small": 1.0, "big": 1.0}


def test_sharing_any_model_keeps_the_proportion() -> None:
    workers: dict[str, Said] = {
        "a": (("m",), 100.0, 1.0),
        "c": (("n",), 400.0, 1.0),
        "b": (("m", "n"), 200.0, 1.0),
    }
    book = book_of(workers)
    assert book.speed("b") / book.speed("a") == pytest.approx(2)
    assert book.speed("c") / book.speed("b") == pytest.approx(2)
    assert set(book.remove("b", 1.0)) == {"a", "c"}
    assert speeds(book) == {"a": 1.0, "c": 1.0}


NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
MODELS = st.lists(st.sampled_from(["m", "n", "o", "p"]), max_size=3, unique=True).map(tuple)
RATES = st.one_of(st.none(), st.just(0.0), st.floats(0.5, 500))
STEPS = st.lists(st.tuples(NAMES, st.one_of(st.none(), st.tuples(MODELS, RATES, st.floats(0, 4)))), max_size=40)


@given(steps=STEPS)
def test_few_workers_always_have_the_speeds_of_the_definition(steps: list[tuple[str, Said | None]]) -> None:
    book = SpeedBook()
    workers: dict[str, Said] = {}
    seen: dict[str, float] = {}
    for address, said in steps:
        if said is None:
            workers.pop(address, None)
            seen.pop(address, None)
            changed = book.remove(address, 0.0)
        else:
            workers[address] = said
            changed = book.set(address, *said, 0.0)
        seen |= {name: book.speed(name) for name in changed}
        assert speeds(book) == pytest.approx(by_walking(workers))
        assert seen == speeds(book), "a change of speed was not reported"


@given(steps=STEPS)
def test_many_workers_have_them_after_a_while(steps: list[tuple[str, Said | None]]) -> None:
    book = SpeedBook()
    workers: dict[str, Said] = {f"w{n}": (("m",), None, 1.0) for n in range(SMALL_GROUP)}
    for address, first in workers.items():
        book.set(address, *first, 0.0)
    for address, said in steps:
        if said is None:
            workers.pop(address, None)
            book.remove(address, 0.0)
        else:
            workers[address] = said
            book.set(address, *said, 0.0)
    for step in range(4):  # a group that has split is looked at again, part by part
        for address, last in workers.items():
            book.set(address, *last, 10.0 + step)
    assert speeds(book) == pytest.approx(by_walking(workers), rel=2 * speed.RESCALE_CHANGE)


def test_a_change_of_the_mean_reaches_many_workers_once_in_a_while() -> None:
    book = book_of({f"w{n}": (("m",), 100.0, 1.0) for n in range(1000)})
    changed = [len(list(book.set(f"w{n}", ("m",), 500.0 + n, 1.0, 5.0 + n * RESCALE_S / 100))) for n in range(100)]
    assert sorted(changed)[-2:] == [1, 1000]
    assert book.speed("w99") == pytest.approx(5.4, rel=0.1)
    book.set("w0", ("m",), 100.0, 1.0, 7.0)
    assert fmean(book.speed(f"w{n}") for n in range(1000)) == pytest.approx(1.0)
