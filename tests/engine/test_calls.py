"""Calls to a real engine whose steps overlap, with calls that only these tests know; and the engine's loop alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
from safetensors.torch import load_file

from fastserve.engine.calls.all_calls import ALL_CALLS
from fastserve.engine.calls.handling import CallContext, CallDispatcher, CallHandler
from fastserve.engine.calls.pause import Pause, Resume
from fastserve.engine.calls.reset_prefix_cache import ResetPrefixCache
from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import (
    Call,
    CallError,
    CallReply,
    CallRequest,
    Event,
    Outputs,
    Shutdown,
    Submit,
    reply_type,
)
from fastserve.engine.process import EngineLoop
from fastserve.engine.profiling import StepProfiler
from fastserve.engine.settings import EngineConfig
from fastserve.errors import EngineDeadError, InvalidRequestError
from tests.worker.engine_contract import request, run, wait_stats

from .conftest import TinyModels
from .engine_with_calls import PROGRAM, Work
from .read_weight import ReadWeight, WeightValues
from .test_scheduler import Clock, Device, alone, make_core

TIMEOUT_S = 2.0
in_module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_models: TinyModels) -> AsyncIterator[EngineProcess]:
    config = EngineConfig(model_dir=tiny_models.path("llama"), device="cpu", max_total_tokens=4096)
    process = EngineProcess(config, timeout_s=TIMEOUT_S, program=PROGRAM)
    await process.start(lambda _: None)
    yield process
    await process.close()


@in_module_loop
async def test_a_weight_is_read_by_name_while_the_engine_serves(engine: EngineProcess, tiny_models: TinyModels) -> None:
    stored = load_file(Path(tiny_models.path("llama")) / "model.safetensors")
    running = asyncio.create_task(run(engine, request(max_tokens=100)))
    # Of a norm, a packed linear layer, and a layer whose weight is stored elsewhere too.
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        read = await engine.call(ReadWeight(name, max_values=20))
        expected = stored[name]
        assert read == WeightValues(tuple(expected.shape), expected.flatten()[:20].float().tolist())
    with pytest.raises(InvalidRequestError, match=r"no weight 'model\.nose\.weight'") as caught:
        await engine.call(ReadWeight("model.nose.weight"))
    assert caught.value.param == "name"
    assert len((await running).token_ids) == 100


@in_module_loop
async def test_calls_between_overlapping_steps_change_no_answer(engine: EngineProcess) -> None:
    def some() -> list[asyncio.Task[Any]]:
        params: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "logprobs": 1}
        return [
            asyncio.create_task(run(engine, request([4, 5, i], seed=i, **params, presence_penalty=i % 2 / 2)))
            for i in range(6)
        ]

    undisturbed = [answer.token_ids for answer in await asyncio.gather(*some())]
    tasks = some()
    num_calls = 0
    while not all(task.done() for task in tasks):
        await engine.call(Pause("keep"))
        await engine.call(ResetPrefixCache(reset_running_requests=num_calls % 2 == 0))
        await engine.call(Resume())
        steps, num_calls = engine.stats.steps, num_calls + 1
        await wait_stats(engine, lambda stats: stats.steps > steps + 3 or not stats.num_running)  # noqa: B023
    assert num_calls > 3
    assert [(await task).token_ids for task in tasks] == undisturbed
    assert engine.stats.preemptions > 0


@in_module_loop
async def test_an_engine_that_works_on_a_call_is_not_taken_for_a_hung_one(engine: EngineProcess) -> None:
    dead = asyncio.create_task(engine.wait_dead())
    working = asyncio.create_task(engine.call(Work(1.5 * TIMEOUT_S, max_silence_s=60)))
    waits = asyncio.create_task(run(engine, request(max_tokens=3)))
    await working
    assert len((await waits).token_ids) == 3
    assert not dead.done()
    dead.cancel()


@in_module_loop
async def test_an_engine_that_hangs_in_a_call_is_killed_and_the_call_fails(engine: EngineProcess) -> None:
    """The last test of this engine."""
    began = time.monotonic()
    hanging = asyncio.create_task(engine.call(Work(60)))
    behind = asyncio.create_task(engine.call(Resume()))
    for call in (hanging, behind):
        with pytest.raises(EngineDeadError, match=r"hung.*--engine-timeout-s"):
            await call
    assert time.monotonic() - began < TIMEOUT_S + 5
    with pytest.raises(EngineDeadError, match="not running"):
        await engine.call(Resume())


# ---- the loop without a process ---------------------------------------------------------------------------------


class Break(Call[None], frozen=True):
    pass


def _break(call: Break, context: CallContext) -> None:
    raise RuntimeError("half of it is done")


def _request(call_id: int, call: Call[Any]) -> CallRequest:
    return CallRequest(call_id, type(call).__name__, msgspec.Raw(msgspec.msgpack.encode(call)))


class Talker(Device):
    """Sends commands to the loop when a step of this number is launched."""

    def __init__(self, socket: zmq.Socket[bytes], script: dict[int, list[Any]]) -> None:
        super().__init__()
        self._socket = socket
        self._script = script

    def launch(self, plan: Any) -> Any:
        for command in self._script.get(len(self.plans), ()):
            self._socket.send(msgspec.msgpack.encode(command))
        return super().launch(plan)


def run_loop(script: dict[int, list[Any]], tmp_path: Path, handlers: Any = ALL_CALLS) -> list[Event]:
    """Events of an engine's loop whose steps overlap. The script's commands of step 0 come before the first step."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as theirs:
        ours.bind("inproc://engine")
        theirs.connect("inproc://engine")
        device = Talker(ours, script)
        for command in script.pop(0):
            ours.send(msgspec.msgpack.encode(command))
        core = make_core(device, None, overlap=True, clock=Clock())
        EngineLoop(core, theirs, StepProfiler(tmp_path), handlers).run()
        events = []
        while ours.poll(0):
            events.append(msgspec.msgpack.decode(ours.recv(), type=Event))
        return events


