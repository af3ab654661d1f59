"""Planning a step while another one runs: the same answers, and the device has its next step before Python has the last
one's tokens. Single rules are here; random histories of the scheduler with overlap are in test_scheduler.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zmq
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastserve.engine.contract import (
    Abort,
    EngineRequest,
    Event,
    Outputs,
    RequestOutput,
    SamplingParams,
    Shutdown,
    Submit,
)
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.device import pack, unpack
from fastserve.engine.executor import Executor, PendingStep
from fastserve.engine.plan import StepPlan, StepResult
from fastserve.engine.process import EngineLoop
from fastserve.engine.profiling import StepProfiler
from fastserve.engine.runner import runner as runner_module
from fastserve.engine.sampling import batch as batch_module
from fastserve.engine.sampling import sampler as sampler_module
from fastserve.engine.sampling.order import LOGITS_PROCESSORS, needs_last_token
from fastserve.engine.sampling.processor import SamplingRow
from fastserve.engine.sampling.sampler import Sampler
from fastserve.engine.speculation.draft_budget import DraftBudget
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.speculator import DraftRequest, Speculator
from fastserve.engine.transfers import Readback, to_device

from .conftest import TinyModels
from .test_engine_equality import EOS, Answer, greedy, make_core, random_prompt, run, run_mixture
from .test_logits_processors import EXAMPLES, PROCESSORS
from .test_scheduler import BLOCKS, Clock, Device, Guesser, Memory, Oracle, alone, make_scheduler, step
from .test_scheduler import make_core as make_modelless_core
from .test_speculation_equality import mixed_requests

# ---- what is planned ahead, and what waits ----------------------------------------------------------------------


def overlapped(device: Device, guesser: Guesser | None = None) -> EngineCore:
    return make_modelless_core(device, guesser, overlap=True, clock=Clock())


def finish(core: EngineCore, device: Device) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    while core.has_work:
        for output in step(core, device):
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    return answers


def test_each_step_but_the_first_is_launched_before_the_last_result() -> None:
    device = Device()
    core = overlapped(device)
    requests = [EngineRequest(f"r{index}", [index] * 3, SamplingParams(8)) for index in range(3)]
    for request in requests:
        core.add(request)
    assert core.step() == [], "nothing was running"
    assert len(device.in_flight) == 1
    assert finish(core, device) == {request.request_id: alone(request) for request in requests}
    assert len(device.plans) == 8, "an end by length is known before: no step is run in vain"
    assert device.num_ahead == 7


def test_a_stop_costs_one_row_whose_result_is_dropped() -> None:
    request = EngineRequest("stops", [1, 2, 3], SamplingParams(12))
    expected = alone(request)
    at = next(index for index in range(1, 11) if expected[index] not in expected[:index])
    request = EngineRequest("stops", [1, 2, 3], SamplingParams(12, stop_token_ids=(expected[at],)))
    goes_on = EngineRequest("goes on", [2, 1], SamplingParams(12))
    device = Device()
    core = overlapped(device)
    core.add(request)
    core.add(goes_on)
    answers = finish(core, device)
    assert answers == {"stops": expected[: at + 1], "goes on": alone(goes_on)}
    assert sum(chunk.seq_id == 0 for plan in device.plans for chunk in plan.chunks) == at + 2
    assert core.stats.finished == 2
    assert core.stats.generated_tokens == sum(map(len, answers.values()))
    assert core.scheduler.pool.num_free == BLOCKS


def test_freed_blocks_are_given_away_while_their_old_owner_is_still_computed() -> None:
    """The KV cache is written in the order of the launches, so the new owner's content is what stays."""
    request = EngineRequest("stops", [1] * 30, SamplingParams(9))
    request = EngineRequest("stops", [1] * 30, SamplingParams(9, stop_token_ids=(alone(request)[0],)))
    device = Device()
    core = overlapped(device)
    core.add(request)
    while not device.plans or not device.plans[-1].chunks[0].sample:
        step(core, device)
    heir = EngineRequest("heir", [2] * 30, SamplingParams(4))
    core.add(heir)
    given_away = False
    answers: dict[str, list[int]] = {}
    while core.has_work:
        plans = len(device.plans)
        in_flight = [computed.plan for computed in device.in_flight]
        for output in step(core, device):
            answers.setdefault(output.request_id, []).extend(output.token_ids)
        given_away |= any(new.seq_id == 1 for plan in device.plans[plans:] for new in plan.new) and any(
            chunk.seq_id == 0 for plan in in_flight for chunk in plan.chunks
        )
    assert given_away, "the heir was to begin while the other was in flight"
    assert answers == {"stops": alone(request), "heir": alone(heir)}


