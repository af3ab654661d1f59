"""Products with the adapters of a batch by the CPU kernel, against their definition."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastserve.engine.adapters.batch import AdapterBatch
from fastserve.engine.adapters.tiles import num_rank_groups, pack_tiles, unpack_tiles
from fastserve.engine.kernels.lora import CpuLoraKernel, TileOrder
from fastserve.engine.runner.runner import ModelRunner

from .conftest import TinyModels, keep_way
from .lora_batches import RandomSite, batch_of
from .test_adapters import assert_same, make_adapter, request, run, serve

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RANKS = {1: 4, 2: 64, 3: 1, 4: 16, 5: 8, 6: 20, 7: 33}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kernel_of(dtype: torch.dtype) -> CpuLoraKernel:
    kernel = CpuLoraKernel.load(dtype)
    if kernel is None:
        pytest.skip("no compiler is installed")
    return kernel


def mixture(rows: int) -> list[int]:
    """Slots of rows: at least one with weights, some of the bare base, some of a slot without weights for the site."""
    slots = [random.choice([0, 0, *RANKS, 9]) for _ in range(rows - 1)]
    slots.insert(random.randrange(rows), random.choice([*RANKS]))
    return slots


@pytest.mark.parametrize("order", [TileOrder(), TileOrder(4, 16, 2), TileOrder(2, 16, 1)], ids=str)
@pytest.mark.parametrize(("rank", "in_size", "out_size", "width"), [(1, 5, 3, 16), (20, 130, 257, 128)])
def test_tiles_of_any_order_are_unpacked(order: TileOrder, rank: int, in_size: int, out_size: int, width: int) -> None:
    a, b = torch.randn(rank, in_size), torch.randn(out_size, rank)
    tiles = pack_tiles(a, b, width, order)
    found_a, found_b = unpack_tiles(tiles, num_rank_groups(rank), in_size, out_size, width, order)
    assert torch.equal(found_a[:rank], a)
    assert torch.equal(found_b[:, :rank], b)


@pytest.mark.parametrize("in_float", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("in_size", "out_size", "width", "rows"), [(40, 24, 16, 5), (1300, 300, 128, 40), (67, 50, 64, 90)]
)
def test_each_row_gets_the_product_of_its_adapter(
    dtype: torch.dtype, in_size: int, out_size: int, width: int, rows: int, in_float: bool
) -> None:
    """`in_float`: added to a partial sum of ranks."""
    kernel = kernel_of(dtype)
    slots = mixture(rows)
    first = RandomSite(in_size, out_size, RANKS, kernel.order, dtype, width=width)
    second = RandomSite(in_size, 19, {2: 12, 5: 3}, kernel.order, dtype, width=width, out_begin=out_size)
    x = torch.randn(rows, in_size).to(dtype)
    base = torch.randn(rows, out_size + 19 + 3).to(torch.float32 if in_float else dtype)
    out = base.clone()
    kernel.add(x, out, [first.tables, second.tables], batch_of(slots))
    expected = base.double()
    expected[:, :out_size] += first.product(x, slots)
    expected[:, out_size : out_size + 19] += second.product(x, slots)
    assert torch.allclose(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    bare = [row for row, slot in enumerate(slots) if slot in (0, 9)]
    assert torch.equal(out[bare], base[bare]), "rows without an adapter must keep their bits"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(40, 24, 16), (1300, 77, 128)])
def test_each_token_of_an_embedding_gets_the_product_of_its_adapter(
    dtype: torch.dtype, tokens: int, hidden: int, width: int
) -> None:
    kernel = kernel_of(dtype)
    slots, ids = mixture(50), [random.randrange(tokens) for _ in range(50)]
    site = RandomSite(tokens, hidden, RANKS, kernel.order, dtype, width=width)
    base = torch.randn(50, hidden).to(dtype)
    out = base.clone()
    kernel.add_embedding(torch.tensor(ids), out, site.tables, batch_of(slots))
    expected = base.double() + site.embedded(ids, slots)
    assert torch.allclose(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    bare = [row for row, slot in enumerate(slots) if slot in (0, 9)]
    assert torch.equal(out[bare], base[bare])
    assert not torch.equal(out, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    kernel = kernel_of(dtype)
    site = RandomSite(1700, 200, RANKS, kernel.order, dtype, width=64)
    slots = mixture(70)
    x, base = torch.randn(70, 1700).to(dtype), torch.randn(70, 200).to(dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        threaded = kernel_of(dtype)
        out = base.clone()
        threaded.add(x, out, [site.tables], batch_of(slots))
        alone = base.clone()
        for row, slot in enumerate(slots):
            one = AdapterBatch.of([slot])
            if one is not None:
                threaded.add(x[row : row + 1], alone[row : row + 1], [site.tables], one)
        found += [out, alone]
    assert all(torch.equal(other, found[0]) for other in found)
    assert not torch.equal(found[0], base)


def test_inputs_that_do_not_fit_are_refused() -> None:
    kernel = kernel_of(torch.float32)
    site = RandomSite(32, 16, RANKS, kernel.order)
    with pytest.raises(RuntimeError, match="adapters cannot be added"):
        kernel.add(torch.randn(2, 31), torch.randn(2, 16), [site.tables], batch_of([1, 2]))
    with pytest.raises(RuntimeError, match="adapters cannot be added"):
        kernel.add(torch.randn(2, 32), torch.randn(2, 15), [site.tables], batch_of([1, 2]))
    with pytest.raises(RuntimeError, match="adapters of an embedding cannot be added"):
        kernel.add_embedding(torch.tensor([3, 4]), torch.randn(2, 15), site.tables, batch_of([1, 2]))


def test_steps_with_adapters_are_computed_in_one_call_as_by_the_modules(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    kernel_of(torch.float32)
    base = tiny_models.path("llama")
    folders = {f"a{rank}": make_adapter(base, tmp_path / f"a{rank}", rank) for rank in (4, 20)}
    requests = [
        request(f"r{index}", list(range(2, 8 + 5 * index)), 6, name, logprobs=0, prompt_logprobs=index % 2 or None)
        for index, name in enumerate(["a4", "", "a20", "a4", ""])
    ]
    answers = {}
    for way in ("whole_step", "modules"):
        core = serve(base, folders)
        runner = core._executor
        assert isinstance(runner, ModelRunner)
        keep_way(runner, way)
        answers[way] = run(core, requests)
    for name, answer in answers["whole_step"].items():
        assert_same(answer, answers["modules"][name], name)
    assert len({tuple(answers["modules"][name].token_ids) for name in ("r0", "r1", "r2")}) == 3
