"""Services that died are restarted with exponential backoff; those ended on purpose are not."""

import os
import shlex
import signal
import sys
from pathlib import Path

import psutil

from fastserve.launching.restarts import MAX_PAUSE_S, STABLE_S, Pauses
from tests.processes import is_alive

from .launching import Sandbox, dump, wait_until


def launched(sandbox: Sandbox, *words: str, mood: str = "", **env: str) -> dict[str, int]:
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model(mood=mood)), *words, **env)
    assert result.returncode == 0, result.stderr
    return sandbox.services()


def log_of(sandbox: Sandbox) -> str:
    return (sandbox.logs / "launcher.log").read_text()


def test_pauses_double_up_to_a_minute_and_start_anew_after_five_minutes_of_service() -> None:
    pauses = Pauses()
    assert [pauses.next_s(0.0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, MAX_PAUSE_S]
    assert pauses.next_s(STABLE_S - 1) == MAX_PAUSE_S
    assert [pauses.next_s(STABLE_S), pauses.next_s(0.0)] == [1, 2]


def test_killed_services_come_back_with_their_settings_and_logs(sandbox: Sandbox) -> None:
    pids = launched(sandbox, "--api-keys", "sk-one", mood="engine")
    ports = (sandbox.controller_port, sandbox.worker_port, sandbox.server_port)
    before = [dump(port) for port in ports]
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: log_of(sandbox).count("serves again at") == 3, "three services that serve again")
    assert not set(sandbox.services().values()) & set(pids.values())
    assert [dump(port) for port in ports] == before
    log = log_of(sandbox)
    for kind, pid in pids.items():
        assert f"(process {pid}) was killed by SIGKILL" in log, kind
    assert log.count("It is started again in 1 s.") == 3
    (run,) = sandbox.runs()
    for service in run["services"]:
        served = Path(service["log"]).read_text().count("Uvicorn running on")
        assert served == (0 if service["kind"] == "supervisor" else 2), "the log goes on where it was"
    assert sandbox.shutdown().returncode == 0
    assert sandbox.strays() == [], "the first worker's engine too"


def test_a_service_that_cannot_start_is_tried_again_with_a_growing_pause(sandbox: Sandbox) -> None:
    model = sandbox.model()
    assert sandbox.launch("--model-path-address", sandbox.item(model)).returncode == 0
    pid = sandbox.services()["model_worker"]
    (model / "mood").write_text("die")
    os.kill(pid, signal.SIGKILL)
    line = "ended with exit code 3: The checkpoint has no config.json. It is started again in 2 s."
    wait_until(lambda: line in log_of(sandbox), "a second death", 20.0)
    assert set(sandbox.services()) == {"controller", "openai_api_server"}
    (model / "mood").write_text("")
    wait_until(lambda: "serves again" in log_of(sandbox), "a service that serves again", 20.0)


def test_services_ended_on_purpose_stay_away_and_the_supervisor_ends_with_the_last(sandbox: Sandbox) -> None:
    pids = launched(sandbox)
    supervisor = sandbox.supervisor()
    os.kill(pids["model_worker"], signal.SIGTERM)
    wait_until(lambda: "it was ended on purpose, and is not started again" in log_of(sandbox), "its end")
    assert set(sandbox.services()) == {"controller", "openai_api_server"}
    os.kill(pids["openai_api_server"], signal.SIGINT)
    os.kill(pids["controller"], signal.SIGTERM)
    wait_until(lambda: not is_alive(supervisor), "the supervisor's end")
    assert not list(sandbox.logs.glob("*.json"))
    assert sandbox.strays() == []


def test_a_crash_is_a_crash_whatever_signals_the_parent_ignores(sandbox: Sandbox) -> None:
    """If SIGCHLD is ignored, the system keeps no exit codes."""
    code = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    words = ("--model-path-address", sandbox.item(sandbox.model()))
    process = sandbox.start_in_shell(f"exec {shlex.join([sys.executable, '-c', code])}", *words)
    assert process.wait(timeout=60) == 0
    os.kill(sandbox.services()["model_worker"], signal.SIGKILL)
    wait_until(lambda: "was killed by SIGKILL. It is started again in 1 s." in log_of(sandbox), "the news")
    assert sandbox.shutdown().returncode == 0
    process.communicate(timeout=10)


def test_a_service_that_hangs_after_a_second_signal_stays_away(sandbox: Sandbox) -> None:
    """It is ended by its own SIGALRM (`HARD_EXIT_S`)."""
    pids = launched(sandbox)
    os.kill(pids["model_worker"], signal.SIGALRM)
    wait_until(lambda: "it was ended on purpose, and is not started again" in log_of(sandbox), "its end")


def test_shutdown_of_one_kind_is_not_undone_even_where_it_had_to_kill(sandbox: Sandbox) -> None:
    pids = launched(sandbox, STANDIN_MOOD="openai_api_server=stubborn")
    result = sandbox.shutdown("--serve", "openai_api_server", "--drain-timeout-s", "0.2")
    assert "openai_api_server was killed after 0.2 s" in result.stdout
    wait_until(lambda: "is not started again" in log_of(sandbox), "its end")
    os.kill(pids["controller"], signal.SIGKILL)
    wait_until(lambda: "controller serves again" in log_of(sandbox), "other kinds are started again")
    assert "openai_api_server" not in sandbox.services()
    assert sandbox.shutdown().returncode == 0
    assert sandbox.strays() == []
    assert not list(sandbox.logs.glob("*.json"))


def test_no_restart(sandbox: Sandbox) -> None:
    pids = launched(sandbox, "--no-restart")
    os.kill(pids["model_worker"], signal.SIGKILL)
    wait_until(lambda: "was killed by SIGKILL" in log_of(sandbox), "its end")
    assert "It is not started again (--no-restart)." in log_of(sandbox)
    assert set(sandbox.services()) == {"controller", "openai_api_server"}


def test_services_need_no_supervisor_and_it_is_small(sandbox: Sandbox) -> None:
    pids = launched(sandbox)
    supervisor = psutil.Process(sandbox.supervisor())
    if not any(name.startswith("COVERAGE_") for name in os.environ):  # which would be measured too
        assert supervisor.memory_info().rss < 30e6
    assert not any("-c" in word for word in supervisor.cmdline())
    supervisor.kill()
    wait_until(lambda: not is_alive(supervisor.pid), "its end")
    assert all(is_alive(pid) for pid in pids.values())
    assert sandbox.shutdown().stdout.count("has ended") == 3
    assert sandbox.strays() == []


def test_a_deleted_log_folder_is_made_again_for_a_service_that_comes_back(sandbox: Sandbox) -> None:
    pids = launched(sandbox)
    for path in sandbox.logs.iterdir():
        path.unlink()
    sandbox.logs.rmdir()
    os.kill(pids["controller"], signal.SIGKILL)
    wait_until(lambda: (sandbox.logs / "controller.log").exists(), "a new log", 10.0)
    wait_until(lambda: "Uvicorn running on" in (sandbox.logs / "controller.log").read_text(), "a service", 10.0)
    assert sandbox.shutdown().stdout.count("has ended") == 3
    assert sandbox.strays() == []
