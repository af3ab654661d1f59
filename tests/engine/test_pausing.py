"""Pauses and cache resets between steps, without a model: invariants and answers over random histories."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.engine.contract import EngineRequest, RequestOutput, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.pausing import PauseMode, PauseState
from fastserve.engine.plan import StepPlan, StepResult
from fastserve.errors import ConflictError

from .test_scheduler import BLOCK, BLOCKS, Clock, Device, Guesser, alone, make_core, requests, step


class VersionedDevice(Device):
    """Notes with which version each slot was computed: a sequence that begins later must not read older ones."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self._written: dict[int, int] = {}
        self._begun: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        result = super().execute(plan)
        for new in plan.new:
            self._begun[new.seq_id] = self.version
        for chunk in plan.chunks:
            blocks = self.blocks[chunk.seq_id]
            slots = [blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(chunk.start + chunk.num_rows)]
            for slot in slots[chunk.start :]:
                self._written[slot] = self.version
            assert all(self._written[slot] >= self._begun[chunk.seq_id] for slot in slots), "a stale block was found"
        return result


class History:
    """Drives a core as the engine's loop does: calls come between steps, with nothing in flight."""

    def __init__(self, seed: int | None, *, overlap: bool) -> None:
        self.device = VersionedDevice()
        self.core: EngineCore = make_core(
            self.device, None if seed is None else Guesser(seed), overlap=overlap, clock=Clock()
        )
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.reasons, "nothing may follow the last output"
            self.answers.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                self.reasons[output.request_id] = output.finish_reason

    def step(self) -> None:
        if self.core.has_work:
            assert not self.core.pausing.is_paused
            self.take(step(self.core, self.device))
        self.core.pausing.update()

    def drain(self) -> None:
        self.take(self.core.drain())
        assert not self.device.in_flight
        self.core.scheduler.check()

    def pause(self, mode: PauseMode) -> PauseState | None:
        """None: requests that had begun are still being finished."""
        self.drain()
        paused = self.core.pausing.pause(mode, self.take)
        self.core.scheduler.check()
        return paused.result() if paused.done() else None

    def resume(self) -> None:
        self.drain()
        self.core.pausing.resume()

    def reset(self, *, reset_running_requests: bool) -> None:
        self.drain()
        self.core.scheduler.reset_prefix_cache(reset_running_requests=reset_running_requests)
        self.device.version += 1
        self.core.scheduler.check()

    def run(self) -> None:
        for _ in range(5000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("a request starved")


actions = st.lists(
    st.one_of(
        requests,
        requests,
        st.integers(0, 30),
        st.none(),
        st.none(),
        st.sampled_from(["keep", "wait", "abort", "resume", "reset", "reset running"]),
    ),
    max_size=60,
)
"""A request arrives, the n-th request is aborted, a step runs, or a call comes."""


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=200, deadline=None)
@given(history=actions, seed=st.none() | st.integers(0, 9))
def test_calls_between_steps_lose_no_request_and_change_no_answer(
    overlap: bool, history: list[EngineRequest | int | str | None], seed: int | None
) -> None:
    run = History(seed, overlap=overlap)
    sent: list[EngineRequest] = []
    left: set[str] = set()
    for action in history:
        if isinstance(action, EngineRequest):
            sent.append(EngineRequest(f"r{len(sent)}", action.prompt_ids, action.params, priority=action.priority))
            assert run.core.add(sent[-1]) is None
        elif isinstance(action, int):
            if action < len(sent) and f"r{action}" not in run.reasons:
                run.core.abort(f"r{action}")
                left.add(f"r{action}")
        elif action in ("reset", "reset running"):
            run.reset(reset_running_requests=action == "reset running")
        elif action == "resume":
            run.resume()
        elif action is not None:
            run.pause(action)  # type: ignore[arg-type]
        else:
            run.step()
    run.resume()
    run.run()
    assert run.reasons.keys() | left == {request.request_id for request in sent}
    for request in sent:
        whole, answer = alone(request), run.answers.get(request.request_id, [])
        if run.reasons.get(request.request_id, "abort") == "abort":
            assert answer == whole[: len(answer)]
        else:
            assert answer == whole
    assert run.core.scheduler.pool.num_free == BLOCKS
    assert run.core.scheduler.num_requests == 0


LONG = SamplingParams(9)


@pytest.mark.parametrize("overlap", [False, True])
def test_modes_treat_what_has_begun_and_hold_what_has_not(overlap: bool) -> None:
    for mode in ("keep", "wait", "abort"):
        run = History(None, overlap=overlap)
        begun, later = EngineRequest("begun", [1, 2], LONG), EngineRequest("later", [3], LONG)
        run.core.add(begun)
        run.step()
        run.step()
        state = run.pause(mode)
        run.core.add(later)
        if mode == "wait":
            assert state is None
            assert run.core.pausing.is_pausing
            run.run()
            assert run.reasons == {"begun": "length"}
        else:
            assert state == PauseState(True, int(mode == "keep"), 0, int(mode == "abort"))
            assert run.reasons == ({"begun": "abort"} if mode == "abort" else {})
        assert run.core.pausing.is_paused
        assert not run.core.has_work
        assert run.core.stats.num_waiting == 1, "what came later waits"
        assert "later" not in run.answers
        run.resume()
        run.run()
        assert run.answers["later"] == alone(later)
        assert run.answers["begun"] == alone(begun)[: len(run.answers["begun"])]
        assert run.reasons["begun"] == ("abort" if mode == "abort" else "length")


