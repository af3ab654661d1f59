"""Ranks on a GPU, as far as one GPU goes: one rank joined by NCCL, with the exchanges of a divided model in its layers.

`python -m pytest -m gpu`. FASTSERVE_TEST_DEVICE=cpu runs these tests on the CPU (gloo), to try the tests themselves.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.distributed.gang import Gang
from fastserve.distributed.keys import CurveKeys
from fastserve.distributed.machines import Machine
from fastserve.engine.build import build_core
from fastserve.engine.loading.partition import Partition
from fastserve.engine.loading.partition_plan import plan_partition
from fastserve.engine.ranks.gang_messages import Formed
from fastserve.engine.ranks.machine_group import MachineGroupCollectives
from fastserve.engine.ranks.process_group import ProcessGroupCollectives
from fastserve.engine.settings import EngineConfig
from tests.processes import free_ports

from .conftest import TinyModels
from .test_engine_equality import EOS, greedy
from .test_on_gpu import answer_all, graphs_of

DEVICE = os.environ.get("FASTSERVE_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["one machine", "several machines"])
def single_rank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ProcessGroupCollectives]:
    device = torch.device(DEVICE)
    if request.param == "one machine":
        group = ProcessGroupCollectives.join(tmp_path / "meet", 0, 1, device, 20.0)
    else:
        (port,) = free_ports(1)
        gang = Gang((Machine(0, "m_part0", "127.0.0.1", port),), 1, 0, 20.0)
        keys = CurveKeys.derive("5e" * 32)
        group = MachineGroupCollectives.join_gang(gang, 0, Formed(1, ("127.0.0.1",)), keys, device, 20.0)
    yield group
    group.close()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Grows with each call of the method."""
    calls: list[str] = []
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(name)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_exchanges_of_one_rank_return_its_part(single_rank: ProcessGroupCollectives) -> None:
    part = torch.randn(3, 5, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(single_rank.all_reduce(part), part)
    assert single_rank.all_reduce(part, torch.float32).dtype == torch.float32
    assert torch.equal(single_rank.all_gather(part), part)
    assert torch.equal(single_rank.all_reduce_max(torch.tensor([3, -4])), torch.tensor([3, -4]))
    single_rank.barrier()


def test_an_exchange_is_part_of_a_recorded_graph(single_rank: ProcessGroupCollectives) -> None:
    if not ON_CUDA:
        pytest.skip("nothing is recorded on a CPU")
    part = torch.zeros(4, 8, device=DEVICE)
    single_rank.all_reduce(part)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = single_rank.all_reduce(part * 2)
        joined = single_rank.all_gather(part + 1)
    for value in (1.0, 5.0):
        part.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert total.eq(2 * value).all()
        assert joined.eq(value + 1).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_a_model_with_the_exchanges_of_ranks_in_its_layers(
    monkeypatch: pytest.MonkeyPatch, tiny_models: TinyModels, single_rank: ProcessGroupCollectives, name: str
) -> None:
    """Divided over one rank, as over several: the same code computes it, and its decoding steps are recorded."""
    monkeypatch.setattr(
        Partition, "of", lambda model, collectives, **_: Partition(plan_partition(model, 1), collectives)
    )
    path = tiny_models.path(name)
    exchanges = count_calls(monkeypatch, single_rank, "all_reduce")
    config = EngineConfig(
        model_dir=path, device=DEVICE, dtype="float32", max_num_seqs=4, max_total_tokens=2048, block_size=16
    )
    core = build_core(config, lambda *_: None, collectives=single_rank)
    if ON_CUDA:
        assert graphs_of(core) is not None, "decoding steps were not recorded"
    rng = random.Random(1)
    prompts = {f"r{length}": [rng.randrange(2, 160) for _ in range(length)] for length in (1, 17, 60)}
    answers = answer_all(core, [greedy(prompt, 30, key) for key, prompt in prompts.items()])
    for key, prompt in prompts.items():
        assert answers[key] == tiny_models.reference(path, prompt, 30, [EOS])
    assert exchanges
