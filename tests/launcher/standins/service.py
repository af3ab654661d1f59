"""Common code of the three stand-ins. The file `mood` in the model's folder, or the variable STANDIN_MOOD
(`KIND=MOOD`), makes one misbehave: `die`, `killed`, `mute` (never serves), `stubborn` (ignores SIGTERM), `engine`
(starts a process of its own, which ignores SIGTERM), `late` (dies half a second after it began to serve), `lonely` (a
controller that no worker reaches), `drain` (takes half a second to end after SIGTERM), `chatty` (logs without end),
`unready` (answers `/ready` with 503 for the first two seconds), `loading` (answers while it loads for two seconds)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastserve.config import ServerConfig, WorkerConfig
from fastserve.options import parse_config

ENGINE = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('armed', flush=True); time.sleep(600)"
)


def mood_of(kind: str, config: ServerConfig) -> str:
    name, _, mood = os.environ.get("STANDIN_MOOD", "").partition("=")
    if name == kind:
        return mood
    path = Path(config.model_path) / "mood" if isinstance(config, WorkerConfig) else Path("/nonexistent")
    return path.read_text().strip() if path.is_file() else ""


class Handler(BaseHTTPRequestHandler):
    workers = 9
    ready_at_s = 0.0
    loaded_at_s = 0.0

    def do_GET(self) -> None:
        content: dict[str, Any] = {"workers": self.workers}
        if self.path == "/dump":
            content = {"argv": sys.argv[1:], "env": dict(os.environ)}
        if self.path == "/health" and time.monotonic() < self.loaded_at_s:
            content = {"status": "loading"}
        body = json.dumps(content).encode()
        self.send_response(503 if self.path == "/ready" and time.monotonic() < self.ready_at_s else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def log(level: str, message: str) -> None:
    with contextlib.suppress(OSError):  # as logging does
        print(f"2026-01-01 00:00:00 | {level} | standin | {message}", file=sys.stderr, flush=True)


def drain(number: int, frame: object) -> None:
    log("INFO", "SIGTERM")
    time.sleep(0.5)
    log("INFO", "drained")
    sys.exit(0)


def chat() -> None:
    while True:
        log("INFO", "chatting " * 100)
        time.sleep(0.01)


def run(kind: str, config_class: type[ServerConfig]) -> None:
    config = parse_config(config_class, None, kind, os.environ)
    mood = mood_of(kind, config)
    log("INFO", "loading the weights: 40 %")
    if mood == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mood == "die":
        for number in range(30):
            log("INFO", f"step {number}")
        log("ERROR", "The checkpoint has no config.json.")
        sys.exit(3)
    if mood == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mood == "mute":
        time.sleep(600)
    if mood == "engine":
        engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE)
        assert engine.stdout is not None
        engine.stdout.readline()
        log("INFO", f"engine {engine.pid}")
    if mood == "unready":
        Handler.ready_at_s = time.monotonic() + 2.0
    if mood == "loading":
        Handler.loaded_at_s = time.monotonic() + 2.0
    if mood == "lonely":
        Handler.workers = 0
    if mood == "drain":
        signal.signal(signal.SIGTERM, drain)
    if mood == "chatty":
        threading.Thread(target=chat, daemon=True).start()
    if mood == "late":
        threading.Timer(0.5, os._exit, (7,)).start()
    ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    server = ThreadingHTTPServer((config.host, config.port), Handler)
    wait_s = max(0.0, Handler.loaded_at_s - time.monotonic())
    threading.Timer(wait_s, log, ("INFO", f"Uvicorn running on http://{config.host}:{config.port}")).start()
    server.serve_forever()
