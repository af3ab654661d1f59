"""The launcher killed or cut off: its services either run and are found, or have ended."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastserve.launching.console import Console
from fastserve.launching.log_files import locked
from fastserve.launching.processes import RUN_MARK, SERVICE_MARK, Mark, find_services
from tests.processes import is_alive

from .launching import Sandbox, wait_until

KINDS = {"controller", "model_worker", "openai_api_server"}


@pytest.mark.parametrize(
    ("redirection", "environ"),
    [
        (">/dev/full 2>/dev/full", {}),
        (">&- 2>&- <&-", {}),
        ("| head -1", {}),
        ("", {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
    ],
    ids=["full", "closed", "broken pipe", "ascii"],
)
def test_a_console_that_cannot_print_stops_no_launch(
    sandbox: Sandbox, redirection: str, environ: dict[str, str]
) -> None:
    model = sandbox.model("\u6a21\u578b \u00fc")
    process = sandbox.start_in_shell("", "--model-path-address", sandbox.item(model), after=redirection, **environ)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    if not redirection:
        shown = "".join(f"\\udc{byte:02x}" if byte > 127 else chr(byte) for byte in os.fsencode(model))
        assert f"worker      http://127.0.0.1:{sandbox.worker_port}  {shown}" in output
    # A pipe lets the shell end before the launcher does.
    wait_until(lambda: set(sandbox.services()) == KINDS, "three listed services")
    wait_until(lambda: "All services serve." in (sandbox.logs / "launcher.log").read_text(), "a finished launch")
    assert all(is_alive(pid) for pid in sandbox.services().values())
    assert f"--model-path={model}" in psutil.Process(sandbox.services()["model_worker"]).cmdline()
    assert sandbox.shutdown().stdout.count("has ended") == 3
    assert sandbox.strays() == []


def test_where_no_file_can_be_written_the_services_run_and_are_found(sandbox: Sandbox) -> None:
    """As on a full disk: no log lines and no run file."""
    process = sandbox.start_in_shell("ulimit -f 0;", "--model-path-address", sandbox.item(sandbox.model()))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "cannot be written (File too large): the services run without it." in output
    assert "fastserve is running." in output
    assert sandbox.services() == {}
    ended = sandbox.shutdown()
    assert ended.stdout.count("has ended") == 3
    assert sandbox.strays() == []


def test_folders_that_cannot_be_made_harm_nothing(sandbox: Sandbox) -> None:
    words = ("--model-path-address", sandbox.item(sandbox.model()))
    nowhere = "/dev/null/" + "t" * 200
    key = "a-cluster-key-for-tests-0123456789"
    result = sandbox.launch(*words, TMPDIR=nowhere, HOME=nowhere, XDG_RUNTIME_DIR=nowhere, FASTSERVE_CLUSTER_KEY=key)
    assert result.returncode == 0, result.stderr
    assert sandbox.shutdown().returncode == 0
    assert sandbox.strays() == []


def test_a_working_directory_that_is_gone_is_a_sentence(sandbox: Sandbox) -> None:
    gone = sandbox.folder / "gone"
    for module in ("launcher", "shutdown"):
        gone.mkdir()
        command = f"cd {gone}; rmdir {gone}; exec {sys.executable} -m fastserve.{module}"
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert "--log-dir logs: the folder cannot be found" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_launch_in_the_background_is_ended_by_a_signal(sandbox: Sandbox, number: signal.Signals) -> None:
    """Shell scripts start background commands with SIGINT ignored."""
    model = sandbox.model(mood="mute")
    process = sandbox.start_in_shell("trap '' INT; exec", "--model-path-address", sandbox.item(model))
    pids = wait_until(lambda: len(sandbox.services()) == 3 and sandbox.services(), "three services")
    for pid in (*pids.values(), sandbox.supervisor()):
        ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert ignored is not None
        assert not int(ignored[1], 16) & 1 << (signal.SIGINT - 1), "Ctrl-C by hand must reach a service"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"The launch was ended by {number.name}.\n"
    assert sandbox.strays() == []


def test_a_second_ctrl_c_ends_at_once(sandbox: Sandbox) -> None:
    process = sandbox.start(
        "--model-path-address", sandbox.item(sandbox.model(mood="mute")), STANDIN_MOOD="controller=stubborn"
    )
    wait_until(lambda: len(sandbox.services()) == 3, "three services")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - started < 2.5, "not the three seconds that a stubborn service gets after the first"
    assert process.returncode == 130
    assert sandbox.strays() == []


def test_nohup_goes_on_when_the_terminal_is_closed(sandbox: Sandbox) -> None:
    process = sandbox.start_in_shell("trap '' HUP; exec", "--model-path-address", sandbox.item(sandbox.model()))
    wait_until(lambda: sandbox.services(), "a service")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0
    for pid in sandbox.services().values():
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.3)
    assert all(is_alive(pid) for pid in sandbox.services().values())


def kill_at(sandbox: Sandbox, delay_s: float, *, both: bool) -> str:
    """Kill a launcher `delay_s` after its start, and with `both` its supervisor too. Returns its state at that time."""
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.folder / "model"))
    time.sleep(delay_s)
    process.kill()
    if both:
        for service in find_services():
            if service.mark.log_dir == str(sandbox.logs) and service.mark.kind == "supervisor":
                for member in service.members:
                    member.kill()
    process.communicate(timeout=10)
    return f"killed after {delay_s:.2f} s"


@pytest.mark.parametrize("both", [False, True])
def test_a_killed_launcher_leaves_nothing_that_shutdown_does_not_find(sandbox: Sandbox, both: bool) -> None:
    sandbox.model()
    number_of_kills = int(os.environ.get("FASTSERVE_KILLS", "2"))
    rng = random.Random(7)
    for round_number in range(number_of_kills):
        state = kill_at(sandbox, 0.1 + (round_number + rng.random()) * 1.5 / number_of_kills, both=both)
        if round_number % 2:
            shutil.rmtree(sandbox.logs, ignore_errors=True)
        result = sandbox.shutdown()
        assert result.returncode == 0, (state, result.stderr)
        # Between fork and exec a process has no mark yet; it ends by itself, as its launcher is gone.
        wait_until(lambda: sandbox.strays() == [], f"nothing left ({state}, {result.stdout})", 3.0)


def test_a_launcher_that_is_killed_takes_the_launch_with_it(sandbox: Sandbox) -> None:
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.model(mood="mute")))
    wait_until(lambda: len(sandbox.services()) == 3, "three services")
    process.kill()
    process.communicate(timeout=10)
    wait_until(lambda: sandbox.strays() == [], "nothing left", 10.0)
    assert not list(sandbox.logs.glob("*.json"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_a_launch_that_waits_for_another_one_is_ended_at_once_by_a_signal(sandbox: Sandbox) -> None:
    model = sandbox.model()
    sandbox.logs.mkdir()
    with locked(sandbox.logs, lambda: None):
        process = sandbox.start("--model-path-address", sandbox.item(model))

        def waits() -> bool:
            return any(
                os.path.realpath(link) == str(sandbox.logs) for link in Path(f"/proc/{process.pid}/fd").iterdir()
            )

        wait_until(waits, "a launcher that waits")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (130, "", "The launch was ended by SIGINT.\n")
    assert list(sandbox.logs.iterdir()) == []


def test_shutdown_during_a_launch_ends_it(sandbox: Sandbox) -> None:
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.model(mood="mute")))
    wait_until(lambda: len(sandbox.services()) == 3, "three services")
    assert sandbox.shutdown().returncode == 0
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "The launch was ended from outside" in errors
    assert sandbox.strays() == []


def test_a_supervisor_that_dies_during_a_launch_leaves_nothing(sandbox: Sandbox) -> None:
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.model(mood="mute")))
    wait_until(lambda: len(sandbox.services()) == 3, "three services")
    os.kill(sandbox.supervisor(), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "its supervisor is gone" in errors
    assert sandbox.strays() == []


def test_the_console_never_raises(tmp_path: Path) -> None:
    closed = (tmp_path / "out").open("w")
    closed.close()
    for stream in (None, closed):
        console = Console(stream)
        console.say("line")
        console.show_progress("progress")


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        Console(file).say("worker \x1b]0;evil\x07\r\nsecond line \u202e\udc80")
    assert (tmp_path / "out").read_text(encoding="utf-8") == (
        "worker \\x1b]0;evil\\x07\\r\nsecond line \\u202e\\udc80\n"
    )


def test_broken_marks_are_nobodys() -> None:
    mark = Mark("0123456789ab", "/l", 1, "controller", "controller", 2, "/l/controller.log")
    for service in ("", "[]", "{}", '{"kind": 1}', "\x01"):
        environ = {**os.environ, **mark.environ(), SERVICE_MARK: service}
        with subprocess.Popen([sys.executable, "-c", "input()"], env=environ, stdin=subprocess.PIPE) as process:
            try:
                started = psutil.Process(process.pid)
                wait_until(lambda: started.environ().get(RUN_MARK) == mark.run_id, "an environment")  # noqa: B023
                assert find_services(mark.run_id) == []
            finally:
                process.kill()
