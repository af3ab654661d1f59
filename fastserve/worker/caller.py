"""The sender of a request, as its headers and key describe it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from fastapi import Request

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import shown
from fastserve.openai.responses.head import ResponseHead
from fastserve.protocol import (
    CHOICES_HEADER,
    LEASE_HEADER,
    MAX_CHOICES_CHARS,
    MAX_LEASE_CHARS,
    MAX_SEED,
    RESPONSE_HEADER,
    SEED_HEADER,
)
from fastserve.serving.request_ids import read_request_id

_LEASE = re.compile(rf"[\x21-\x7e]{{1,{MAX_LEASE_CHARS}}}")
_SEED = re.compile(r"[0-9]{1,19}")
_CHOICES = re.compile(r"[0-9]{1,6}(?:,[0-9]{1,6})*")


@dataclass(frozen=True)
class Caller:
    request_id: str
    lease: str | None
    arrived_s: float
    """Arrival of the request, as time.monotonic()."""
    may_prioritise: bool
    """Whether its requests may have a priority below 0, which is above the default."""
    seed_header: str | None = None
    choices_header: str | None = None
    response_header: str | None = None
    """Values of SEED_HEADER, CHOICES_HEADER and RESPONSE_HEADER; None unless the caller is a service of the cluster."""

    def read_seed(self) -> int | None:
        """The API server's seed for a request without one. Raises InvalidRequestError."""
        text = self.seed_header
        if text is None:
            return None
        if not _SEED.fullmatch(text) or int(text) > MAX_SEED:
            raise _invalid(SEED_HEADER, text, f"Give a whole number from 0 to {MAX_SEED}.")
        return int(text)

    def read_head(self) -> ResponseHead | None:
        """The head of a response that the API server stores; None without a store. Raises InvalidRequestError."""
        text = self.response_header
        if text is None:
            return None
        try:
            return ResponseHead.decode(text)
        except ValueError as error:
            raise _invalid(RESPONSE_HEADER, text, "API server and worker must be of neighbouring versions.") from error

    def read_choices(self) -> tuple[int, ...] | None:
        """Indices of the choices to generate, ascending; None: all. Raises InvalidRequestError."""
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
    # Only the guard for services of the cluster sets an owner. Clients of a standalone worker use fields of the body.
    is_from_cluster = hasattr(request.state, "owner")
    return Caller(
        read_request_id(request.scope["headers"]),
        # Each heartbeat lists the leases, and the controller would refuse it for an invalid one.
        lease if lease is not None and _LEASE.fullmatch(lease) else None,
        time.monotonic(),
        may_prioritise=request.state.may_prioritise,
        seed_header=headers.get(SEED_HEADER) if is_from_cluster else None,
        choices_header=headers.get(CHOICES_HEADER) if is_from_cluster else None,
        response_header=headers.get(RESPONSE_HEADER) if is_from_cluster else None,
    )


async def read_body(request: Request) -> bytes:
    """Read the body without caching it in the request, as `Request.body` does: long bodies would be held twice."""
    return b"".join([chunk async for chunk in request.stream()])
