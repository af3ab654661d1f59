"""From one command to the first answer: the launcher, the real engine, the demo model, HTTP and the OpenAI SDK."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.processes import free_ports, is_alive

from .clients import MODEL, chat
from .processes import get

QUESTION = "What is 7 + 5?"
FIRST_ANSWER_S = 20.0
ATTEMPTS = 2
"""A busy machine with two cores may be too slow once."""


def strays(folder: Path) -> dict[int, list[str]]:
    """Processes that were started in `folder` and still run."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and is_alive(process.pid):
                found[process.pid] = process.cmdline()
        except psutil.Error:
            continue
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for pid in strays(tmp_path):
        psutil.Process(pid).kill()


def run(folder: Path, module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"fastserve.{module}", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150, check=False)


def post(port: int, body: dict[str, Any]) -> tuple[str, bytes]:
    """Content type and body over plain HTTP."""
    connection = http.client.HTTPConnection("localhost", port, timeout=30)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        assert response.status == 200, f"status {response.status}: {content!r}"
        return response.headers["content-type"], content
    finally:
        connection.close()


def launch_and_ask(folder: Path, ports: list[int]) -> tuple[str, float]:
    """The launcher's output, and the seconds from the command to the first answer."""
    controller, worker, server = ports
    begin = time.monotonic()
    launched = run(
        folder,
        "launcher",
        *("--controller-port", str(controller), "--server-port", str(server)),
        *("--model-path-address", f"{MODEL}@localhost@{worker}"),
    )
    assert launched.returncode == 0, f"the launcher failed: {launched.stderr[-3000:]}"
    serves_s = time.monotonic() - begin

    content_type, body = post(server, chat(QUESTION, stream=False))
    first_answer_s = time.monotonic() - begin
    print(f"the launcher took {serves_s:.1f} s; the first answer came {first_answer_s:.1f} s after the command")
    assert content_type == "application/json"
    assert json.loads(body)["choices"][0]["message"]["content"] == "12"
    return launched.stdout, first_answer_s


def shut_down(folder: Path) -> None:
    ended = run(folder, "shutdown", "--serve", "all")
    assert ended.returncode == 0, ended.stderr
    assert strays(folder) == {}, "the shutdown left processes behind"


def test_one_command_serves(folder: Path, record_property: Callable[[str, object], None]) -> None:
    controller, worker, server = ports = free_ports(3)
    output, first_answer_s = launch_and_ask(folder, ports)
    for _ in range(ATTEMPTS - 1):
        if first_answer_s < FIRST_ANSWER_S:
            break
        shut_down(folder)
        output, first_answer_s = launch_and_ask(folder, ports)
    record_property("first_answer_s", round(first_answer_s, 1))
    assert first_answer_s < FIRST_ANSWER_S

    summary = output.partition("fastserve is running.")[2].split()
    for port in (controller, worker, server):
        assert f"http://localhost:{port}" in summary, f"an address is missing: {output}"
        assert get(f"http://localhost:{port}/health") is not None, f"nothing serves on port {port}"

    content_type, body = post(server, chat(QUESTION, stream=True))
    assert content_type.startswith("text/event-stream")
    assert body.endswith(b"data: [DONE]\n\n"), f"the stream has no end: {body!r}"
    lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == "12"

    with openai.OpenAI(base_url=f"http://localhost:{server}/v1", api_key="none", max_retries=0) as sdk:
        assert [model.id for model in sdk.models.list()] == [MODEL]
        whole = sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}])
        assert whole.choices[0].message.content == "12"
        assert whole.choices[0].finish_reason == "stop"
        chunks = list(
            sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": QUESTION}], stream=True)
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "12"
        assert chunks[-1].choices[0].finish_reason == "stop"

    assert len(strays(folder)) >= 4, "controller, worker, engine and API server should outlive the launcher"
    shut_down(folder)
    assert all(get(f"http://localhost:{port}/health") is None for port in (controller, worker, server))


@pytest.mark.parametrize("entry", ["controller", "openai_api_server"])
def test_entry_imports_no_torch(entry: str) -> None:
    script = (
        f"import fastserve.{entry}, sys\n"
        "heavy = {name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers'}\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
