"""A stand-in service as a process, and a raw HTTP client that can break the protocol."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.keys import CLUSTER_KEY

PATIENCE_S = 10.0


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, "OpenAI's shape"
        return error


def parse_replies(data: bytes) -> list[Reply]:
    """Parse consecutive answers with Content-Length."""
    replies = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", len(rest)))
        replies.append(Reply(int(first.split()[1]), headers, rest[:length]))
        data = rest[length:]
    return replies


class Wire:
    """One TCP connection."""

    def __init__(self, port: int, host: str = "127.0.0.1", source: str | None = None) -> None:
        self.socket = socket.create_connection(
            (host, port), timeout=PATIENCE_S, source_address=None if source is None else (source, 0)
        )

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_to_end(self, timeout_s: float = PATIENCE_S) -> bytes:
        """Everything until the server closes. Raises TimeoutError if it does not."""
        self.socket.settimeout(timeout_s)
        data = b""
        while piece := self.socket.recv(65536):
            data += piece
        return data

    def read_until(self, mark: bytes, timeout_s: float = PATIENCE_S) -> bytes:
        self.socket.settimeout(timeout_s)
        data = bytearray()
        while data.find(mark, max(0, len(data) - 65536 - len(mark))) < 0:
            piece = self.socket.recv(65536)
            assert piece, f"the server closed after {bytes(data[-1000:])!r}"
            data += piece
        return bytes(data)

    def next_reply(self) -> Reply:
        """One answer with Content-Length; the connection may stay open."""
        head = self.read_until(b"\r\n\r\n")
        while True:
            [reply, *_] = parse_replies(head)
            if len(reply.body) == int(reply.headers["content-length"]):
                return reply
            head += self.socket.recv(65536)

    def last_reply(self, timeout_s: float = PATIENCE_S) -> Reply:
        """The only answer before the server closes."""
        [reply] = parse_replies(self.read_to_end(timeout_s))
        return reply

    def is_closed(self, timeout_s: float = PATIENCE_S) -> bool:
        """Whether the server closes within `timeout_s` without sending anything."""
        try:
            return self.read_to_end(timeout_s) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


KNOWN = f"Host: localhost\r\nAuthorization: Bearer {CLUSTER_KEY}\r\n"
"""Header lines of a member of the cluster."""


@dataclass
class Service:
    process: subprocess.Popen[str]
    port: int
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wire(self, source: str | None = None, host: str = "127.0.0.1") -> Wire:
        return Wire(self.port, host, source)

    def ask(
        self, path: str = "/health", method: str = "GET", body: bytes = b"", headers: str = "", timeout_s: float = 10
    ) -> Reply:
        with self.wire() as wire:
            length = f"Content-Length: {len(body)}\r\n" if body else ""
            head = f"{method} {path} HTTP/1.1\r\n{KNOWN}Connection: close\r\n{length}{headers}\r\n"
            wire.send(head.encode() + body)
            return wire.last_reply(timeout_s)

    def num_connections(self) -> int:
        connections = psutil.Process(self.process.pid).net_connections()
        return sum(item.status in ("ESTABLISHED", "CLOSE_WAIT") for item in connections)

    def rss_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


StartService = Callable[..., Service]
