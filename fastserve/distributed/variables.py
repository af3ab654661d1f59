"""Typed reading of environment variables. An unset or empty variable has its default."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fastserve.distributed.problems import Problems
from fastserve.observability.text import printable

_MAX_CHARS = 80


class Variables:
    """Reads variables. An invalid one has its default, and adds a problem."""

    def __init__(self, environ: Mapping[str, str], problems: Problems) -> None:
        self._environ = environ
        self._problems = problems
        self._invalid: set[str] = set()

    def are_valid(self, *names: str) -> bool:
        """Whether none of the variables, which must have been read, is invalid: comparing them makes sense."""
        return self._invalid.isdisjoint(names)

    def text(self, name: str) -> str | None:
        return self._environ.get(name, "").strip() or None

    def shown(self, name: str) -> str:
        """`NAME=value`, shortened, for messages."""
        return f"{name}={printable(self._environ.get(name, ''), _MAX_CHARS)}"

    def integer(self, name: str, default: int, minimum: int, maximum: int = 2**31 - 1) -> int:
        found = self.optional_integer(name, minimum, maximum)
        return default if found is None else found

    def optional_integer(self, name: str, minimum: int, maximum: int = 2**31 - 1) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        # int() would take 1_0 and digits of other scripts, too.
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
            self._refuse(name, f"is no whole number. Give one from {minimum} to {maximum}.")
            return None
        value = int(text)
        if not minimum <= value <= maximum:
            self._refuse(name, f"is out of range. Give a whole number from {minimum} to {maximum}.")
            return None
        return value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """One of `choices`, in any case; returned in upper case."""
        text = self.text(name)
        if text is None:
            return None
        if text.upper() not in choices:
            self._refuse(name, f"is not known here. Give one of {', '.join(choices)}.")
            return None
        return text.upper()

    def path(self, name: str) -> Path | None:
        """A path that exists."""
        text = self.text(name)
        if text is None:
            return None
        path = Path(text).expanduser()
        if not path.exists():
            self._refuse(name, "names no file or folder.")
            return None
        return path

    def _refuse(self, name: str, problem: str) -> None:
        self._invalid.add(name)
        self._problems.add(f"{self.shown(name)} {problem}")
