"""Ranks on several machines: equality with one machine, losses, strangers, older groups."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zmq

from fastserve.distributed.keys import CurveKeys
from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.network import Machines, NetworkCollectives, NetworkRelay
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.errors import StartupError

from .conftest import TinyModels
from .machines import KEYS, join_machines, make_relay
from .test_ranks_whole_step import logits, on_ranks

TWO = Machines([1, 1], generation=1)


@contextlib.contextmanager
def joined(*num_ranks: int, **options: Any) -> Iterator[list[SharedMemoryCollectives]]:
    ranks = join_machines(num_ranks, **options)
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def exchange(ranks: list[SharedMemoryCollectives], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: rank.all_reduce(parts[rank.rank]), ranks))


def exchange_until_lost(ranks: SharedMemoryCollectives) -> None:
    while True:
        ranks.all_reduce(torch.ones(30))


@pytest.mark.parametrize("num_ranks", [(1, 1), (2, 1)])
def test_a_divided_model_has_the_same_bits_on_several_machines(
    num_ranks: tuple[int, ...], tiny_models: TinyModels
) -> None:
    """In the kernel of a whole step, which exchanges by itself."""
    path = tiny_models.path("llama")
    expected = on_ranks(sum(num_ranks), lambda collectives: logits(path, collectives))[0]
    with joined(*num_ranks) as ranks, ThreadPoolExecutor(len(ranks)) as pool:
        for found in pool.map(lambda rank: logits(path, rank), ranks):
            assert torch.equal(found, expected)


def test_nothing_is_encrypted_without_a_key_and_sums_are_the_same() -> None:
    with joined(1, 1, keys=None) as ranks:
        assert all(
            torch.equal(sums, torch.full((5,), 3.0)) for sums in exchange(ranks, [torch.ones(5), 2 * torch.ones(5)])
        )


def test_a_wait_ends_when_another_thread_aborts_it_and_the_other_machine_learns_of_it() -> None:
    with joined(1, 1) as ranks:
        threading.Timer(0.2, ranks[0].abort).start()
        for rank in ranks:
            begin = time.monotonic()
            with pytest.raises(RankLostError, match="was lost"):
                exchange_until_lost(rank)
            assert time.monotonic() - begin < 10


def test_a_wait_for_another_machine_ends_at_its_deadline() -> None:
    with joined(1, 1) as ranks:
        ranks[0].set_timeout(0.2)
        with pytest.raises(RankLostError, match=r"did not answer within 0\.2 s"):
            ranks[0].barrier()


def test_a_machine_that_leaves_in_order_lets_others_finish_the_exchange() -> None:
    first, second = join_machines((1, 1))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(second.all_reduce, torch.ones(3))
        first.all_reduce(torch.ones(3))
        first.close()
        assert torch.equal(late.result(), 2 * torch.ones(3))
    with pytest.raises(RankLostError):
        second.all_reduce(torch.ones(3))
    second.close()


OTHER_MACHINE = """
import sys, torch
from fastserve.distributed.keys import CurveKeys
from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.ranks.network import Machines, NetworkCollectives, NetworkRelay
from fastserve.engine.ranks.segment import Segment
segment = Segment.create(2, 4096)
relay = NetworkRelay(segment, 1, Machines([1, 1], 1), CurveKeys.derive("5e" * 32))
print(relay.address, flush=True)
relay.join([sys.argv[1], relay.address], 60)
ranks = NetworkCollectives(cpu_library(torch.float32), segment, 1, 60.0, relay)
while True:
    ranks.all_reduce(torch.ones(30))
