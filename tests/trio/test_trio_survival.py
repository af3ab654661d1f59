"""Processes die under load, and clients notice only what cannot be avoided."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import psutil
import pytest

from fastserve.protocol import RoutingTable
from tests.processes import is_alive

from .clients import Client, Monitor, Outcome, eventually, steady_load
from .processes import START_TIMEOUT_S, Service, Trio

Answers = dict[str, str]
Record = Callable[[str, object], None]

OUT_OF_DISPATCH_S = 2.0
HEARTBEAT_S = 1.0
SLACK_S = 1.5
"""Seconds that a busy machine may add to a heartbeat interval."""


@pytest.fixture
def texts(solo_answers: Answers) -> list[str]:
    """Long answers, so that a death always interrupts some, and as many short ones."""
    by_length = sorted(solo_answers, key=lambda text: len(solo_answers[text]))
    long, short = by_length[-12:], by_length[::18]
    return [text for pair in zip(long, short, strict=False) for text in pair]


def check(outcomes: Sequence[Outcome], answers: Answers, *, may_cut: bool) -> int:
    """Check that every answer is right; with `may_cut`, streams may end with an error. Returns these."""
    assert outcomes, "no request was made"
    cut = [one for one in outcomes if one.is_cut]
    failed = [one for one in outcomes if not one.is_complete and not (may_cut and one.is_cut)]
    assert not failed, f"{len(failed)} of {len(outcomes)} requests failed: {failed[:3]}"
    wrong = [one for one in outcomes if one.is_complete and one.text != answers[one.question]]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} answers are not the ones to their questions: {wrong[:3]}"
    mixed = [one for one in cut if not answers[one.question].startswith(one.text)]
    assert not mixed, f"what came before the cut is not the answer's beginning: {mixed[:3]}"
    return len(cut)


async def more_answers(outcomes: list[Outcome], count: int) -> None:
    goal = len(outcomes) + count

    async def came() -> bool:
        return len(outcomes) >= goal

    await eventually(came, f"{count} more answers under load", 60.0)


async def in_the_middle_of_work(monitor: Monitor, client: Client, worker: Service) -> None:
    """Wait for a moment at which a client waits for an answer of the worker without having got any data."""

    async def works() -> bool:
        seen = await monitor.metrics(worker.address)
        table = await monitor.table()
        assert table is not None
        elsewhere = sum(row.in_flight for row in table.workers if row.address != worker.address)
        # More requests without streaming than the other workers have requests: at least one of them is here.
        return seen["fastserve_engine_num_requests_running"] >= 2 and client.num_whole > elsewhere

    await eventually(works, f"{worker.name} has requests to lose", 30.0)


async def gets_traffic(monitor: Monitor, worker: Service) -> None:
    before = (await monitor.dispatched())[worker.address]

    async def got() -> bool:
        return (await monitor.dispatched())[worker.address] >= before + 3

    await eventually(got, f"{worker.name} gets requests again", 20.0)


async def handed_on(monitor: Monitor, trio: Trio) -> float:
    """Number of requests that the API server has retried with another worker."""
    return (await monitor.metrics(trio.server.address))["fastserve_gateway_retries_total"]


async def leaves_dispatch(monitor: Monitor, worker: Service, since: float, within_s: float) -> float:
    """Seconds from `since` until the worker is out of dispatch."""

    async def is_out() -> bool:
        return not await monitor.in_dispatch(worker.address)

    await eventually(is_out, f"{worker.name} is out of dispatch", within_s)
    return time.monotonic() - since


@asynccontextmanager
async def lasting_streams(client: Client, count: int) -> AsyncIterator[list[asyncio.Task[Outcome]]]:
    """Requests that run for many seconds; they are cancelled at the end of the block."""
    more = {"ignore_eos": True, "max_tokens": 1900}
    tasks = [asyncio.create_task(client.ask("Say the alphabet.", stream=True, **more)) for _ in range(count)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_worker_killed_under_load(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str], record_property: Record
) -> None:
    victim = trio.workers[0]
    engine = victim.engine_pid()
    async with steady_load(client, texts) as outcomes:
        at_first = await monitor.dispatched()
        await more_answers(outcomes, 60)
        now = await monitor.dispatched()
        shares = {address: now[address] - at_first[address] for address in now}
        assert min(shares.values()) >= 0.05 * sum(shares.values()), f"the load is not shared: {shares}"

        before = await handed_on(monitor, trio)
        await in_the_middle_of_work(monitor, client, victim)
        victim.kill()
        killed = time.monotonic()
        out_s = await leaves_dispatch(monitor, victim, killed, OUT_OF_DISPATCH_S)
        await more_answers(outcomes, 40)
        assert await handed_on(monitor, trio) > before, "no request had to be saved, so nothing was shown"

        async def engine_is_gone() -> bool:
            return not is_alive(engine)

        await eventually(engine_is_gone, "the dead worker's engine process ends", 5.0)

        victim.start()
        again = f"{victim.name} is in dispatch again after a restart"
        await eventually(lambda: monitor.in_dispatch(victim.address), again, START_TIMEOUT_S)
        await gets_traffic(monitor, victim)
    cut = check(outcomes, solo_answers, may_cut=True)
    print(f"{len(outcomes)} requests, {cut} streams cut; out of dispatch after {out_s * 1000:.0f} ms; shares {shares}")
    record_property("out_of_dispatch_ms", round(out_s * 1000))
    await monitor.all_zero()


async def test_controller_killed_under_load(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str], record_property: Record
) -> None:
    async with steady_load(client, texts) as outcomes, lasting_streams(client, 3) as lasting:
        await more_answers(outcomes, 20)
        trio.controller.kill()
        await more_answers(outcomes, 40)

        trio.controller.start()
        await eventually(monitor.table, "the controller answers again", 30.0)
        began = time.monotonic()
        workers = {worker.address for worker in trio.workers}

        async def whole() -> RoutingTable | None:
            table = await monitor.table()
            return table if table is not None and {row.address for row in table.workers} == workers else None

        table = await eventually(whole, "the restarted controller knows both workers", HEARTBEAT_S + SLACK_S)
        whole_s = time.monotonic() - began
        assert table is not None
        early = [task.result() for task in lasting if task.done()]
        assert not early, f"requests that should have outlasted the controller's restart ended: {early}"
        known = sum(row.in_flight for row in table.workers)
        listed = [lease for row in table.workers for lease in row.status.leases]
        assert min(known, len(set(listed))) >= len(lasting), (
            f"{len(lasting)} requests from before the kill still run; the controller counts {known}, leases {listed}"
        )
        await more_answers(outcomes, 20)
    check(outcomes, solo_answers, may_cut=False)
    print(f"{len(outcomes)} requests; the controller was whole {whole_s * 1000:.0f} ms after it served again")
    record_property("whole_after_ms", round(whole_s * 1000))
    await monitor.all_zero()


async def test_worker_told_to_stop_under_load(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str]
) -> None:
    leaving = trio.workers[1]
    async with steady_load(client, texts) as outcomes:
        await more_answers(outcomes, 20)
        await in_the_middle_of_work(monitor, client, leaving)
        leaving.process.terminate()
        asked_at = time.monotonic()
        out_s = await leaves_dispatch(monitor, leaving, asked_at, OUT_OF_DISPATCH_S)

        async def has_ended() -> bool:
            return not leaving.running

        await eventually(has_ended, f"{leaving.name} ends", 40.0)
        ended_s = time.monotonic() - asked_at
        await more_answers(outcomes, 20)
    check(outcomes, solo_answers, may_cut=False)
    # uvicorn drains, and then lets the signal end the process.
    assert leaving.process.returncode == 0, leaving.log[-2000:]
    for step in ("said goodbye to the controller", "Finished server process"):
        assert step in leaving.log, f"its log lacks {step!r}:\n{leaving.log[-2000:]}"
    print(f"{len(outcomes)} requests; out of dispatch after {out_s * 1000:.0f} ms, ended after {ended_s:.1f} s")
    await monitor.all_zero()


async def test_engine_killed_under_load(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str], record_property: Record
) -> None:
    victim = trio.workers[0]
    starts = (await monitor.metrics(victim.address))["fastserve_worker_engine_restarts_total"]
    async with steady_load(client, texts) as outcomes:
        await more_answers(outcomes, 20)
        before = await handed_on(monitor, trio)
        await in_the_middle_of_work(monitor, client, victim)
        engine = victim.engine_pid()
        psutil.Process(engine).kill()
        killed = time.monotonic()

        async def recovered() -> bool:
            seen = await monitor.metrics(victim.address)
            return seen["fastserve_worker_engine_restarts_total"] > starts

        await eventually(recovered, f"{victim.name} has started its engine again", START_TIMEOUT_S)
        recovered_s = time.monotonic() - killed
        assert victim.engine_pid() != engine
        await gets_traffic(monitor, victim)
        await more_answers(outcomes, 20)
    cut = check(outcomes, solo_answers, may_cut=True)
    assert await handed_on(monitor, trio) > before, "no request had to be saved, so nothing was shown"
    print(f"{len(outcomes)} requests, {cut} streams cut; the engine was back after {recovered_s:.1f} s")
    record_property("engine_back_s", round(recovered_s, 1))
    await monitor.all_zero()


async def test_death_of_the_only_worker_is_an_error_in_openais_shape(
    trio: Trio, client: Client, monitor: Monitor
) -> None:
    """The counterpart of the tests above: without another worker, the client gets a typed error at once."""
    only, other = trio.workers
    other.stop()
    asking = [
        asyncio.create_task(client.ask("Say the alphabet.", stream=stream, ignore_eos=True, max_tokens=1900))
        for stream in (True, False)
    ]
    await in_the_middle_of_work(monitor, client, only)
    only.kill()
    streamed, whole = await asyncio.wait_for(asyncio.gather(*asking), 10.0)
    assert streamed.is_cut, f"not a typed error event: {streamed}"
    assert whole.trouble is not None
    assert whole.trouble.startswith("status 503"), whole
    await monitor.all_zero()
