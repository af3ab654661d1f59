"""The settings with which processes of an engine start."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from fastserve.engine.settings import AdapterOptions, EngineConfig
from fastserve.engine.start_settings import settings_file
from fastserve.errors import StartupError

READ_TWICE = """
import os, sys
from fastserve.engine.settings import EngineConfig
from fastserve.engine.start_settings import read_settings
config = read_settings(EngineConfig)
if sys.argv[1:] == []:
    os.execv(sys.executable, [*sys.orig_argv, "again"])
name, path = config.adapters.modules[-1]
print(len(config.adapters.modules), name, path)
"""


def test_thousands_of_adapters_with_long_paths_reach_a_process_also_when_it_replaces_itself() -> None:
    folder = "/" + "/".join(["a-long-name-of-a-folder"] * 40)
    modules = tuple((f"a{index}", f"{folder}/ä{index}") for index in range(5000))
    with settings_file(EngineConfig(model_dir="m", adapters=AdapterOptions(modules=modules))) as file:
        assert len(file.read()) > 2 << 20  # the most that a whole command line may have on Linux
        file.seek(0)
        command = [sys.executable, "-c", READ_TWICE]
        found = subprocess.run(command, stdin=file, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert found.stdout == f"5000 a4999 {folder}/ä4999\n", found.stderr


def test_no_room_for_the_settings_is_a_failed_start_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(StartupError, match=r"temporary file: .*/nowhere.*TMPDIR"):
        settings_file(EngineConfig(model_dir="m"))
