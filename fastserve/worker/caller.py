"""What comes with a request beside its body."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastapi import Request

from fastserve.openai.answers import request_id_of
from fastserve.protocol import LEASE_HEADER, REQUEST_ID_HEADER


@dataclass(frozen=True)
class Caller:
    request_id: str
    lease: str | None
    arrived: float
    """time.monotonic() when the request came."""


def caller_of(request: Request) -> Caller:
    headers = request.headers
    return Caller(request_id_of(headers.get(REQUEST_ID_HEADER)), headers.get(LEASE_HEADER), time.monotonic())
