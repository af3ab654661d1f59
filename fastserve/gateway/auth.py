"""API keys: read at start, and asked of every route that has not opted out by name."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.config import ApiServerConfig
from fastserve.errors import AuthenticationError, StartupError
from fastserve.serving.errors import error_response

PUBLIC_PATHS = frozenset({"/health", "/ready", "/metrics"})


def load_keys(config: ApiServerConfig) -> tuple[str, ...]:
    """The keys of the flag (or its environment variable) and of the file, without repeats; empty: the door is open.

    Raises StartupError when keys are asked for but none is found: a server that was meant to be guarded must not open.
    """
    keys = list(config.api_keys or ())
    if config.api_keys is not None and not keys:
        raise StartupError("--api-keys holds no key: name at least one, or leave the flag out to serve without keys.")
    if config.api_keys_file is not None:
        found = _read_keys(config.api_keys_file)
        if not found:
            raise StartupError(f"--api-keys-file {config.api_keys_file} holds no key: write one key a line.")
        keys += found
    return tuple(dict.fromkeys(keys))


def _read_keys(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StartupError(f"--api-keys-file {path} cannot be read: {reason}.") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


class ApiKeyMiddleware:
    """Asks for one of `keys` as a bearer token, everywhere but on PUBLIC_PATHS.

    It stands before the router, so unknown routes and routes still to be written are guarded too. Only digests are
    kept and compared, each with every key, so that the time taken tells nothing about a key or which one it was.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in PUBLIC_PATHS or not self._digests:
            await self._app(scope, receive, send)
            return
        token = _bearer_token(scope)
        if token is not None and self._is_known(token):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            problem = "Incorrect API key provided." if token else "You did not provide an API key."
            error = AuthenticationError(f"{problem} Send it as the header 'Authorization: Bearer <key>'.")
            response = error_response(error)
            response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)

    def _is_known(self, token: bytes) -> bool:
        given = _digest(token)
        matches = False
        for known in self._digests:
            matches |= hmac.compare_digest(given, known)
        return matches


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer_token(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return bytes(token.strip()) if scheme.lower() == b"bearer" else None
    return None
