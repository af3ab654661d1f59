"""The shutdown command: ends what launchers started, and nothing else."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fastserve.config import ShutdownConfig
from fastserve.errors import StartupError
from fastserve.launching.console import Console
from fastserve.launching.processes import RUN_MARK, SERVICE_MARK, SUPERVISOR, find_services
from fastserve.launching.run_file import ListedService, RunFile
from fastserve.shutdown import shut_down
from tests.processes import is_alive

from .launching import Sandbox, wait_until


def launched(sandbox: Sandbox, *words: str, mood: str = "", **env: str) -> dict[str, int]:
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model(mood=mood)), *words, **env)
    assert result.returncode == 0, result.stderr
    return sandbox.services()


def test_all_in_the_order_that_lets_requests_end(sandbox: Sandbox) -> None:
    pids = launched(sandbox)
    result = sandbox.shutdown()
    assert result.returncode == 0, result.stderr
    ended = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("has ended")]
    assert ended == ["openai_api_server", "model_worker", "controller"]
    assert not any(is_alive(pid) for pid in pids.values())
    assert not list(sandbox.logs.glob("*.json"))


def test_nothing_running_is_no_error(sandbox: Sandbox) -> None:
    for _ in range(2):
        result = sandbox.shutdown()
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Nothing to shut down: no service of a launch in logs runs.\n")
        sandbox.logs.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("kind", "flag"), [("controller", "--serve"), ("model_worker", "--down"), ("openai_api_server", "--serve")]
)
def test_one_kind(sandbox: Sandbox, kind: str, flag: str) -> None:
    pids = launched(sandbox)
    assert sandbox.shutdown(flag, kind).returncode == 0
    assert {name for name, pid in pids.items() if not is_alive(pid)} == {kind}
    wait_until(lambda: set(sandbox.services()) == set(pids) - {kind}, "the run file without what was ended")
    again = sandbox.shutdown(flag, kind)
    assert again.returncode == 0
    assert again.stdout.startswith(f"Nothing to shut down: no {kind} of a launch in logs runs.\n")


def test_second_launch_beside_the_first(sandbox: Sandbox) -> None:
    first = launched(sandbox)
    beside = Sandbox(sandbox.folder)
    result = beside.launch("--model-path-address", beside.item("model"))
    assert result.returncode == 0, result.stderr
    runs = {run["server_port"]: run for run in sandbox.runs()}
    assert set(runs) == {sandbox.server_port, beside.server_port}
    logs = [service["log"] for run in runs.values() for service in run["services"]]
    assert len(set(logs)) == 8
    second = runs[beside.server_port]["pids"]

    assert sandbox.shutdown("--server-port", str(beside.server_port)).returncode == 0
    assert not any(is_alive(pid) for pid in second.values())
    assert all(is_alive(pid) for pid in first.values())
    assert beside.launch("--model-path-address", beside.item("model")).returncode == 0
    assert sandbox.shutdown().returncode == 0
    assert sandbox.strays() == []


def test_stubborn_service_is_killed_with_its_engine_after_the_drain(sandbox: Sandbox) -> None:
    launched(sandbox, mood="engine", STANDIN_MOOD="openai_api_server=stubborn")
    log = sandbox.logs / f"worker_model_127_0_0_1_{sandbox.worker_port}.log"
    found = re.search(r"engine (\d+)", log.read_text())
    assert found is not None
    engine = int(found[1])
    assert is_alive(engine)
    started = time.monotonic()
    result = sandbox.shutdown("--drain-timeout-s", "0.5")
    assert result.returncode == 0, result.stderr
    assert "openai_api_server was killed after 0.5 s" in result.stdout
    assert time.monotonic() - started < 20
    assert not is_alive(engine)
    assert sandbox.strays() == []


def test_engine_of_a_worker_that_died_is_found(sandbox: Sandbox) -> None:
    pids = launched(sandbox, "--no-restart", mood="engine")
    psutil.Process(pids["model_worker"]).kill()
    wait_until(lambda: not is_alive(pids["model_worker"]), "the worker's end")
    assert len(sandbox.strays()) == 4
    assert sandbox.shutdown("--serve", "model_worker").returncode == 0
    assert len(sandbox.strays()) == 3


def test_recycled_process_id_is_left_alone(sandbox: Sandbox) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        try:
            sandbox.logs.mkdir()
            file = RunFile(sandbox.logs, 8888, "0123456789ab")
            file.write([ListedService("controller", "controller", stranger.pid, 21001, "controller.log")])
            result = sandbox.shutdown()
            assert result.returncode == 0, result.stderr
            assert "Nothing to shut down" in result.stdout
            assert stranger.poll() is None
            assert not list(sandbox.logs.glob("*.json"))
        finally:
            stranger.kill()


@pytest.mark.parametrize("damage", ["deleted folder", "moved folder", "broken file", "link"])
def test_services_are_ended_whatever_became_of_the_run_file(sandbox: Sandbox, damage: str) -> None:
    pids = launched(sandbox)
    (path,) = sandbox.logs.glob("fastserve-*.pid.json")
    words: list[str] = []
    if damage == "deleted folder":
        shutil.rmtree(sandbox.logs)
    elif damage == "moved folder":
        sandbox.logs.rename(sandbox.folder / "old logs")
        words = ["--log-dir", "old logs"]
    elif damage == "broken file":
        path.write_text(path.read_text()[:40])
    else:
        path.unlink()
        path.symlink_to("/dev/zero")
    result = sandbox.shutdown(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("has ended") == 3
    assert not any(is_alive(pid) for pid in pids.values())
    assert sandbox.strays() == []
    assert not list(sandbox.folder.glob("*/*.json"))


@pytest.mark.parametrize("damage", ["none", "deleted folder"])
def test_services_of_an_earlier_version_are_found(sandbox: Sandbox, damage: str) -> None:
    """Their environment has the launch's id, but no mark."""
    run_id = "0123456789ab"
    ports = {
        "controller": sandbox.controller_port,
        "model_worker": sandbox.worker_port,
        "openai_api_server": sandbox.server_port,
    }
    sandbox.logs.mkdir()
    RunFile(sandbox.logs, sandbox.server_port, run_id).write([])
    model = sandbox.model(mood="engine")
    for kind, port in ports.items():
        with (sandbox.logs / f"{kind}.log").open("wb") as log:
            words = [f"--port={port}", *([f"--model-path={model}"] if kind == "model_worker" else [])]
            environ = {name: value for name, value in sandbox.environ().items() if name != SERVICE_MARK}
            subprocess.Popen(
                [sys.executable, "-m", f"standins.{kind}", *words],
                cwd=sandbox.folder,
                env={**environ, RUN_MARK: run_id},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    for kind in ports:
        log_file = sandbox.logs / f"{kind}.log"
        wait_until(lambda: "Uvicorn running on" in log_file.read_text(), f"the {kind}")  # noqa: B023
    assert len(sandbox.strays()) == 4
    refused = sandbox.launch("--model-path-address", sandbox.item(model))
    assert f"is in use by the controller of an earlier launch (process {min(sandbox.strays())})" in refused.stderr
    if damage == "none":
        assert "Nothing" in sandbox.shutdown("--server-port", "1").stdout
        ended = sandbox.shutdown("--server-port", str(sandbox.server_port))
    else:
        shutil.rmtree(sandbox.logs)
        ended = sandbox.shutdown()
    shown = [line.split()[0] for line in ended.stdout.splitlines() if line.endswith("has ended")]
    assert shown == ["openai_api_server", "model_worker", "controller"]
    assert sandbox.strays() == [], "the engine too"
    assert not list(sandbox.folder.glob("*/*.json"))


def test_services_are_ended_though_nothing_can_be_printed(sandbox: Sandbox) -> None:
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model("\u6a21\u578b")))
    assert result.returncode == 0, result.stderr
    run = [sys.executable, "-m", "fastserve.shutdown", "--serve"]
    environ = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for kind, redirections in {
        "model_worker": "",
        "openai_api_server": ">/dev/full 2>/dev/full",
        "controller": ">&- 2>&- <&-",
    }.items():
        command = f"{shlex.join([*run, kind])} {redirections}"
        process = subprocess.run(
            command, shell=True, cwd=sandbox.folder, env=environ, capture_output=True, timeout=30, check=False
        )
        assert (process.returncode, process.stderr) == (0, b"")
        wait_until(lambda: kind not in sandbox.services(), f"the end of the {kind}")  # noqa: B023
    assert sandbox.launch("--model-path-address", sandbox.item("\u6a21\u578b")).returncode == 0
    with subprocess.Popen([*run, "all"], cwd=sandbox.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as piped:
        assert piped.stdout is not None
        piped.stdout.close()
        assert piped.stderr is not None
        assert piped.stderr.read() == b""
    assert piped.returncode == 0
    wait_until(lambda: sandbox.strays() == [], "nothing left")


def test_another_folder_says_where_it_looked_and_what_runs_elsewhere(sandbox: Sandbox, tmp_path: Path) -> None:
    launched(sandbox)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "fastserve.shutdown"]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0
    assert f"Looked for launches that log to {elsewhere}/logs. Others run:" in result.stdout
    line = next(line for line in result.stdout.splitlines() if str(sandbox.logs) in line)
    assert len(sandbox.services()) == 3
    again = subprocess.run([*command, *line.split()], cwd=elsewhere, timeout=30, check=False)
    assert again.returncode == 0
    assert sandbox.strays() == []


