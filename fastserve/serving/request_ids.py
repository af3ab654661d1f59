"""Request ids: the client's own if valid; the same in the answer's header and body and in all logs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from fastserve.protocol import REQUEST_ID_HEADER

_NAME = REQUEST_ID_HEADER.encode()
_PROPER = re.compile(rb"[\x21-\x7e]{1,128}")
"""Visible ASCII characters, which need no escaping in headers, log lines and answers."""


def read_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id in the request's header if it is valid, else a new one."""
    for name, value in headers:
        if name == _NAME and _PROPER.fullmatch(value):
            return value.decode("ascii")
    return f"req-{secrets.token_hex(12)}"