def test_the_outputs_of_the_step_in_flight_come_before_the_reply(tmp_path: Path) -> None:
    first = request([1], max_tokens=30)
    late = request([2], max_tokens=2)
    script: dict[int, list[Any]] = {
        0: [Submit(first)],
        4: [_request(7, Pause("keep")), Submit(late), _request(8, Resume())],
    }
    script |= {20: [Shutdown()]}
    events = run_loop(script, tmp_path)
    [paused, resumed] = [at for at, event in enumerate(events) if isinstance(event, CallReply)]
    reply = events[paused]
    assert isinstance(reply, CallReply)
    assert (reply.call_id, msgspec.msgpack.decode(reply.reply)) == (
        7,
        {"paused": True, "num_running": 1, "num_waiting": 0, "num_aborted": 0},
    )
    before = [event for event in events[:paused] if isinstance(event, Outputs)]
    tokens = [token for event in before for output in event.outputs for token in output.token_ids]
    # The command is sent when step 4 is launched, which happens while step 3 is in flight: both are committed.
    assert tokens == alone(first)[:5]
    assert before[-1].stats.paused
    between = events[paused + 1 : resumed]
    assert all(isinstance(event, Outputs) and not event.outputs for event in between), "nothing is computed"
    assert not events[resumed - 1].stats.paused  # type: ignore[union-attr]
    after = [output for event in events[resumed:] if isinstance(event, Outputs) for output in event.outputs]
    assert [token for output in after if output.request_id == late.request_id for token in output.token_ids] == alone(
        late
    )


def test_what_a_handler_does_not_expect_ends_the_engine_as_a_step_does(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half of it is done"):
        run_loop({0: [_request(0, Break())]}, tmp_path, [CallHandler(Break, _break)])


@pytest.mark.parametrize(
    ("name", "call", "problem"),
    [
        ("Pause", {"mode": "never"}, "Invalid enum value 'never'"),
        ("StartProfile", {"num_steps": 0}, "num_steps"),
        ("StartProfile", {"num_steps": "many"}, "num_steps"),
        ("ResetPrefixCache", [], "malformed"),
        ("Nothing\n", {}, r"no call Nothing\n; it has"),
    ],
)
def test_a_malformed_call_gets_an_error_and_the_engine_goes_on(
    tmp_path: Path, name: str, call: Any, problem: str
) -> None:
    script = {0: [CallRequest(3, name, msgspec.Raw(msgspec.msgpack.encode(call))), _request(4, Resume()), Shutdown()]}
    [failed, done] = [event for event in run_loop(script, tmp_path) if isinstance(event, CallError | CallReply)]
    assert isinstance(failed, CallError)
    assert failed.call_id == 3
    assert failed.kind in ("InvalidRequestError", "UnsupportedParameterError")
    assert problem in failed.message
    assert isinstance(done, CallReply)


def test_two_calls_of_one_name_are_refused() -> None:
    context: Any = None
    with pytest.raises(ValueError, match="two calls have the name Break"):
        CallDispatcher([CallHandler(Break, _break), CallHandler(Break, lambda call, context: None)], context)


def test_every_call_that_ships_names_its_reply() -> None:
    for handler in ALL_CALLS:
        assert issubclass(reply_type(handler.call_type), msgspec.Struct)
    with pytest.raises(TypeError, match="direct subclass"):
        reply_type(Call)
