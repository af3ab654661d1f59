"""The Triton products with the adapters of a batch against their definition: interpreted, or compiled on a GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastserve.engine.adapters.batch import AdapterBatch
from fastserve.engine.kernels.lora import TileOrder

from .lora_batches import RandomSite, batch_of
from .triton_interpreter import DEVICES, import_kernels

module: Any = import_kernels("triton_lora")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Triton's interpreter truncates to bfloat16 in place of rounding."""
RANKS = {1: 4, 2: 64, 3: 1, 4: 16, 5: 8, 6: 20}


def mixture(rows: int) -> list[int]:
    """Slots of rows: some of the bare base, some of a slot without weights for the site, and a long run of one."""
    chosen = [random.choice([0, 0, *RANKS, 9]) for _ in range(rows)]
    chosen[rows // 2 :] = [2] * (rows - rows // 2)
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("in_size", "out_size", "width", "rows"), [(40, 24, 16, 5), (300, 100, 32, 40)])
def test_each_row_gets_the_product_of_its_adapter(
    device: str, dtype: torch.dtype, in_size: int, out_size: int, width: int, rows: int
) -> None:
    slots = mixture(rows)
    first = RandomSite(in_size, out_size, RANKS, TileOrder(), dtype, device, width)
    second = RandomSite(in_size, 19, {2: 12, 5: 3}, TileOrder(), dtype, device, width, out_begin=out_size)
    x = torch.randn(rows, in_size).to(dtype)
    base = torch.randn(rows, out_size + 19 + 3).to(dtype)
    out = base.to(device)
    if out is base:
        out = base.clone()
    module.TritonLoraKernel().add(x.to(device), out, [first.tables, second.tables], batch_of(slots))
    expected = base.double()
    expected[:, :out_size] += first.product(x, slots)
    expected[:, out_size : out_size + 19] += second.product(x, slots)
    assert torch.allclose(out.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    bare = [row for row, slot in enumerate(slots) if slot in (0, 9)]
    assert torch.equal(out.cpu()[bare], base[bare]), "rows without an adapter must keep their bits"


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_fixed_size_take_any_mixture(device: str) -> None:
    rows = module.DeviceRows.empty(24, torch.device(device))
    site = RandomSite(140, 50, RANKS, TileOrder(), device=device, width=16)
    kernel = module.TritonLoraKernel()
    for count in (24, 3, 17):
        slots = [*mixture(count), *[0] * (24 - count)]
        x, base = torch.randn(24, 140), torch.randn(24, 50)
        out = base.clone().to(device)
        rows.fill(batch_of(slots))
        kernel.add(x.to(device), out, [site.tables], rows.first(24))
        assert torch.allclose(out.cpu().double(), base.double() + site.product(x, slots), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_each_token_of_an_embedding_gets_the_product_of_its_adapter(device: str, dtype: torch.dtype) -> None:
    slots, ids = mixture(40), [random.randrange(130) for _ in range(40)]
    site = RandomSite(130, 50, RANKS, TileOrder(), dtype, device, 32)
    base = torch.randn(40, 50).to(dtype)
    expected = base.double() + site.embedded(ids, slots)
    fixed = module.DeviceRows.empty(40, torch.device(device))
    fixed.fill(batch_of(slots))
    for batch in (batch_of(slots), fixed):
        out = base.clone().to(device)
        module.TritonLoraKernel().add_embedding(torch.tensor(ids).to(device), out, site.tables, batch)
        assert torch.allclose(out.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        bare = [row for row, slot in enumerate(slots) if slot in (0, 9)]
        assert torch.equal(out.cpu()[bare], base[bare])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    site = RandomSite(300, 40, RANKS, TileOrder(), device=device, width=16)
    slots = mixture(20)
    x, base = torch.randn(20, 300).to(device), torch.randn(20, 40).to(device)
    kernel = module.TritonLoraKernel()
    together, alone = base.clone(), base.clone()
    kernel.add(x, together, [site.tables], batch_of(slots))
    for row, slot in enumerate(slots):
        one = AdapterBatch.of([slot])
        if one is not None:
            kernel.add(x[row : row + 1], alone[row : row + 1], [site.tables], one)
    assert torch.equal(together, alone)
    assert not torch.equal(together, base)
