"""Bearer tokens: read from a request's headers and compared in constant time.

Only SHA-256 digests of keys are kept, and a token's digest is compared with each of them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import TypeVar

KeyT = TypeVar("KeyT")


def digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def owner_name(token: bytes) -> str:
    """A name for the holder of a key that does not give the key away, the same after a restart."""
    return hashlib.sha256(b"fastserve owner " + token).hexdigest()[:32]


def find_key(token: bytes, known: Iterable[tuple[bytes, KeyT]]) -> KeyT | None:
    """The value paired with the token's digest, or None. All pairs are compared, so that the time is constant."""
    given = digest(token)
    found: KeyT | None = None
    for key_digest, key in known:
        if hmac.compare_digest(given, key_digest):
            found = key
    return found


def bearer_token(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the `Authorization: Bearer` header; None if there is none, or more than one."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None
