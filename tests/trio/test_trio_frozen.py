"""Processes are stopped (SIGSTOP) under load, as on a machine that swaps or during a live migration."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from .clients import Client, Monitor, eventually, steady_load
from .processes import Service, Trio
from .test_trio_survival import (
    Answers,
    Record,
    check,
    gets_traffic,
    handed_on,
    in_the_middle_of_work,
    more_answers,
    texts,
)

__all__ = ["texts"]

LEFT_S = 10.0
"""Seconds: three heartbeats, a poll of the table, a second for the worker's answer, and slack for a busy machine."""


@asynccontextmanager
async def stopped(service: Service) -> AsyncIterator[None]:
    service.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.process.send_signal(signal.SIGCONT)


async def test_requests_leave_a_worker_that_stands_still(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str], record_property: Record
) -> None:
    victim = trio.workers[0]
    async with steady_load(client, texts) as outcomes:
        await more_answers(outcomes, 20)
        before = await handed_on(monitor, trio)
        await in_the_middle_of_work(monitor, client, victim)
        async with stopped(victim):
            began = time.monotonic()

            async def is_left() -> bool:
                return await handed_on(monitor, trio) > before

            await eventually(is_left, "a request is handed on", LEFT_S)
            left_s = time.monotonic() - began
            await more_answers(outcomes, 40)
        await gets_traffic(monitor, victim)
        await more_answers(outcomes, 10)
    cut = check(outcomes, solo_answers, may_cut=True)
    print(f"{len(outcomes)} requests, {cut} streams cut; the first was handed on after {left_s:.1f} s")
    record_property("left_after_s", round(left_s, 1))
    await monitor.all_zero()


async def test_a_controller_that_stands_still_stops_nobody(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str]
) -> None:
    async with steady_load(client, texts) as outcomes:
        await more_answers(outcomes, 20)
        async with stopped(trio.controller):
            await more_answers(outcomes, 60)
            await asyncio.sleep(4)  # longer than the workers' heartbeats may be late
        await more_answers(outcomes, 20)
        for worker in trio.workers:
            await gets_traffic(monitor, worker)
    check(outcomes, solo_answers, may_cut=False)
    await monitor.all_zero()


@pytest.mark.slow
async def test_an_api_server_that_stands_still_goes_on_where_it_was(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, texts: list[str]
) -> None:
    async with steady_load(client, texts) as outcomes:
        await more_answers(outcomes, 20)
        async with stopped(trio.server):
            await asyncio.sleep(4)
        await more_answers(outcomes, 40)
    check(outcomes, solo_answers, may_cut=False)
    await monitor.all_zero()
