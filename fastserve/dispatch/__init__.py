"""Dispatch policies: each file of this folder is one, named as `--dispatch-method` names it.

A policy file has one class, `Index`, which satisfies `DispatchIndex`: the workers that can take a request for one
model, kept so that an update costs at most the logarithm of their number, and a choice that of their number times the
excluded ones. It is pure: no clock, no I/O, and the `rng` handed to `choose` is its only source of chance.
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
        """Add a worker, or change what is known of it.

        `speed` is relative and not negative: 1 is an average worker, 0 one that cannot be expected to answer.
        `in_flight` counts the requests that run or wait on it.
        """

    def remove(self, address: str) -> None:
        """Take a worker out; an unknown one is no error."""

    def choose(self, exclude: Collection[str], rng: random.Random) -> str | None:
        """The worker that takes the next request, other than those in `exclude`; None when it wants none of them.

        Changes nothing: the caller counts the request with `set`.
        """


def names() -> list[str]:
    """The policies that can be loaded, in alphabetical order; none of them is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[[], DispatchIndex]:
    """The policy's class of indexes. Raises StartupError when there is no such policy."""
    known = names()
    if name not in known:
        raise StartupError(f"--dispatch-method {name}: there is no such method; choose one of {', '.join(known)}.")
    return cast(Callable[[], DispatchIndex], importlib.import_module(f"{__name__}.{name}").Index)
