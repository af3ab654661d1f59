"""Scheduling policies: who starts next, who is preempted, and who is given up. No model."""

from __future__ import annotations

import random
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import EngineOptions, WorkerConfig
from fastserve.engine import scheduling
from fastserve.engine.calls.pending import refusal
from fastserve.engine.contract import EngineRequest, RequestOutput, SamplingParams
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.plan import StepPlan, StepResult
from fastserve.engine.scheduler import Scheduler
from fastserve.engine.scheduling.vtc_fair import AHEAD_SHARE, CREDIT_STEPS, INPUT_PRICE, OUTPUT_PRICE, RECENT_STEPS
from fastserve.errors import StartupError
from fastserve.options import parse_config
from fastserve.worker.refusals import refuse_unavailable

from .weightless_adapters import weightless_adapters

BLOCK, BLOCKS, MAX_SEQS, BUDGET = 4, 64, 8, 32
STEP_S, TOKEN_S = 0.02, 0.001
RATE = 1.6
ADAPTERS = (*map(str, range(9)), "heavy", "light", "first", "second", "away", "busy", *"abcde")


class Simulation:
    """A scheduler whose steps take a fixed time and a time for each token; all tokens are the same."""

    def __init__(
        self,
        policy: str,
        *,
        blocks: int = BLOCKS,
        max_num_seqs: int = MAX_SEQS,
        prefix_cache: bool = False,
        **options: Any,
    ) -> None:
        self.now_s = 0.0
        pool = BlockPool(blocks, BLOCK, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(
            pool,
            policy=scheduling.load(
                EngineOptions(scheduler=policy, **options), ["first", "second"], max_num_batched_tokens=BUDGET
            ),
            max_num_batched_tokens=BUDGET,
            max_num_seqs=max_num_seqs,
            max_model_len=100,
            max_extra_rows=1,
            needs_last_token=lambda _: False,
            adapters=weightless_adapters(pool, ADAPTERS),
            clock=lambda: self.now_s,
        )
        self.arrived: dict[str, tuple[float, str, int]] = {}
        """Time, adapter and length of the prompt, by request id."""
        self.first_token_s: dict[str, float] = {}
        self.refused: list[RequestOutput] = []
        self.service: dict[str, float] = {}
        self.num_tokens = 0

    def add(self, adapter: str, prompt: int = 4, answer: int = 4, priority: int = 0) -> str:
        request_id = f"r{len(self.arrived)}"
        self.arrived[request_id] = (self.now_s, adapter, prompt)
        request = EngineRequest(
            request_id, [len(self.arrived)] * prompt, SamplingParams(answer), priority=priority, adapter=adapter
        )
        assert self.scheduler.add(request) is None
        return request_id

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.refused += self.scheduler.take_refused()
        self.now_s += STEP_S + TOKEN_S * plan.num_tokens
        sampled = {chunk.seq_id: [1] for chunk in plan.chunks if chunk.sample}
        for output in self.scheduler.commit(plan, StepResult(sampled)):
            _, adapter, prompt = self.arrived[output.request_id]
            self.num_tokens += 1
            self.service.setdefault(adapter, 0.0)
            self.service[adapter] += OUTPUT_PRICE
            if output.request_id not in self.first_token_s:
                self.first_token_s[output.request_id] = self.now_s
                self.service[adapter] += INPUT_PRICE * prompt
        return plan

    def waits_s(self, adapters: set[str]) -> list[float]:
        """Times to the first token, in ascending order."""
        return sorted(
            at - self.arrived[request_id][0]
            for request_id, at in self.first_token_s.items()
            if self.arrived[request_id][1] in adapters
        )

    def started(self) -> list[str]:
        """Adapters in the order of their first tokens."""
        return [self.arrived[request_id][1] for request_id in self.first_token_s]


def test_the_files_are_the_values_of_the_option() -> None:
    option = EngineOptions.__dataclass_fields__["scheduler"]
    assert set(scheduling.names()) | {"pets", "peft"} == set(option.metadata["choices"])
    assert get_type_hints(WorkerConfig)["scheduler"] is str


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"scheduler": "pets"}, "latencies"),
        ({"scheduler": "peft"}, "--batch-num-adapters 1"),
        ({"scheduler": "cluster"}, "needs --batch-num-adapters"),
        ({"scheduler": "vtc_fair", "enable_abort": True}, "--enable-abort"),
        ({"scheduler": "vtc_fair", "batch_num_adapters": 2}, "--batch-num-adapters"),
        ({"batch_num_adapters": 2, "enable_abort": True}, "--enable-abort"),
        ({"fair_weights": ("a=2",)}, "--scheduler vtc_fair"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_model_is_read(
    options: dict[str, Any], part: str
) -> None:
    with pytest.raises(StartupError) as refused:
        refuse_unavailable(WorkerConfig(**options))
    assert part in refused.value.message


@pytest.mark.parametrize("weight", ["a=0", "a=-1", "a=nan", "a=x", "a=", "a=1e9", "0"])
def test_a_wrong_weight_is_refused(weight: str) -> None:
    with pytest.raises(StartupError, match="a weight is a number above 0"):
        Simulation("vtc_fair", fair_weights=(weight,))


def test_more_weights_than_adapters_are_refused() -> None:
    with pytest.raises(StartupError, match="weight 3"):
        Simulation("vtc_fair", fair_weights=("1", "2", "3"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--fair-weights", "1", "--fair-weights", "4"],
        ["--fair-weights", "1", "4"],
        ["--fair-weights", "1,4"],
        ["--fair-weights", "a=1,b=4"],
        ["--fair-weights", "b=4"],
    ],
)
def test_weights_may_be_given_in_several_forms(flags: list[str]) -> None:
    options = parse_config(WorkerConfig, ["--scheduler", "vtc_fair", *flags], "x", {})
    policy: Any = scheduling.load(options, ("a", "b"), max_num_batched_tokens=BUDGET)
    assert policy._weights.get("a", 1.0) == 1.0
    assert policy._weights["b"] == 4.0


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a,b=2", {"a,b": 2}),
        ("a,b=2,c,d,e=3,f=4", {"a,b": 2, "c,d,e": 3, "f": 4}),
        ("2,a,b=3", {"first": 2, "a,b": 3}),
        ("a=b=2,c=3", {"a=b": 2, "c": 3}),
        (r"1\,a=2,b=3", {"1,a": 2, "b": 3}),
    ],
)
def test_names_with_commas_have_weights(text: str, weights: dict[str, float]) -> None:
    options = parse_config(WorkerConfig, ["--scheduler", "vtc_fair", "--fair-weights", text], "worker", {})
    policy: Any = scheduling.load(options, ("first",), max_num_batched_tokens=BUDGET)
    assert policy._weights == weights


