"""Stand-in services, shared by tests that do not end them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.wire import Service, StartService, wait_until

STANDIN = Path(__file__).with_name("standin.py")


@pytest.fixture(scope="session")
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Start a stand-in with the given flags; `max_files`: its soft and hard limit of open files."""
    running: list[Service] = []

    def start(*flags: str, max_files: int | None = None, env: dict[str, str] | None = None) -> Service:
        log = tmp_path_factory.mktemp("standin") / "log"

        def limit_files() -> None:
            if max_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, str(STANDIN), "--host", "127.0.0.1", "--port", "0", *flags],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                preexec_fn=limit_files,
                env={**os.environ, **(env or {})},
            )
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.strip(), log.read_text()
        service = Service(process, int(first), log)
        running.append(service)
        wait_until(lambda: "Uvicorn running on" in service.log, "the stand-in serves")
        return service

    yield start
    for service in running:
        service.process.kill()
        service.process.wait()
        if service.process.stdout is not None:
            service.process.stdout.close()


@pytest.fixture(scope="session")
def impatient(start_service: StartService) -> Service:
    """A service with short deadlines, shared by all tests that do not end it."""
    return start_service(
        *(
            "--head-timeout-s",
            "0.5",
            "--body-timeout-s",
            "0.7",
            "--keep-alive-timeout-s",
            "1",
            "--write-timeout-s",
            "0.7",
        ),
        *("--max-body-bytes", "100000", "--max-buffered-bytes", "250000"),
    )
