"""One trio for all tests of this folder; before each test the processes that have died are restarted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.keys import CLUSTER

from . import questions
from .clients import Client, Monitor
from .processes import Trio

NUM_QUESTIONS = 200


@pytest.fixture(scope="session")
def running_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    trio = Trio(tmp_path_factory.mktemp("trio"))
    try:
        yield trio
    finally:
        trio.stop()


@pytest.fixture
def trio(running_trio: Trio) -> Trio:
    running_trio.make_whole()
    return running_trio


@pytest.fixture
async def http(trio: Trio) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=CLUSTER) as session:
        yield session


@pytest.fixture
def client(http: aiohttp.ClientSession, trio: Trio) -> Client:
    return Client(http, trio.server.address)


@pytest.fixture
def monitor(http: aiohttp.ClientSession, trio: Trio) -> Monitor:
    return Monitor(http, trio)


@pytest.fixture(scope="session")
def known_answers() -> dict[str, str]:
    """Filled by `solo_answers`."""
    return {}


@pytest.fixture
async def solo_answers(client: Client, known_answers: dict[str, str]) -> dict[str, str]:
    """Two hundred questions, with the model's answer to each when asked alone. Asked once per session.

    How well the model knows when to end is its own tests' business; here an answer that does not end is left out.
    """
    for text in questions.all_questions():
        if len(known_answers) == NUM_QUESTIONS:
            break
        if text not in known_answers:
            outcome = await client.ask(text, stream=False, max_tokens=250)
            assert outcome.is_complete, f"asked alone: {outcome}"
            if outcome.finish_reason == "stop":
                known_answers[text] = outcome.text
    assert len(known_answers) == NUM_QUESTIONS, f"only {len(known_answers)} answers end by themselves"
    return known_answers
