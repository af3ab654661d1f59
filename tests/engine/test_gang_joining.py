"""Ranks of several machines join rank 0: who is missing, who is refused, and what strangers achieve."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from fastserve.distributed.gang import Gang
from fastserve.distributed.keys import CurveKeys, gang_secret
from fastserve.distributed.machines import Machine
from fastserve.engine.ranks import gang_hub, join
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.gang_hub import GangHub, is_sibling
from fastserve.engine.ranks.gang_link import GangLink, RefusedError
from fastserve.engine.ranks.gang_messages import Formed
from fastserve.engine.ranks.join import join_machines
from fastserve.engine.ranks.messages import ReadWeight
from fastserve.engine.ranks.pass_segment import pass_segment, receive_segment
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.errors import EngineDeadError, StartupError
from tests.processes import free_ports

KEYS = CurveKeys.derive(gang_secret("a cluster key of these tests"))
OTHER_KEYS = CurveKeys.derive(gang_secret("another cluster key of them"))
SETTINGS = {"--dtype": "float32", "torch": "2.0"}
WAIT_S = 10.0


def make_gang(part: int = 0, timeout_s: float = WAIT_S, size: int = 2, local_size: int = 1) -> Gang:
    (port,) = free_ports(1)
    machines = tuple(Machine(at, f"m_part{at}", "127.0.0.1", port + 20 * at) for at in range(size))
    return Gang(machines, local_size, part, timeout_s)


def on_part(gang: Gang, part: int) -> Gang:
    return Gang(gang.machines, gang.local_size, part, gang.timeout_s)


@pytest.fixture
def lost() -> threading.Event:
    return threading.Event()


@pytest.fixture
def make_hub(lost: threading.Event) -> Iterator[Callable[[Gang], GangHub]]:
    hubs: list[GangHub] = []

    def make(gang: Gang) -> GangHub:
        hubs.append(GangHub(gang, KEYS, SETTINGS, lost.set))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


@pytest.fixture
def make_link() -> Iterator[Callable[..., GangLink]]:
    links: list[GangLink] = []

    def make(gang: Gang, rank: int = 1, keys: CurveKeys | None = KEYS, settings: dict[str, str] = SETTINGS) -> GangLink:
        links.append(GangLink(on_part(gang, rank), rank, keys, settings))
        return links[-1]

    yield make
    for link in links:
        link.close()


def test_all_ranks_form_one_group_and_get_commands_in_order(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink]
) -> None:
    gang = make_gang(size=3)
    links = [make_link(gang, rank) for rank in (2, 1)]  # before rank 0 is there
    hub = make_hub(gang)
    formed = hub.wait_formed()
    assert formed.ips == ("127.0.0.1",) * 3
    assert [link.wait_formed() for link in links] == [formed, formed]
    for number in range(3):
        hub.send(ReadWeight(str(number)))
    for link in links:
        assert [link.receive() for _ in range(3)] == [ReadWeight(str(number)) for number in range(3)]
    for rank in (1, 2):
        hub.send(ReadWeight(f"of rank {rank}"), rank)
    hub.send(ReadWeight("of all"))
    for link, rank in zip(links, (2, 1), strict=True):
        assert [link.receive() for _ in range(2)] == [ReadWeight(f"of rank {rank}"), ReadWeight("of all")]


def test_rank_0_says_which_machines_are_missing(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gang = make_gang(timeout_s=1.5, size=3)
    make_link(gang, 1)
    with pytest.raises(StartupError) as caught:
        make_hub(gang).wait_formed()
    assert "rank 2 (m_part2, 127.0.0.1)" in caught.value.message
    assert "rank 1" not in caught.value.message
    assert "GANG_TIMEOUT_MIN" in caught.value.message
    assert "waiting: missing rank 1 (m_part1, 127.0.0.1), rank 2 (m_part2, 127.0.0.1)" in caplog.text


def test_a_difference_in_settings_is_named_on_both_sides(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink]
) -> None:
    gang = make_gang(timeout_s=2.0)
    hub = make_hub(gang)
    link = make_link(gang, settings=SETTINGS | {"--dtype": "bfloat16"})
    with pytest.raises(RefusedError, match="--dtype is bfloat16 there, and float32 on rank 0"):
        link.wait_formed()
    with pytest.raises(StartupError, match="--dtype is bfloat16 there, and float32 on rank 0"):
        hub.wait_formed()


def test_a_rank_that_cannot_start_gives_rank_0_its_reason(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink]
) -> None:
    gang = make_gang(size=3)
    hub, link = make_hub(gang), make_link(gang, 1)
    time.sleep(0.5)  # it joins
    link.fail("there is no such file")
    with pytest.raises(StartupError, match=r"rank 1 .*there is no such file"):
        hub.wait_formed()


def test_rank_0_begins_anew_when_another_rank_falls_silent(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink], lost: threading.Event
) -> None:
    gang = make_gang()
    hub, link = make_hub(gang), make_link(gang)
    hub.wait_formed()
    link.wait_formed()
    begin = time.monotonic()
    link.close()
    assert lost.wait(WAIT_S)
    assert time.monotonic() - begin < 5.0


def form(hub: GangHub, links: Sequence[GangLink]) -> Formed:
    """Wait for a new group on all sides."""
    with ThreadPoolExecutor(len(links)) as pool:
        waiting = [pool.submit(link.wait_formed) for link in links]
        formed = hub.wait_formed()
        assert [one.result() for one in waiting] == [formed] * len(links)
    return formed


def keeping(hub: GangHub, links: Sequence[GangLink]) -> None:
    hub.serving(keeps_weights=True)
    for link in links:
        link.keep_weights()


def test_ranks_that_keep_their_weights_form_a_new_group_with_the_one_that_is_back(
    make_hub: Callable[[Gang], GangHub],
    make_link: Callable[..., GangLink],
    lost: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gang_hub, "MAX_SILENCE_S", 1.5)
    gang = make_gang(size=3)
    hub, links = make_hub(gang), [make_link(gang, rank) for rank in (1, 2)]
    first = form(hub, links)
    keeping(hub, links)
    aborted = [threading.Event() for _ in range(2)]
    hub.watch(aborted[0].set)
    links[0].watch(aborted[1].set)
    hub.send(ReadWeight("of the first group"))
    links[1].close()
    assert all(one.wait(WAIT_S) for one in aborted)
    with pytest.raises(EngineDeadError, match=r"rank 2 .* has been silent"):
        hub.require_group()
    hub.leave("it is lost")
    links[1] = make_link(gang, 2)
    second = form(hub, links)
    assert second.generation > first.generation
    hub.send(ReadWeight("of the second group"))
    assert [link.receive() for link in links] == [ReadWeight("of the second group")] * 2
    assert not lost.is_set()


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_a_group_whose_exchanges_have_failed_on_one_side_is_left_by_all(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink], leaves_first: int
) -> None:
    gang = make_gang()
    hub, links = make_hub(gang), [make_link(gang)]
    first = form(hub, links)
    keeping(hub, links)
    if leaves_first == 0:
        hub.leave("an exchange failed")
        with pytest.raises(EngineDeadError, match="an exchange failed"):
            links[0].receive()
        second = form(hub, links)
    else:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(links[0].wait_formed)
            deadline = time.monotonic() + WAIT_S
            while not hub.is_lost and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(EngineDeadError, match="has left the group"):
                hub.require_group()
            second = hub.wait_formed()
            assert waiting.result() == second
    assert second.generation > first.generation


def test_other_ranks_keep_their_weights_while_rank_0_is_started_again(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink]
) -> None:
    gang = make_gang()
    hub, links = make_hub(gang), [make_link(gang)]
    form(hub, links)
    keeping(hub, links)
    hub.close()
    hub = make_hub(gang)
    with pytest.raises(EngineDeadError, match="rank 0 has been"):
        links[0].receive()
    form(hub, links)


def test_rank_0_would_kill_only_processes_of_its_own_parent() -> None:
    sleeping = subprocess.Popen(["sleep", "30"])
    pid = os.fork()
    if pid == 0:
        os._exit(0 if is_sibling(sleeping.pid) else 1)
    _, status = os.waitpid(pid, 0)
    others = [is_sibling(other) for other in (sleeping.pid, os.getpid(), os.getppid(), 1)]
    sleeping.kill()
    sleeping.wait()
    assert os.waitstatus_to_exitcode(status) == 0
    assert others == [False] * 4


@pytest.mark.parametrize("keys", [None, OTHER_KEYS])
def test_a_stranger_joins_nothing_and_stops_nothing(
    make_hub: Callable[[Gang], GangHub],
    make_link: Callable[..., GangLink],
    keys: CurveKeys | None,
    lost: threading.Event,
) -> None:
    gang = make_gang()
    hub = make_hub(gang)
    stranger = make_link(gang, 1, keys)
    flood = [socket.create_connection(("127.0.0.1", gang.control_port)) for _ in range(200)]
    for connection in flood:
        connection.sendall(b"\xff" * 200)
    link = make_link(gang, 1)
    assert hub.wait_formed() == link.wait_formed()
    assert stranger._formed.empty()
    hub.send(ReadWeight("still there"))
    assert link.receive() == ReadWeight("still there")
    assert not lost.is_set()
    for connection in flood:
        connection.close()


def test_a_member_of_the_cluster_that_sends_nonsense_stops_nothing(
    make_hub: Callable[[Gang], GangHub], make_link: Callable[..., GangLink]
) -> None:
    gang = make_gang()
    hub = make_hub(gang)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    odd = context.socket(zmq.DEALER)
    KEYS.secure_client(odd)
    odd.connect(gang.control_endpoint())
    for message in ([b""], [b"\xc1" * 100], [b"a", b"b", b"c"], [b"\x91" * 5000]):
        odd.send_multipart(message)
    link = make_link(gang)
    assert hub.wait_formed() == link.wait_formed()
    context.destroy(linger=0)


GENERATION = time.time_ns() // 1_000_000


def join_all(gang: Gang, generations: Sequence[int], folders: Sequence[Path]) -> list[SharedMemoryCollectives]:
    """All ranks, in threads, each with its generation; `folders`: of each machine."""
    formed = [Formed(generation, ("127.0.0.1",) * gang.size) for generation in generations]

    def join(rank: int) -> SharedMemoryCollectives:
        part = rank // gang.local_size
        own = msgspec.structs.replace(on_part(gang, part), folder=str(folders[part]))
        joined = join_machines(own, rank, formed[rank], KEYS)
        assert isinstance(joined, SharedMemoryCollectives)
        return joined

    with ThreadPoolExecutor(gang.size) as pool:
        return list(pool.map(join, range(gang.size)))


def sums_of(ranks: Sequence[SharedMemoryCollectives]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: rank.all_reduce(torch.full((7,), 1.0 + rank.rank)), ranks))


@pytest.mark.parametrize("local_size", [1, 2, 3])
def test_the_ranks_of_each_machine_share_a_segment_and_machines_a_relay(local_size: int, tmp_path: Path) -> None:
    gang = make_gang(local_size=local_size)
    folders = [tmp_path / str(part) for part in range(2)]
    for folder in folders:
        folder.mkdir()
    total = float(sum(range(1, gang.size + 1)))
    for generation in (GENERATION, GENERATION + 1):  # a new group follows on the same ports and in the same folders
        ranks = join_all(gang, [generation] * gang.size, folders)
        assert [(rank.rank, rank.size) for rank in ranks] == [(rank, gang.size) for rank in range(gang.size)]
        assert all(torch.equal(sums, torch.full((7,), total)) for sums in sums_of(ranks))
        assert [len(list(folder.iterdir())) for folder in folders] == [0, 0], "the sockets are gone"
        for rank in ranks:
            rank.close()


def test_machines_of_different_generations_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "MAX_START_SILENCE_S", 1.0)
    with pytest.raises(RankLostError, match=r"newer group|have not joined"):
        join_all(make_gang(), [GENERATION, GENERATION + 1], [tmp_path, tmp_path])


def test_a_segment_of_another_generation_is_not_taken(tmp_path: Path) -> None:
    with contextlib.closing(Segment.create(2)) as segment, ThreadPoolExecutor(1) as pool:
        offer = pool.submit(pass_segment, segment, tmp_path, GENERATION, 1, WAIT_S)
        with pytest.raises(RankLostError, match="did not pass its segment"):
            receive_segment(tmp_path, GENERATION + 1, 2, 0.2)
        with contextlib.closing(receive_segment(tmp_path, GENERATION, 2, WAIT_S)):
            offer.result()


def test_a_first_rank_names_how_many_did_not_ask_for_its_segment(tmp_path: Path) -> None:
    (tmp_path / f"{GENERATION:x}").touch()  # left by a process that was killed
    with contextlib.closing(Segment.create(3)) as segment, ThreadPoolExecutor(1) as pool:
        offer = pool.submit(pass_segment, segment, tmp_path, GENERATION, 2, 0.5)
        receive_segment(tmp_path, GENERATION, 3, WAIT_S).close()
        with pytest.raises(RankLostError, match="1 of the 2 other ranks"):
            offer.result()
