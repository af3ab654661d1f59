"""The run file of a launch: a list of its processes, for people and scripts.

fastserve itself does not depend on its content: services are found by the marks in their environment. The file's name
contains the launch's id, so services are found from their log folder even after it was moved.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastserve.observability.private_files import draft_of, replace_file

_NAME = re.compile(r"fastserve-([0-9]{1,5})-([0-9a-f]{12})\.pid\.json")
MAX_STOP_BYTES = 4096


@dataclass(frozen=True)
class RunFile:
    """The run file of one launch, and its list of stopped services."""

    log_dir: Path
    server_port: int
    run_id: str

    @property
    def path(self) -> Path:
        return self.log_dir / f"fastserve-{self.server_port}-{self.run_id}.pid.json"

    @property
    def stop_path(self) -> Path:
        """Path of the file with the kinds of services that are ended on purpose and must not be restarted."""
        return self.log_dir / f"fastserve-{self.server_port}-{self.run_id}.stop.json"

    def write(self, services: Sequence[ListedService]) -> None:
        """Replace the run file in one step. Raises OSError."""
        content = {
            "run_id": self.run_id,
            "server_port": self.server_port,
            "services": [asdict(service) for service in services],
        }
        replace_file(self.path, json.dumps(content, indent=2) + "\n")

    def remove(self) -> None:
        """Raises OSError when a file cannot be removed."""
        for path in (self.path, self.stop_path):
            path.unlink(missing_ok=True)
            draft_of(path).unlink(missing_ok=True)

    def write_stopped(self, kinds: Sequence[str]) -> None:
        """Add to the kinds of services that must not be restarted. Raises OSError."""
        replace_file(self.stop_path, json.dumps(sorted({*self.read_stopped(), *kinds})) + "\n")

    def read_stopped(self) -> set[str]:
        """Kinds of services that must not be restarted; none if the file is missing or broken."""
        try:
            with self.stop_path.open("rb") as file:
                kinds = json.loads(file.read(MAX_STOP_BYTES))
        except (OSError, ValueError):
            return set()
        return {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()


@dataclass(frozen=True)
class ListedService:
    """One entry of the run file."""

    kind: str
    name: str
    pid: int
    port: int
    log: str


def run_files_in(log_dir: Path) -> list[RunFile]:
    """The run files in a log folder. Raises PermissionError if this user may not read it."""
    try:
        names = sorted(os.listdir(log_dir))
    except PermissionError:
        raise
    except OSError:
        return []
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return [RunFile(log_dir, int(match[1]), match[2]) for match in matches]
