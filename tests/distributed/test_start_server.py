"""`python -m fastserve.start_server` as a real process, with the documented command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import openai
import psutil

from fastserve.demo import demo_model_path
from tests.processes import free_ports

RANK_MODULES = {"fastserve.engine.process", "fastserve.engine.follower", "fastserve.engine.gang_follower"}


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url + "/status", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server did not start (exit code {process.poll()})")


def test_the_documented_command_serves_openais_and_rtp_llms_routes() -> None:
    (port,) = free_ports(1)
    folder = str(demo_model_path())
    environ = {"TP_SIZE": "2", "WORLD_SIZE": "2", "MODEL_TYPE": "llama", "START_PORT": str(port)}
    environ |= {
        "CHECKPOINT_PATH": folder,
        "TOKENIZER_PATH": folder,
        "CONCURRENCY_LIMIT": "4",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen([sys.executable, "-m", "fastserve.start_server"], env=os.environ | environ)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(process, url)
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            (model,) = client.models.list().data
            messages: Any = [{"role": "user", "content": "What is 7 + 5?"}]
            answer = client.chat.completions.create(model=model.id, messages=messages, temperature=0)
        assert "12" in (answer.choices[0].message.content or "")
        prompt = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
        found = post(url + "/", {"prompt": prompt, "generate_config": {"top_k": 1, "max_new_tokens": 32}})
        assert "12" in found["response"]
        with urllib.request.urlopen(url + "/worker_status", timeout=10) as response:
            assert json.load(response)["available_concurrency"] == 4
        if socket.has_ipv6:
            with urllib.request.urlopen(f"http://[::1]:{port}/health", timeout=10) as response:
                assert response.status == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert len([child for child in children if set(child.cmdline()) & RANK_MODULES]) == 2
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0