def test_requests_that_need_the_last_token_are_waited_for_and_others_are_not() -> None:
    for settings, is_ahead in (
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_tokens": 4, "logit_bias": {3: 1.0}, "top_p": 0.5, "logprobs": 2}, True),
    ):
        device = Device()
        core = overlapped(device)
        params = SamplingParams(6, **settings)
        core.add(EngineRequest("r", [1, 2], params))
        core.add(EngineRequest("plain", [3], SamplingParams(6)))
        finish(core, device)
        assert device.num_ahead == (5 if is_ahead else 0)
        core.add(EngineRequest("plain", [3], SamplingParams(6)))
        finish(core, device)
        assert device.num_ahead == (10 if is_ahead else 5), "once it has ended, the others go ahead again"


def test_nothing_is_preempted_ahead() -> None:
    """Where blocks run out, the step waits for the last one, whose end may leave some."""
    device = Device()
    core = overlapped(device)
    for index in range(3):
        core.add(EngineRequest(f"r{index}", [index] * 9, SamplingParams(30)))
    while core.has_work:
        preemptions, ahead = core.stats.preemptions, device.num_ahead
        step(core, device)
        assert core.stats.preemptions == preemptions or device.num_ahead == ahead
    assert core.stats.preemptions > 0
    assert device.num_ahead > 40


def test_no_plan_is_made_ahead_of_drafts() -> None:
    scheduler, memory = make_scheduler(drafting=Oracle(0)), Memory()
    scheduler.add(EngineRequest("r", [1, 2, 3], SamplingParams(12)))
    plan = scheduler.schedule()
    assert scheduler.can_run_ahead()
    scheduler.commit(plan, memory.execute(plan))
    plan = scheduler.schedule()
    assert plan.has_drafts
    assert not scheduler.can_run_ahead()
    scheduler.commit(plan, memory.execute(plan))
    assert scheduler.can_run_ahead()


def test_an_abort_while_its_step_runs_leaves_nothing_behind() -> None:
    guesser = Guesser(0)
    device = Device()
    core = overlapped(device, guesser)
    stays = EngineRequest("stays", [3], SamplingParams(9))
    for number in range(30):
        core.add(EngineRequest("goes", [1, 2, 3], SamplingParams(20)))
        core.add(stays)
        outputs = [output for _ in range(number % 6 + 1) for output in step(core, device)]
        core.abort("goes")
        answers = finish(core, device)
        assert set(answers) <= {"stays"}
        output_tokens = [token for output in outputs if output.request_id == "stays" for token in output.token_ids]
        assert output_tokens + answers.get("stays", []) == alone(stays)
        assert not device.in_flight
        assert core.scheduler.pool.num_free == BLOCKS
    assert guesser.tried > 0
    assert not guesser.known


# ---- the engine's loop ------------------------------------------------------------------------------------------