def test_launches_at_the_same_time_have_logs_of_their_own(sandbox: Sandbox) -> None:
    model = sandbox.model()
    sandboxes = [Sandbox(sandbox.folder) for _ in range(3)]
    launches = [here.start("--model-path-address", here.item(model)) for here in sandboxes]
    errors = [process.communicate(timeout=60)[1] for process in launches]
    assert errors == ["", "", ""]
    logs = [service["log"] for run in sandbox.runs() for service in run["services"]]
    assert len(logs) == len(set(logs)) == 12
    assert sandbox.shutdown().stdout.count("has ended") == 9
    assert sandbox.strays() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
@pytest.mark.parametrize("folder_mode", [0o700, 0o755])
def test_another_users_launch_is_named_and_left_alone(sandbox: Sandbox, folder_mode: int) -> None:
    launched(sandbox)
    sandbox.logs.chmod(folder_mode)
    for folder in [sandbox.folder, *sandbox.folder.parents[:-2]]:
        folder.chmod(0o755)
    with pytest.raises(StartupError, match="run the shutdown as the user who started the launch"):
        as_nobody(lambda: shut_down(ShutdownConfig(log_dir=str(sandbox.logs)), Console(None)))
    assert len(sandbox.services()) == 3
    assert all(is_alive(pid) for pid in sandbox.services().values())


