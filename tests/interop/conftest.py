"""Our controller and worker, and FastChat's API server before them, once for all tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import httpx
import pytest

from tests.environments import CannotMakeError

from .fastchat import FastChat, find_or_make
from .processes import Service, wait_until

MODEL = "fastserve-demo"
ALIAS = "qwen-demo"
"""FastChat uses ChatML for names with "qwen", and the demo model was trained with ChatML."""
NAMES = [MODEL, ALIAS]

Start = Callable[..., Service]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start one of our services on a free port; it is stopped at the end."""
    with ExitStack() as stack:

        def start_one(module: str, *arguments: str, **env: str) -> Service:
            command = [sys.executable, "-m", f"fastserve.{module}", "--host", "127.0.0.1", "--port", "0", *arguments]
            # FastChat's programs have no cluster key.
            command.append("--insecure")
            log = tmp_path_factory.mktemp(module) / f"{module}.log"
            return stack.enter_context(Service(command, log, {**os.environ, "OMP_NUM_THREADS": "1", **env}))

        yield start_one


@pytest.fixture(scope="session")
def controller(start: Start) -> str:
    """Its address."""
    return start("controller").address


@pytest.fixture(scope="session")
def worker(start: Start, controller: str) -> str:
    """The address of a worker that is registered with our controller."""
    address = start_worker(start, controller).address
    wait_until(lambda: list_models(controller) == NAMES, "our worker is registered with our controller")
    return address


@pytest.fixture(scope="session")
def fastchat(pytestconfig: pytest.Config) -> FastChat:
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)  # absent with `-p no:cacheprovider`
    if cache is None:
        pytest.skip("no folder for FastChat's environment: pytest's cache is switched off")
    try:
        return find_or_make(os.environ, cache.mkdir("fastchat"))
    except CannotMakeError as error:
        pytest.skip(f"no environment for FastChat: {error}")


@pytest.fixture(scope="session")
def api_server(
    fastchat: FastChat, controller: str, worker: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of FastChat's API server, which asks our controller for workers."""
    arguments = ("--host", "127.0.0.1", "--port", "0", "--controller-address", controller)
    with fastchat_service(fastchat, "openai_api_server", tmp_path_factory.mktemp("api"), *arguments) as service:
        yield service.address


def start_worker(start: Start, controller: str) -> Service:
    """Started with the command line and the environment variable of FastChat's worker."""
    return start(
        "model_worker",
        *("--model-path", MODEL, "--model-names", ",".join(NAMES), "--device", "cpu"),
        *("--controller-address", controller, "--limit-worker-concurrency", "5", "--stream-interval", "2"),
        FASTCHAT_WORKER_HEART_BEAT_INTERVAL="1",
    )


def fastchat_service(fastchat: FastChat, module: str, folder: Path, *arguments: str) -> AbstractContextManager[Service]:
    return Service(fastchat.command(module, *arguments), folder / f"{module}.log", fastchat.env())


def list_models(controller: str) -> list[str]:
    return sorted(httpx.post(f"{controller}/list_models").raise_for_status().json()["models"])
