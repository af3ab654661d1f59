"""FastChat in its own Python environment: its requirements conflict with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.environments import CannotMakeError, made_in

VARIABLE = "FASTSERVE_FSCHAT_PYTHON"
"""Environment variable: the Python of an environment with FastChat. If unset, the tests make one."""
PACKAGE = "fschat==0.2.36"
REQUIREMENTS = Path(__file__).with_name("requirements-fastchat.txt")

_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({"python": list(sys.version_info[:2]), "fschat": version("fschat"), "pydantic": version("pydantic")}))
"""
_WITH_OUR_PACKAGES = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class FastChat:
    python: str
    python_version: tuple[int, int]
    pydantic_version: str

    @property
    def can_stream(self) -> bool:
        return self.pydantic_version.startswith("1.")

    @property
    def can_borrow(self) -> bool:
        """Whether it can import what is installed for the tests' own interpreter."""
        return self.python_version == sys.version_info[:2]

    def env(self) -> dict[str, str]:
        """Empty LOGDIR: no log files. No proxy may come between processes of one machine."""
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return own | {"LOGDIR": "", "NO_PROXY": "localhost,127.0.0.1", "PYTHONUNBUFFERED": "1"}

    def command(self, module: str, *arguments: str) -> list[str]:
        return [self.python, "-m", f"fastchat.serve.{module}", *arguments]

    def run(self, module: str, *arguments: str, cwd: Path) -> str:
        """Run it to the end; returns its output."""
        return _output(self.command(module, *arguments), cwd=cwd, env=self.env())

    def run_with_torch(self, module: str, *arguments: str, cwd: Path) -> str:
        """Run a module that needs torch and transformers, which come from the tests' own packages."""
        packages = sysconfig.get_path("purelib")
        command = [self.python, "-c", _WITH_OUR_PACKAGES, packages, f"fastchat.serve.{module}", *arguments]
        return _output(command, cwd=cwd, env=self.env())


def find_or_make(environ: Mapping[str, str], folder: Path) -> FastChat:
    """The environment that `VARIABLE` names, else the one in `folder`, made on first use. Raises CannotMakeError."""
    python = environ.get(VARIABLE) or str(_made_in(folder))
    versions = json.loads(_output([python, "-c", _VERSIONS]))
    assert versions["fschat"] == PACKAGE.partition("==")[2], f"{python} has FastChat {versions['fschat']}"
    major, minor = versions["python"]
    return FastChat(python, (major, minor), versions["pydantic"])


def _made_in(folder: Path) -> Path:
    if sys.version_info >= (3, 14):
        raise CannotMakeError("FastChat 0.2.36 needs pydantic 1, which ends with Python 3.13")
    return made_in(folder, REQUIREMENTS, PACKAGE)


def _output(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd, env=env)
    assert ended.returncode == 0, f"{command} ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
    return ended.stdout
