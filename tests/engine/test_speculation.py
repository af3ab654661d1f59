"""Speculation without a model: where drafts come from, what they cost, and when they are given up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastserve.engine.plan import DRAFT_PLACEHOLDER
from fastserve.engine.speculation.draft_budget import AcceptanceRates, DraftBudget, Offer
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.speculator import PlaceholderProposer, Speculator
from fastserve.engine.speculation.vocabulary import require_same_vocabulary
from fastserve.engine.speed import SpeedMeter
from fastserve.errors import StartupError

MAX_DRAFTS = 8


# ---- prompt lookup ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "max_drafts", "drafts"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 1, 2], 8, [3, 4, 5, 1, 2, 3, 4, 5]),  # what follows reaches the end: it repeats itself
        ([7, 7, 7], 4, [7, 7, 7, 7]),
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 2, [4, 8]),  # the latest of two places that agree equally
        ([5, 1, 2, 3, 9, 6, 1, 2, 4, 8, 5, 1, 2], 2, [3, 9]),  # the one that agrees longest
        ([1, 2, 3, 4], 3, []),
        ([1, 2], 3, []),
        ([1], 3, []),
    ],
)
def test_prompt_lookup_finds_what_followed_before(token_ids: list[int], max_drafts: int, drafts: list[int]) -> None:
    assert NgramProposer().propose(0, token_ids, max_drafts) == drafts


def test_prompt_lookup_follows_a_growing_sequence() -> None:
    """Asked at each token or only now and then, it finds what a fresh index finds, and sequences stay apart."""
    rng = random.Random(0)
    often, seldom = NgramProposer(), NgramProposer()
    sequences: list[list[int]] = [[rng.randrange(4)] for _ in range(3)]
    for step in range(300):
        for seq_id, token_ids in enumerate(sequences):
            expected = NgramProposer().propose(0, token_ids, 4)
            assert often.propose(seq_id, token_ids, 4) == expected
            if step % 17 == seq_id:
                assert seldom.propose(seq_id, token_ids, 4) == expected
            token_ids.append(rng.randrange(4))
    often.forget(1)
    often.forget(1)
    assert often.propose(1, [8, 9, 8], 2) == []


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    proposer = NgramProposer()
    token_ids = [*range(10_000), 7_000, 7_001]
    found = [proposer.propose(0, token_ids, 2) for _ in range(12)]
    assert found[0] == []
    assert found[-1] == [7_002, 7_003]


# ---- what a step costs ------------------------------------------------------------------------------------------


def test_the_curve_goes_through_what_was_measured_and_never_falls() -> None:
    meter = SpeedMeter((1, 1.0), (4, 1.3), (16, 3.7))
    assert [meter.step_s(size) for size in (1, 4, 16, 64)] == pytest.approx([1.0, 1.3, 3.7, 13.3])
    assert meter.tokens_per_s == pytest.approx(8 / meter.step_s(8))
    noisy = SpeedMeter((1, 1.0), (16, 0.5))
    rng = random.Random(0)
    for _ in range(500):
        noisy.record(rng.randint(1, 300), rng.random())
        curve = [noisy.step_s(size) for size in range(1, 400)]
        assert curve == sorted(curve)


def test_the_curve_learns_sizes_one_by_one_and_slowness_for_all() -> None:
    meter = SpeedMeter((1, 1.0), (16, 2.5))
    for _ in range(400):
        meter.record(1, 1.0)
        meter.record(128, 40.0)
    assert meter.step_s(1) == pytest.approx(1.0, rel=0.05)
    assert meter.step_s(128) == pytest.approx(40.0, rel=0.05)
    for _ in range(100):
        meter.record(1, 2.0)
    assert meter.step_s(1) == pytest.approx(2.0, rel=0.05)
    assert meter.step_s(128) > 45
    before = meter.step_s(1)
    meter.record(1, 1000.0)
    assert meter.step_s(1) < 1.2 * before, "one hiccup must not count for more than one step"


# ---- how many drafts --------------------------------------------------------------------------------------------


def memory_bound(num_tokens: int) -> float:
    """One token takes as long as reading the weights does, and some more cost little."""
    return 1.0 + 0.02 * num_tokens


def compute_bound(num_tokens: int) -> float:
    return 0.1 + 1.0 * num_tokens


@dataclass
class Text:
    """A sequence whose drafts are right as `is_right(step, depth)` says."""

    seq_id: int
    is_right: Callable[[int, int], bool]
    token_ids: list[int]


@dataclass
class Run:
    seconds: float = 0.0
    tokens: int = 0
    drafts: int = 0


def simulate(
    texts: list[Text],
    step_s: Callable[[int], float],
    steps: int,
    speculator: Speculator | None = None,
    draft_step_s: Callable[[int], float] | None = None,
) -> Run:
    """Time and tokens of some steps, in which all texts decode."""
    speculator = speculator or Speculator(PlaceholderProposer(), DraftBudget(step_s, draft_step_s), MAX_DRAFTS)
    run = Run()
    for step in range(steps):
        drafts = speculator.draft(texts, [MAX_DRAFTS] * len(texts), 1000)
        tried = {}
        for text in texts:
            count = len(drafts.get(text.seq_id, []))
            right = next((depth for depth in range(count) if not text.is_right(step, depth)), count)
            run.tokens += right + 1
            if count:
                tried[text.seq_id] = (count, right)
        num_drafts = sum(count for count, _ in tried.values())
        run.drafts += num_drafts
        run.seconds += step_s(len(texts) + num_drafts)
        if draft_step_s is not None and tried:
            run.seconds += max(count for count, _ in tried.values()) * draft_step_s(len(tried))
        speculator.learn(len(texts), tried)
    return run


def texts_of(count: int, is_right: Callable[[int, int], bool]) -> list[Text]:
    return [Text(seq_id, is_right, [0]) for seq_id in range(count)]


PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "never": lambda _step, _depth: False,
    "seldom": lambda step, depth: hash((step, depth)) % 10 == 0,
    "half": lambda step, depth: hash((step, depth)) % 2 == 0,
    "first only": lambda _step, depth: depth == 0,
    "in turns of 40 steps": lambda step, _depth: step // 40 % 2 == 0,
    "in turns of 7 steps": lambda step, _depth: step // 7 % 2 == 0,
    "always": lambda _step, _depth: True,
}


@pytest.mark.parametrize("step_s", [memory_bound, compute_bound])
@pytest.mark.parametrize("draft_step_s", [None, lambda count: 0.2 + 0.01 * count])
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_speculation_never_costs_more_than_its_share(
    pattern: str, count: int, draft_step_s: Callable[[int], float] | None, step_s: Callable[[int], float]
) -> None:
    steps = 1500
    run = simulate(texts_of(count, PATTERNS[pattern]), step_s, steps, draft_step_s=draft_step_s)
    without_s = run.tokens * step_s(count) / count
    assert run.seconds <= 1.03 * without_s


def test_what_was_lost_is_earned_back_before_more_is_risked() -> None:
    """Ten steps' time or more went into wrong drafts: at 2 % of each step's time, that takes 500 steps."""
    budget = DraftBudget(compute_bound)
    assert budget.num_tried(1) > 0
    while budget.balance_s > -10 * compute_bound(1):
        budget.learn(1, {0: (8, 0)})
    owed = -budget.balance_s / (0.02 * compute_bound(1))
    steps = 0
    while budget.min_first(1, MAX_DRAFTS) == float("inf"):
        assert budget.num_tried(1) == 0
        budget.learn(1, {})
        steps += 1
    assert steps == pytest.approx(owed, abs=2)
    assert steps > 450


def test_right_drafts_pay_where_tokens_are_cheap() -> None:
    for share, gain in ((1.0, 5.0), (0.8, 2.0)):
        rng = random.Random(0)
        run = simulate(texts_of(1, lambda _, __, rng=rng, share=share: rng.random() < share), memory_bound, 500)  # type: ignore[misc]
        assert run.tokens * memory_bound(1) > gain * run.seconds


def test_a_full_batch_on_a_slow_device_gets_next_to_none() -> None:
    run = simulate(texts_of(64, lambda _, depth: depth < 2), compute_bound, 1000)
    assert run.drafts < 0.04 * run.tokens


def test_one_good_text_in_a_batch_of_bad_ones_gets_the_drafts() -> None:
    texts = texts_of(8, lambda _, __: False)
    texts[3].is_right = lambda _, __: True
    speculator = Speculator(PlaceholderProposer(), DraftBudget(memory_bound), MAX_DRAFTS)
    simulate(texts, memory_bound, 400, speculator)
    given = [speculator.draft(texts, [MAX_DRAFTS] * 8, 1000) for _ in range(20)]
    assert all(len(drafts.get(3, [])) == MAX_DRAFTS for drafts in given)
    assert all(len(drafts) <= 2 for drafts in given)


def test_what_did_not_pay_is_tried_again() -> None:
    """After a long time of wrong drafts, right ones are noticed."""
    for count in (1, 8):
        text = texts_of(count, lambda step, _: step >= 1000)
        speculator = Speculator(PlaceholderProposer(), DraftBudget(memory_bound), MAX_DRAFTS)
        simulate(text, memory_bound, 1000, speculator)
        late = simulate(texts_of(count, lambda _, __: True), memory_bound, 300, speculator)
        assert late.tokens > 3 * 300 * count


def test_budget_and_limits_hold() -> None:
    speculator = Speculator(PlaceholderProposer(), DraftBudget(memory_bound), MAX_DRAFTS)
    texts = texts_of(6, lambda _, __: True)
    simulate(texts, memory_bound, 50, speculator)
    drafts = speculator.draft(texts, [5, 0, -1, 2, 3, 8], 9)
    assert sum(map(len, drafts.values())) == 9
    assert not {1, 2} & set(drafts)
    assert len(drafts[3]) <= 2
    assert all(draft == [DRAFT_PLACEHOLDER] * len(draft) for draft in drafts.values())
    assert speculator.draft(texts, [0] * 6, 9) == {}
    assert speculator.draft([], [], 9) == {}


def test_drafts_go_where_they_promise_most() -> None:
    budget = DraftBudget(memory_bound)
    offers = [
        Offer(0, 8, AcceptanceRates(0.9, 0.9)),
        Offer(1, 8, AcceptanceRates(0.9, 0.2)),
        Offer(2, 8, AcceptanceRates(0.0, 0.0)),
    ]
    deep, shallow, none = budget.allot(3, offers, 100)
    assert deep > shallow > 0
    assert none == 0
    first, second, _ = budget.allot(3, offers, 3)
    assert (first, second) in {(2, 1), (3, 0)}


# ---- draft models -----------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> str:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return str(folder)


def test_a_draft_model_needs_the_same_vocabulary(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model", {"a": 0, "b": 1})
    twin = write_tokenizer(tmp_path / "twin", {"a": 0, "b": 1})
    other = write_tokenizer(tmp_path / "other", {"b": 0, "a": 1})
    bare = tmp_path / "bare"
    bare.mkdir()
    require_same_vocabulary(model, twin, 1000, 1024)  # embeddings may be padded
    require_same_vocabulary(str(bare), str(bare), 1000, 1000)
    for draft, size, other_size in ((other, 1000, 1000), (str(bare), 1000, 1000)):
        with pytest.raises(StartupError, match=r"--speculative-model .* same vocabulary"):
            require_same_vocabulary(model, draft, size, other_size)
    with pytest.raises(StartupError, match="1024 tokens, and the model has 1000"):
        require_same_vocabulary(str(bare), str(bare), 1000, 1024)
