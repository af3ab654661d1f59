"""Where the socket between worker and engine lies, and what killed workers leave."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.engine.socket_folder import MAX_SOCKET_PATH_BYTES, SocketFolder, remove_abandoned
from fastserve.errors import StartupError

HOLD_AND_DIE = """
import os, signal
from fastserve.engine.socket_folder import SocketFolder
folder = SocketFolder({})
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files whose path is short."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_it_is_private_and_leaves_nothing(temporary: Path) -> None:
    folder = SocketFolder({})
    assert folder.path.parent == temporary
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(folder.socket)) <= MAX_SOCKET_PATH_BYTES
    folder.close()
    folder.close()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("unfit", ["long", "missing", "a file"])
def test_an_unfit_folder_for_temporary_files_is_passed_over(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, unfit: str
) -> None:
    runtime = temporary / "run"
    runtime.mkdir()
    bad = temporary / ("x" * 120 if unfit == "long" else "bad")
    if unfit == "long":
        bad.mkdir()
    elif unfit == "a file":
        bad.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(bad))
    folder = SocketFolder({"XDG_RUNTIME_DIR": str(runtime)})
    assert folder.path.parent == runtime
    folder.close()


def test_where_there_is_no_place_the_sentence_names_all(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("x" * 120)))

    def refuse(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(StartupError, match=r"too long by \d+ bytes.*/tmp \(No space left on device\).*TMPDIR"):
        SocketFolder({})


def test_what_a_killed_process_left_is_removed_and_nothing_else(temporary: Path) -> None:
    left = subprocess.run(
        [sys.executable, "-c", HOLD_AND_DIE],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert Path(left).is_dir()
    held = SocketFolder({})  # which cleans up first
    assert not Path(left).exists()
    foreign = temporary / "fastserve-notes"
    foreign.mkdir()
    (foreign / "text").write_text("no lock in here")
    link = temporary / "fastserve-link"
    link.symlink_to(foreign)
    assert remove_abandoned(temporary) == 0
    assert held.path.is_dir()
    assert (foreign / "text").exists()
    held.close()