@pytest.mark.parametrize("text", ["a,b", "a=x,b=2", "a,b=", "a=1,b"])
def test_a_weight_that_is_missing_among_several_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--fair-weights"):
        Simulation("vtc_fair", fair_weights=(text,))


# ---- fair shares ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=3, max_size=3),
    blocks=st.integers(26, 64),
    late=st.integers(0, 60),
)
def test_the_services_of_clients_with_waiting_requests_differ_by_a_bound(
    lengths: list[tuple[int, int]], blocks: int, late: int
) -> None:
    """The bound of the paper, in any interval, whatever lengths and however late a client comes."""
    simulation = Simulation("vtc_fair", blocks=blocks)
    bound = 2 * max(INPUT_PRICE * max(prompt for prompt, _ in lengths), OUTPUT_PRICE * blocks * BLOCK)
    history: list[list[float]] = []
    for number in range(200):
        for client, (prompt, answer) in enumerate(lengths):
            waiting = sum(
                adapter == str(client) and request_id not in simulation.first_token_s
                for request_id, (_, adapter, _) in simulation.arrived.items()
            )
            for _ in range(0 if client == 2 and number < late else max(0, MAX_SEQS + 1 - waiting)):
                simulation.add(str(client), prompt, answer)
        simulation.step()
        if number >= late:
            history.append([simulation.service.get(str(client), 0.0) for client in range(3)])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        gaps = [services[one] - services[other] for services in history]
        assert max(gaps) - min(gaps) <= bound


@pytest.mark.parametrize("weights", [("first=3",), ("3", "1")])
def test_service_is_as_the_weights(weights: tuple[str, ...]) -> None:
    simulation = Simulation("vtc_fair", fair_weights=weights)
    for _ in range(300):
        simulation.add("first")
        simulation.add("second")
    for _ in range(150):
        simulation.step()
    assert simulation.service["first"] / simulation.service["second"] == pytest.approx(3, rel=0.1)


def test_a_client_that_was_away_has_saved_up_no_more_than_the_credit() -> None:
    simulation = Simulation("vtc_fair", max_num_seqs=1)
    simulation.add("away")
    for _ in range(100):
        simulation.add("busy")
    for _ in range(200):
        simulation.step()
    for _ in range(20):
        simulation.add("away")
    begun = len(simulation.first_token_s)
    for _ in range(60):
        simulation.step()
    after = simulation.started()[begun:]
    lead = after.count("away") - after.count("busy")
    # A request is 4 tokens of prompt and 4 of answer.
    assert 2 < lead <= 2 + CREDIT_STEPS * BUDGET / (4 * INPUT_PRICE + 4 * OUTPUT_PRICE)