class Client(Device):
    """Sends commands to the loop while it has steps in flight."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        super().__init__()
        self._socket = socket

    def say(self, command: Submit | Abort | Shutdown) -> None:
        self._socket.send(msgspec.msgpack.encode(command))

    def launch(self, plan: StepPlan) -> Any:
        number = len(self.plans)
        if number == 3:
            self.say(Submit(EngineRequest("late", [2], SamplingParams(4))))
        elif number == 6:
            self.say(Abort(["endless"]))
        elif number == 9:
            self.say(Shutdown())
        return super().launch(plan)


def test_commands_are_taken_while_a_step_runs(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as theirs:
        ours.bind("inproc://engine")
        theirs.connect("inproc://engine")
        device = Client(ours)
        device.say(Submit(EngineRequest("endless", [1], SamplingParams(30))))
        device.say(Submit(EngineRequest("last", [5], SamplingParams(30))))
        EngineLoop(overlapped(device), theirs, StepProfiler(tmp_path)).run()
        output_tokens: dict[str, list[int]] = {}
        while ours.poll(0):
            event = msgspec.msgpack.decode(ours.recv(), type=Event)
            assert isinstance(event, Outputs)
            for output in event.outputs:
                output_tokens.setdefault(output.request_id, []).extend(output.token_ids)
    ids = [[chunk.seq_id for chunk in plan.chunks] for plan in device.plans]
    # Launched with step 3, while step 2 was running; so step 4 is the next to be planned, before step 3 is done.
    assert ids == [[0, 1]] * 4 + [[0, 1, 2]] * 3 + [[1, 2]] + [[1]] * 2
    assert device.num_ahead == len(ids) - 1
    assert output_tokens["late"] == alone(EngineRequest("late", [2], SamplingParams(4)))
    assert len(output_tokens["endless"]) == 6, "steps 0 to 5; the token of step 6 is not emitted"


# ---- drafts -----------------------------------------------------------------------------------------------------


class Text:
    def __init__(self, seq_id: int) -> None:
        self.seq_id = seq_id
        self.token_ids: list[int] = []


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(("wait_s", "max_waits"), [(0.1, 0.3), (0.5, 0.1)])
def test_waiting_for_drafts_that_are_never_found_is_given_up(count: int, wait_s: float, max_waits: float) -> None:
    """Time lost by waiting is bounded as that of wrong drafts is: by 2 % of all steps, and two steps at the start."""
    speculator = Speculator(NgramProposer(), DraftBudget(lambda tokens: 1.0 + 0.02 * tokens), 8)
    rng = random.Random(0)
    texts: list[DraftRequest] = [Text(seq_id) for seq_id in range(count)]
    waits, steps = 0, 2000
    for _ in range(steps):
        tried: dict[int, tuple[int, int]] = {}
        if speculator.is_worth_waiting(texts):
            waits += 1
            tried = {key: (len(found), 0) for key, found in speculator.draft(texts, [8] * count, 100).items()}
            speculator.charge(wait_s)
        for text in texts:
            text.token_ids.append(rng.randrange(1 << 30))
        speculator.learn(count, tried)
    assert 0 < waits < max_waits * steps
    assert waits * wait_s <= 0.02 * steps * (1.0 + 0.02 * count) + 3 * (1.0 + 0.02 * count)


def test_drafts_that_are_right_are_waited_for() -> None:
    speculator = Speculator(NgramProposer(), DraftBudget(lambda tokens: 1.0 + 0.02 * tokens), 8)
    text = Text(0)
    text.token_ids = [1, 2, 3, 4] * 4
    for _ in range(200):
        assert speculator.is_worth_waiting([text])
        found = speculator.draft([text], [8], 100).get(0, [])
        speculator.charge(0.2)
        speculator.learn(1, {0: (len(found), len(found))} if found else {})
        text.token_ids += found or text.token_ids[-4:-3]
    assert speculator.accepted_tokens > 1000


# ---- real models ------------------------------------------------------------------------------------------------


class LateReadback(Readback):
    """As on a GPU: what was taken stands on the host only once it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._coming: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, 77)
        self._coming.append((host, tensor.clone()))
        return host

    def wait(self) -> None:
        for host, tensor in self._coming:
            host.copy_(tensor)


