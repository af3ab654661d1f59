"""Services started by hand on one machine need no key setting; beyond it they do not start without a key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from fastserve.access.cluster_key import ENV_CLUSTER_KEY, find_or_make, user_key_path
from tests.access.serving import eventually
from tests.access.test_cluster_guard import CHAT, ask
from tests.processes import free_ports

Start = Callable[..., "subprocess.Popen[bytes]"]
SECRETS = {"FASTSERVE_ADMIN_KEY": "an-admin-key-0123456789", "FASTSERVE_API_KEYS": "sk-client"}


@contextmanager
def starting(environ: dict[str, str], folder: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(module: str, *argv: str, **env: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"fastserve.{module}", *argv]
        with (folder / f"{module}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environ | env, stdin=subprocess.DEVNULL, stderr=log))
        return started[-1]

    try:
        yield start
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(20)


async def test_three_services_started_side_by_side_find_each_others_key(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != ENV_CLUSTER_KEY}
    # Not HOME: the engine's compiled kernels are kept there.
    environ |= {"XDG_CONFIG_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    controller, worker, server = free_ports(3)
    to_controller = f"--controller-address=http://localhost:{controller}"
    with starting(environ, tmp_path) as start:
        start("controller", f"--port={controller}")
        model = start(
            "model_worker", f"--port={worker}", to_controller, "--device=cpu", "--max-total-tokens=4096", **SECRETS
        )
        start("openai_api_server", f"--port={server}", to_controller)
        async with aiohttp.ClientSession() as http:
            url = f"http://localhost:{server}/v1/chat/completions"

            async def answers() -> bool:
                try:
                    return (await ask(http, "POST", url, json=CHAT))[0] == 200
                except aiohttp.ClientError:
                    return False

            await eventually(answers, timeout_s=60)
        path = user_key_path(environ)
        key = find_or_make(environ).current
        for name in ("controller", "model_worker", "openai_api_server"):
            log = (tmp_path / f"{name}.log").read_text()
            assert log.count(str(path)) == 1, "one line says where the key lies"
            assert key not in log
        [engine] = psutil.Process(model.pid).children()
        assert not {ENV_CLUSTER_KEY, *SECRETS} & set(engine.environ()), "the engine's process has no use for keys"


@pytest.mark.parametrize("service", ["model_worker", "openai_api_server"])
def test_an_address_that_is_none_is_named_before_a_key_is_asked_for(service: str) -> None:
    command = [sys.executable, "-m", f"fastserve.{service}", "--port=0", "--controller-address=localhost:21001"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "--controller-address localhost:21001 is no address of a service" in ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("controller", "--host=0.0.0.0"),
        ("model_worker", "--engine=fake", "--controller-address=http://192.0.2.1:21001"),
        ("openai_api_server", "--controller-address=http://controller.example:21001"),
    ],
    ids=lambda words: " ".join(words),
)
def test_beyond_the_machine_they_say_how_to_make_a_key_and_end(words: tuple[str, ...], tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != ENV_CLUSTER_KEY} | {"HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", f"fastserve.{words[0]}", "--port=0", *words[1:]],
        env=environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    [line] = ended.stderr.strip().splitlines()
    for part in (
        "need a cluster key",
        "secrets.token_urlsafe(32)",
        "--cluster-key-file",
        ENV_CLUSTER_KEY,
        "--insecure",
    ):
        assert part in line
    assert not list(tmp_path.iterdir())
