from __future__ import annotations

import asyncio
import random

import pytest

from fastserve.errors import OverloadedError
from fastserve.worker.admission import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_full_queue_refuses_at_once() -> None:
    clock = Clock()
    admission = Admission(2, 3, 100, clock)
    release = asyncio.Event()

    async def hold() -> None:
        async with admission.permit():
            await release.wait()

    holders = [asyncio.create_task(hold()) for _ in range(5)]
    await asyncio.sleep(0)
    assert (admission.running, admission.waiting) == (2, 3)
    with pytest.raises(OverloadedError) as caught:
        async with admission.permit():
            pass
    assert caught.value.status == 429
    assert caught.value.headers() == {"Retry-After": "1"}
    release.set()
    await asyncio.gather(*holders)
    assert (admission.running, admission.waiting) == (0, 0)


async def test_retry_after_follows_the_throughput() -> None:
    clock = Clock()
    admission = Admission(1, 10, 100, clock)
    for _ in range(5):  # one request in four seconds
        async with admission.permit():
            clock.now += 4
    async with admission.permit():
        waiting = [asyncio.create_task(admission.permit().__aenter__()) for _ in range(10)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            async with admission.permit():
                pass
        assert caught.value.retry_after_s == pytest.approx(10 / (5 / 16))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_first_come_first_served() -> None:
    admission = Admission(1, 10, 100, Clock())
    order = []

    async def run(number: int) -> None:
        async with admission.permit():
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(run(i) for i in range(8)))
    assert order == list(range(8))


async def test_leases_are_known_while_they_run_or_wait() -> None:
    admission = Admission(1, 10, 100, Clock())
    async with admission.permit("a"):
        waiting = asyncio.create_task(admission.permit("b").__aenter__())
        await asyncio.sleep(0)
        assert sorted(admission.leases) == ["a", "b"]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert admission.leases == ["a"]
    assert admission.leases == []


@pytest.mark.parametrize("seed", range(3))
async def test_random_cancellations_leak_nothing(seed: int) -> None:
    randomly = random.Random(seed)
    admission = Admission(3, 2000, 10**6, Clock())
    max_running = 0

    async def request(number: int) -> None:
        nonlocal max_running
        async with admission.permit(f"lease-{number % 40}", number % 7):
            max_running = max(max_running, admission.running)
            for _ in range(randomly.randrange(4)):
                await asyncio.sleep(0)
            if randomly.random() < 0.2:
                raise ValueError("the request failed")

    tasks = [asyncio.create_task(request(i)) for i in range(1000)]
    while not all(task.done() for task in tasks):
        randomly.choice(tasks).cancel()
        for _ in range(randomly.randrange(3)):
            await asyncio.sleep(0)
    assert (admission.running, admission.waiting, admission.queued_tokens, admission.leases) == (0, 0, 0, [])
    assert max_running <= 3
    async with asyncio.timeout(1), admission.permit():
        assert admission.running == 1


async def test_a_newcomer_waits_while_a_permit_is_handed_over() -> None:
    admission = Admission(1, 10, 100, Clock())
    order: list[str] = []

    async def run(name: str) -> None:
        async with admission.permit():
            order.append(name)

    async with admission.permit():
        first = asyncio.create_task(run("first"))
        await asyncio.sleep(0)
    late = asyncio.create_task(run("late"))
    await asyncio.gather(first, late)
    assert order == ["first", "late"]


async def test_prompts_that_wait_are_bounded_together() -> None:
    admission = Admission(1, 10, 100, Clock())
    release = asyncio.Event()

    async def hold(num_tokens: int) -> None:
        async with admission.permit(num_tokens=num_tokens):
            await release.wait()

    holders = [asyncio.create_task(hold(500))]  # what runs does not count
    await asyncio.sleep(0)
    holders.append(asyncio.create_task(hold(80)))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="--max-queued-tokens") as caught:
        await hold(21)
    assert caught.value.headers().keys() == {"Retry-After"}
    holders.append(asyncio.create_task(hold(20)))
    await asyncio.sleep(0)
    assert (admission.running, admission.waiting, admission.queued_tokens) == (1, 2, 100)
    release.set()
    await asyncio.gather(*holders)
    assert (admission.running, admission.waiting, admission.queued_tokens) == (0, 0, 0)


async def test_a_prompt_longer_than_the_bound_may_wait_alone() -> None:
    admission = Admission(1, 10, 100, Clock())
    async with admission.permit():
        waiting = asyncio.create_task(admission.permit(num_tokens=1000).__aenter__())
        await asyncio.sleep(0)
        assert admission.queued_tokens == 1000
    await waiting


async def test_a_permit_given_to_a_cancelled_request_is_handed_over() -> None:
    admission = Admission(1, 10, 100, Clock())
    ran: list[str] = []

    async def run(name: str) -> None:
        async with admission.permit():
            ran.append(name)

    async with admission.permit():
        first, second = asyncio.create_task(run("first")), asyncio.create_task(run("second"))
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert (ran, admission.running, admission.waiting) == (["second"], 0, 0)