class Watched:
    """An executor that counts the steps that are launched while another one is in flight."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.num_in_flight = 0
        self.num_ahead = 0

    def launch(self, plan: StepPlan) -> PendingStep:
        self.num_ahead += self.num_in_flight
        self.num_in_flight += 1
        return _WatchedStep(self, self._executor.launch(plan))


class _WatchedStep:
    def __init__(self, watched: Watched, pending: PendingStep) -> None:
        self._watched = watched
        self._pending = pending

    def result(self) -> StepResult:
        self._watched.num_in_flight -= 1
        return self._pending.result()


def watch(core: EngineCore) -> Watched:
    watched = core._executor = Watched(core._executor)
    return watched


@pytest.fixture(autouse=True)
def _late_readback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "Readback", LateReadback)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_random_mixtures_equal_generate(tiny_models: TinyModels, name: str) -> None:
    assert run_mixture(tiny_models, tiny_models.path(name), 4, 0, overlap=True) > 0


def test_alone_equals_generate_and_is_always_one_step_ahead(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    core = make_core(path, overlap=True, speculative_method="off")
    watched = watch(core)
    prompt = list(range(2, 20))
    answers = {"r": Answer()}
    core.add(greedy(prompt, 40, stop=()))
    run(core, answers)
    assert answers["r"].token_ids == tiny_models.reference(path, prompt, 40, [])
    assert core.stats.steps == 40
    assert watched.num_ahead == 39


class Undecided(Speculator):
    """Waits for drafts at random."""

    rng = random.Random(3)

    def is_worth_waiting(self, sequences: Sequence[DraftRequest]) -> bool:
        return self.rng.random() < 0.2


@dataclass
class Received:
    """All outputs of a request, merged."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: RequestOutput) -> None:
        assert self.finish_reason is None
        self.token_ids += output.token_ids
        self.logprobs += [(item.token_id, round(item.logprob, 3)) for item in output.logprobs or []]
        self.prompt_logprobs += [(item.token_id, round(item.logprob, 3)) for item in output.prompt_logprobs or []]
        self.finish_reason = output.finish_reason


@pytest.mark.parametrize("speculates", [False, True])
def test_all_parameters_in_any_mixture_sample_the_same_with_and_without(
    tiny_models: TinyModels, speculates: bool
) -> None:
    """Bias, bans, penalties, filters, logprobs, prompt logprobs, stops, drafts; chunks, preemption, prefix hits."""
    path = tiny_models.path("llama")
    # Some of those with penalties only: while one of them runs, hardly a step is planned ahead.
    mixed = enumerate(mixed_requests(random.Random(8), 60))
    requests = [
        request for index, request in mixed if index < 8 or not needs_last_token(LOGITS_PROCESSORS, request.params)
    ]
    assert any(needs_last_token(LOGITS_PROCESSORS, request.params) for request in requests)
    small: dict[str, Any] = {
        "block_size": 4, "max_num_batched_tokens": 21, "max_total_tokens": 112, "max_model_len": 100,
    }  # fmt: skip
    received: list[dict[str, Received]] = []
    for overlap in (False, True):
        core = make_core(path, overlap=overlap, speculative_method="off", **small)
        if speculates and overlap:
            core._speculator = core.scheduler._drafting = Undecided(NgramProposer(), DraftBudget(lambda _: 1.0), 6)
        watched = watch(core)
        rng = random.Random(5)
        waiting = list(requests)
        received.append({request.request_id: Received() for request in requests})
        while waiting or core.has_work:
            while waiting and rng.random() < 0.5:
                core.add(waiting.pop())
            for output in core.step():
                received[-1][output.request_id].add(output)
            core.scheduler.check()
        assert core.stats.preemptions > 0
        assert core.stats.num_used_blocks == 0
        assert (core.stats.accepted_tokens > 0) == (speculates and overlap)
        assert watched.num_ahead > 20 if overlap else watched.num_ahead == 0
    assert received[0] == received[1]


