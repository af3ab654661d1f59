"""Scheduler and block pool without a model: properties over random histories, and single rules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.plan import StepPlan, StepResult
from fastserve.engine.scheduler import Scheduler

BUDGET, MAX_SEQS, BLOCK, BLOCKS, MAX_LEN = 11, 5, 4, 12, 40


class Memory:
    """Executes plans on an imaginary KV cache: it remembers which token was written into which slot, and draws tokens
    that depend on all tokens before. A wrong block table, a lost chunk or a falsely shared block changes the answer."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        drawn: dict[int, int] = {}
        for seq_id in plan.dropped:
            del self.tokens[seq_id], self.blocks[seq_id]
        for new in plan.new:
            self.tokens[new.seq_id] = list(new.token_ids)
            self.blocks[new.seq_id] = []
        for chunk in plan.chunks:
            tokens, blocks = self.tokens[chunk.seq_id], self.blocks[chunk.seq_id]
            blocks += chunk.new_block_ids
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self.slots[blocks[position // BLOCK] * BLOCK + position % BLOCK] = (position, tokens[position])
            if chunk.sample:
                context = range(chunk.start + chunk.num_tokens)
                seen = [self.slots[blocks[place // BLOCK] * BLOCK + place % BLOCK] for place in context]
                assert seen == list(enumerate(tokens)), "the pages do not hold the sequence's own tokens"
                drawn[chunk.seq_id] = next_token(tokens)
                tokens.append(drawn[chunk.seq_id])
        return StepResult(drawn, {})


def next_token(tokens: list[int]) -> int:
    return (sum((index + 1) * token for index, token in enumerate(tokens)) * 31 + len(tokens)) % 6


def alone(request: EngineRequest) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in request.params.stop_token_ids:
            break
    return tokens[len(request.prompt_ids) :]


def make_scheduler(blocks: int = BLOCKS) -> Scheduler:
    pool = BlockPool(blocks, BLOCK)
    return Scheduler(pool, max_num_batched_tokens=BUDGET, max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN)


requests = st.builds(
    # Few different tokens, so that prompts share beginnings and prefix hits are common.
    lambda prompt, repeat, count, stop, priority: EngineRequest(
        "", (prompt * repeat)[:24], SamplingParams(count, stop_token_ids=(0,) if stop else ()), priority=priority
    ),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 16),
    st.booleans(),
    st.integers(0, 1),
)
actions = st.lists(st.one_of(requests, st.integers(0, 30), st.none()), max_size=60)
"""A request arrives, the n-th request is aborted, or a step runs."""


@settings(max_examples=300, deadline=None)
@given(actions)
def test_any_history_keeps_the_books_and_the_answers(history: list[EngineRequest | int | None]) -> None:
    scheduler, memory = make_scheduler(), Memory()
    sent: list[EngineRequest] = []
    answers: dict[str, list[int]] = {}
    finished: set[str] = set()
    aborted: set[str] = set()

    def step() -> None:
        plan = scheduler.schedule()
        assert plan.num_tokens <= BUDGET
        assert len(scheduler.running) <= MAX_SEQS
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        assert plan.chunks or not scheduler.has_work, "work waits but the step is empty"
        for output in scheduler.commit(plan, memory.execute(plan)):
            assert output.request_id not in finished | aborted
            answers[output.request_id] += output.token_ids
            if output.finish_reason:
                finished.add(output.request_id)
        scheduler.check()

    for action in history:
        if isinstance(action, EngineRequest):
            request = EngineRequest(f"r{len(sent)}", action.prompt_ids, action.params, priority=action.priority)
            sent.append(request)
            answers[request.request_id] = []
            assert scheduler.add(request) is None
        elif isinstance(action, int):
            if action < len(sent) and f"r{action}" not in finished:
                scheduler.abort(f"r{action}")
                aborted.add(f"r{action}")
                scheduler.check()
        else:
            step()
    for _ in range(5000):
        if not scheduler.has_work:
            break
        step()
    assert not scheduler.has_work, "a request starved"
    assert finished | aborted == {request.request_id for request in sent}
    for request in sent:
        if request.request_id in finished:
            assert answers[request.request_id] == alone(request)
        else:
            assert answers[request.request_id] == alone(request)[: len(answers[request.request_id])]
    assert scheduler.pool.num_free == BLOCKS


def test_decoding_comes_before_prefill() -> None:
    scheduler, memory = make_scheduler(), Memory()
    scheduler.add(EngineRequest("short", [1], SamplingParams(10)))
    plan = scheduler.schedule()
    scheduler.commit(plan, memory.execute(plan))
    scheduler.add(EngineRequest("long", [2] * 24, SamplingParams(2)))
    for _ in range(2):
        plan = scheduler.schedule()
        assert [chunk.num_tokens for chunk in plan.chunks] == [1, BUDGET - 1]
        scheduler.commit(plan, memory.execute(plan))


def test_preemption_takes_the_last_in_order_and_loses_nothing() -> None:
    scheduler, memory = make_scheduler(), Memory()
    wanted = [EngineRequest(f"r{index}", [index] * 9, SamplingParams(30)) for index in range(3)]
    for request in wanted:
        scheduler.add(request)
    answers: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    order: list[str] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        for output in scheduler.commit(plan, memory.execute(plan)):
            answers[output.request_id] += output.token_ids
            if output.finish_reason:
                order.append(output.request_id)
    assert scheduler.preemptions > 0
    assert order == ["r0", "r1", "r2"]
    assert answers == {request.request_id: alone(request) for request in wanted}


def test_priority_goes_before_arrival() -> None:
    scheduler = make_scheduler()
    for index, priority in enumerate([3, 1, 2]):
        scheduler.add(EngineRequest(f"r{index}", [1] * 10, SamplingParams(2), priority=priority))
    plan = scheduler.schedule()
    assert [new.seq_id for new in plan.new] == [1, 2]


def test_the_pool_hands_out_the_least_recently_used_content_last_block_first() -> None:
    pool = BlockPool(4, 2)
    held = pool.allocate(3)
    parent = 0
    for block_id, tokens in zip(held, [(1, 2), (3, 4), (5, 6)], strict=True):
        parent = pool.register(block_id, parent, tokens)
    pool.free(held)
    pool.allocate(2)  # the block without content, then the end of the prefix
    match = pool.match([1, 2, 3, 4, 5, 6, 7], 6)
    assert match.block_ids == held[:2]


def test_equal_hashes_do_not_make_equal_prefixes() -> None:
    """-1 and -2 have the same hash in CPython: a cache that trusts hashes would hand out the wrong block."""
    assert hash((-1,)) == hash((-2,))
    pool = BlockPool(2, 1)
    pool.register(pool.allocate(1)[0], 0, (-1,))
    assert pool.match([-1, 5], 1).block_ids
    assert not pool.match([-2, 5], 1).block_ids


def test_a_pool_smaller_than_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="must fit"):
        make_scheduler(blocks=9)


def test_ten_thousand_random_steps() -> None:
    rng = random.Random(0)
    beginnings = [[rng.randrange(3) for _ in range(16)] for _ in range(4)]
    scheduler, memory = make_scheduler(), Memory()
    alive: dict[str, EngineRequest] = {}
    answers: dict[str, list[int]] = {}
    for step in range(10_000):
        if rng.random() < 0.3 and len(alive) < 40:
            begin = rng.choice(beginnings)[: rng.randint(0, 16)]
            prompt = begin + [rng.randrange(3) for _ in range(rng.randint(1, 8))]
            request = EngineRequest(f"r{step}", prompt, SamplingParams(rng.randint(1, 16)), priority=rng.randint(0, 2))
            alive[request.request_id] = request
            answers[request.request_id] = []
            scheduler.add(request)
        if alive and rng.random() < 0.02:
            victim = rng.choice(sorted(alive))
            del alive[victim]
            scheduler.abort(victim)
        plan = scheduler.schedule()
        for output in scheduler.commit(plan, memory.execute(plan)):
            answers[output.request_id] += output.token_ids
            if output.finish_reason:
                assert answers[output.request_id] == alone(alive.pop(output.request_id))
        scheduler.check()
    assert scheduler.preemptions > 100
    assert scheduler.cached_tokens > 1000
