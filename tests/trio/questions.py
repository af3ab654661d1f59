"""Questions whose answers differ, so that a mixed-up answer cannot pass for the right one."""

from __future__ import annotations

from random import Random

from demo_model.facts import FACTS
from demo_model.words import WORDS


def sums() -> dict[str, str]:
    """Questions and their answers: two numbers below 50, every total once."""
    rng = Random(7)
    pairs = []
    for total in range(4, 98):
        first = rng.randint(max(0, total - 49), min(49, total))
        pairs.append((first, total - first))
    return {f"What is {a} + {b}?": str(a + b) for a, b in pairs}


def facts() -> dict[str, str]:
    """Questions, and what a right answer contains."""
    return {fact.unseen[0]: fact.key for fact in FACTS}


def others(count: int) -> list[str]:
    """Texts to repeat, and requests for a few long answers."""
    rng = Random(11)
    counting = [f"Count from 1 to {number}." for number in range(6, 18, 2)]
    stories = ["Tell me a story about a fox.", "Say the alphabet."]
    texts = [" ".join(rng.sample(WORDS, 3)) for _ in range(count - len(counting) - len(stories))]
    return [*counting, *stories, *(f"Repeat after me: {text}" for text in texts)]


def all_questions() -> list[str]:
    """A few more than the tests need."""
    return [*sums(), *facts(), *others(100)]
