"""Adapters of a model that is divided over two processes: the same answers as undivided."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.engine.adapters.reading import HostAdapter
from fastserve.engine.adapters.store import DeviceStore
from fastserve.engine.client import EngineProcess
from fastserve.engine.contract import EngineRequest
from fastserve.engine.settings import AdapterOptions, EngineConfig

from .conftest import TinyModels
from .test_adapters import LAYERS, Answer, assert_same, make_adapter, mixture, run, serve, take


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", (*LAYERS, "embed_tokens", "lm_head")),
        pytest.param("gpt2", ("c_attn", "c_proj", "c_fc"), marks=pytest.mark.slow),
    ],
)
async def test_two_ranks_answer_a_mixture_as_one_does(
    tiny_models: TinyModels, tmp_path: Path, name: str, layers: tuple[str, ...]
) -> None:
    base = tiny_models.path(name)
    folders = {f"x{rank}": make_adapter(base, tmp_path / f"x{rank}", rank, layers) for rank in (4, 20, 9)}
    await assert_same_on_two_ranks(base, folders)


async def assert_same_on_two_ranks(base: str, folders: dict[str, Path], **options: Any) -> None:
    requests = mixture(["", *folders], 12, seed=5)
    expected = run(serve(base, folders), requests)
    modules = tuple((adapter, str(folder)) for adapter, folder in folders.items())
    config = EngineConfig(
        model_dir=base, device="cpu", dtype="float32", tp_size=2, max_total_tokens=16 * 90,
        adapters=AdapterOptions(modules=modules, max_loras=2, max_cpu_loras=2), **options,
    )  # fmt: skip
    engine = EngineProcess(config)
    await engine.start(lambda _: None)
    try:
        answers = {one.request_id: Answer() for one in requests}

        async def ask(one: EngineRequest) -> None:
            with engine.generate(one) as outputs:
                async for output in outputs:
                    take(output, answers)

        await asyncio.gather(*map(ask, requests))
        for one in requests:
            assert_same(answers[one.request_id], expected[one.request_id], f"{one.request_id} {one.adapter}")
        stats = engine.stats.adapters
        assert stats is not None
        assert stats.loads >= len(folders)
    finally:
        await engine.close()


def test_each_rank_is_sent_its_own_part_of_an_adapter_alone() -> None:
    sent: list[tuple[int | None, bytes]] = []
    placed: list[HostAdapter] = []

    class Memory:
        def place(self, slot: int, part: HostAdapter, block_ids: list[int]) -> None:
            placed.append(part)

    def send(command: Any, rank: int | None = None) -> None:
        sent.append((rank, command.part.tiles))

    def part(rank: int) -> HostAdapter:
        return HostAdapter(torch.full((1, 4), rank, dtype=torch.uint8), np.zeros(1, np.int32), np.ones(1, np.int32))

    memory: Any = Memory()
    reader: Any = None
    DeviceStore(reader, memory, send).place(0, [part(rank) for rank in range(3)], [7])
    assert sent == [(1, bytes([1] * 4)), (2, bytes([2] * 4))]
    assert [int(one.tiles[0, 0]) for one in placed] == [0]