def as_nobody(action: Callable[[], None]) -> None:
    os.seteuid(65534)
    try:
        action()
    finally:
        os.seteuid(0)


def test_shutdowns_side_by_side_leave_nothing_and_cut_no_drain(sandbox: Sandbox) -> None:
    launched(sandbox, STANDIN_MOOD="openai_api_server=drain")
    command = [sys.executable, "-m", "fastserve.shutdown"]
    both = [subprocess.Popen(command, cwd=sandbox.folder, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("Nothing to shut down" in output for output in outputs) == [False, True]
    assert sandbox.strays() == []
    log = (sandbox.logs / "openai_api_server.log").read_text()
    assert log.count("SIGTERM") == 1, "the second shutdown must not cut the drain short"
    assert "drained" in log


@pytest.mark.slow
def test_each_service_gets_its_own_time_to_drain(sandbox: Sandbox) -> None:
    item = sandbox.item(sandbox.model(mood="stubborn"), "?drain-timeout-s=0.5")
    result = sandbox.launch("--drain-timeout-s", "60", "--model-path-address", item)
    assert result.returncode == 0, result.stderr
    marks = [service.mark for service in find_services() if service.mark.log_dir == str(sandbox.logs)]
    assert {mark.kind: mark.drain_timeout_s for mark in marks if mark.kind != SUPERVISOR} == {
        "controller": 60.0,
        "model_worker": 0.5,
        "openai_api_server": 60.0,
    }
    ended = sandbox.shutdown()
    assert "was killed after 5.5 s" in ended.stdout
    assert ended.stdout.count("has ended") == 2
    assert sandbox.strays() == []


def test_a_closed_terminal_does_not_stop_a_shutdown_and_ctrl_c_leaves_the_rest_to_be_found(sandbox: Sandbox) -> None:
    pids = launched(sandbox, STANDIN_MOOD="openai_api_server=drain")
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
               "from fastserve.shutdown import main; main([])"]  # fmt: skip
    for number, code in ((signal.SIGINT, 130), (signal.SIGHUP, 0)):
        process = subprocess.Popen(
            command, cwd=sandbox.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Ending")
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in errors
        if number == signal.SIGINT:
            assert "Run the shutdown again" in errors
            assert is_alive(pids["controller"])
    assert sandbox.strays() == []
