"""Checks against foreign web pages, which reach services on loopback through their visitors' browsers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from starlette.types import ASGIApp, Scope

from fastserve.access.hosts import HostCheck, is_own_origin
from fastserve.access.refusals import Guard
from fastserve.errors import (
    MisdirectedRequestError,
    PermissionDeniedError,
    UnsupportedMediaTypeError,
)

Headers = Iterable[tuple[bytes, bytes]]
_MAX_SHOWN_CHARS = 80


def header_of(headers: Headers, header_name: bytes) -> bytes | None:
    """Value of the first header of this (lower-case) name, or None."""
    return next((value for name, value in headers if name == header_name), None)


def check_host(hosts: HostCheck, headers: Headers) -> None:
    """Raises MisdirectedRequestError if any Host header names a host that is not ours."""
    for name, value in headers:
        if name == b"host" and not hosts.allows(value):
            raise MisdirectedRequestError(
                f"The Host header {_shown(value)} does not name this service. Call it by an IP address or localhost, "
                "or start it with --allowed-hosts NAME."
            )


BYTE_ROUTES = frozenset({"/update_weights_from_tensor"})
"""Routes that take application/octet-stream too, which web pages cannot send without a CORS preflight either."""


def check_media_type(scope: Scope) -> None:
    """Raises UnsupportedMediaTypeError for a body whose content type is not JSON: web pages may send forms and plain
    text to other sites without a CORS preflight.
    """
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return
    media_type = b""
    has_body = False
    for name, value in scope["headers"]:
        if name == b"content-type":
            media_type = value
        elif name == b"content-length":
            has_body = value.strip(b"0") != b""
        elif name == b"transfer-encoding":
            has_body = True
    kind = media_type.partition(b";")[0].strip().lower()
    takes_bytes = scope["path"] in BYTE_ROUTES
    if has_body and kind != b"application/json" and not (takes_bytes and kind == b"application/octet-stream"):
        raise UnsupportedMediaTypeError(
            f"The body has the content type {_shown(media_type)}: send JSON with the header 'Content-Type: "
            "application/json'."
        )


class WebPageGuard(Guard):
    """Refuses pages of foreign sites on services that are open to every client on this machine."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: HostCheck,
        is_open: Callable[[], bool],
        allowed_origins: Collection[str],
        json_only: bool,
    ) -> None:
        """`is_open`: whether no API key is required. `allowed_origins`: origins of pages that may call it besides its
        own; `*`: all. `json_only`: always refuse bodies of other media types.
        """
        super().__init__(app)
        self._hosts = hosts
        self._is_open = is_open
        self._allowed_origins = frozenset(origin.encode() for origin in allowed_origins)
        self._json_only = json_only

    def check(self, scope: Scope) -> None:
        headers = scope["headers"]
        if self._is_open():
            check_host(self._hosts, headers)
            origin = header_of(headers, b"origin")
            if origin is not None and not self._is_allowed(origin, header_of(headers, b"host")):
                # Checked here because the browser sends requests without a preflight and only hides their answers.
                raise PermissionDeniedError(
                    f"Pages of {_shown(origin)} may not use this server, which asks for no API key. Set API keys, or "
                    "allow the page with --allowed-origins.",
                    code="origin_not_allowed",
                )
        if self._json_only and scope["type"] == "http":
            check_media_type(scope)

    def _is_allowed(self, origin: bytes, host: bytes | None) -> bool:
        allowed = self._allowed_origins
        return origin in allowed or b"*" in allowed or is_own_origin(origin, host)


def _shown(value: bytes) -> str:
    """A header's value for an error message: escaped and shortened."""
    text = ascii(value[: _MAX_SHOWN_CHARS + 1].decode("latin-1"))
    return text if len(value) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "...'"
