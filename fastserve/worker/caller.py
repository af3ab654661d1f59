"""Who sent a request, and the headers that come with it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from fastapi import Request

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import shown
from fastserve.protocol import CHOICES_HEADER, LEASE_HEADER, MAX_CHOICES_CHARS, MAX_LEASE_CHARS, MAX_SEED, SEED_HEADER
from fastserve.serving.request_ids import read_request_id

_LEASE = re.compile(rf"[\x21-\x7e]{{1,{MAX_LEASE_CHARS}}}")
_SEED = re.compile(r"[0-9]{1,19}")
_CHOICES = re.compile(r"[0-9]{1,6}(?:,[0-9]{1,6})*")


@dataclass(frozen=True)
class Caller:
    request_id: str
    lease: str | None
    arrived_s: float
    """time.monotonic() when the request came."""
    may_prioritise: bool
    """Whether it may ask for a priority above that of others (below 0)."""
    seed_header: str | None = None
    choices_header: str | None = None
    """Values of SEED_HEADER and CHOICES_HEADER, of callers that are believed."""

    def read_seed(self) -> int | None:
        """The API server's seed for a request that brings none. Raises InvalidRequestError."""
        text = self.seed_header
        if text is None:
            return None
        if not _SEED.fullmatch(text) or int(text) > MAX_SEED:
            raise _invalid(SEED_HEADER, text, f"Give a whole number from 0 to {MAX_SEED}.")
        return int(text)

    def read_choices(self) -> tuple[int, ...] | None:
        """Indices of the choices to generate, in ascending order; None: all. Raises InvalidRequestError."""
        text = self.choices_header
        if text is None:
            return None
        if len(text) > MAX_CHOICES_CHARS or not _CHOICES.fullmatch(text):
            remedy = f"Give indices with commas between them, at most {MAX_CHOICES_CHARS} characters."
            raise _invalid(CHOICES_HEADER, text, remedy)
        indices = [int(part) for part in text.split(",")]
        if len(set(indices)) != len(indices):
            raise _invalid(CHOICES_HEADER, text, "Give each index once.")
        return tuple(sorted(indices))


def _invalid(header: str, text: str, remedy: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid value for the header '{header}': {shown(text)}. {remedy}", param=header)


def caller_of(request: Request) -> Caller:
    headers = request.headers
    lease = headers.get(LEASE_HEADER)
    # Only the guard of a cluster's services leaves an owner: clients of a lone worker have the body to ask with.
    is_from_cluster = hasattr(request.state, "owner")
    return Caller(
        read_request_id(request.scope["headers"]),
        # Leases are sent on with each heartbeat: one that the controller would refuse must not get into it.
        lease if lease is not None and _LEASE.fullmatch(lease) else None,
        time.monotonic(),
        may_prioritise=request.state.may_prioritise,
        seed_header=headers.get(SEED_HEADER) if is_from_cluster else None,
        choices_header=headers.get(CHOICES_HEADER) if is_from_cluster else None,
    )


async def read_body(request: Request) -> bytes:
    """The body of a request, which does not keep it: a request that waits must not hold it twice."""
    return b"".join([chunk async for chunk in request.stream()])
