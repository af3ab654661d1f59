"""API keys: from flag and file, reloaded, counted and logged when refused, and with the right to negative priority."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from fastserve.access.api_keys import load_api_keys
from fastserve.access.refusals import RefusedKeys
from fastserve.errors import StartupError
from fastserve.observability.metrics import CollectorRegistry
from tests.access.serving import eventually, run_controller, run_server, run_worker
from tests.access.test_cluster_guard import CHAT, ask, wait_served
from tests.keys import CLUSTER

CHAT_ROUTE = "/v1/chat/completions"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    return path


def write(file: Path, text: str) -> None:
    file.write_text(text)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_come_from_flag_and_file_and_an_empty_source_ends_the_start(file: Path) -> None:
    file.write_text("# ours\n one \n\ntwo priority\none\n")
    keys = load_api_keys(("zero", "one", "three priority"), str(file)).value
    found = {
        name: keys.find(name.encode()) for name in ("zero", "one", "two", "three", "four", "# ours", "", "two priority")
    }
    assert {name: key.may_prioritise for name, key in found.items() if key} == {
        "zero": False,
        "one": False,
        "two": True,
        "three": True,
    }
    assert not load_api_keys(None, None).value
    file.write_text("\n# none\n")
    with pytest.raises(StartupError, match="holds no key"):
        load_api_keys(None, str(file))
    with pytest.raises(StartupError, match="holds no key"):
        load_api_keys((), None)
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        load_api_keys(None, str(file) + "-absent")
    file.write_text("sk-hush extra\n")
    with pytest.raises(StartupError, match="a word that is not known") as refused:
        load_api_keys(None, str(file))
    assert "sk-hush" not in refused.value.message


def test_a_file_that_others_can_read_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("one\n")
    load_api_keys(None, str(file))
    assert not caplog.text
    for mode in (0o640, 0o604):
        caplog.clear()
        file.chmod(mode)
        load_api_keys(None, str(file))
        assert f"can be read by other users (mode {mode:04o}): `chmod 600 {file}`" in caplog.text


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text("one\n")
    keys = load_api_keys(("flag",), str(file))
    before = keys.value
    keys.refresh()
    assert keys.value is before
    file.write_text("two\n")
    keys.refresh()
    assert [bool(keys.value.find(name)) for name in (b"one", b"two", b"flag")] == [False, True, True]
    for broken in (b"", b"\xff\xfe\xff", b"two what\n", b"x" * 2**21):
        caplog.clear()
        file.write_bytes(broken)
        keys.refresh()
        keys.refresh()
        assert keys.value.find(b"two")
        assert caplog.text.count("stay valid") == 1
    file.unlink()
    keys.refresh()
    assert keys.value.find(b"two")
    replacement = file.with_name("new")
    replacement.write_text("six\n")
    os.replace(replacement, file)
    keys.refresh()
    assert keys.value.find(b"six")


async def test_a_server_takes_new_keys_when_the_file_changes_or_on_a_signal(
    http: aiohttp.ClientSession, file: Path
) -> None:
    write(file, "one\n")
    async with run_server("http://127.0.0.1:9", api_keys_file=str(file)) as server:

        async def opens(key: str) -> bool:
            return (await ask(http, "GET", server + "/v1/models", headers=bearer(key)))[0] == 200

        assert await opens("one")
        assert not await opens("two")
        write(file, "two\n")
        await eventually(lambda: opens("two"))
        assert not await opens("one")
        write(file, "six\n")
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: opens("six"), timeout_s=0.9)


async def test_refused_keys_are_counted_and_logged_without_any_part_of_them(
    http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with run_server("http://127.0.0.1:9", api_keys=("sk-right",)) as server:
        sent = bearer("sk-guess-%s-%n-hush") | {"X-Request-Id": "req-from-client"}
        for _ in range(40):
            assert (await ask(http, "GET", server + "/v1/models", headers=sent))[0] == 401
        assert (await ask(http, "GET", server + "/v1/models", headers=bearer("sk-right")))[0] == 200
        async with http.get(server + "/metrics") as response:
            assert "fastserve_refused_api_keys_total 40.0" in await response.text()
    lines = [line for line in caplog.text.splitlines() if "Refused" in line]
    assert 1 <= len(lines) <= 10
    assert "with a wrong api key: from 127.0.0.1, request req-from-client" in lines[0]
    assert "guess" not in caplog.text
    assert "hush" not in caplog.text


def test_the_log_says_how_many_refusals_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    refused = RefusedKeys("api", CollectorRegistry(), lambda: now)
    for _ in range(6):
        refused.note({"client": ("10.0.0.9", 1), "headers": []}, has_key=False)
    now += 2
    refused.note({"client": None, "headers": [(b"x-request-id", b"a\nb\x1b" + b"x" * 500)]}, has_key=True)
    assert [record.getMessage() for record in caplog.records] == [
        "Refused a request with no api key: from 10.0.0.9, request without an id",
        f"Refused a request with a wrong api key: from an unknown address, request 'a\\nb\\x1b{'x' * 124}' "
        "(5 more since the last such line)",
    ]


async def is_ready(http: aiohttp.ClientSession, server: str) -> bool:
    return (await ask(http, "GET", server + "/ready"))[0] == 200


async def test_going_before_others_takes_a_key_with_that_right(http: aiohttp.ClientSession, file: Path) -> None:
    write(file, "plain\nurgent priority\n")
    forged = {"X-Fastserve-May-Prioritise": "1"}

    async def priority(url: str, value: int, headers: dict[str, str]) -> tuple[int, str | None]:
        return await ask(http, "POST", url + CHAT_ROUTE, json=CHAT | {"priority": value}, headers=headers)

    denied = (403, "permission_denied")
    async with (
        run_controller() as controller,
        run_worker(controller) as worker,
        run_server(controller, api_keys_file=str(file)) as guarded,
        run_server(controller) as open_to_all,
    ):
        await wait_served(http, open_to_all)
        assert await priority(guarded, -5, bearer("urgent")) == (200, None)
        assert await priority(guarded, -5, bearer("plain")) == denied
        assert await priority(guarded, -5, bearer("plain") | forged) == denied
        for value in (0, 5):
            assert await priority(guarded, value, bearer("plain")) == (200, None)
        assert await priority(open_to_all, -5, {}) == (200, None), "without keys on loopback everybody may"
        assert await priority(worker, -5, CLUSTER) == denied
        assert await priority(worker, -5, CLUSTER | forged) == (200, None), "who has the cluster key is believed"
    async with (
        run_controller(insecure=True) as controller,
        run_worker(controller, insecure=True) as worker,
        run_server(controller, insecure=True, api_keys_file=str(file)) as guarded,
    ):
        await eventually(lambda: is_ready(http, guarded))
        assert await priority(guarded, -5, bearer("urgent")) == (200, None)
        assert await priority(guarded, -5, bearer("plain")) == denied, "keys of clients count without a cluster key too"
        assert await priority(worker, -5, {}) == (200, None)
    async with run_worker(api_keys_file=str(file)) as alone:
        assert await priority(alone, -5, bearer("urgent")) == (200, None)
        assert await priority(alone, -5, bearer("plain") | forged) == denied
    async with run_worker() as alone:
        assert await priority(alone, -5, {}) == (200, None)
        assert await priority(alone, -5, {"X-Forwarded-For": "127.0.0.1"}) == denied, "a proxy speaks for strangers"
    async with run_worker(host="0.0.0.0") as alone:
        assert await priority(alone, -5, forged) == denied, "beyond loopback nobody may without a key"
        assert await priority(alone, 5, {}) == (200, None)
