"""The plan of a divided model: pure divisions of sizes, and transformers' own plans beside ours."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    ModernBertDecoderConfig,
    PreTrainedModel,
)

from fastserve.engine.loading.partition_plan import PartitionPlan, named_styles, plan_partition
from fastserve.engine.loading.sharding import Shard, Sharding, sharding_of, split_evenly, split_heads
from fastserve.engine.loading.small_config import small_config
from fastserve.engine.loading.tensor_shards import join, take
from fastserve.errors import StartupError

from .conftest import CONFIGS

COLUMN_STYLES = {"colwise", "packed_colwise", "colwise_gather_output"}
ROW_STYLES = {"rowwise", "packed_rowwise", "rowwise_split_input"}
WHOLE_STYLES = {"replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj"}
SOME = ("llama", "phi3", "gpt_neox", "olmo2", "mixtral", "deepseek_v3", "cohere2", "gemma3_text", "starcoder2", "glm4")
OTHERS = {
    "doge": "dt_proj",  # divided, it computes something else, and is refused at start
    "dory": "embed_tokens lm_head",  # classes of their own
    "longcat_flash": "experts",  # modules of experts that are not known
    "aria_text": "experts",
}
"""What we leave whole where transformers does not."""


# ---- sizes ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 9), st.sampled_from([None, 1, 3, 64]))
def test_even_ranges_cover_all_and_differ_by_one_unit(total: int, count: int, unit: int | None) -> None:
    step = unit or 1
    if -(-total // step) < count:
        with pytest.raises(ValueError, match=f"{total} cannot be divided by {count}"):
            split_evenly(total, count, unit)
        return
    ranges = split_evenly(total, count, unit)
    assert len(ranges) == count
    assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), total]
    assert all(begin < end for begin, end in ranges)
    assert unit is None or all(begin % unit == 0 for begin, _ in ranges)
    sizes = [end - begin for begin, end in ranges]
    assert max(sizes) <= max(1.15 * total / count, total / count + 1) or unit is not None


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 17))
def test_each_rank_has_the_kv_heads_of_its_query_heads(kv_heads: int, group: int, count: int) -> None:
    heads = kv_heads * group
    if count > heads:
        with pytest.raises(ValueError, match="cannot be divided"):
            split_heads(heads, kv_heads, count)
        return
    try:
        found = split_heads(heads, kv_heads, count)
    except ValueError:
        assert kv_heads < count  # a group of few heads would be shared by many ranks
        assert group < -(-count // kv_heads)
        return
    assert [head for begin, end in found.query for head in range(begin, end)] == list(range(heads))
    for (begin, end), (kv_begin, kv_end) in zip(found.query, found.kv, strict=True):
        of_heads = [head // group for head in range(begin, end)]
        assert set(of_heads) == set(range(kv_begin, kv_end))
        assert len({of_heads.count(kv) for kv in of_heads}) == 1  # one size of groups
    counted = [kv for pair, counts in zip(found.kv, found.counts, strict=True) if counts for kv in range(*pair)]
    assert counted == list(range(kv_heads))


@given(st.data())
def test_parts_of_all_ranks_make_up_the_whole(data: st.DataObject) -> None:
    dims, count = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)), data.draw(st.integers(1, 4))
    dim, parts, unit = (
        data.draw(st.integers(0, len(dims) - 1)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
    )
    blocks = count + data.draw(st.integers(0, 4))
    dims[dim] = parts * unit * blocks
    sharding = sharding_of(dims, dim, split_evenly(blocks, count, 1), unit, parts)
    whole = torch.arange(torch.Size(dims).numel()).view(dims)
    shards = [sharding.of(rank) for rank in range(count)]
    found = [take(shard, whole) for shard in shards]
    assert [tuple(part.shape) for part in found] == [shard.shape for shard in shards]
    assert torch.equal(join(sharding, torch.cat(found, dim=dim)), whole)
    if len(dims) == 2:
        assert torch.equal(take(shards[-1].transposed(), whole.t()), found[-1].t())


def test_parts_that_several_ranks_hold_are_joined_once() -> None:
    sharding = Sharding((4, 3), 0, (((0, 2),), ((0, 2),), ((2, 4),)))
    whole = torch.randn(4, 3)
    assert not sharding.is_concatenation
    assert torch.equal(join(sharding, torch.cat([take(sharding.of(rank), whole) for rank in range(3)])), whole)


@pytest.mark.parametrize("ranges", [((0, 3), (8, 11)), ((3, 8), (11, 16)), ((2, 10),)])
def test_a_part_of_a_joined_weight_is_made_of_parts_of_its_pieces(ranges: tuple[tuple[int, int], ...]) -> None:
    gate, up = torch.randn(2, 8, 5)
    shard = Shard((16, 5), 0, ranges)
    pieces = [take(shard.piece(0, index, 2), piece) for index, piece in enumerate((gate, up))]
    assert torch.equal(torch.cat(pieces), take(shard, torch.cat([gate, up])))


# ---- models -----------------------------------------------------------------------------------------------------


def on_meta(config: Any) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("name", list(CONFIGS))
def test_each_rank_has_about_its_share(name: str) -> None:
    model = on_meta(CONFIGS[name])
    plan = plan_partition(model, 2)
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    of_rank = sum(
        plan.weights[name].of(0).share * model.get_parameter(name).numel() if name in plan.weights
        else model.get_parameter(name).numel()
        for name in tied.values()
    )  # fmt: skip
    assert of_rank < 0.6 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("size", "working"), [(5, "1 or 2 or 3 or 4"), (9, "1 or 2 or 3 or 4")])
def test_sizes_that_work_are_named(size: int, working: str) -> None:
    with pytest.raises(StartupError, match=rf"{size} ranks: 4 heads .* Start with --tp-size {working}\.$"):
        plan_partition(on_meta(CONFIGS["llama"]), size)


def differences(model: PreTrainedModel, plan: PartitionPlan) -> list[str]:
    """Names that transformers' plan divides in another way."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = []
    for name, style in named_styles(model):
        path = name.removesuffix(".weight")
        weight = f"{path}.weight" if f"{path}.weight" in names else name
        divided, is_row = weight in plan.weights, path in plan.row_parallel
        if path.rpartition(".")[0] in plan.experts:
            is_row = path.endswith("down_proj")
        same = (
            divided and not is_row if style in COLUMN_STYLES
            else divided and is_row if style in ROW_STYLES
            else name in plan.experts if style == "moe_tp_experts"
            else path == plan.embedding if style == "embedding_rowwise"
            else not divided if style in WHOLE_STYLES
            else True
        )  # fmt: skip
        if not same:
            found.append(f"{name} {style}")
    return found


