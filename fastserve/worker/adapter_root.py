"""The adapters in a folder of adapters (`--lora-root`): looked up by name, and listed again only when files change."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from fastserve.worker.adapter_source import CONFIG_FILE, Adapter, name_problem

logger = logging.getLogger(__name__)

SETTLED_S = 3.0
"""Age from which on the time of a folder's last change differs from that of any later change. File systems count in
steps of up to 2 s."""
MAX_WATCHED = 1024
"""Folders without an adapter whose changes are noticed. An adapter in any other is found when it is asked for."""


class AdapterRoot:
    """`changes` is for one thread at a time, the other methods for any."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives the time as the file system does, in seconds since 1970."""
        self.path = path
        self._clock = clock
        self._seen: dict[Path, int] = {}
        """Time of change in ns, as of the last list, of the folder itself and of those in it without an adapter."""
        self._must_list = True

    def member(self, name: str) -> Adapter | None:
        """The adapter in the folder `name`; None if there is none, or no adapter can have such a name."""
        if "/" in name or "\\" in name or name in ("", ".", "..") or name_problem(name) is not None:
            return None
        folder = self.path / name
        try:
            return Adapter(name, name, str(folder)) if (folder / CONFIG_FILE).is_file() else None
        except OSError:  # such as a name that is too long for the file system
            return None

    def folder(self, source: str) -> Path | None:
        """The folder of the adapter at `source`, a path below the root that no link leads out of; None if there is
        none.
        """
        member = self.member(source)
        if member is not None:
            return Path(member.path)
        if "\0" in source:
            return None
        folder = (self.path / source).resolve()
        is_inside = folder.is_relative_to(self.path.resolve())
        return folder if is_inside and (folder / CONFIG_FILE).is_file() else None

    def changes(self, max_members: int) -> dict[str, Adapter] | None:
        """The adapters by name, `max_members` at most; None if nothing has changed since the last call. Raises OSError.

        A folder becomes an adapter when its files are written, which the root's time of change does not show: so that
        of each folder without an adapter is compared as well.
        """
        if not self._must_list and all(_changed_at(path) == seen for path, seen in self._seen.items()):
            return None
        self._must_list = True  # until the list is complete
        seen = {self.path: os.stat(self.path).st_mtime_ns}
        members: dict[str, Adapter] = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                if len(members) >= max_members:
                    logger.warning("--lora-root has more adapters than the %d that fit (--max-adapters).", max_members)
                    break
                if not entry.is_dir():
                    continue
                changed_at = _changed_at(Path(entry.path))
                member = self.member(entry.name)
                if member is not None:
                    members[entry.name] = member
                elif len(seen) <= MAX_WATCHED and changed_at is not None:
                    seen[Path(entry.path)] = changed_at
        self._seen = seen
        self._must_list = self._clock() - max(seen.values()) / 1e9 < SETTLED_S
        return members


def _changed_at(folder: Path) -> int | None:
    """None if it is gone."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None
