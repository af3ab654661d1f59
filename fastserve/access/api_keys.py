"""API keys: which clients may use a service, and which may raise the priority of their requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Scope

from fastserve.access.admin import AdminCheck
from fastserve.access.bearer import bearer_token, digest, find_key, owner_name
from fastserve.access.hosts import is_of_this_machine
from fastserve.access.key_files import Reloadable, read_lines
from fastserve.access.refusals import Guard, RefusedKeys
from fastserve.errors import AuthenticationError, StartupError

ENV_API_KEYS = "FASTSERVE_API_KEYS"
PUBLIC_PATHS = frozenset({"/health", "/ready", "/metrics"})
PRIORITY_MARK = "priority"


@dataclass(frozen=True)
class ApiKey:
    may_prioritise: bool
    """Whether its requests may have a negative `priority`, which schedules them before others."""


@dataclass(frozen=True)
class ApiKeys:
    """The valid API keys. If there are none, the service is open."""

    accepted: tuple[tuple[bytes, ApiKey], ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.accepted)

    def find(self, token: bytes) -> ApiKey | None:
        """The key that `token` matches, or None. Takes the same time for every token."""
        return find_key(token, self.accepted)


def load_api_keys(given: Sequence[str] | None, key_file: str | None) -> Reloadable[ApiKeys]:
    """The keys of --api-keys (or its environment variable) and of the file, each `KEY` or `KEY priority`.

    Raises StartupError if a source was given but holds no key: a server that was meant to be guarded must not open.
    """
    if given is not None and not given:
        raise StartupError("--api-keys holds no key: name at least one, or leave the flag out to serve without keys.")

    def read() -> ApiKeys:
        lines = [] if key_file is None else read_lines(key_file, "--api-keys-file")
        if key_file is not None and not lines:
            raise StartupError(f"--api-keys-file {key_file} holds no key: write one key a line.")
        return _parse([*(given or ()), *lines])

    return Reloadable(read, key_file, "--api-keys-file")


def _parse(lines: Sequence[str]) -> ApiKeys:
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        key, *marks = line.split()
        if marks not in ([], [PRIORITY_MARK]):
            raise StartupError(
                f"API key {number} is followed by a word that is not known: write KEY, or KEY {PRIORITY_MARK} for keys "
                "whose requests may go before others."
            )
        keys[key] = ApiKey(may_prioritise=bool(marks) or (key in keys and keys[key].may_prioritise))
    return ApiKeys(tuple((digest(name.encode()), key) for name, key in keys.items()))


class ApiKeyGuard(Guard):
    """Requires an API key as a bearer token, except on PUBLIC_PATHS. Stores in the request's state whether it
    `may_prioritise`, the `key_owner` to whom what it stores belongs (empty without keys), and the mark for
    `require_admin`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Reloadable[ApiKeys],
        admin: AdminCheck,
        refused: RefusedKeys,
        everybody_may_prioritise: bool,
    ) -> None:
        """`everybody_may_prioritise`: whether all requests may have a negative priority if there are no keys."""
        super().__init__(app)
        self._keys = keys
        self._admin = admin
        self._refused = refused
        self._everybody_may_prioritise = everybody_may_prioritise

    def check(self, scope: Scope) -> None:
        if scope["path"] in PUBLIC_PATHS:
            return
        keys = self._keys.value
        token = bearer_token(scope["headers"])
        is_admin = self._admin.note(scope, token)
        scope["state"]["key_owner"] = ""
        if not keys:
            scope["state"]["may_prioritise"] = self._everybody_may_prioritise and is_of_this_machine(scope)
            return
        key = None if token is None else keys.find(token)
        if key is None and not is_admin:
            self._refused.note(scope, has_key=bool(token))
            problem = "Incorrect API key provided." if token else "You did not provide an API key."
            raise AuthenticationError(f"{problem} Send it as the header 'Authorization: Bearer <key>'.")
        scope["state"]["key_owner"] = owner_name(token or b"")
        scope["state"]["may_prioritise"] = is_admin or (key is not None and key.may_prioritise)
