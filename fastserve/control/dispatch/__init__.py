"""Dispatch policies: each file of this folder is one, named as `--dispatch-method` names it.

A policy file has one function, `choose(candidates, rng)`. It gets at least one candidate and returns the index of the
one that takes the request, or None when it wants none of them. It is pure: no clock, no I/O, no state kept between
calls, and `rng` is its only source of chance.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from fastserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live worker that serves the wanted model."""

    address: str
    speed: float
    """Relative: 1 is an average worker. Not negative; 0 is a worker that cannot be expected to answer."""
    in_flight: int
    """Requests that run or wait on it."""


Policy = Callable[[Sequence[Candidate], random.Random], int | None]


def names() -> list[str]:
    """The policies that can be loaded, in alphabetical order; none of them is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Policy:
    """Raises StartupError when there is no such policy."""
    known = names()
    if name not in known:
        raise StartupError(f"--dispatch-method {name}: there is no such method; choose one of {', '.join(known)}.")
    return cast(Policy, importlib.import_module(f"{__name__}.{name}").choose)
