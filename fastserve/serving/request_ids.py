"""Ids of requests: the client's own where it is proper, the same in the answer's header and body and in all logs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from fastserve.protocol import REQUEST_ID_HEADER

_NAME = REQUEST_ID_HEADER.encode()
_PROPER = re.compile(rb"[\x21-\x7e]{1,128}")
"""Visible characters of ASCII: what stands in a header, in a log line and in an answer's id without being changed."""


def read_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that came with the request when it is proper, else a fresh one."""
    for name, value in headers:
        if name == _NAME and _PROPER.fullmatch(value):
            return value.decode("ascii")
    return f"req-{secrets.token_hex(12)}"
