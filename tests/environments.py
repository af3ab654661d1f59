"""Python environments of their own for packages whose requirements conflict with ours, made on first use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MAKING_TIMEOUT_S = 240.0
"""For each command."""


class CannotMakeError(Exception):
    """The environment cannot be made here, for the reason in the message."""


def made_in(folder: Path, requirements: Path, *without_dependencies: str) -> Path:
    """The Python of an environment below `folder`, made from the package index unless it is there.

    `without_dependencies`: packages to install besides the requirements, without what they ask for themselves.
    Raises CannotMakeError.
    """
    words = " ".join((*without_dependencies, sys.version))
    recipe = hashlib.sha256(requirements.read_bytes() + words.encode()).hexdigest()
    env_folder = folder / recipe[:16]
    if not env_folder.exists():
        # Made elsewhere and then renamed, so that an interrupted run leaves no incomplete environment.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "env"
            _make(made, requirements, without_dependencies)
            try:
                made.rename(env_folder)
            except OSError:
                if not env_folder.exists():  # another run was faster
                    raise
    return _python_of(env_folder)


def _make(env_folder: Path, requirements: Path, without_dependencies: tuple[str, ...]) -> None:
    pip = [str(_python_of(env_folder)), "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    # Most of it is never imported, and what is compiles itself then.
    install = [*pip, "install", "--quiet", "--no-compile"]
    commands = [[sys.executable, "-m", "venv", str(env_folder)], [*install, "--requirement", str(requirements)]]
    if without_dependencies:
        commands.append([*install, "--no-deps", *without_dependencies])
    for command in commands:
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=MAKING_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise CannotMakeError(f"making it took longer than {MAKING_TIMEOUT_S:g} s") from error
        if ended.returncode:
            last = (ended.stderr or ended.stdout).strip().splitlines()[-1:]
            raise CannotMakeError(f"{command[2]} failed: {''.join(last)}")


def _python_of(env_folder: Path) -> Path:
    return env_folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
