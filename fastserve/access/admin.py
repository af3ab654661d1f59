"""Administrators: who may call routes that change a service (profiles, adapters, weights, pauses).

If an admin key is set (FASTSERVE_ADMIN_KEY or --admin-key-file), it is sent as the bearer token instead of the API key
or cluster key, and is accepted on all other routes too. Without one, such routes accept only this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.types import Scope

from fastserve.access.bearer import digest, find_key
from fastserve.access.hosts import is_of_this_machine
from fastserve.access.key_files import Reloadable, read_lines
from fastserve.errors import PermissionDeniedError, StartupError

ENV_ADMIN_KEY = "FASTSERVE_ADMIN_KEY"
MIN_ADMIN_KEY_CHARS = 16


@dataclass(frozen=True)
class AdminKeys:
    """The valid admin keys. Without any, every client on this machine is an administrator."""

    digests: tuple[tuple[bytes, bool], ...] = field(default=(), repr=False)

    def accepts(self, token: bytes) -> bool:
        return bool(find_key(token, self.digests))


def load_admin_keys(environ: Mapping[str, str], key_file: str | None) -> Reloadable[AdminKeys]:
    """Admin keys from the file (one per line), else from the environment. Raises StartupError."""

    def read() -> AdminKeys:
        if key_file is not None:
            return _make(read_lines(key_file, "--admin-key-file"), f"--admin-key-file {key_file}")
        given = environ.get(ENV_ADMIN_KEY, "")
        return _make(given.split(","), ENV_ADMIN_KEY) if given.strip() else AdminKeys()

    return Reloadable(read, key_file, "--admin-key-file")


def _make(entries: list[str], source: str) -> AdminKeys:
    keys = [entry.strip() for entry in entries if entry.strip()]
    if not keys:
        raise StartupError(f"{source} holds no key: write one key a line.")
    if any(len(key) < MIN_ADMIN_KEY_CHARS for key in keys):
        raise StartupError(f"{source}: a key is too easy to guess: it needs at least {MIN_ADMIN_KEY_CHARS} characters.")
    return AdminKeys(tuple((digest(key.encode()), True) for key in dict.fromkeys(keys)))


class AdminCheck:
    """For middleware: marks requests of administrators, which `require_admin` checks in the routes."""

    def __init__(self, keys: Reloadable[AdminKeys]) -> None:
        self._keys = keys

    def note(self, scope: Scope, token: bytes | None) -> bool:
        """Store in the request's state whether it may change the service. Returns whether its token is an admin key."""
        keys = self._keys.value
        has_key = token is not None and keys.accepts(token)
        state = scope.setdefault("state", {})
        state["is_admin"] = has_key if keys.digests else is_of_this_machine(scope)
        state["has_admin_keys"] = bool(keys.digests)
        return has_key


def require_admin(request: HTTPConnection) -> None:
    """FastAPI dependency of routes that change a service. Raises PermissionDeniedError for non-administrators."""
    if getattr(request.state, "is_admin", False):
        return
    if getattr(request.state, "has_admin_keys", False):
        raise PermissionDeniedError(
            "This route changes the service: send the admin key as the header 'Authorization: Bearer <admin key>'."
        )
    raise PermissionDeniedError(
        "This route changes the service, and without an admin key it answers to its own machine only. Start the "
        f"service with --admin-key-file FILE or {ENV_ADMIN_KEY}, and send that key."
    )
