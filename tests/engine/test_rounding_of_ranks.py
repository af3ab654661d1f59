"""In 16 bits, ranks compute as exactly as one rank: their partial sums are added in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Olmo2Config, PretrainedConfig

from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.layouts.onednn import OneDnnWeight
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.layers.layouts.plain import PlainWeight
from fastserve.engine.layers.parallel import RowParallelLinear
from fastserve.engine.layers.quantizer import find_quantizer
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.thread_collectives import run_ranks

from .conftest import SHAPE, logits_of
from .test_partition import load, save

LARGER = {
    **SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "initializer_range": 0.06,
}  # fmt: skip
TOKENS = torch.randint(2, 150, (64,), generator=torch.Generator().manual_seed(3)).tolist()


def grouped(weight: torch.Tensor) -> WeightLayout:
    return GroupedWeight.of(weight) or pytest.skip("no kernel of ours for dense weights")


def int8(weight: torch.Tensor) -> WeightLayout:
    return find_quantizer("int8")(weight, weight.dtype, None)


@pytest.mark.parametrize("layout_of", [grouped, int8])
def test_partial_products_of_our_kernels_are_not_rounded(layout_of: Callable[[torch.Tensor], WeightLayout]) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(torch.randn(128, 512, generator=generator).bfloat16())
    if layout.struct(None) is None:
        pytest.skip("no kernel of ours for this layout")
    x = torch.randn(3, 37, 512, generator=generator).bfloat16()
    partial = layout.partial_product(x)
    assert partial.dtype is torch.float32
    assert torch.equal(partial.bfloat16(), layout.product(x, None))
    assert (partial != partial.bfloat16()).double().mean() > 0.9


def test_a_sum_over_ranks_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(128, 512, generator=generator).bfloat16(),
        torch.randn(37, 512, generator=generator).bfloat16(),
    )
    parts = [grouped(part.contiguous()) for part in weight.chunk(2, dim=1)]
    inputs = [part.contiguous() for part in x.chunk(2, dim=1)]

    def run_rank(collectives: Collectives) -> torch.Tensor:
        out: torch.Tensor = RowParallelLinear(parts[collectives.rank], None, collectives)(inputs[collectives.rank])
        return out

    exact = (x.double() @ weight.double().t()).bfloat16()
    for found in run_ranks(2, run_rank):
        assert found.dtype is torch.bfloat16
        # Sums in float32 seldom lie on the other side of a boundary of rounding. Rounded twice, a third differ.
        assert (found == exact).double().mean() > 0.99


@pytest.mark.parametrize("kind", [PlainWeight, OneDnnWeight])
def test_layouts_without_such_a_kernel_round_each_part(kind: type[PlainWeight] | type[OneDnnWeight]) -> None:
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    layout = kind(weight)
    assert torch.equal(layout.partial_product(x), layout.product(x, None))


@pytest.mark.parametrize("config", [LlamaConfig(**LARGER), Olmo2Config(**LARGER)], ids=["llama", "olmo2"])
def test_ranks_differ_less_from_one_rank_than_16_bits_do_from_32(tmp_path: Path, config: PretrainedConfig) -> None:
    save(config, tmp_path)
    exact = logits_of(load(tmp_path), TOKENS)
    loaded = load(tmp_path, dtype="bfloat16")
    one = logits_of(loaded, TOKENS).float()
    noise = (one - exact).norm()
    of_kernel = isinstance(loaded.model.get_submodule("model.layers.0.self_attn.o_proj").layout, GroupedWeight)
    for size in (2, 4):
        for logits in run_ranks(size, lambda collectives: logits_of(load(tmp_path, collectives, "bfloat16"), TOKENS)):
            assert (logits - exact).norm() < 1.1 * noise
            assert (logits - one).norm() < (0.6 if of_kernel else 1.1) * noise
