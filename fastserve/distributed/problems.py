"""Collects everything that is wrong with an environment, so that it is reported together."""

from __future__ import annotations

from fastserve.errors import StartupError


class EnvironmentFault(StartupError):
    """The environment contradicts itself, or a value in it is invalid. The message has a line for each problem."""

    exit_code = 2


class Problems:
    def __init__(self) -> None:
        self._messages: list[str] = []

    def add(self, message: str) -> None:
        if message not in self._messages:
            self._messages.append(message)

    def extend(self, other: Problems) -> None:
        for message in other._messages:
            self.add(message)

    def __bool__(self) -> bool:
        return bool(self._messages)

    def raise_if_any(self) -> None:
        """Raises EnvironmentFault with all messages."""
        if not self._messages:
            return
        if len(self._messages) == 1:
            raise EnvironmentFault(self._messages[0])
        lines = "".join(f"\n  - {message}" for message in self._messages)
        raise EnvironmentFault(f"{len(self._messages)} problems in the environment:{lines}")