def test_a_pause_that_waits_is_done_with_the_last_request_however_that_ends() -> None:
    run = History(None, overlap=False)
    for name in ("finishes", "leaves"):
        run.core.add(EngineRequest(name, [1], SamplingParams(3 if name == "finishes" else 30)))
    run.step()
    paused = run.core.pausing.pause("wait", run.take)
    for _ in range(4):
        run.step()
    assert run.reasons == {"finishes": "length"}
    assert not paused.done()
    run.core.abort("leaves")
    run.core.pausing.update()
    assert paused.result(0) == PauseState(True, 0, 0)


@pytest.mark.parametrize("change", ["keep", "abort", "resume"])
def test_a_pause_that_waits_fails_when_another_call_overtakes_it(change: PauseMode | Literal["resume"]) -> None:
    run = History(None, overlap=False)
    run.core.add(EngineRequest("r", [1], LONG))
    run.step()
    paused = [run.core.pausing.pause("wait", run.take) for _ in range(2)]
    if change == "resume":
        run.resume()
    else:
        run.pause(change)
    for waiting in paused:
        with pytest.raises(ConflictError):
            waiting.result(0)


def test_clients_who_come_and_go_while_paused_leave_nothing_behind() -> None:
    run = History(None, overlap=False)
    for mode in ("keep", "wait"):
        run.pause(mode)
        for number in range(1000):
            run.core.add(EngineRequest(f"r{number}", [1], LONG))
            run.core.abort(f"r{number}")
        assert run.core.scheduler._policy.first([]) is None
        assert not run.core.scheduler._held
    run.resume()
    assert not run.core.has_work


def test_held_requests_keep_their_order() -> None:
    run = History(None, overlap=False)
    run.pause("keep")
    for number, priority in enumerate([0, 1, -1, 0]):
        run.core.add(EngineRequest(f"r{number}", [1], SamplingParams(1), priority=priority))
    run.resume()
    run.core.scheduler.max_num_seqs = 1
    run.run()
    assert list(run.answers) == ["r2", "r0", "r3", "r1"]


# ---- the prefix cache -------------------------------------------------------------------------------------------


def test_a_cleared_pool_finds_nothing_and_holders_keep_their_blocks() -> None:
    pool = BlockPool(8, BLOCK)
    tokens = list(range(3 * BLOCK))
    held = pool.allocate(2)
    parent = pool.register(held[0], pool.match([], 0).parent, tuple(tokens[:BLOCK]))
    idle = pool.allocate(1)
    pool.register(idle[0], pool.match([], 0).parent, tuple(tokens[BLOCK : 2 * BLOCK]))
    pool.free(idle)
    assert pool.clear() == 2
    pool.check([held])
    assert pool.num_free == 6
    assert pool.match(tokens, len(tokens)).block_ids == []
    # The holder goes on, and what it computes from its old blocks is not found either.
    pool.register(held[1], parent, tuple(tokens[BLOCK : 2 * BLOCK]))
    assert pool.match(tokens, len(tokens)).block_ids == []
    pool.free(held)
    pool.check([])
    assert sorted(pool.allocate(8)) == list(range(8)), "no block is lost"


def test_a_first_block_that_was_half_full_when_the_cache_was_cleared_is_not_found() -> None:
    run = History(None, overlap=False)
    prompt = [1] * (BLOCK - 1)
    run.core.add(EngineRequest("old", prompt, SamplingParams(BLOCK)))
    run.step()
    run.reset(reset_running_requests=False)
    run.run()
    assert run.answers["old"] == alone(EngineRequest("old", prompt, SamplingParams(BLOCK)))
    run.core.add(EngineRequest("new", prompt + run.answers["old"][:BLOCK], SamplingParams(1)))
    run.run()
    assert run.core.stats.cached_tokens == 0


def test_running_requests_are_computed_anew_when_asked_for() -> None:
    run = History(None, overlap=True)
    request = EngineRequest("r", list(range(6)), LONG)
    run.core.add(request)
    run.step()
    run.step()
    run.drain()
    done = run.core.scheduler.reset_prefix_cache(reset_running_requests=True)
    run.device.version += 1
    assert (done.num_blocks, done.num_preempted) == (1, 1)
    assert run.core.stats.num_used_blocks == 0
    run.run()
    assert run.answers["r"] == alone(request)
    assert run.core.stats.cached_tokens == 0
