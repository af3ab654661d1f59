"""Dispatch policies, one in each file of this folder; the file's name is the value of `--dispatch-method`.

A policy file has a class `Index`, which implements `DispatchIndex`: an index of the workers that can take a request for
one model. With n workers an update costs O(log n), a choice O(log n) for each excluded worker. No clock, no I/O, and no
randomness but the `rng` passed to `choose`.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable, Collection
from typing import Protocol, cast

from fastserve.errors import StartupError


class DispatchIndex(Protocol):
    def set(self, address: str, speed: float, in_flight: int) -> None:
        """Add or update a worker.

        `speed` is relative and not negative: 1 is an average worker, 0 one that cannot be expected to answer.
        `in_flight`: running and waiting requests on it.
        """

    def remove(self, address: str) -> None:
        """Remove a worker. An unknown one is no error."""

    def choose(self, exclude: Collection[str], rng: random.Random) -> str | None:
        """The worker for the next request, none of `exclude`; None if none is suitable.

        Changes nothing: the caller counts the request with `set`.
        """


def names() -> list[str]:
    """Names of the available policies, in alphabetical order. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[[], DispatchIndex]:
    """The policy's `Index` class. Raises StartupError for an unknown policy."""
    known = names()
    if name not in known:
        raise StartupError(f"--dispatch-method {name}: there is no such method; choose one of {', '.join(known)}.")
    return cast(Callable[[], DispatchIndex], importlib.import_module(f"{__name__}.{name}").Index)
