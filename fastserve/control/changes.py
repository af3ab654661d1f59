"""Versions of the rows of the routing table, so that readers get only what has changed.

Each change gives its row the next version. Only the last change of a row is kept, and the last MAX_REMOVED removals; a
reader with an older version gets the whole table.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_REMOVED = 10_000


class ChangeLog:
    def __init__(self) -> None:
        self.version = 0
        self._rows: OrderedDict[str, int] = OrderedDict()
        """Version of each row's last change, oldest first."""
        self._removed: OrderedDict[str, int] = OrderedDict()
        """Version of each removal, oldest first."""
        self._forgotten = 0
        """Removals up to this version may have been forgotten."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, address: str) -> bool:
        return address in self._rows

    def put(self, address: str) -> None:
        """Record that a row is new or has changed."""
        self.version += 1
        self._rows[address] = self.version
        self._rows.move_to_end(address)
        self._removed.pop(address, None)

    def remove(self, address: str) -> None:
        """Record that a row is gone. An unknown row is no error."""
        if self._rows.pop(address, None) is None:
            return
        self.version += 1
        self._removed[address] = self.version
        if len(self._removed) > MAX_REMOVED:
            _, self._forgotten = self._removed.popitem(last=False)

    def addresses(self) -> list[str]:
        return list(self._rows)

    def since(self, version: int) -> tuple[list[str], list[str]] | None:
        """Addresses of the rows that changed after `version`, and of those removed after it. None if the log does not
        reach back so far, or `version` was never issued.
        """
        if not self._forgotten <= version <= self.version:
            return None
        return _after(self._rows, version), _after(self._removed, version)


def _after(versions: OrderedDict[str, int], version: int) -> list[str]:
    found = []
    for address in reversed(versions):
        if versions[address] <= version:
            break
        found.append(address)
    return found