def test_the_credit_is_not_given_once_for_each_client_that_comes() -> None:
    """Each of many clients that come while all of them wait begins at the same counter."""
    simulation = Simulation("vtc_fair", max_num_seqs=1)
    for _ in range(40):
        simulation.add("busy")
    for _ in range(100):
        simulation.step()
    for client in range(9):
        simulation.add(str(client), 4, 1)
    policy: Any = simulation.scheduler._policy
    counters = [policy._clients[str(client)].counter for client in range(9)]
    assert min(counters) == max(counters) > 0


def test_no_prompt_of_a_client_with_much_service_is_beside_that_of_one_with_little() -> None:
    simulation = Simulation("vtc_fair", blocks=256)
    for _ in range(20):
        simulation.add("heavy", 4, 12)
    for _ in range(10):
        simulation.step()
    num_light = 0
    while simulation.scheduler.num_waiting:
        simulation.add("light", 4, 1)
        begun = len(simulation.first_token_s)
        plan = simulation.step()
        num_now = simulation.started()[begun:].count("light")
        # Those of the light client have ended with this step.
        assert not num_now or all(item.seq_id not in simulation.scheduler._by_id for item in plan.new)
        num_light += num_now
        simulation.step()
    assert num_light > 5
    assert simulation.started().count("heavy") == 20, "its prompts go on in other steps"


