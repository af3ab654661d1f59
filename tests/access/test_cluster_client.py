"""Programs beside the services meet addresses and answers of any kind."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from fastserve.access import cluster_client
from fastserve.access.cluster_client import ClusterClient
from fastserve.errors import StartupError

KEY = "k" * 20


class Answering(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "address",
    [
        "localhost:20002",
        "ftp://localhost:1",
        "http://",
        "http://h:99999",
        "http://h:x",
        "http://h:1/v1",
        "http://a b",
        "http://u@h:1",
    ],
)
def test_an_address_that_is_none_is_a_sentence(address: str) -> None:
    with pytest.raises(StartupError, match="address"):
        ClusterClient(address, key=KEY)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[1]", b"{"], ids=["deep", "bytes", "a list", "cut"])
def test_an_answer_that_is_no_object_has_no_fields(
    service: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answering, "content", content)
    with ClusterClient(service, key=KEY) as client:
        assert client.call(service, "/x", None, 5.0).reply == {}
        with pytest.raises(StartupError, match="did not answer as a controller does"):
            client.workers_of("m")


def test_an_answer_without_end_is_not_kept(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_client, "MAX_ANSWER_BYTES", 1000)
    monkeypatch.setattr(Answering, "content", b"[" + b"1," * 1000 + b"1]")
    with ClusterClient(service, key=KEY) as client:
        outcome = client.call(service, "/x", None, 5.0)
        assert outcome.status == 0
        assert "more than 1000 bytes" in outcome.message
        monkeypatch.setattr(Answering, "content", b"{}")
        assert client.call(service, "/x", None, 5.0).is_success, "the next call has a connection of its own"
