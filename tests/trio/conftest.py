"""One trio for all tests of this folder; each gets it whole again, whatever the one before did to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from . import questions
from .clients import Client, Eyes
from .processes import Trio


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
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


@pytest.fixture
def client(http: aiohttp.ClientSession, trio: Trio) -> Client:
    return Client(http, trio.server.address)


@pytest.fixture
def eyes(http: aiohttp.ClientSession, trio: Trio) -> Eyes:
    return Eyes(http, trio)


@pytest.fixture(scope="session")
def known_answers() -> dict[str, str]:
    """Filled by `solo_answers`."""
    return {}


@pytest.fixture
async def solo_answers(client: Client, known_answers: dict[str, str]) -> dict[str, str]:
    """What the model answers to each question when it is asked nothing else: asked one after the other, once."""
    for text in questions.two_hundred():
        if text not in known_answers:
            outcome = await client.ask(text, stream=False)
            assert outcome.is_complete, f"asked alone: {outcome}"
            assert outcome.finish_reason == "stop", f"asked alone, the answer did not end by itself: {outcome}"
            known_answers[text] = outcome.text
    return known_answers
