"""Collectives of several machines by torch.distributed, with gloo over loopback in NCCL's place; ranks are threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
import zmq

from fastserve.distributed.gang import Gang
from fastserve.distributed.keys import CurveKeys
from fastserve.distributed.machines import Machine
from fastserve.engine.ranks import join, machine_group
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.curve_store import CurveStore, StoreServer
from fastserve.engine.ranks.gang_messages import Formed
from fastserve.engine.ranks.machine_group import MachineGroupCollectives
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError
from tests.processes import free_ports

KEYS = CurveKeys.derive("5e" * 32)
OTHER_KEYS = CurveKeys.derive("6f" * 32)
CPU = torch.device("cpu")


class Machines:
    """Two machines of one rank each, whose groups form one after the other."""

    def __init__(self) -> None:
        (port,) = free_ports(1)
        self.gang = Gang(tuple(Machine(part, f"m_part{part}", "127.0.0.1", port) for part in range(2)), 1, 0, 10.0)
        self.groups: list[MachineGroupCollectives] = []

    def join(self, rank: int, generation: int, timeout_s: float = 10.0, is_lost: Any = lambda: False) -> Any:
        formed = Formed(generation, ("127.0.0.1", "127.0.0.1"))
        return MachineGroupCollectives.join_gang(self.gang, rank, formed, KEYS, CPU, timeout_s, is_lost)

    def form(self, generation: int) -> list[MachineGroupCollectives]:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda rank: self.join(rank, generation), range(2)))
        self.groups += found
        return found


@pytest.fixture
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    for group in made.groups[::-1]:  # the first has the store
        group.close()


def on_all(groups: list[MachineGroupCollectives], work: Callable[[MachineGroupCollectives], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, groups))


def test_machines_exchange_and_form_again_in_the_same_processes(machines: Machines) -> None:
    for generation in (1, 2):
        groups = machines.form(generation)
        parts = [torch.full((2, 3), rank + generation, dtype=torch.bfloat16) for rank in range(2)]
        sums = on_all(groups, lambda group: group.all_reduce(parts[group.rank]))  # noqa: B023
        assert [found.tolist() for found in sums] == [[[1.0 + 2 * generation] * 3] * 2] * 2
        joined = on_all(groups, lambda group: group.all_gather(torch.arange(group.rank + 1)))
        assert [found.tolist() for found in joined] == [[0, 0, 1]] * 2
        groups[1].close()
        groups[0].close()


def test_a_lost_machine_ends_the_exchange_that_waits_for_it(machines: Machines) -> None:
    groups = machines.form(1)
    timer = threading.Timer(0.3, groups[0].abort)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(RankLostError, match="another rank of the model was lost"):
        groups[0].all_reduce(torch.ones(2))
    assert 0.2 < time.monotonic() - begin < 5
    with pytest.raises(RankLostError):
        groups[0].barrier()
    with pytest.raises(RankLostError):
        groups[0].set_timeout(1.0)  # the end of a step whose exchanges were in a recorded graph
    groups[1].close()
    groups[0].close()
    assert on_all(machines.form(2), lambda group: float(group.all_reduce(torch.ones(1)))) == [2.0, 2.0]


def test_a_machine_that_does_not_answer_is_lost_at_the_deadline(machines: Machines) -> None:
    first, _ = machines.form(1)
    first.set_timeout(0.4)
    begin = time.monotonic()
    with pytest.raises(RankLostError, match=r"did not answer within 0\.4 s"):
        first.all_gather(torch.ones(1))
    assert 0.3 < time.monotonic() - begin < 5


def test_a_machine_that_does_not_come_ends_the_start(machines: Machines) -> None:
    with pytest.raises(RankLostError):
        machines.join(0, 1, timeout_s=0.5)
    assert machines.form(2)  # the port is free again


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_stops_waiting_for_one_that_is_known_to_be_lost(machines: Machines, rank: int) -> None:
    lost = threading.Event()
    timer = threading.Timer(0.2, lost.set)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(RankLostError):
        machines.join(rank, 1, timeout_s=60.0, is_lost=lost.is_set)
    assert time.monotonic() - begin < 5


@pytest.fixture
def server() -> Iterator[StoreServer]:
    found = StoreServer(KEYS, "127.0.0.1:0")
    yield found
    found.close()


@pytest.fixture
def make_store(server: StoreServer) -> Iterator[Callable[..., CurveStore]]:
    stores: list[CurveStore] = []

    def make(keys: CurveKeys | None = KEYS, timeout_s: float = 5.0) -> CurveStore:
        stores.append(CurveStore(keys, server.address, timeout_s))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def test_the_store_keeps_what_torchs_contract_says(make_store: Callable[..., CurveStore]) -> None:
    first, second = make_store(), make_store()
    first.set("key", b"\0value")
    assert second.get("key") == b"\0value"
    assert [first.add("count", 2), second.add("count", 3), first.add("count", 0)] == [2, 5, 5]
    assert first.check(["key", "count"])
    assert not first.check(["key", "other"])
    assert first.compare_set("key", b"another", b"new") == b"\0value"
    assert second.compare_set("key", b"\0value", b"new") == b"new"
    assert first.compare_set("made", "", b"now") == b"now"
    assert (second.delete_key("key"), second.delete_key("key")) == (True, False)
    begin = time.monotonic()
    with pytest.raises(RankLostError, match=r"within 0\.2 s .*key"):
        first.wait(["key"], timedelta(seconds=0.2))
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("keys", [OTHER_KEYS, None])
def test_a_stranger_reads_and_changes_nothing(
    server: StoreServer, make_store: Callable[..., CurveStore], keys: CurveKeys | None
) -> None:
    member, stranger = make_store(), make_store(keys, 0.7)
    member.set("unique id", b"secret")
    for attempt in (lambda: stranger.get("unique id"), lambda: stranger.set("unique id", b"mine")):
        with pytest.raises(RankLostError, match="does not answer"):
            attempt()
    assert make_store().get("unique id") == b"secret"


def test_nonsense_stops_nothing(server: StoreServer, make_store: Callable[..., CurveStore]) -> None:
    store = make_store()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 100
        KEYS.secure_client(socket)
        socket.connect(f"tcp://{server.address}")
        for frames in ([b""], [b"1", b"add", b"key", b"no number", b""], [b"1", b"stop", b"", b"", b""], [b"x"] * 9):
            socket.send_multipart(frames)
        store.set("key", b"value")
        assert store.get("key") == b"value"
        time.sleep(0.2)
    assert store.get("key") == b"value"


def test_nccl_uses_the_interface_of_the_route_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = next(
        name for name, rows in psutil.net_if_addrs().items() if any(row.address == "127.0.0.1" for row in rows)
    )
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    machine_group._use_interface("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}"
    machine_group._use_interface("10.255.255.1")  # what is set stays
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}"


@pytest.mark.parametrize(
    ("device", "choice", "expected"),
    [
        ("cuda", None, True),
        ("cuda", "nccl", True),
        ("cuda", "host", False),
        ("cpu", None, False),
        ("cpu", "host", False),
    ],
)
def test_gpus_exchange_by_nccl_unless_the_user_wants_encryption(
    monkeypatch: pytest.MonkeyPatch, device: str, choice: str | None, expected: bool
) -> None:
    class Device:
        torch_device = torch.device(device)

    monkeypatch.setattr(join, "find_device", lambda name: Device)
    assert join.uses_nccl(EngineConfig(model_dir="m", machine_collectives=choice)) == expected


def test_nccl_without_gpus_is_refused() -> None:
    with pytest.raises(StartupError, match="--machine-collectives nccl needs --device cuda"):
        join.uses_nccl(EngineConfig(model_dir="m", device="cpu", machine_collectives="nccl"))
