"""Loop detection: a server registered as a worker with its own controller would forward requests to itself forever.

Each forwarding server has an id, made at its start, and appends it to the header HOPS_HEADER. A request with the
server's own id has been here before. The number of ids is bounded too, for loops through other programs that forward
the header, and for overlong chains.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from fastserve.errors import LoopDetectedError
from fastserve.protocol import HOPS_HEADER

NAME = HOPS_HEADER.encode()


class LoopGuard:
    def __init__(self, kind: str, max_hops: int) -> None:
        """`kind`: name of such servers in errors. `max_hops`: longest chain of servers."""
        self._kind = kind
        self._max_hops = max_hops
        self._server_id = secrets.token_hex(8)

    def next_hops(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Value of HOPS_HEADER for forwarding a request with these headers. Raises LoopDetectedError."""
        value = next((value for name, value in headers if name == NAME), b"").decode("latin-1")
        passed = [part.strip() for part in value.split(",", self._max_hops + 1)] if value else []
        if self._server_id in passed:
            raise self._error(f"This {self._kind} received a request that it had forwarded before")
        if len(passed) >= self._max_hops:
            raise self._error(f"The request has passed through more than {self._max_hops} servers")
        return ",".join([*passed, self._server_id])

    def _error(self, problem: str) -> LoopDetectedError:
        return LoopDetectedError(f"{problem}: a worker is registered with the address of one.")
