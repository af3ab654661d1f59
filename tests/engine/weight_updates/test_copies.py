"""Copies of weights that take new values before these are put in place, and their memory."""

from __future__ import annotations

import pytest
import torch

from fastserve.engine.layers.layouts.layout import Memo, WeightLayout, memory_like
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.layers.layouts.plain import PlainWeight
from fastserve.engine.weight_updates.memory import UpdateMemory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ends", [(16, 32), (24, 40), (16, 40)], ids=str)
def test_parts_of_one_memory_are_replaced_without_the_others(dtype: torch.dtype, ends: tuple[int, int]) -> None:
    old, new = torch.rand(2, 48, 64).to(dtype)
    whole: WeightLayout | None = GroupedWeight.of(old)
    for layout in (PlainWeight(old.clone()), whole):
        if layout is None:  # no compiler
            pytest.skip("weights are not packed here")
        rows = [slice(begin, end) for begin, end in zip((0, *ends), (*ends, 48), strict=True)]
        parts = [layout.part(some) for some in rows]
        memo: Memo = {}
        copies = {number: parts[number].copied(memo) for number in (2, 0)}
        for number, copied in copies.items():
            copied.set(new[rows[number]])
        assert torch.equal(layout.get(), old)
        for number, copied in copies.items():
            parts[number].take_over(copied)
        assert torch.equal(layout.get(), torch.cat([new[rows[0]], old[rows[1]], new[rows[2]]]))


def test_the_next_update_has_the_memory_of_the_last_one_until_it_is_dropped() -> None:
    memory, weight, tiny = UpdateMemory(), torch.rand(1 << 20), torch.rand(4)
    memo = memory.memo()
    first, _ = memory_like(weight, memo), memory_like(tiny, memo)
    buffer = memory.take_buffer(1 << 22, weight.device)
    memory.give_back(buffer)
    memory.keep(memo)

    again = memory.memo()
    assert len(again) == 1
    second = memory_like(weight, again)
    assert second.data_ptr() == first.data_ptr()
    second.copy_(weight)
    assert torch.equal(second, weight)
    smaller = memory.take_buffer(1 << 21, weight.device)
    assert smaller.data_ptr() == buffer.data_ptr()
    assert memory.take_buffer(1 << 21, weight.device).data_ptr() != buffer.data_ptr()

    memory.give_back(smaller)
    memory.drop()
    assert not memory.memo()
    assert memory.take_buffer(1 << 21, weight.device).data_ptr() != buffer.data_ptr()
