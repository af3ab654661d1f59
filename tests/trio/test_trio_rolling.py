"""Every service is restarted under load, one after the other as in an upgrade, and no client notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .clients import Client, Monitor, Outcome, eventually, steady_load
from .processes import START_TIMEOUT_S, STOP_TIMEOUT_S, Service, Trio
from .test_trio_survival import Answers, check, gets_traffic, more_answers, texts

__all__ = ["texts"]


class FailoverClient(Client):
    """Client of two API servers, like a load balancer: requests that one does not accept go to the other."""

    def __init__(self, http: aiohttp.ClientSession, urls: list[str]) -> None:
        super().__init__(http, urls[0])
        self._others = [Client(http, url) for url in urls[1:]]

    async def ask(self, text: str, *, stream: bool, leave_after: int | None = None, **more: Any) -> Outcome:
        outcome = await super().ask(text, stream=stream, leave_after=leave_after, **more)
        for other in self._others:
            if not _is_unheard(outcome):
                break
            outcome = await other.ask(text, stream=stream, leave_after=leave_after, **more)
        return outcome


def _is_unheard(outcome: Outcome) -> bool:
    """Whether the server did not get the request: it does not listen, or closed an idle connection at that moment."""
    names = ("ClientConnectorError", "ServerDisconnectedError", "ClientOSError", "ConnectionResetError")
    return not outcome.has_data and outcome.trouble is not None and outcome.trouble.startswith(names)


@pytest.fixture
def second_server(trio: Trio, tmp_path: Path) -> Iterator[Service]:
    flags = ["--controller-address", trio.controller.address]
    service = Service("server-2", "openai_api_server", flags, tmp_path)
    service.start()
    service.wait_serving("/ready")
    yield service
    service.stop()


async def restart(service: Service) -> None:
    """Shut it down, and start it again."""
    service.process.terminate()

    async def has_ended() -> bool:
        return not service.running

    await eventually(has_ended, f"{service.name} ends", STOP_TIMEOUT_S)
    assert service.process.returncode == 0, service.log[-2000:]
    service.start()

    async def serves() -> bool:
        return service.serves()

    await eventually(serves, f"{service.name} serves again", START_TIMEOUT_S)


@pytest.mark.slow
async def test_rolling_restart_of_every_service_loses_nothing(
    trio: Trio,
    http: aiohttp.ClientSession,
    monitor: Monitor,
    solo_answers: Answers,
    texts: list[str],
    second_server: Service,
) -> None:
    client = FailoverClient(http, [trio.server.address, second_server.address])
    async with steady_load(client, texts) as outcomes:
        for worker in trio.workers:
            await more_answers(outcomes, 20)
            await restart(worker)
            again = f"{worker.name} is in dispatch again"
            await eventually(lambda address=worker.address: monitor.in_dispatch(address), again, START_TIMEOUT_S)  # type: ignore[misc]
            await gets_traffic(monitor, worker)
        await restart(trio.controller)
        for worker in trio.workers:
            await gets_traffic(monitor, worker)
        for server in (trio.server, second_server):
            await more_answers(outcomes, 20)
            await restart(server)
        await more_answers(outcomes, 20)
    check(outcomes, solo_answers, may_cut=False)
    print(f"{len(outcomes)} requests")
    await monitor.all_zero()
