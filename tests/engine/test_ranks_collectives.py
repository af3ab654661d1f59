"""Collectives: the ranks are threads here; tests of the engine run them as processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives, RankLostError
from fastserve.engine.ranks.process_group import ProcessGroupCollectives
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives

from .machines import join_machines

SLOT_BYTES = 4096  # small, so that some exchanges take several


class Group:
    """Runs a function on all ranks."""

    def __init__(self, ranks: list[Any]) -> None:
        self.ranks = ranks
        self._pool = ThreadPoolExecutor(len(ranks))

    def run(self, work: Callable[[Collectives], Any]) -> list[Any]:
        return list(self._pool.map(work, self.ranks))


def share_memory(size: int, timeout_s: float = 20.0) -> list[SharedMemoryCollectives]:
    segment = Segment.create(size, SLOT_BYTES)
    ranks = [SharedMemoryCollectives.load(segment, rank, timeout_s) for rank in range(size)]
    if any(rank is None for rank in ranks):
        pytest.skip("no C++ compiler")
    return [rank for rank in ranks if rank is not None]


def join_gloo(size: int, folder: Path) -> list[ProcessGroupCollectives]:
    def join(rank: int) -> ProcessGroupCollectives:
        return ProcessGroupCollectives.join(folder / "meet", rank, size, torch.device("cpu"), 20.0)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


GROUPS = [
    "shared memory of 2",
    "shared memory of 3",
    "gloo of 2",
    "machines of 1+1",
    "machines of 1+1+1",
    "machines of 2+2",
]


@pytest.fixture(scope="module", params=GROUPS)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    kind, size = request.param.split(" of ")
    if kind == "machines":
        made = Group(join_machines([int(one) for one in size.split("+")], slot_bytes=SLOT_BYTES))
    elif kind == "gloo":
        made = Group(join_gloo(int(size), tmp_path_factory.mktemp("gloo")))
    else:
        made = Group(share_memory(int(size)))
    yield made
    for rank in made.ranks:
        rank.close()


def random(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 17), (5, 896), (2, 3, 40)])
def test_sums_are_in_rank_order_in_float32_and_rounded_once(
    group: Group, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    parts = [random(rank, *shape) * 10**rank for rank in range(len(group.ranks))]
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    found = group.run(lambda ranks: ranks.all_reduce(parts[ranks.rank], dtype))
    assert all(torch.equal(one, expected.to(dtype)) for one in found)
    again = group.run(lambda ranks: ranks.all_reduce(parts[ranks.rank].to(dtype)))
    assert all(one.dtype is dtype and torch.equal(one, again[0]) for one in again)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parts_of_different_sizes_are_gathered_in_rank_order(group: Group, dim: int, dtype: torch.dtype) -> None:
    parts = []
    for rank in range(len(group.ranks)):
        shape = [6, 7, 30]
        shape[dim] = 20 * rank + 1
        parts.append((random(rank, *shape) * 100).to(dtype))
    for found in group.run(lambda ranks: ranks.all_gather(parts[ranks.rank], dim)):
        assert torch.equal(found, torch.cat(parts, dim))


def test_an_empty_part_is_gathered(group: Group) -> None:
    for found in group.run(lambda ranks: ranks.all_gather(torch.ones(4, 3 if ranks.rank == 0 else 0))):
        assert torch.equal(found, torch.ones(4, 3))


def test_the_maximum_is_by_value(group: Group) -> None:
    size = len(group.ranks)
    for found in group.run(lambda ranks: ranks.all_reduce_max(torch.eye(size, dtype=torch.float64)[ranks.rank])):
        assert torch.equal(found, torch.ones(size, dtype=torch.float64))


def test_many_exchanges_stay_in_step(group: Group) -> None:
    """A rank may be an exchange ahead of another; it must not overwrite what the other still reads."""

    def add_up(ranks: Collectives) -> float:
        value = torch.full((300,), float(ranks.rank + 1))
        for index in range(200):
            if index % 50 == ranks.rank:
                time.sleep(0.001)
            value = ranks.all_reduce(value) / ranks.size
        assert value.eq(value[0]).all()
        return float(value[0])

    found = group.run(add_up)
    assert found == [found[0]] * len(found)
    assert found[0] == pytest.approx((len(found) + 1) / 2)


def test_nobody_passes_a_barrier_before_all_have_come(group: Group) -> None:
    come = []

    def work(ranks: Collectives) -> int:
        time.sleep(0.02 * ranks.rank)
        come.append(ranks.rank)
        ranks.barrier()
        return len(come)

    assert group.run(work) == [len(group.ranks)] * len(group.ranks)


def test_one_rank_keeps_its_tensors() -> None:
    x = random(0, 4, 5)
    assert SINGLE_RANK.all_reduce(x) is x
    assert SINGLE_RANK.all_reduce(x, torch.bfloat16).dtype is torch.bfloat16
    assert SINGLE_RANK.all_gather(x) is SINGLE_RANK.all_reduce_max(x) is x


def test_a_wait_ends_at_its_deadline() -> None:
    first, _ = share_memory(2, timeout_s=0.2)
    with pytest.raises(RankLostError, match=r"did not answer within 0\.2 s"):
        first.all_reduce(torch.ones(3))
    with pytest.raises(RankLostError):  # at once, and from then on
        first.barrier()


def test_a_wait_ends_when_a_rank_is_declared_lost() -> None:
    first, _ = share_memory(2)
    timer = threading.Timer(0.2, first.segment.declare_lost)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(RankLostError, match="was lost"):
        first.all_gather(torch.ones(3))
    assert time.monotonic() - begin < 10
    timer.join()


def test_ranks_that_make_different_calls_learn_of_it() -> None:
    group = Group(share_memory(2, timeout_s=5.0))

    def work(ranks: Collectives) -> str:
        try:
            ranks.all_reduce(torch.ones(3 + ranks.rank))
        except RankLostError as error:
            return error.message
        return ""

    assert all("different calls" in message for message in group.run(work))


def test_a_lost_peer_of_a_process_group_is_an_error_of_ours(tmp_path: Path) -> None:
    first, second = join_gloo(2, tmp_path)
    first.set_timeout(0.3)
    with pytest.raises(RankLostError, match="was lost"):
        first.all_reduce(torch.ones(3))
    second.close()


def test_progress_of_all_ranks_is_added_up() -> None:
    segment = Segment.create(3, SLOT_BYTES)
    segment.set_progress(0, 5, 10)
    segment.set_progress(2, 1, 20)
    assert segment.progress() == (6, 50)  # one has not begun
    segment.close()
    segment.close()