def test_the_client_ahead_has_short_prompts_in_a_step_while_others_were_served_lately() -> None:
    simulation = Simulation("vtc_fair", blocks=256, max_num_seqs=30)

    def prompt_tokens() -> int:
        plan = simulation.step()
        return sum(chunk.num_tokens for chunk in plan.chunks if chunk.start == 0)

    for _ in range(12):
        simulation.add("heavy", 8, 1)
    assert prompt_tokens() == BUDGET, "alone, it has the whole step"
    simulation.add("light", 4, 1)
    simulation.step()
    assert [prompt_tokens() for _ in range(2)] == [BUDGET // AHEAD_SHARE] * 2
    for _ in range(int(RECENT_STEPS * BUDGET / 8)):
        simulation.add("heavy", 8, 1)
    while prompt_tokens() == BUDGET // AHEAD_SHARE:
        pass
    assert prompt_tokens() == BUDGET, "alone again"
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.started().count("heavy") == len(simulation.arrived) - 1


def test_a_long_prompt_leaves_room_in_the_step_for_one_of_a_client_with_less_service() -> None:
    simulation = Simulation("vtc_fair", blocks=256)
    simulation.add("heavy", 90, 2)
    simulation.step()
    light = simulation.add("light", 16, 2)
    simulation.step()
    assert light in simulation.first_token_s
    while simulation.scheduler.has_work:
        assert simulation.step().num_tokens <= BUDGET
    assert len(simulation.first_token_s) == 2


def test_the_client_with_the_most_service_is_preempted() -> None:
    simulation = Simulation("vtc_fair", blocks=26, max_num_seqs=4)
    for _ in range(3):
        simulation.add("heavy", 20, 30)
        simulation.step()
    light = simulation.add("light", 20, 30)
    while light not in simulation.first_token_s:
        simulation.step()
    before = simulation.scheduler.preemptions
    while simulation.scheduler.preemptions == before:
        simulation.step()
    waiting = [item for item in simulation.scheduler._sequences.values() if item not in simulation.scheduler.running]
    assert waiting
    assert all(item.request.adapter == "heavy" for item in waiting)


def test_a_new_request_gets_a_place_of_the_client_that_has_the_most() -> None:
    simulation = Simulation("vtc_fair", max_num_seqs=4)
    for _ in range(8):
        simulation.add("heavy", 4, 40)
    for _ in range(3):
        simulation.step()
    light = [simulation.add("light", 4, 40) for _ in range(4)]
    for _ in range(20):
        simulation.step()
    # Half of the places, and no more: equal places do not move.
    assert [request_id in simulation.first_token_s for request_id in light] == [True, True, False, False]
    assert simulation.scheduler.preemptions == 2
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.num_tokens == 12 * 40, "a preempted answer goes on where it was"


def test_no_place_moves_within_a_client() -> None:
    simulation = Simulation("vtc_fair", max_num_seqs=4)
    for number in range(40):
        simulation.add("heavy", 4, 4 + number % 5)
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.scheduler.preemptions == 0


def _load(policy: str) -> Simulation:
    """Nine clients with RATE requests a second each, and one with ten times as many, for 30 s."""
    rng = random.Random(0)
    arrivals = [(at, str(client)) for client in range(9) for at in _poisson(rng, RATE, 30)]
    arrivals += [(at, "heavy") for at in _poisson(rng, 10 * RATE, 30)]
    arrivals.sort()
    simulation = Simulation(policy, blocks=256, max_num_seqs=16, prefix_cache=True)
    while arrivals or simulation.scheduler.has_work:
        while arrivals and (arrivals[0][0] <= simulation.now_s or not simulation.scheduler.has_work):
            at, adapter = arrivals.pop(0)
            simulation.now_s = max(simulation.now_s, at)
            simulation.add(adapter, 16, 16)
        simulation.step()
    return simulation


def _poisson(rng: random.Random, rate: float, duration_s: float) -> list[float]:
    times, now_s = [], 0.0
    while (now_s := now_s + rng.expovariate(rate)) < duration_s:
        times.append(now_s)
    return times


def test_one_client_with_ten_times_the_load_delays_the_others_far_less_than_under_first_come() -> None:
    others = {str(client) for client in range(9)}
    fair, first_come = _load("vtc_fair"), _load("slora")

    def p99(simulation: Simulation) -> float:
        waits = simulation.waits_s(others)
        return waits[int(0.99 * len(waits))]

    assert p99(first_come) > 10 * p99(fair), "without fair shares there is something to fix"
    assert fair.num_tokens / fair.now_s >= 0.98 * first_come.num_tokens / first_come.now_s


# ---- clusters of adapters ---------------------------------------------------------------------------------------


def test_few_adapters_run_at_once() -> None:
    simulation = Simulation("cluster", batch_num_adapters=2, max_num_seqs=4)
    for at in range(40):
        simulation.add("abcde"[at % 5], answer=3 + at % 4)
    counts = []
    while simulation.scheduler.has_work:
        simulation.step()
        counts.append(len({item.request.adapter for item in simulation.scheduler.running} - {""}))
    assert simulation.started()[:4] == ["a", "b", "a", "b"]
    # A new one starts only where none of the running ones waits.
    assert sum(counts) / len(counts) < 2.6
    plain = Simulation("slora", max_num_seqs=4)
    for at in range(40):
        plain.add("abcde"[at % 5])
    plain.step()
    assert plain.started() == ["a", "b", "c", "d"]


def test_an_adapter_is_passed_for_a_bounded_time() -> None:
    simulation = Simulation("cluster", batch_num_adapters=1, max_num_seqs=2)
    simulation.add("a", answer=4)
    simulation.add("a", answer=6)
    simulation.step()
    passed = simulation.add("b")
    while passed not in simulation.first_token_s:
        assert simulation.now_s < 15, "an adapter starves"
        while simulation.scheduler.num_waiting < 4:
            simulation.add("a", answer=4 + len(simulation.arrived) % 3)
        simulation.step()
    assert simulation.now_s > 9


# ---- requests that are given up ---------------------------------------------------------------------------------


def test_what_would_come_too_late_is_given_up_and_the_rest_comes_in_time() -> None:
    simulation = Simulation("slora", enable_abort=True, first_token_slo_s=2.0)
    for number in range(600):
        if number < 300:
            simulation.add(str(number % 7), answer=16)
        simulation.step()
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.refused
    assert len(simulation.refused) + len(simulation.first_token_s) == len(simulation.arrived)
    assert max(simulation.waits_s(set("0123456"))) <= 2.0
    error = refusal(simulation.refused[0])
    assert error.status == 503
    assert int(error.headers()["Retry-After"]) >= 1
    assert error.code == "first_token_late"


def test_under_overload_the_newest_is_first_and_else_the_oldest() -> None:
    simulation = Simulation("abort", max_num_seqs=1, first_token_slo_s=1000.0)
    first = simulation.add("")
    second = simulation.add("")
    while simulation.scheduler.has_work:
        simulation.step()
    assert list(simulation.first_token_s) == [first, second]
    ids: list[str] = []
    for _ in range(20):
        ids += [simulation.add("") for _ in range(5)]
        simulation.step()
    begun = set(simulation.first_token_s)
    for _ in range(5):
        simulation.step()
    started = [item for item in simulation.first_token_s if item not in begun]
    assert started
    assert min(map(ids.index, started)) > len(ids) - 15


def test_a_request_that_has_begun_is_never_given_up() -> None:
    simulation = Simulation("abort", blocks=26, first_token_slo_s=1.0)
    for _ in range(4):
        simulation.add("", 20, 60)
    while simulation.scheduler.has_work:
        simulation.step()
        simulation.now_s += 0.2
    assert simulation.scheduler.preemptions > 0
    assert len(simulation.first_token_s) + len(simulation.refused) == 4
    assert not {output.request_id for output in simulation.refused} & simulation.first_token_s.keys()
