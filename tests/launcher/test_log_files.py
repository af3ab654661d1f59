"""Logs: kept across starts, bounded, private to their owner, and never written through a link."""

import logging
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastserve.errors import StartupError
from fastserve.launching.log_files import prepare_folder, rotate, rotate_in_use, tail, worker_log_name
from fastserve.launching.plan import parse_item
from fastserve.observability.logging import MAX_LOG_DAYS, OneLineFormatter, setup_logging
from fastserve.observability.private_files import open_for_append, replace_file

from .launching import Sandbox, wait_until

LIMITED_LOGS = ("--log-max-bytes", "10000", "--log-keep", "2")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_log_of_a_crash_survives_the_next_starts(sandbox: Sandbox) -> None:
    words = ("--model-path-address", sandbox.item(sandbox.model()), "--log-keep", "1")
    for number in range(3):
        (sandbox.folder / "model" / "mood").write_text("die" if number == 0 else "")
        result = sandbox.launch(*words)
        assert result.returncode == (1 if number == 0 else 0), result.stderr
        assert sandbox.shutdown().returncode == 0
        crashed = [path.name for path in sorted(sandbox.logs.iterdir()) if "The checkpoint has no" in path.read_text()]
        worker = f"worker_model_127_0_0_1_{sandbox.worker_port}.log"
        assert (worker + ["", ".1", "-"][number] in crashed) is (number < 2)
        assert len(list(sandbox.logs.glob("controller.log*"))) <= 2


def test_logs_and_run_files_are_for_their_owner_alone(sandbox: Sandbox) -> None:
    sandbox.logs.mkdir(mode=0o755)
    (sandbox.logs / "controller.log").write_text("of an older version\n")
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()))
    assert result.returncode == 0, result.stderr
    assert mode(sandbox.logs) == 0o700
    assert {path.name: mode(path) for path in sandbox.logs.iterdir() if path.suffix != ".1"} == {
        path.name: 0o600 for path in sandbox.logs.iterdir() if path.suffix != ".1"
    }
    assert len(list(sandbox.logs.glob("fastserve-*.pid.json"))) == 1


def test_a_folder_that_holds_other_things_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    tmp_path.chmod(0o755)
    assert prepare_folder(tmp_path, "--log-dir x") == []
    assert mode(tmp_path) == 0o755
    tmp_path.chmod(0o777)
    (warning,) = prepare_folder(tmp_path, "--log-dir x")
    assert "other users can write to" in warning
    assert mode(tmp_path) == 0o777


def test_an_empty_folder_that_everybody_uses_is_left_as_it_is(tmp_path: Path) -> None:
    """Like /tmp in a container, where everybody is root."""
    tmp_path.chmod(0o1777)
    assert prepare_folder(tmp_path, "--log-dir x") == []
    assert mode(tmp_path) == 0o1777


@pytest.mark.parametrize("name", ["/proc/nope", "l" * 5000, "a" * 300])
def test_a_folder_that_cannot_be_made_is_a_sentence(name: str) -> None:
    with pytest.raises(StartupError, match="the folder cannot be made"):
        prepare_folder(Path(name), f"--log-dir {name[:20]}")


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device", "folder", "hard link"])
def test_nothing_but_a_file_of_our_own_is_written_to(tmp_path: Path, kind: str) -> None:
    log, victim = tmp_path / "controller.log", tmp_path / "victim"
    if kind != "dangling link":
        victim.write_text("precious")
    if kind == "hard link":
        log.hardlink_to(victim)
    elif kind in ("link", "dangling link", "device"):
        log.symlink_to("/dev/null" if kind == "device" else victim)
    elif kind == "pipe":
        os.mkfifo(log)
    else:
        log.mkdir()
    for refused in (open_for_append, lambda path: rotate(path, 5)):
        with pytest.raises(OSError, match=r"link|such device|directory"):
            refused(log)
    assert victim.exists() is (kind != "dangling link")
    assert not victim.exists() or victim.read_text() == "precious"
    assert not (tmp_path / "controller.log.1").exists()


def test_a_launch_whose_log_is_a_link_is_a_sentence(sandbox: Sandbox) -> None:
    sandbox.logs.mkdir()
    (sandbox.logs / "launcher.log").symlink_to(sandbox.folder / "victim")
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()))
    assert result.returncode == 1
    assert result.stderr == (
        f"The log {sandbox.logs}/launcher.log cannot be written: it is a link, and links are not followed: remove it.\n"
    )
    assert not (sandbox.folder / "victim").exists()
    assert sandbox.strays() == []


def test_another_users_file_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_text("")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user"):
        os.close(open_for_append(path))


def test_a_link_in_place_of_a_draft_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run.tmp").symlink_to(victim)
    replace_file(tmp_path / "run.json", "{}")
    assert (victim.read_text(), (tmp_path / "run.json").read_text()) == ("precious", "{}")


