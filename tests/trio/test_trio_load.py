"""Many requests at once: every answer is right, nothing is held afterwards, and requests of absent clients end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import aiohttp
import openai
import pytest

from . import questions
from .clients import MODEL, Client, Monitor, Outcome, chat, eventually
from .processes import Trio

Answers = dict[str, str]
MAX_RSS_MB = 120.0
STOP_S = 0.2
"""Seconds in which the engine has to abort the request of a client that has disconnected."""


async def stream_by_sdk(sdk: openai.AsyncOpenAI, text: str) -> Outcome:
    outcome = Outcome(text, stream=True)
    chunks = await sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], temperature=0, stream=True
    )
    async for chunk in chunks:
        outcome.ids.add(chunk.id)
        outcome.has_data = True
        for choice in chunk.choices:
            outcome.text += choice.delta.content or ""
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
    outcome.is_done = True  # the iteration ended; the SDK hides `[DONE]`
    return outcome


async def test_two_hundred_streams_at_once(
    client: Client,
    monitor: Monitor,
    trio: Trio,
    solo_answers: Answers,
    record_property: Callable[[str, object], None],
) -> None:
    texts = list(solo_answers)
    knowledge = {**questions.sums(), **questions.facts()}
    right = sum(known in solo_answers.get(text, "") for text, known in knowledge.items())
    assert right >= 0.85 * len(knowledge), f"the model itself knows only {right} of {len(knowledge)} answers"
    assert len(set(solo_answers.values())) >= 0.8 * len(texts), "too many equal answers to notice a mixture"

    begin = time.monotonic()
    limits = openai.DefaultAsyncHttpxClient(timeout=120)
    url = trio.server.address + "/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=limits) as sdk:
        outcomes = await asyncio.gather(
            *(stream_by_sdk(sdk, text) for text in texts[::2]),
            *(client.ask(text, stream=True) for text in texts[1::2]),
        )
    took_s = time.monotonic() - begin
    record_property("streams_per_s", round(len(outcomes) / took_s, 1))
    print(f"{len(outcomes)} streams at once took {took_s:.1f} s, {len(outcomes) / took_s:.0f} a second")

    broken = [one for one in outcomes if not one.is_complete or one.finish_reason != "stop"]
    assert not broken, f"{len(broken)} streams were not complete: {broken[:3]}"
    wrong = [
        (one.question, one.text, solo_answers[one.question])
        for one in outcomes
        if one.text != solo_answers[one.question]
    ]
    assert not wrong, f"{len(wrong)} streams differ from the answer to the question asked alone: {wrong[:3]}"
    ids = Counter(one_id for one in outcomes for one_id in one.ids)
    assert len(ids) == len(texts), f"answers share ids: {ids.most_common(3)}"
    shares = await monitor.dispatched()
    assert all(shares.values()), f"a worker took no part: {shares}"
    await monitor.all_zero()


async def ask_and_perhaps_leave(client: Client, text: str, rng: Random) -> Outcome | None:
    """The text; None if the client disconnected before the end."""
    way = rng.choice(("whole", "stream", "leave whole", "leave early", "leave in the middle"))
    if way in ("whole", "stream"):
        return await client.ask(text, stream=way == "stream")
    if way == "leave in the middle":
        outcome = await client.ask(text, stream=True, leave_after=rng.randint(1, 6), ignore_eos=True, max_tokens=60)
        assert outcome.trouble is None, f"before the client left: {outcome}"
        return None
    patience_s = rng.choice((0.0, 0.001, 0.005, 0.02, 0.1)) * rng.random()
    try:
        async with asyncio.timeout(patience_s):
            return await client.ask(text, stream=way == "leave early")
    except TimeoutError:
        return None


async def test_thousand_requests_with_disconnects_leave_nothing(
    client: Client, monitor: Monitor, solo_answers: Answers, record_property: Callable[[str, object], None]
) -> None:
    rng = Random(5)
    texts = [text for text, answer in solo_answers.items() if len(answer) < 80]
    slots = asyncio.Semaphore(64)

    async def one(number: int) -> Outcome | None:
        async with slots:
            return await ask_and_perhaps_leave(client, rng.choice(texts), Random(number))

    begin = time.monotonic()
    outcomes = await asyncio.gather(*(one(number) for number in range(1000)))
    took_s = time.monotonic() - begin
    stayed = [outcome for outcome in outcomes if outcome is not None]
    print(f"1000 requests took {took_s:.1f} s, {len(stayed)} of them to their end")
    record_property("requests_per_s", round(1000 / took_s, 1))

    await monitor.all_zero()
    assert 300 <= len(stayed) <= 700, f"{len(stayed)} of 1000 stayed: not the mixture that was meant"
    failed = [outcome for outcome in stayed if not outcome.is_complete]
    assert not failed, f"{len(failed)} requests failed: {failed[:3]}"
    wrong = [
        (one.question, one.text, solo_answers[one.question]) for one in stayed if one.text != solo_answers[one.question]
    ]
    assert not wrong, f"{len(wrong)} answers differ from the answer to the question asked alone: {wrong[:3]}"


@pytest.mark.parametrize("stream", [True, False])
async def test_generation_stops_when_its_client_leaves(
    trio: Trio, monitor: Monitor, stream: bool, record_property: Callable[[str, object], None]
) -> None:
    """By the engine's counter; the time is taken to when its last growth was seen. A busy machine gets three tries."""
    seen: list[float] = []
    for _ in range(3):
        seen.append(await seconds_to_last_token(trio, monitor, stream))
        await monitor.all_zero()
        if seen[-1] < STOP_S:
            break
    print(f"the engine's counter last grew {seen[-1] * 1000:.0f} ms after the client had left")
    record_property("stopped_after_ms", round(seen[-1] * 1000))
    assert seen[-1] < STOP_S, f"the engine went on for {seen} s after the client had left"


async def seconds_to_last_token(trio: Trio, monitor: Monitor, stream: bool) -> float:
    counter = "fastserve_engine_generation_tokens_total"
    before = {worker.address: (await monitor.metrics(worker.address))[counter] for worker in trio.workers}
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        body = chat("Tell me a story about a fox.", stream=stream, ignore_eos=True, max_tokens=2000)
        asking = asyncio.create_task(session.post(trio.server.address + "/v1/chat/completions", json=body).__aenter__())

        async def busy() -> str:
            for address, count in before.items():
                if (await monitor.metrics(address))[counter] > count + 20:
                    return address
            return ""

        address = await eventually(busy, "a worker generates", 20.0)
        assert asking.done() == stream, "the answer came at the wrong time"
        left = time.monotonic()
        if stream:
            asking.result().close()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    count = (await monitor.metrics(address))[counter]
    last_growth = time.monotonic()
    while time.monotonic() - last_growth < 0.5:
        now = (await monitor.metrics(address))[counter]
        if now > count:
            count, last_growth = now, time.monotonic()
        assert count - before[address] < 1990, "the generation went on to its end"
        await asyncio.sleep(0.005)
    return last_growth - left


async def test_controller_and_server_stay_small(
    trio: Trio, client: Client, record_property: Callable[[str, object], None]
) -> None:
    outcomes = await asyncio.gather(*(client.ask("Hello!", stream=number % 2 == 0) for number in range(100)))
    assert all(outcome.is_complete for outcome in outcomes)
    sizes = {service.name: round(service.rss_mb(), 1) for service in trio.services}
    print(f"resident, in MB: {sizes}")
    record_property("rss_mb", sizes)
    for service in (trio.controller, trio.server):
        assert sizes[service.name] < MAX_RSS_MB, f"{service.name} holds {sizes[service.name]} MB"
