"""Who sent a request, and the headers that come with it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from fastapi import Request

from fastserve.openai.answers import request_id_of
from fastserve.protocol import LEASE_HEADER, MAX_LEASE_CHARS, REQUEST_ID_HEADER

_LEASE = re.compile(rf"[\x21-\x7e]{{1,{MAX_LEASE_CHARS}}}")


@dataclass(frozen=True)
class Caller:
    request_id: str
    lease: str | None
    arrived: float
    """time.monotonic() when the request came."""
    may_prioritise: bool
    """Whether it may ask for a priority above that of others (below 0)."""


def caller_of(request: Request) -> Caller:
    lease = request.headers.get(LEASE_HEADER)
    return Caller(
        request_id_of(request.headers.get(REQUEST_ID_HEADER)),
        # Leases are sent on with each heartbeat: one that the controller would refuse must not get into it.
        lease if lease is not None and _LEASE.fullmatch(lease) else None,
        time.monotonic(),
        may_prioritise=request.state.may_prioritise,
    )


async def read_body(request: Request) -> bytes:
    """The body of a request, which does not keep it: a request that waits must not hold it twice."""
    return b"".join([chunk async for chunk in request.stream()])