"""


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_that_is_killed_or_stopped_is_noticed_within_5_s(fault: signal.Signals) -> None:
    relay, segment = make_relay(0, TWO, slot_bytes=4096)
    command = [sys.executable, "-c", OTHER_MACHINE, relay.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            relay.join([relay.address, other.stdout.readline().strip()], 60)
            library = cpu_library(torch.float32)
            assert library is not None
            ranks = NetworkCollectives(library, segment, 0, 60.0, relay)
            for _ in range(20):
                assert torch.equal(ranks.all_reduce(torch.ones(30)), 2 * torch.ones(30))
            os.kill(other.pid, fault)
            begin = time.monotonic()
            with pytest.raises(RankLostError, match="was lost"):
                exchange_until_lost(ranks)
            assert time.monotonic() - begin < 5
            ranks.close()
        finally:
            other.kill()


def raw_bytes(address: str) -> None:
    host, _, port = address.rpartition(":")
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(100), bytes(10000)):
        with socket.create_connection((host, int(port)), 5) as stranger, contextlib.suppress(OSError):
            stranger.sendall(data)
            stranger.settimeout(0.05)
            found = stranger.recv(4096)
            assert b"fastserve" not in found
            assert len(found) <= 100, "more than ZeroMQ's greeting"


def send_with(keys: CurveKeys | None, address: str) -> None:
    """Send messages in the name of machine 1."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    stranger.linger = 0
    if keys is not None:
        keys.secure_client(stranger)
    stranger.connect(f"tcp://{address}")
    # The header of a farewell, and of a part.
    for kind in (2, 1, 0):
        stranger.send_multipart([bytes([kind]) + (1).to_bytes(4, "little") + (1).to_bytes(2, "little") + bytes(12)])
    time.sleep(0.3)  # strangers have no event to wait for
    stranger.close()
    context.term()


def test_strangers_learn_nothing_join_nothing_and_stop_nothing() -> None:
    with joined(1, 1) as ranks:
        first = ranks[0]
        assert isinstance(first, NetworkCollectives)
        for _ in range(2):
            raw_bytes(first.relay.address)
        send_with(None, first.relay.address)
        wrong = CurveKeys.derive("77" * 32)
        send_with(wrong, first.relay.address)
        send_with(CurveKeys(KEYS.server, wrong.client), first.relay.address)  # knows the public key alone
        for sums in exchange(ranks, [torch.ones(5), torch.ones(5)]):
            assert torch.equal(sums, 2 * torch.ones(5))


def join_both(first: NetworkRelay, second: NetworkRelay, timeout_s: float) -> list[str]:
    """What each of them says."""
    addresses = [first.address, second.address]

    def join(relay: NetworkRelay) -> str:
        try:
            relay.join(addresses, timeout_s)
        except RankLostError as error:
            return error.message
        return ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(join, (first, second)))


def close_all(*made: tuple[NetworkRelay, Segment]) -> None:
    for relay, segment in made:
        relay.close()
        segment.close()


def test_a_machine_with_another_key_does_not_join() -> None:
    first, second = make_relay(0, TWO), make_relay(1, TWO, CurveKeys.derive("77" * 32))
    found = join_both(first[0], second[0], 1.0)
    assert "machine 1" in found[0]
    assert "machine 0" in found[1]
    assert all("have not joined" in message and "another cluster key" in message for message in found)
    close_all(first, second)


def test_a_machine_of_an_older_group_is_refused_and_its_messages_are_not_read() -> None:
    new, old = make_relay(0, Machines([1, 1], generation=8)), make_relay(1, Machines([1, 1], generation=7))
    found = join_both(new[0], old[0], 1.0)
    assert "machine 1" in found[0]
    assert "newer group" in found[1]
    close_all(new, old)


def test_a_machine_that_divides_the_model_otherwise_is_refused() -> None:
    first, second = make_relay(0, TWO), make_relay(1, TWO, slot_bytes=8192)
    found = join_both(first[0], second[0], 1.0)
    assert any("divides it otherwise" in message for message in found)
    close_all(first, second)


def test_a_machine_joins_late_and_after_an_older_process_of_it() -> None:
    """The first connects to a process of an older group, which ends; then the new one comes at the same address."""
    old = make_relay(1, Machines([1, 1], generation=0))
    address = old[0].address
    first = make_relay(0, TWO)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(first[0].join, [first[0].address, address], 20.0)
        time.sleep(0.5)
        close_all(old)
        segment = Segment.create(2, 1 << 20)
        new = NetworkRelay(segment, 1, TWO, KEYS, address)
        new.join([first[0].address, address], 20.0)
        joining.result()
    close_all(first, (new, segment))


def test_an_address_that_cannot_be_bound_is_named() -> None:
    segment = Segment.create(2, 4096)
    with pytest.raises(StartupError, match=r"192\.0\.2\.1:5"):
        NetworkRelay(segment, 0, TWO, KEYS, "192.0.2.1:5")
    segment.close()
