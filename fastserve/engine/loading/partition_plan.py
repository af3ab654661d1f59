"""Which weight of a model is divided over ranks, and how (tensor parallelism).

Attention is divided by heads, MLPs and experts by their intermediate size, the embedding and the LM head by vocabulary;
all else is whole on every rank. With expert parallelism each expert is whole on one rank. What a module is follows from
the names of its weights, or, for names that are not known here, from the plan that the architecture has in transformers
(`base_model_tp_plan`). Its plans are not followed where they gather what the model's code cannot use in parts (fused
projections, norms over all heads): here, each part of a fused projection is divided, and such a norm sums over the
ranks.

Rejected: the configuration of a smaller model (heads and intermediate size divided by the ranks) for each rank. It
cannot express uneven parts or shared KV heads, and sizes that an architecture derives from each other would change.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.layers.experts import are_experts
from fastserve.engine.layers.linear import can_be_tied
from fastserve.engine.loading.sharding import HeadRanges, Range, Sharding, sharding_of, split_evenly, split_heads
from fastserve.errors import StartupError

_QUERY = ("q_proj", "q_b_proj")
_KEY = ("k_proj",)
_VALUE = ("v_proj",)
_BY_HEAD = ("query_key_value", "kv_b_proj", "g_proj", "gate_proj")
"""Projections whose outputs are one block for each query head."""
_JOINED = ("qkv_proj", "c_attn", "Wqkv", "qkv")
"""Queries, keys and values of all heads, one after the other."""
_ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo")
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_", "key_", "attn_sub_norm")
_MLP_INPUT = (
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1", "w3", "wi", "Wi",
    "input_linear",
)  # fmt: skip
_MLP_OUTPUT = ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2", "wo", "Wo", "output_linear")
_COLUMN_STYLES = {"colwise", "packed_colwise", "colwise_gather_output", "colwise_rep"}
_ROW_STYLES = {"rowwise", "packed_rowwise", "rowwise_split_input", "rowwise_rep"}
"""Styles of transformers' plans: divided along outputs, along inputs."""
_MAX_SIZES = 8
"""Sizes that an error lists."""


@dataclass(slots=True)
class HeadNumbers:
    """Numbers of heads of one attention module."""

    query: int
    kv: int
    dim: int


@dataclass(slots=True)
class AttentionPlan:
    heads: HeadNumbers
    ranges: HeadRanges


@dataclass(slots=True)
class PartitionPlan:
    """How a model is divided over `size` ranks. Names and paths are those of the whole model."""

    size: int
    weights: dict[str, Sharding] = field(default_factory=dict)
    """Parameters of which each rank has a part."""
    row_parallel: set[str] = field(default_factory=set)
    """Paths of linear layers whose products are partial sums."""
    experts: set[str] = field(default_factory=set)
    """Paths of experts modules of which each rank has a part of every expert."""
    whole_experts: dict[str, tuple[Range, ...]] = field(default_factory=dict)
    """By the paths of experts modules of which each rank has some experts: those of each rank."""
    norms: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    """Paths of norms over channels of all ranks; by rank, whether its channels count (another may have the same)."""
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    """By the paths of attention modules."""
    embedding: str | None = None
    """Path of the embedding that is divided by vocabulary."""
    head: str | None = None
    """Path of the LM head that is divided by vocabulary."""
    undivided: set[str] = field(default_factory=set)
    """Classes of attention modules that are whole on every rank, because no rule divides them."""

    def add(self, attention: PartitionPlan) -> None:
        """Include the plan of an attention module."""
        self.weights |= attention.weights
        self.row_parallel |= attention.row_parallel
        self.norms |= attention.norms
        self.attention |= attention.attention


class _UnknownFormError(ValueError):
    """A module is not of a form that is known here."""


def plan_partition(
    model: PreTrainedModel, size: int, *, expert_parallel: bool = False, undivided: Collection[str] = ()
) -> PartitionPlan:
    """Plan for a model whose weights may be on the meta device. `expert_parallel`: experts are given out whole.
    `undivided`: classes of attention modules to leave whole on every rank, beside those of unknown forms. Raises
    StartupError with the sizes that work when the model cannot be divided by `size`."""
    try:
        plan = _plan(model, size, expert_parallel=expert_parallel, undivided=undivided)
    except ValueError as error:
        sizes = _working_sizes(model, size, expert_parallel=expert_parallel, undivided=undivided)
        raise StartupError(f"{type(model).__name__} cannot be divided over {size} ranks: {error}.{sizes}") from error
    if expert_parallel and not plan.whole_experts:
        raise StartupError(
            f"{type(model).__name__} has no experts that can be given out to ranks. Start it without "
            "--enable-expert-parallel and EP_SIZE."
        )
    return plan