def test_it_is_off_on_cpus_and_with_a_draft_model(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    cases: list[dict[str, Any]] = [{}, {"overlap": True, "speculative_model_dir": path}]
    for settings in cases:
        core = make_core(path, **settings)
        watched = watch(core)
        answers = {"r": Answer()}
        core.add(greedy([5, 6, 7], 12))
        run(core, answers)
        assert answers["r"].token_ids == tiny_models.reference(path, [5, 6, 7], 12, [EOS])
        assert watched.num_ahead == 0


def test_a_place_is_taken_over_while_its_last_owner_is_in_flight(tiny_models: TinyModels) -> None:
    """One row of the runner's tables: the next sequence is introduced before the last result of the one before."""
    path = tiny_models.path("llama")
    core = make_core(path, overlap=True, max_num_seqs=1, speculative_method="off")
    rng = random.Random(2)
    prompts = {f"r{index}": random_prompt(rng, 160) for index in range(6)}
    # Each ends by a stop token, so its place is free one step before its last row is done.
    expected = {key: tiny_models.reference(path, prompt, 9, []) for key, prompt in prompts.items()}
    answers = {key: Answer() for key in prompts}
    for key, prompt in prompts.items():
        core.add(greedy(prompt, 9, key, (expected[key][5],)))
    run(core, answers)
    for key, answer in answers.items():
        assert answer.token_ids == expected[key][: expected[key].index(expected[key][5]) + 1]


# ---- transfers --------------------------------------------------------------------------------------------------


def test_arrays_of_all_kinds_travel_in_one_piece() -> None:
    rng = np.random.default_rng(0)
    arrays: list[np.typing.NDArray[Any]] = [
        rng.integers(0, 9, (3, 5)).astype(np.int32),
        np.empty((0,), dtype=np.int64),
        rng.random((5, 3, 1)).astype(np.float32),
        rng.random((7, 1)),
        np.empty((2, 0), dtype=np.int32),
        rng.integers(-9, 9, (4, 6))[:, ::2],
    ]
    packed = pack(arrays, pinned=False)
    assert packed.dtype == torch.uint8
    found = unpack(packed, arrays)
    for array, tensor, on_cpu in zip(arrays, found, to_device(arrays, torch.device("cpu")), strict=True):
        assert tensor.dtype == on_cpu.dtype
        assert tensor.tolist() == on_cpu.tolist() == array.tolist()
        assert tensor.numel() == 0 or tensor.data_ptr() % 16 == packed.data_ptr() % 16


# ---- sampling without waiting -----------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed by mypy
    """Fails where anything but the device's own tensors is computed with; those of "meta" have no values to ask for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for item in tree_leaves((args, kwargs or {})):
            assert not isinstance(item, torch.Tensor) or item.device.type == "meta", f"{func} on {item.device}"
        return func(*args, **(kwargs or {}))


class NoReadback(Readback):
    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_sampling_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_meta(arrays: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
        assert device.type == "meta"
        kinds = {
            "int32": torch.int32,
            "int64": torch.int64,
            "float32": torch.float32,
            "float64": torch.float64,
        }
        return [torch.empty(array.shape, dtype=kinds[str(array.dtype)], device=device) for array in arrays]

    monkeypatch.setattr(sampler_module, "device_of", lambda _: SimpleNamespace(has_float64=True))
    monkeypatch.setattr(batch_module, "to_device", to_meta)
    every_kind = [
        SamplingParams(5, temperature=0.0),
        SamplingParams(5),
        SamplingParams(5, top_p=0.9, top_k=3, min_p=0.1),
        SamplingParams(5, typical_p=0.5, logprobs=2),
        *(params for examples in EXAMPLES.values() for params in examples),
    ]
    with OnDevice():
        for batch in (every_kind, every_kind[:1], every_kind[1:2], every_kind[2:3] * 3):
            sampler = Sampler(PROCESSORS)
            rows = [SamplingRow(sampler.start(params, 0, 1), np.array([0, 3], dtype=np.int32)) for params in batch]
            logits = torch.empty(len(rows), 50, device="meta")
            sampled = sampler.sample(logits, rows, NoReadback())
            assert sampled.token_ids.shape == (len(rows),)
            with pytest.raises(RuntimeError):
                sampled.token_ids.tolist()
