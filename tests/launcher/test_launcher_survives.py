"""Whatever happens to the launcher: services either run and are found, or are gone."""

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

from .launching import Place, wait_until

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
def test_a_console_that_cannot_print_stops_no_launch(place: Place, redirection: str, environ: dict[str, str]) -> None:
    model = place.model("\u6a21\u578b \u00fc")
    process = place.start_in_shell("", "--model-path-address", place.item(model), after=redirection, **environ)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    if not redirection:
        shown = "".join(f"\\udc{byte:02x}" if byte > 127 else chr(byte) for byte in os.fsencode(model))
        assert f"worker      http://127.0.0.1:{place.worker_port}  {shown}" in output
    # A pipe lets the shell end before the launcher does.
    wait_until(lambda: set(place.services()) == KINDS, "three listed services")
    wait_until(lambda: "All services serve." in (place.logs / "launcher.log").read_text(), "a finished launch")
    assert all(is_alive(pid) for pid in place.services().values())
    assert f"--model-path={model}" in psutil.Process(place.services()["model_worker"]).cmdline()
    assert place.shutdown().stdout.count("has ended") == 3
    assert place.strays() == []


def test_where_no_file_can_be_written_the_services_run_and_are_found(place: Place) -> None:
    """As on a full disk: no line in a log, and no run file."""
    process = place.start_in_shell("ulimit -f 0;", "--model-path-address", place.item(place.model()))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "cannot be written (File too large): the services run without it." in output
    assert "fastserve is running." in output
    assert place.services() == {}
    ended = place.shutdown()
    assert ended.stdout.count("has ended") == 3
    assert place.strays() == []


def test_folders_that_cannot_be_made_harm_nothing(place: Place) -> None:
    words = ("--model-path-address", place.item(place.model()))
    nowhere = "/dev/null/" + "t" * 200
    key = "a-cluster-key-for-tests-0123456789"
    result = place.launch(*words, TMPDIR=nowhere, HOME=nowhere, XDG_RUNTIME_DIR=nowhere, FASTSERVE_CLUSTER_KEY=key)
    assert result.returncode == 0, result.stderr
    assert place.shutdown().returncode == 0
    assert place.strays() == []


def test_a_working_directory_that_is_gone_is_a_sentence(place: Place) -> None:
    gone = place.folder / "gone"
    for module in ("launcher", "shutdown"):
        gone.mkdir()
        command = f"cd {gone}; rmdir {gone}; exec {sys.executable} -m fastserve.{module}"
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert "--log-dir logs: the folder cannot be found" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_launch_in_the_background_is_ended_by_a_signal(place: Place, number: signal.Signals) -> None:
    """A shell's script has SIGINT ignored for what it starts in the background."""
    model = place.model(mood="mute")
    process = place.start_in_shell("trap '' INT; exec", "--model-path-address", place.item(model))
    pids = wait_until(lambda: len(place.services()) == 3 and place.services(), "three services")
    for pid in (*pids.values(), place.supervisor()):
        ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert ignored is not None
        assert not int(ignored[1], 16) & 1 << (signal.SIGINT - 1), "Ctrl-C by hand must reach a service"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"The launch was ended by {number.name}.\n"
    assert place.strays() == []


def test_a_second_ctrl_c_ends_at_once(place: Place) -> None:
    process = place.start(
        "--model-path-address", place.item(place.model(mood="mute")), STANDIN_MOOD="controller=stubborn"
    )
    wait_until(lambda: len(place.services()) == 3, "three services")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - started < 2.5, "not the three seconds that a stubborn service gets after the first"
    assert process.returncode == 130
    assert place.strays() == []


def test_nohup_goes_on_when_the_terminal_is_closed(place: Place) -> None:
    process = place.start_in_shell("trap '' HUP; exec", "--model-path-address", place.item(place.model()))
    wait_until(lambda: place.services(), "a service")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0
    for pid in place.services().values():
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.3)
    assert all(is_alive(pid) for pid in place.services().values())


def kill_at(place: Place, delay_s: float, *, both: bool) -> str:
    """Kill a launcher, and with it its supervisor if `both`, so long after its start. Returns what it was doing."""
    process = place.start("--model-path-address", place.item(place.folder / "model"))
    time.sleep(delay_s)
    process.kill()
    if both:
        for service in find_services():
            if service.mark.log_dir == str(place.logs) and service.mark.kind == "supervisor":
                for member in service.members:
                    member.kill()
    process.communicate(timeout=10)
    return f"killed after {delay_s:.2f} s"


@pytest.mark.parametrize("both", [False, True])
def test_a_killed_launcher_leaves_nothing_that_shutdown_does_not_find(place: Place, both: bool) -> None:
    place.model()
    number_of_kills = int(os.environ.get("FASTSERVE_KILLS", "2"))
    rng = random.Random(7)
    for round_number in range(number_of_kills):
        state = kill_at(place, 0.1 + (round_number + rng.random()) * 1.5 / number_of_kills, both=both)
        if round_number % 2:
            shutil.rmtree(place.logs, ignore_errors=True)
        result = place.shutdown()
        assert result.returncode == 0, (state, result.stderr)
        # Between its fork and its exec a process carries no mark yet; it ends by itself, as its launcher is gone.
        wait_until(lambda: place.strays() == [], f"nothing left ({state}, {result.stdout})", 3.0)


def test_a_launcher_that_is_killed_takes_the_launch_with_it(place: Place) -> None:
    process = place.start("--model-path-address", place.item(place.model(mood="mute")))
    wait_until(lambda: len(place.services()) == 3, "three services")
    process.kill()
    process.communicate(timeout=10)
    wait_until(lambda: place.strays() == [], "nothing left", 10.0)
    assert not list(place.logs.glob("*.json"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_a_launch_that_waits_for_another_one_is_ended_at_once_by_a_signal(place: Place) -> None:
    model = place.model()
    place.logs.mkdir()
    with locked(place.logs, lambda: None):
        process = place.start("--model-path-address", place.item(model))

        def waits() -> bool:
            return any(os.path.realpath(link) == str(place.logs) for link in Path(f"/proc/{process.pid}/fd").iterdir())

        wait_until(waits, "a launcher that waits")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (130, "", "The launch was ended by SIGINT.\n")
    assert list(place.logs.iterdir()) == []


def test_shutdown_during_a_launch_ends_it(place: Place) -> None:
    process = place.start("--model-path-address", place.item(place.model(mood="mute")))
    wait_until(lambda: len(place.services()) == 3, "three services")
    assert place.shutdown().returncode == 0
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "The launch was ended from outside" in errors
    assert place.strays() == []


def test_a_supervisor_that_dies_during_a_launch_leaves_nothing(place: Place) -> None:
    process = place.start("--model-path-address", place.item(place.model(mood="mute")))
    wait_until(lambda: len(place.services()) == 3, "three services")
    os.kill(place.supervisor(), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "its supervisor is gone" in errors
    assert place.strays() == []


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