def _working_sizes(model: PreTrainedModel, size: int, *, expert_parallel: bool, undivided: Collection[str]) -> str:
    working = []
    for smaller in range(1, size):
        try:
            _plan(model, smaller, expert_parallel=expert_parallel, undivided=undivided)
            working.append(smaller)
        except ValueError:
            continue
    return f" Start with --tp-size {' or '.join(map(str, working[-_MAX_SIZES:]))}." if working else ""


def _plan(model: PreTrainedModel, size: int, *, expert_parallel: bool, undivided: Collection[str]) -> PartitionPlan:
    plan = PartitionPlan(size)
    styles = transformers_styles(model)
    plan_experts = _plan_whole_experts if expert_parallel else _plan_experts
    attention = {path: module for path, module in model.named_modules() if _is_attention(module)}
    for path, module in attention.items():
        try:
            if type(module).__name__ in undivided:
                raise _UnknownFormError
            plan.add(_plan_attention(model, path, module, size))
        except _UnknownFormError:
            plan.undivided.add(type(module).__name__)
    for path, module in model.named_modules():
        if are_experts(module):
            plan_experts(plan, path, module)
        elif path not in attention:
            _plan_mlp(plan, path, module, styles)
    _plan_vocabulary(plan, model)
    if not plan.attention and not plan.row_parallel and not plan.experts and not plan.whole_experts:
        raise ValueError("neither its attention nor its MLPs are of a form that is known to be divisible")
    return plan


# ---- attention --------------------------------------------------------------------------------------------------


def _is_attention(module: torch.nn.Module) -> bool:
    children = dict(module.named_children())
    return hasattr(module, "layer_idx") and any(_is_linear(children.get(name)) for name in _ATTENTION_OUTPUT) and any(
        _is_linear(children.get(name)) for name in (*_QUERY, *_JOINED, "query_key_value")
    )  # fmt: skip


def _plan_attention(model: PreTrainedModel, path: str, module: torch.nn.Module, size: int) -> PartitionPlan:
    """The plan of this module alone."""
    plan = PartitionPlan(size)
    heads = _head_numbers(model, module)
    ranges = split_heads(heads.query, heads.kv, size)
    plan.attention[path] = AttentionPlan(heads, ranges)
    for name, child in module.named_children():
        where = f"{path}.{name}"
        if not _is_linear(child):
            _plan_head_norm(plan, where, name, child, plan.attention[path])
        elif name in _ATTENTION_OUTPUT:
            _divide_inputs(plan, where, child, ranges.query, _require_whole(where, _in(child), heads.query))
        elif name in (*_QUERY, *_BY_HEAD):
            _divide_outputs(plan, where, child, ranges.query, _require_whole(where, _out(child), heads.query))
        elif name in (*_KEY, *_VALUE):
            _divide_outputs(plan, where, child, ranges.kv, _require_whole(where, _out(child), heads.kv))
        elif name in _JOINED:
            _divide_joined(plan, where, child, plan.attention[path])
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() and parameter.shape[0] == heads.query:  # attention sinks, scales of heads
            plan.weights[f"{path}.{name}"] = sharding_of(parameter.shape, 0, ranges.query)
    return plan


