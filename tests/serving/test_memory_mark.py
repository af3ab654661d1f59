"""New requests are refused above the memory mark, before the system kills the process."""

from __future__ import annotations

import errno

from fastserve.host_memory import MemoryBound
from fastserve.serving.bounds import SAMPLE_INTERVAL_S, MemoryMeter
from tests.serving.wire import Service, StartService, wait_until


def test_requests_are_refused_above_the_mark_and_taken_again_below(
    start_service: StartService, impatient: Service
) -> None:
    usual_mb = impatient.rss_mb()
    service = start_service("--memory-high-mark", f"{(usual_mb + 100) * 1e6:.0f}")
    with service.wire() as wire:
        wire.send(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wire.read_until(b"data: 1")
        assert service.ask("/allocate?megabytes=200").status == 200
        wait_until(lambda: service.ask("/things/a").status == 503, "new requests are refused")
        reply = service.ask("/things/a")
        assert reply.error["code"] == "server_overloaded"
        assert "memory" in reply.error["message"]
        assert int(reply.headers["retry-after"]) >= 1
        assert service.ask("/health").status == 200
        wire.read_until(b"data: ")  # running requests go on
        assert service.ask("/allocate?megabytes=0").status == 200
        wait_until(lambda: service.ask("/things/a").status == 200, "new requests are taken again")
    assert service.log.count("refused for want of memory") == 1
    assert service.log.count("there is memory again") == 1


def test_the_mark_is_a_share_of_each_bound() -> None:
    now = 0.0
    bounds = [MemoryBound(50, 100, "on this machine"), MemoryBound(20, 100, "in a container")]
    meter = MemoryMeter(0.9, lambda: now, lambda: bounds)
    assert not meter.is_high()
    bounds[1] = MemoryBound(5, 100, "in a container")
    assert not meter.is_high(), "it is not looked at for each request"
    now += SAMPLE_INTERVAL_S
    assert meter.is_high()
    bounds[1] = MemoryBound(11, 100, "in a container")
    now += SAMPLE_INTERVAL_S
    assert not meter.is_high()


def test_what_was_found_last_counts_while_no_file_can_be_opened() -> None:
    now, free, is_short = 0.0, 5, False

    def bounds() -> list[MemoryBound]:
        if is_short:
            raise OSError(errno.EMFILE, "Too many open files")
        return [MemoryBound(free, 100, "on this machine")]

    meter = MemoryMeter(0.9, lambda: now, bounds)
    assert meter.is_high()
    is_short, free = True, 50
    now += SAMPLE_INTERVAL_S
    assert meter.is_high()
    is_short = False
    now += SAMPLE_INTERVAL_S
    assert not meter.is_high()
    is_short = True
    now += SAMPLE_INTERVAL_S
    assert not meter.is_high()
