"""Where the CPU kernels are kept: also without a home to write to, and never where others could change them."""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from fastserve.engine import cache_folder
from fastserve.engine.kernels import build


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files; the user's cache is a file, so nothing can be made below it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    # Compiling the real source takes long, and what it says does not matter here.
    source = tmp_path / "cpu.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "_SOURCE", source)
    return folder


def built_in(folder: Path) -> list[Path]:
    return [library.parent for library in folder.rglob("*.so")]


def test_without_a_writable_cache_the_kernels_are_built_among_the_temporary_files(
    temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = build.build_library("float32")
    assert library is not None
    assert library.answer() == 42
    [folder] = built_in(temporary)
    assert folder == cache_folder.private_temporary() / "kernels"
    assert f"The CPU kernels are kept in {folder}" in caplog.text
    if os.name == "posix":
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    before = next(temporary.rglob("*.so")).stat().st_mtime_ns
    assert build.build_library("float32") is not None
    assert next(temporary.rglob("*.so")).stat().st_mtime_ns == before


def test_a_user_without_a_home_has_kernels(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a user that it does not know."""

    def unknown() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    assert build.build_library("float32") is not None
    assert built_in(temporary)


def test_a_cache_that_libraries_cannot_be_loaded_from_is_passed_over(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the home is mounted with noexec."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load = ctypes.CDLL

    def refuse(path: str) -> object:
        if path.startswith(str(tmp_path / "cache")):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert build.build_library("float32") is not None
    assert built_in(temporary)
    assert "failed to map segment" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="owners as POSIX has them")
@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_that_another_user_made_is_not_used(
    is_link: bool, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    user = os.getuid()
    folder = cache_folder.private_temporary()
    (tmp_path / "target").mkdir()
    if is_link:
        folder.symlink_to(tmp_path / "target")
    else:
        folder.mkdir()
    monkeypatch.setattr(cache_folder, "_user", lambda: str(user))
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert build.build_library("float32") is None
    assert not built_in(tmp_path)
    assert f"{folder} belongs to another user" in caplog.text
    assert "slower torch operations are used" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="modes as POSIX has them")
def test_a_folder_that_others_may_write_to_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert cache_folder.make_private(folder) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
