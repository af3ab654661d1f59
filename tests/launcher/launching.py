"""Real launches of the stand-in services."""

import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fastserve.launching.processes import SUPERVISOR
from fastserve.launching.run_file import run_files_in
from tests.processes import free_ports, is_alive

HERE = Path(__file__).parent
PATHS = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
LAUNCHER = "from fastserve.launcher import main; main(package='standins')"


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def dump(port: int, host: str = "127.0.0.1") -> dict[str, Any]:
    """`argv` and `env` of a running stand-in."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/dump")
        started_with: dict[str, Any] = json.loads(connection.getresponse().read())
        return started_with
    finally:
        connection.close()


class Sandbox:
    """A folder and free ports for launches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.controller_port, self.server_port, self.worker_port, self.other_port = free_ports(4)

    def launch_real(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the launcher with the real services."""
        ports = ["--controller-port", str(self.controller_port), "--server-port", str(self.server_port)]
        return subprocess.run(
            [sys.executable, "-m", "fastserve.launcher", *ports, *words],
            cwd=self.folder,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def model(self, name: str = "model", mood: str = "") -> Path:
        path = self.folder / name
        path.mkdir(parents=True)
        (path / "mood").write_text(mood)
        return path

    def item(self, model: Path | str, options: str = "", port: int | None = None) -> str:
        return f"{model}@127.0.0.1@{port or self.worker_port}{options}"

    def command(self, *words: str) -> list[str]:
        """Flags in `words` come after the ports of this sandbox, and so override them."""
        flags = [
            *("--controller-host", "127.0.0.1", "--controller-port", str(self.controller_port)),
            *("--server-host", "127.0.0.1", "--server-port", str(self.server_port)),
        ]
        return [sys.executable, "-c", LAUNCHER, *flags, *words]

    def environ(self, **env: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *PATHS]), **env}

    def start_in_shell(self, before: str, *words: str, after: str = "", **env: str) -> "subprocess.Popen[str]":
        """Start the launcher from a shell, with `before` and `after` around its command."""
        return subprocess.Popen(
            ["sh", "-c", f"{before} {shlex.join(self.command(*words))} {after}"],
            cwd=self.folder,
            env=self.environ(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, *words: str, stdout: int = subprocess.PIPE, **env: str) -> "subprocess.Popen[str]":
        # The tests may have been started with SIGINT ignored, as background commands of a shell script are.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                self.command(*words),
                cwd=self.folder,
                env=self.environ(**env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, previous)

    def launch(self, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*words, stdout=subprocess.PIPE, **env)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def shutdown(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fastserve.shutdown", *words]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)

    def services(self) -> dict[str, int]:
        """Process ids by kind, from the run files."""
        return {kind: pid for run in self.runs() for kind, pid in run["pids"].items() if kind != SUPERVISOR}

    def supervisor(self) -> int:
        """Process id of the one supervisor."""
        (run,) = self.runs()
        return int(run["pids"][SUPERVISOR])

    def runs(self) -> list[dict[str, Any]]:
        """The content of the run files, and process ids by kind."""
        runs = [json.loads(file.path.read_text()) for file in run_files_in(self.logs)]
        return [{**run, "pids": {service["kind"]: service["pid"] for service in run["services"]}} for run in runs]

    def strays(self) -> list[int]:
        """Ids of processes that were started in this folder and still run."""
        return [process.pid for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.pid != os.getpid() and process.cwd() == str(self.folder) and is_alive(process.pid)
        except psutil.Error:
            return False

    def clear(self) -> None:
        for pid in self.strays():
            psutil.Process(pid).kill()