def planned(name: str) -> tuple[PreTrainedModel, PartitionPlan] | None:
    """A small model of the kind on the meta device, and our plan; None where transformers has no small one, the kind is
    not served, or some of its attention is of a form that we leave whole."""
    kind = CONFIG_MAPPING[name]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    if not getattr(model_class, "_supports_attention_backend", False) or not kind.base_model_tp_plan:
        return None
    try:
        config = kind().get_text_config(decoder=True)
        model = on_meta(small_config(config, range(min(8, config.num_hidden_layers))))
        plan = plan_partition(model, 2)
    except (StartupError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return (model, plan) if plan.attention and not plan.undivided else None


@pytest.mark.parametrize("name", SOME)
def test_our_rules_divide_as_transformers_does(name: str) -> None:
    found = planned(name)
    assert found is not None
    assert differences(*found) == []
    assert any(True for _ in named_styles(found[0]))


@pytest.mark.slow
def test_our_rules_divide_as_transformers_does_for_all_its_plans() -> None:
    compared = 0
    unlike: dict[str, list[str]] = {}
    for name in sorted(CONFIG_MAPPING.keys()):
        found = planned(name)
        if found is None:
            continue
        compared += 1
        known = OTHERS.get(name, "").split()
        if others := [line for line in differences(*found) if not any(part in line for part in known)]:
            unlike[name] = others
    assert unlike == {}
    assert compared >= 75


def test_parts_with_capital_letters_are_known() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    plan = plan_partition(on_meta(ModernBertDecoderConfig(vocab_size=96, pad_token_id=0, **sizes)), 2)
    assert plan.undivided == set()
    assert {path.rsplit(".", 2)[1] for path in plan.row_parallel} == {"attn", "mlp"}


def test_ranks_have_the_same_number_of_rows_of_gate_and_up() -> None:
    plan = plan_partition(on_meta(CONFIGS["phi3"]), 3)
    for rank, other in itertools.pairwise(range(3)):
        parts = [plan.weights["model.layers.0.mlp.gate_up_proj.weight"].of(index) for index in (rank, other)]
        for part in parts:
            (begin, end), (up_begin, up_end) = part.ranges
            assert (up_begin - begin, up_end - end) == (96, 96)
        assert parts[0].ranges[0][1] == parts[1].ranges[0][0]
