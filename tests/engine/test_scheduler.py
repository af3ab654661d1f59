"""Scheduler and block pool without a model: properties over random histories, and single rules."""

from __future__ import annotations

import random
from collections.abc import Sequence as AnySequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import EngineOptions
from fastserve.engine import scheduling
from fastserve.engine.contract import EngineInfo, EngineRequest, RequestOutput, SamplingParams, TokenLogprob
from fastserve.engine.core import EngineCore
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.plan import MAX_EXTRA_LOGITS, Chunk, StepPlan, StepResult
from fastserve.engine.sampling.order import LOGITS_PROCESSORS, needs_last_token
from fastserve.engine.scheduler import PRIORITY_LEVEL_S, Drafting, Scheduler
from fastserve.engine.scheduling import SchedulingPolicy
from fastserve.engine.sequence import Sequence
from fastserve.engine.speculation.speculator import DraftRequest
from fastserve.engine.speed import SpeedMeter

from .weightless_adapters import weightless_adapters

BUDGET, MAX_SEQS, BLOCK, BLOCKS, MAX_LEN, EXTRA_ROWS = 11, 5, 4, 12, 40, 7


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Memory:
    """Executes plans on an imaginary KV cache: it remembers which token was written into which slot, and samples tokens
    that depend on all tokens before. A wrong block table, a lost chunk or a falsely shared block changes the answer."""

    def __init__(self, rope_switch_length: int = MAX_LEN) -> None:
        self.rope_switch_length = rope_switch_length
        self.slots: dict[int, tuple[int, int, bool]] = {}
        """Position, token, and whether its sequence was longer than the switch when the runner got it."""
        self.is_long: dict[int, bool] = {}
        self.num_switched = 0
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        sampled: dict[int, list[int]] = {}
        scored: dict[int, list[TokenLogprob]] = {}
        for seq_id in plan.dropped:
            del self.tokens[seq_id], self.blocks[seq_id]
        for new in plan.new:
            self.tokens[new.seq_id] = list(new.token_ids)
            self.blocks[new.seq_id] = []
            is_long = len(new.token_ids) > self.rope_switch_length
            self.num_switched += is_long and not self.is_long.get(new.seq_id, True)
            self.is_long[new.seq_id] = is_long
        for chunk in plan.chunks:
            tokens, blocks = self.tokens[chunk.seq_id], self.blocks[chunk.seq_id]
            blocks[chunk.num_held_blocks :] = chunk.new_block_ids
            guessed = tokens + chunk.draft_ids
            is_long = self.is_long[chunk.seq_id]
            assert is_long or chunk.start + chunk.num_rows <= self.rope_switch_length
            for position in range(chunk.start, chunk.start + chunk.num_rows):
                self.slots[blocks[position // BLOCK] * BLOCK + position % BLOCK] = (
                    position,
                    guessed[position],
                    is_long,
                )
            context = range(chunk.start + chunk.num_rows)
            seen = [self.slots[blocks[place // BLOCK] * BLOCK + place % BLOCK] for place in context]
            assert seen == [(place, guessed[place], is_long) for place in context], (
                "the KV cache does not hold the sequence's own tokens"
            )
            if chunk.num_scored:
                scored[chunk.seq_id] = score(tokens, chunk)
            if chunk.sample:
                assert chunk.start + chunk.num_tokens == len(tokens)
                sampled[chunk.seq_id] = [next_token(tokens)]
                for draft in chunk.draft_ids:
                    if draft != sampled[chunk.seq_id][-1]:
                        break
                    sampled[chunk.seq_id].append(next_token(tokens + sampled[chunk.seq_id]))
                tokens += sampled[chunk.seq_id]
        tried = {chunk.seq_id: len(chunk.draft_ids) for chunk in plan.chunks if chunk.draft_ids}
        return StepResult(sampled, prompt_logprobs=scored, num_drafts=tried)


class Device(Memory):
    """An executor that computes a step when its result is asked for: as late as a device may. It makes sure that what
    is launched before needs nothing that is not known by then."""

    def __init__(self, rope_switch_length: int = MAX_LEN) -> None:
        super().__init__(rope_switch_length)
        self.in_flight: list[Computed] = []
        self.plans: list[StepPlan] = []
        self.num_ahead = 0
        self._params: dict[int, SamplingParams] = {}

    def launch(self, plan: StepPlan) -> Computed:
        assert len(self.in_flight) <= 1, "two steps ahead"
        self._params |= {new.seq_id: new.params for new in plan.new}
        for before in self.in_flight:
            self.num_ahead += 1
            assert not before.plan.has_drafts, "how many tokens it brings is not known"
            assert not plan.has_drafts, "drafts of a text that is not known to its end"
            sampled = {chunk.seq_id for chunk in before.plan.chunks if chunk.sample}
            for chunk in plan.chunks:
                assert not (chunk.seq_id in sampled and needs_last_token(LOGITS_PROCESSORS, self._params[chunk.seq_id]))
            assert not sampled & {new.seq_id for new in plan.new}, "a new sequence with pending tokens"
        self.plans.append(plan)
        self.in_flight.append(Computed(self, plan))
        return self.in_flight[-1]


class Computed:
    def __init__(self, device: Device, plan: StepPlan) -> None:
        self._device = device
        self.plan = plan

    def result(self) -> StepResult:
        assert self._device.in_flight.pop(0) is self, "results are asked for in the order of the launches"
        return self._device.execute(self.plan)


def score(tokens: list[int], chunk: Chunk) -> list[TokenLogprob]:
    """Logprobs that depend on the tokens they were computed from."""
    assert chunk.start <= chunk.score_begin < chunk.score_end <= chunk.start + chunk.num_tokens
    return [expected_score(tokens, place) for place in range(chunk.score_begin + 1, chunk.score_end + 1)]


def expected_score(tokens: list[int], place: int) -> TokenLogprob:
    return TokenLogprob(tokens[place], -float(next_token(tokens[:place])), [])


class Guesser:
    """Drafts of every quality, in every amount that the scheduler allows."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.tried = 0
        self.right = 0
        self.known: set[int] = set()

    def draft(self, sequences: list[Sequence], limits: list[int], budget: int) -> dict[int, list[int]]:
        drafts: dict[int, list[int]] = {}
        for sequence, limit in zip(sequences, limits, strict=True):
            guessed = list(sequence.token_ids)
            quality = self._rng.choice([0.0, 0.5, 1.0])
            for _ in range(min(self._rng.randint(0, 9), limit, budget)):
                guessed.append(next_token(guessed) if self._rng.random() < quality else self._rng.randrange(6))
            found = guessed[sequence.num_tokens :]
            if found:
                drafts[sequence.seq_id] = found
                budget -= len(found)
                self.known.add(sequence.seq_id)
        return drafts

    def expect(self, seq_id: int, predicted_ids: list[int], num_prompt_tokens: int) -> None:
        pass

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        assert len(tried) <= num_sequences
        assert set(tried) <= self.known, "nothing is to be learnt of sequences that ended"
        for drafts, right in tried.values():
            assert 0 <= right <= drafts
            self.tried += drafts
            self.right += right

    def forget(self, seq_id: int) -> None:
        self.known.discard(seq_id)

    def is_worth_waiting(self, sequences: AnySequence[DraftRequest]) -> bool:
        return bool(sequences) and self._rng.random() < 0.5

    def charge(self, seconds: float) -> None:
        assert seconds >= 0


def next_token(tokens: list[int]) -> int:
    return (sum((index + 1) * token for index, token in enumerate(tokens)) * 31 + len(tokens)) % 6


def alone(request: EngineRequest) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in request.params.stop_token_ids:
            break
    return tokens[len(request.prompt_ids) :]


def make_scheduler(
    blocks: int = BLOCKS,
    drafting: Drafting | None = None,
    clock: Clock | None = None,
    *,
    prefix_cache: bool = True,
    policy: SchedulingPolicy | None = None,
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, BLOCK, prefix_cache=prefix_cache),
        policy=policy or make_policy("slora"),
        max_num_batched_tokens=BUDGET,
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_LEN,
        max_extra_rows=EXTRA_ROWS,
        needs_last_token=partial(needs_last_token, LOGITS_PROCESSORS),
        drafting=drafting,
        clock=clock or Clock(),
    )


def make_policy(name: str, **options: Any) -> SchedulingPolicy:
    if name == "cluster":
        options.setdefault("batch_num_adapters", 2)
    return scheduling.load(EngineOptions(scheduler=name, **options), max_num_batched_tokens=BUDGET)


def make_core(
    device: Device, guesser: Guesser | None = None, *, overlap: bool, clock: Clock, policy: str = "slora"
) -> EngineCore:
    info = EngineInfo(
        architecture="", device="", dtype="", vocab_size=MAX_EXTRA_LOGITS // EXTRA_ROWS,
        max_model_len=MAX_LEN, block_size=BLOCK, num_blocks=BLOCKS, eos_token_ids=(), num_parameters=0, load_s=0,
    )  # fmt: skip
    core = EngineCore(
        info, device, SpeedMeter((1, 1.0), (2, 1.1)), policy=make_policy(policy),
        max_num_batched_tokens=BUDGET, max_num_seqs=MAX_SEQS, prefix_cache=True,
        needs_last_token=partial(needs_last_token, LOGITS_PROCESSORS), overlap=overlap, clock=clock,
        rope_switch_length=device.rope_switch_length,
        make_adapters=partial(weightless_adapters, names=("a", "b")),
    )  # fmt: skip
    core._speculator = core.scheduler._drafting = guesser  # type: ignore[assignment]
    return core


def step(core: EngineCore, device: Device) -> list[RequestOutput]:
    """One step, and what must hold after each."""
    had_work = core.has_work
    in_flight, num_launched = list(device.in_flight), len(device.plans)
    outputs = core.step()
    launched = device.plans[num_launched:]
    for plan in launched:
        check_plan(plan, core.scheduler)
    assert all(output.token_ids for output in outputs)
    assert launched or in_flight or not had_work, "work waits but nothing is done"
    assert not set(in_flight) & set(device.in_flight), "a step was not finished"
    assert device.in_flight or not core._overlap or not core.scheduler.has_work, "the device waits for Python"
    core.scheduler.check()
    return outputs


def check_plan(plan: StepPlan, scheduler: Scheduler) -> None:
    assert plan.num_tokens <= BUDGET
    assert sum(len(chunk.draft_ids) + chunk.num_scored for chunk in plan.chunks) <= EXTRA_ROWS
    assert len(scheduler.running) <= MAX_SEQS
    assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
    assert plan.chunks or not scheduler.has_work, "work waits but the step is empty"


def check_prompt_logprobs(request: EngineRequest, outputs: list[list[TokenLogprob] | None]) -> None:
    """They come once, with the first tokens, and are of the prompt's own."""
    if request.params.prompt_logprobs is None:
        assert outputs == [None] * len(outputs)
        return
    prompt = request.prompt_ids
    assert outputs[1:] == [None] * (len(outputs) - 1)
    assert outputs[:1] == [[expected_score(prompt, place) for place in range(1, len(prompt))]][: len(outputs)]


requests = st.builds(
    # Few different tokens, so that prompts share beginnings and prefix hits are common.
    lambda prompt, repeat, count, stop, penalty, scored, priority, adapter: EngineRequest(
        "",
        (prompt * repeat)[:24],
        SamplingParams(
            count,
            # Penalties have no effect here but on what may be planned ahead.
            presence_penalty=penalty,
            stop_token_ids=(0,) if stop else (),
            prompt_logprobs=0 if scored else None,
        ),
        priority=priority,
        adapter=adapter,
    ),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 16),
    st.booleans(),
    st.sampled_from([0.0, 0.0, 1.0]),
    st.booleans(),
    st.integers(0, 1),
    st.sampled_from(["", "a", "b"]),
)
actions = st.lists(st.one_of(requests, st.integers(0, 30), st.none()), max_size=60)
"""A request arrives, the n-th request is aborted, or a step runs."""


@pytest.mark.parametrize(
    ("overlap", "policy"), [(False, "slora"), (True, "slora"), (True, "vtc_fair"), (False, "cluster"), (True, "abort")]
)
@settings(max_examples=120, deadline=None)
@given(history=actions, seed=st.none() | st.integers(0, 9))
def test_any_history_keeps_the_invariants_and_the_answers(
    overlap: bool, policy: str, history: list[EngineRequest | int | None], seed: int | None
) -> None:
    guesser = None if seed is None else Guesser(seed)
    device = Device()
    core = make_core(device, guesser, overlap=overlap, clock=Clock(), policy=policy)
    sent: list[EngineRequest] = []
    answers: dict[str, list[int]] = {}
    scores: dict[str, list[list[TokenLogprob] | None]] = {}
    finished: set[str] = set()
    aborted: set[str] = set()

    def take_step() -> None:
        for output in step(core, device):
            assert output.request_id not in finished | aborted
            answers[output.request_id] += output.token_ids
            scores[output.request_id].append(output.prompt_logprobs)
            if output.finish_reason:
                finished.add(output.request_id)

    for action in history:
        if isinstance(action, EngineRequest):
            request = EngineRequest(
                f"r{len(sent)}", action.prompt_ids, action.params, priority=action.priority, adapter=action.adapter
            )
            sent.append(request)
            answers[request.request_id] = []
            scores[request.request_id] = []
            assert core.add(request) is None
        elif isinstance(action, int):
            if action < len(sent) and f"r{action}" not in finished:
                core.abort(f"r{action}")
                aborted.add(f"r{action}")
                core.scheduler.check()
        else:
            take_step()
    for _ in range(5000):
        if not core.has_work:
            break
        take_step()
    assert not core.has_work, "a request starved"
    assert finished | aborted == {request.request_id for request in sent}
    for request in sent:
        if request.request_id in finished:
            assert answers[request.request_id] == alone(request)
        else:
            assert answers[request.request_id] == alone(request)[: len(answers[request.request_id])]
        check_prompt_logprobs(request, scores[request.request_id])
    assert core.scheduler.pool.num_free == BLOCKS
    assert set(device.tokens) == set(core.scheduler._dropped), "the runner is to forget all that ended"
    assert guesser is None or not guesser.known, "what is known of sequences that ended is kept"


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
    requests = [EngineRequest(f"r{index}", [index] * 9, SamplingParams(30)) for index in range(3)]
    for request in requests:
        scheduler.add(request)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    order: list[str] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        for output in scheduler.commit(plan, memory.execute(plan)):
            answers[output.request_id] += output.token_ids
            if output.finish_reason:
                order.append(output.request_id)
    assert scheduler.preemptions > 0
    assert order == ["r0", "r1", "r2"]
    assert answers == {request.request_id: alone(request) for request in requests}


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


@pytest.mark.parametrize(
    ("speculates", "overlap", "rope_switch_length"),
    [
        (False, False, MAX_LEN),
        (False, True, MAX_LEN),
        (True, False, MAX_LEN),
        (True, True, MAX_LEN),
        (True, True, 18),
        pytest.param(True, False, 18, marks=pytest.mark.slow),
    ],
)
def test_ten_thousand_random_steps(speculates: bool, overlap: bool, rope_switch_length: int) -> None:
    rng = random.Random(0)
    beginnings = [[rng.randrange(3) for _ in range(16)] for _ in range(4)]
    guesser, device, clock = Guesser(1), Device(rope_switch_length), Clock()
    core = make_core(device, guesser if speculates else None, overlap=overlap, clock=clock)
    alive: dict[str, EngineRequest] = {}
    answers: dict[str, list[int]] = {}
    scores: dict[str, list[list[TokenLogprob] | None]] = {}
    begun: dict[str, int] = {}
    longest = num_stopped = 0
    for number in range(10_000):
        if rng.random() < 0.3 and len(alive) < 40:
            begin = rng.choice(beginnings)[: rng.randint(0, 16)]
            prompt = begin + [rng.randrange(3) for _ in range(rng.randint(1, 8))]
            params = SamplingParams(
                rng.randint(1, 16),
                presence_penalty=1.0 if rng.random() < 0.05 else 0.0,
                stop_token_ids=(0,) if rng.random() < 0.3 else (),
                prompt_logprobs=0 if rng.random() < 0.2 else None,
            )
            request = EngineRequest(f"r{number}", prompt, params, priority=rng.randint(0, 2))
            alive[request.request_id] = request
            answers[request.request_id] = []
            scores[request.request_id] = []
            begun[request.request_id] = number
            core.add(request)
        if alive and rng.random() < 0.02:
            victim = rng.choice(sorted(alive))
            del alive[victim]
            core.abort(victim)
        for output in step(core, device):
            answers[output.request_id] += output.token_ids
            scores[output.request_id].append(output.prompt_logprobs)
            if output.finish_reason:
                request = alive.pop(output.request_id)
                assert answers[output.request_id] == alone(request)
                check_prompt_logprobs(request, scores[output.request_id])
                longest = max(longest, number - begun[output.request_id])
                num_stopped += output.finish_reason == "stop"
        clock.now_s += 1.0
        check_cache(core.scheduler, device)
    assert core.scheduler.preemptions > 100
    assert core.scheduler.cached_tokens > 1000
    assert num_stopped > 100
    assert longest < 400, "a request starves"
    assert (device.num_switched > 500) == (rope_switch_length < MAX_LEN)
    if speculates:
        assert 1000 < guesser.right < guesser.tried
    if overlap:
        assert device.num_ahead > (1000 if speculates else 4000)
    else:
        assert device.num_ahead == 0


def check_cache(scheduler: Scheduler, memory: Memory) -> None:
    """The registered blocks are in the KV cache."""
    for (_, tokens), (block_id, _) in scheduler.pool._registered.items():
        held = [memory.slots[block_id * BLOCK + offset][1] for offset in range(BLOCK)]
        assert held == list(tokens), "a block is registered under tokens that it does not hold"


class Oracle(Guesser):
    """Drafts that are all right, as many as allowed."""

    def draft(self, sequences: list[Sequence], limits: list[int], budget: int) -> dict[int, list[int]]:
        drafts: dict[int, list[int]] = {}
        for sequence, limit in zip(sequences, limits, strict=True):
            guessed = list(sequence.token_ids)
            for _ in range(min(limit, budget)):
                guessed.append(next_token(guessed))
            drafts[sequence.seq_id] = guessed[sequence.num_tokens :]
            budget -= len(drafts[sequence.seq_id])
        self.known |= drafts.keys()
        return drafts


def finish(scheduler: Scheduler, memory: Memory) -> list[list[RequestOutput]]:
    """The outputs of each step until nothing is left."""
    steps = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        steps.append(scheduler.commit(plan, memory.execute(plan)))
        scheduler.check()
    return steps


def test_right_drafts_bring_several_tokens_a_step_and_end_where_the_answer_ends() -> None:
    scheduler, memory = make_scheduler(drafting=Oracle(0)), Memory()
    request = EngineRequest("r", [1, 2, 3], SamplingParams(20))
    scheduler.add(request)
    steps = finish(scheduler, memory)
    # The prompt, then as many drafts as rows of logits are allowed, and one more token.
    assert [len(outputs[0].token_ids) for outputs in steps] == [1, EXTRA_ROWS + 1, EXTRA_ROWS + 1, 3]
    assert [token for outputs in steps for token in outputs[0].token_ids] == alone(request)

    stop = alone(request)[4]
    stopping = EngineRequest("s", [1, 2, 3], SamplingParams(20, stop_token_ids=(stop,)))
    scheduler.add(stopping)
    steps = finish(scheduler, memory)
    assert [token for outputs in steps for token in outputs[0].token_ids] == alone(stopping)
    assert steps[-1][0].finish_reason == "stop"


def test_drafts_take_only_what_the_step_has_left() -> None:
    """With every sequence decoding and a prompt to compute, chunks are the same with and without drafts."""
    plans = []
    for drafting in (None, Oracle(0)):
        scheduler, memory = make_scheduler(drafting=drafting), Memory()
        for index in range(2):
            scheduler.add(EngineRequest(f"r{index}", [1, index], SamplingParams(3)))
        plan = scheduler.schedule()
        scheduler.commit(plan, memory.execute(plan))
        scheduler.add(EngineRequest("long", [2] * 8, SamplingParams(2)))
        plan = scheduler.schedule()
        plans.append(plan)
        check_plan(plan, scheduler)
    without, with_drafts = plans
    assert [len(chunk.draft_ids) for chunk in with_drafts.chunks] == [1, 0, 0]
    assert [(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in with_drafts.chunks] == [
        (chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in without.chunks
    ]


class Wrong(Guesser):
    """Drafts that are all wrong, as many as allowed."""

    def draft(self, sequences: list[Sequence], limits: list[int], budget: int) -> dict[int, list[int]]:
        drafts: dict[int, list[int]] = {}
        for sequence, limit in zip(sequences, limits, strict=True):
            drafts[sequence.seq_id] = [6] * min(limit, budget)
            budget -= len(drafts[sequence.seq_id])
        self.known |= drafts.keys()
        return drafts


def test_wrong_drafts_change_nothing_else() -> None:
    """With a pool too small for all: the same chunks in the same steps, the same preemptions, as without drafts."""
    histories = []
    for drafting in (None, Wrong(0)):
        rng = random.Random(4)
        # Without a prefix cache: drafts may evict what nobody holds.
        scheduler, memory = make_scheduler(drafting=drafting, prefix_cache=False), Memory()
        for index in range(12):
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
            scheduler.add(EngineRequest(f"r{index}", prompt, SamplingParams(rng.randint(4, 24))))
        history = []
        while scheduler.has_work:
            plan = scheduler.schedule()
            scheduler.commit(plan, memory.execute(plan))
            scheduler.check()
            history.append([(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks])
        assert scheduler.preemptions > 0
        assert drafting is None or drafting.tried > 100
        histories.append(history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize(("low", "high"), [(2, 0), (0, -100)])
def test_priority_is_a_head_start_and_no_more(low: int, high: int) -> None:
    """Under an endless load of high priority, low priority waits for as long as its levels say, and then runs."""
    clock = Clock()
    scheduler, memory = make_scheduler(clock=clock), Memory()
    scheduler.add(EngineRequest("low", [1] * 8, SamplingParams(4), priority=low))
    head_start_s = (low - high) * PRIORITY_LEVEL_S
    waits: dict[str, float] = {}
    begun: dict[str, float] = {"low": 0.0}
    number = 0
    while "low" not in waits:
        assert clock.now_s < head_start_s + 80, "low priority starves"
        while scheduler.num_waiting < 10:
            scheduler.add(EngineRequest(f"high{number}", [2] * 8, SamplingParams(4), priority=high))
            begun[f"high{number}"] = clock.now_s
            number += 1
        clock.now_s += 0.1
        plan = scheduler.schedule()
        for output in scheduler.commit(plan, memory.execute(plan)):
            if output.finish_reason:
                waits[output.request_id] = clock.now_s - begun[output.request_id]
    assert waits.pop("low") == pytest.approx(head_start_s, abs=2)
    # Those of high priority that came later than its head start lasts are behind it, none earlier.
    assert max(waits.values()) < 3


def test_scored_prompts_take_no_cached_blocks_and_leave_theirs() -> None:
    scheduler, memory = make_scheduler(), Memory()
    prompt = [1, 2, 0, 1, 2, 1, 0, 0, 1, 2]
    for request_id, num_logprobs in (("plain", None), ("scored", 1), ("again", None)):
        params = SamplingParams(2, prompt_logprobs=num_logprobs)
        scheduler.add(EngineRequest(request_id, prompt, params))
        outputs = [output for outputs in finish(scheduler, memory) for output in outputs]
        assert outputs[0].num_cached_tokens == (8 if request_id == "again" else 0)
        check_prompt_logprobs(EngineRequest("", prompt, params), [output.prompt_logprobs for output in outputs])


def test_a_prompt_that_another_engine_has_scored_is_not_scored_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(EngineRequest("r", [1, 2, 0], SamplingParams(4, prompt_logprobs=1), emitted_ids=[1]))
    assert [output.prompt_logprobs for outputs in finish(scheduler, Memory()) for output in outputs] == [None] * 3