def test_a_log_that_grows_is_rotated_while_it_is_written_to(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    code = "import sys, time\nfor n in range(3000): print(f'line {n:06}', flush=True); time.sleep(0.0002)"
    descriptor = open_for_append(log)
    with subprocess.Popen([sys.executable, "-c", code], stdout=descriptor) as process:
        os.close(descriptor)
        while process.poll() is None:
            if log.stat().st_size > 10_000:
                rotate_in_use(log, keep=5)
            time.sleep(0.01)
    lines = [line for number in (5, 4, 3, 2, 1) for line in tail(tmp_path / f"service.log.{number}")] + tail(log)
    assert lines[-1] == "line 002999"
    assert lines == sorted(set(lines)), "none twice, and in order"
    assert all(re.fullmatch(r"line \d{6}", line) for line in lines[1:])
    assert len(lines) > 2900
    assert mode(tmp_path / "service.log.1") == 0o600


def test_a_launchers_logs_stay_within_their_bounds(sandbox: Sandbox) -> None:
    result = sandbox.launch(
        "--model-path-address", sandbox.item(sandbox.model()), *LIMITED_LOGS, STANDIN_MOOD="controller=chatty"
    )
    assert result.returncode == 0, result.stderr
    wait_until(lambda: (sandbox.logs / "controller.log.2").exists(), "two rotations", 30.0)
    assert sandbox.shutdown().returncode == 0
    assert not (sandbox.logs / "controller.log.3").exists()


def test_fewer_logs_are_kept_when_so_wanted(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for number in range(6):
        log.write_text(str(number))
        rotate(log, keep=4)
    assert [(tmp_path / f"a.log.{number}").read_text() for number in (1, 2, 3, 4)] == ["5", "4", "3", "2"]
    log.write_text("6")
    rotate(log, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log.1"]
    rotate(log, keep=1)
    assert (tmp_path / "a.log.1").read_text() == "6", "an empty log takes no place"
    log.write_text("7")
    rotate(log, keep=10**18)
    assert (tmp_path / "a.log.2").read_text() == "6"


@pytest.mark.parametrize(
    "model",
    ["m" * 4000, "\u6a21" * 200, "..", ".", "a/..", "\x1b[2J\n\r\t", "x\udc80y", "C:\\..\\..", "/", "a b$(x)`y`"],
)
def test_log_names_fit_a_file_system_and_stay_in_their_folder(tmp_path: Path, model: str) -> None:
    name = worker_log_name(model, "127.0.0.1", 20002)
    (tmp_path / f"{name}.10").write_text("x")
    assert (tmp_path / f"{name}.10").parent == tmp_path
    assert name.isprintable()
    assert re.fullmatch(r"worker_.*_20002\.log", name, re.DOTALL)


def test_logs_of_one_launch_never_collide() -> None:
    models = ("m" * 300, "m" * 299 + "n", "a/m", "b/m", "m-x", "m_x", "m@1", "m_1")
    items = [parse_item(f"{model}@{host}@{port}") for model in models for host, port in (("1", 1), ("h", 11))]
    names = {worker_log_name(item.model, item.host, item.port + 100 * n) for n, item in enumerate(items)}
    assert len(names) == len(items)


def formatted(message: str, *args: object, exc_info: bool = False) -> str:
    error = sys.exc_info() if exc_info else None
    record = logging.LogRecord("x", logging.INFO, "f", 1, message, args, error)
    return OneLineFormatter("%(levelname)s | %(message)s").format(record)


def test_a_log_record_is_one_line_whatever_its_arguments_hold() -> None:
    forged = "m\n2026-01-01 00:00:00 | ERROR | x | forged\x1b[2J\u2028\x85\udc80"
    line = formatted("Worker %s registered", forged)
    assert line == "INFO | Worker m\\n2026-01-01 00:00:00 | ERROR | x | forged\\x1b[2J\\u2028\\x85\\udc80 registered"
    assert formatted("caf\u00e9 \u6a21\u578b C:\\new") == "INFO | caf\u00e9 \u6a21\u578b C:\\new"
    try:
        raise ValueError("a\n2026-01-01 | ERROR | x | forged\x1b[0m")
    except ValueError:
        lines = formatted("failed", exc_info=True).split("\n")
    assert lines[0] == "INFO | failed"
    assert lines[1] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") and line.isprintable() for line in lines[1:])


def test_daily_logs_are_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    old, fresh = tmp_path / "model_worker_0123abcd.log", tmp_path / "model_worker_0123abce.log.2026-01-01"
    other = tmp_path / "model_worker_notes.log"
    for path in (old, fresh, other):
        path.write_text("x")
    for path in (old, other):
        os.utime(path, (0, time.time() - (MAX_LOG_DAYS + 1) * 86400))
    try:
        setup_logging("info", "controller", {"LOGDIR": str(tmp_path)})
        logging.getLogger("fastserve").info("hello\nforged")
        assert "hello\\nforged" in (tmp_path / "controller.log").read_text()
        assert mode(tmp_path / "controller.log") == 0o600
        assert (old.exists(), fresh.exists(), other.exists()) == (False, True, True)
        (tmp_path / "openai_api_server.log").symlink_to(other)
        with pytest.raises(StartupError, match="links are not followed"):
            setup_logging("info", "openai_api_server", {"LOGDIR": str(tmp_path)})
    finally:
        for handler in root.handlers:
            if handler not in before:
                handler.close()
        root.handlers[:] = before
        root.setLevel(level)