def _head_numbers(model: PreTrainedModel, module: torch.nn.Module) -> HeadNumbers:
    """Numbers of heads, from the sizes of the module's projections where these tell."""
    config: Any = getattr(module, "config", None) or model.config.get_text_config(decoder=True)
    children = dict(module.named_children())
    output = next(children[name] for name in _ATTENTION_OUTPUT if _is_linear(children.get(name)))
    dim = next((found for name in ("v_head_dim", "head_dim", "head_size") if (found := _int(module, name))), None)
    if dim is None or _in(output) % dim:
        raise _UnknownFormError(f"{type(module).__name__} does not say how wide a head is")
    query = _in(output) // dim
    value = children.get("v_proj")
    joined = next((children[name] for name in _JOINED if _is_linear(children.get(name))), None)
    kv = query
    if _is_linear(value):
        kv = _out(value) // dim
    elif joined is not None:
        kv = (_out(joined) // dim - query) // 2
    elif "query_key_value" in children:
        kv = _int(config, "num_key_value_heads") or query
        if kv != query or _out(children["query_key_value"]) != 3 * query * dim:
            raise _UnknownFormError(f"{type(module).__name__} joins queries, keys and values in an unknown order")
    if kv < 1 or query % kv:
        raise _UnknownFormError(f"{type(module).__name__} has {query} heads and {kv} KV heads")
    return HeadNumbers(query, kv, dim)


def _divide_joined(plan: PartitionPlan, path: str, module: torch.nn.Module, attention: AttentionPlan) -> None:
    heads, ranges = attention.heads, attention.ranges
    if _out(module) != (heads.query + 2 * heads.kv) * heads.dim:
        raise _UnknownFormError(f"{path} has {_out(module)} outputs, not those of queries, keys and values")
    key, value = heads.query * heads.dim, (heads.query + heads.kv) * heads.dim
    by_rank = tuple(
        tuple(
            (start + begin * heads.dim, start + end * heads.dim)
            for start, (begin, end) in ((0, query), (key, kv), (value, kv))
        )
        for query, kv in zip(ranges.query, ranges.kv, strict=True)
    )
    weight = module.weight
    plan.weights[f"{path}.weight"] = Sharding(tuple(weight.shape), _out_dim(module), by_rank)
    if module.bias is not None:
        plan.weights[f"{path}.bias"] = Sharding(tuple(module.bias.shape), 0, by_rank)


def _plan_head_norm(
    plan: PartitionPlan, path: str, name: str, module: torch.nn.Module, attention: AttentionPlan
) -> None:
    """A norm of queries, keys or outputs: over each head with one weight for all (whole on every rank) or one for each
    of them, or over all heads together."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not name.startswith(_HEAD_NORMS):
        return
    of_keys = name.startswith("k")
    heads = attention.heads.kv if of_keys else attention.heads.query
    ranges = attention.ranges.kv if of_keys else attention.ranges.query
    if weight.dim() == 2 and weight.shape[0] == heads:
        plan.weights[f"{path}.weight"] = sharding_of(weight.shape, 0, ranges)
    elif weight.dim() == 1 and heads > 1 and weight.shape[0] == heads * attention.heads.dim:
        counts = attention.ranges.counts if of_keys else (True,) * plan.size
        _divide_norm(plan, path, weight, ranges, attention.heads.dim, counts)


# ---- MLPs and experts -------------------------------------------------------------------------------------------


def _plan_mlp(plan: PartitionPlan, path: str, module: torch.nn.Module, styles: Mapping[str, str]) -> None:
    """A module with linear layers into its intermediate size, and one back."""
    children = {name: child for name, child in module.named_children() if _is_linear(child)}
    prefix = f"{path}." if path else ""
    outputs = [name for name in children if name in _MLP_OUTPUT] or [
        name for name in children if _style(styles, prefix + name) in _ROW_STYLES
    ]
    inputs = [name for name in children if name in _MLP_INPUT] or [
        name for name in children if _style(styles, prefix + name) in _COLUMN_STYLES
    ]
    if len(outputs) != 1 or not inputs:
        return
    output = children[outputs[0]]
    width = _in(output)
    parts = {name: _out(children[name]) // width for name in inputs}
    if any(_out(children[name]) != parts[name] * width or parts[name] not in (1, 2) for name in inputs):
        return  # not a pair: whole on every rank
    ranges = split_evenly(width, plan.size)
    for name in inputs:
        _divide_outputs(plan, prefix + name, children[name], ranges, 1, parts[name])
    _divide_inputs(plan, prefix + outputs[0], output, ranges, 1)
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if name.endswith("sub_norm") and isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,):
            _divide_norm(plan, prefix + name, weight, ranges, 1, (True,) * plan.size)


def _plan_experts(plan: PartitionPlan, path: str, module: torch.nn.Module) -> None:
    """Each rank has a part of every expert's intermediate size."""
    own = dict(module.named_parameters(recurse=False))
    down = own.get("down_proj")
    first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    if down is None or first not in own or down.dim() != 3:
        raise ValueError(f"{type(module).__name__} keeps its experts' weights in an unknown form")
    inner, outer = (1, 2) if module.is_transposed else (2, 1)
    width = down.shape[inner]
    parts = own[first].shape[outer] // width
    ranges: Sequence[Range] = split_evenly(width, plan.size)
    unit = 1
    if parts == 2 and not getattr(module, "is_concatenated", True):
        unit, parts = 2, 1  # gate and up alternate
    plan.weights[f"{path}.down_proj"] = sharding_of(down.shape, inner, ranges)
    plan.weights[f"{path}.{first}"] = sharding_of(own[first].shape, outer, ranges, unit, parts)
    if (bias := own.get(f"{first}_bias")) is not None:
        plan.weights[f"{path}.{first}_bias"] = sharding_of(bias.shape, bias.dim() - 1, ranges, unit, parts)
    plan.experts.add(path)


def _plan_whole_experts(plan: PartitionPlan, path: str, module: torch.nn.Module) -> None:
    """Each rank has some of the experts, as many as the others or one more."""
    count: int = module.num_experts
    if count < plan.size:
        raise ValueError(f"it has {count} experts, and each rank needs one")
    ranges = split_evenly(count, plan.size, 1)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() < 2 or parameter.shape[0] != count:
            raise ValueError(f"{type(module).__name__} keeps its experts' weights in an unknown form")
        plan.weights[f"{path}.{name}"] = sharding_of(parameter.shape, 0, ranges)
    plan.whole_experts[path] = tuple(ranges)


# ---- vocabulary -------------------------------------------------------------------------------------------------


def _plan_vocabulary(plan: PartitionPlan, model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    if not can_be_tied(embedding) or not _is_linear(head) or isinstance(head, Conv1D):
        return
    for kind, module in (("embedding", embedding), ("head", head)):
        ranges = split_evenly(module.weight.shape[0], plan.size)
        _divide_outputs(plan, paths[module], module, ranges, 1)
        setattr(plan, kind, paths[module])


# ---- weights ----------------------------------------------------------------------------------------------------


def _divide_outputs(
    plan: PartitionPlan, path: str, module: torch.nn.Module, ranges: Sequence[Range], unit: int, parts: int = 1
) -> None:
    plan.weights[f"{path}.weight"] = sharding_of(module.weight.shape, _out_dim(module), ranges, unit, parts)
    if getattr(module, "bias", None) is not None:
        plan.weights[f"{path}.bias"] = sharding_of(module.bias.shape, 0, ranges, unit, parts)


def _divide_inputs(plan: PartitionPlan, path: str, module: torch.nn.Module, ranges: Sequence[Range], unit: int) -> None:
    plan.weights[f"{path}.weight"] = sharding_of(module.weight.shape, 1 - _out_dim(module), ranges, unit)
    plan.row_parallel.add(path)


def _divide_norm(
    plan: PartitionPlan, path: str, weight: torch.Tensor, ranges: Sequence[Range], unit: int, counts: tuple[bool, ...]
) -> None:
    plan.weights[f"{path}.weight"] = sharding_of(weight.shape, 0, ranges, unit)
    plan.norms[path] = counts


def _is_linear(module: Any) -> bool:
    return type(module) in (torch.nn.Linear, Conv1D)


def _out_dim(module: torch.nn.Module) -> int:
    return 1 if isinstance(module, Conv1D) else 0


def _out(module: Any) -> int:
    size: int = module.weight.shape[_out_dim(module)]
    return size


def _in(module: Any) -> int:
    size: int = module.weight.shape[1 - _out_dim(module)]
    return size


def _require_whole(path: str, width: int, heads: int) -> int:
    """Width of one head."""
    if width % heads:
        raise _UnknownFormError(f"the {width} channels of {path} are not divided evenly by its {heads} heads")
    return width // heads


def _int(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# ---- transformers' plans ----------------------------------------------------------------------------------------


def transformers_styles(model: PreTrainedModel) -> dict[str, str]:
    """transformers' plan for a model: the style for each pattern of names (`*` for numbers), from the configuration and
    the classes of the model and its base."""
    base = model.base_model
    found: dict[str, str] = {}
    for owner, prefix in ((base, f"{model.base_model_prefix}." if base is not model else ""), (model, "")):
        for plan in (getattr(owner.config, "base_model_tp_plan", None), getattr(type(owner), "_tp_plan", None)):
            if owner is model and base is not model and plan is getattr(model.config, "base_model_tp_plan", None):
                continue  # it is the base's
            found |= {prefix + name: str(style) for name, style in (plan or {}).items()}
    return found


def _style(styles: Mapping[str, str], name: str) -> str | None:
    return styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def named_styles(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Each module or parameter that transformers' plan names, with its style."""
    styles = transformers_styles(model)
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for name in names:
        style = _style(styles, name) or _style(styles, name.removesuffix(".weight"))
        if style is not None:
            yield name, style
