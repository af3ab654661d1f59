"""Weights of GGUF files (llama.cpp). The package `gguf` knows tensor names and block formats.

Q8_0 and Q4_0 stay quantized (groups of 32 inputs with one scale); all other types are dequantized when loaded.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from fastserve.engine.layers.experts import expert_weights
from fastserve.engine.loading.checkpoint import StoredTensor, read_bytes, read_shard_of_bytes
from fastserve.engine.loading.formats.source import Divide, QuantizedTensor, Source, Value, join_outputs, source_of
from fastserve.engine.loading.sharding import Shard
from fastserve.errors import StartupError
from fastserve.gguf.configuration import ARCHITECTURES, refuse_architecture
from fastserve.gguf.file import Gguf, GgufTensor, read_gguf

_GROUP = 32
_NATIVE = {"Q8_0": 8, "Q4_0": 4}
"""Types that stay quantized, with their bits."""
_TYPES = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits}
"""Types that the package `gguf` can dequantize."""
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
_BLOCKS_AT_ONCE = 8192
_PERMUTED = {"llama", "mistral3", "smollm3", "granite", "granitemoe"}
"""Architectures whose query and key rows are stored in the order of llama.cpp's rotary positions."""
_GEMMAS = {"gemma", "gemma2", "gemma3"}
"""Architectures whose stored norm weights include the 1 that the model adds."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_FILE_LEAVES = ("gate", "up", "down")
_EXPERT_LEAVES = {"mixtral": ("w1", "w3", "w2")}
"""The names of these projections of an expert in published checkpoints, by model type; `gate_proj` and so on for all
others."""
_GRANITE_ROUTER, _GRANITE_SHARED = "block_sparse_moe.router", "shared_mlp.input_linear"
_SHARED_PARTS = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
"""The tensors that make up `_GRANITE_SHARED`, as the package `gguf` knows them."""
_CONSTANTS = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|.*(attn_rot_embd|inv_freq)(\.weight)?")
"""Tensors that are part of the configuration, or follow from it."""


def gguf_sources(model: PreTrainedModel, file: Path) -> list[Source]:
    """All weights of `model` in `file`. Raises StartupError when the file is broken, its architecture is not served, or
    the model has no place for one of its tensors."""
    header = read_gguf(file)
    kind = header.architecture
    if kind not in ARCHITECTURES:
        raise refuse_architecture(header)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    config = model.config.get_text_config(decoder=True)
    names = gguf.get_tensor_name_map(numbers[kind], config.num_hidden_layers)
    experts = expert_weights(model)
    found, placed = [], set()
    for path in dict.fromkeys(experts.values()):
        for name, tensor, matrix in _experts(header, path, config.model_type):
            placed.add(tensor.name)
            found.append(source_of(name, [_stored(matrix, matrix.shape)], _maker(matrix, _unchanged), _divider(matrix)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in experts:
            continue
        places = _places(names, name)
        tensors = [header.tensors[place] for place in places if place in header.tensors]
        if len(tensors) < len(places):
            continue  # tied, or missing, which the loader reports
        placed |= set(places)
        if len(tensors) > 1:
            found.append(_joined(name, tensors))
            continue
        [tensor] = tensors
        shape = tuple(parameter.shape)
        stored = _stored(tensor, shape)
        make = _maker(tensor, _change(kind, name, tensor.shape, config))
        if shape == (1, *tensor.shape):  # the gate of a shared expert
            found.append(source_of(name, [stored], lambda data, make=make: make(data).unsqueeze(0)))
        else:
            found.append(source_of(name, [stored], make, _divider(tensor)))
    _refuse_unplaced(file, header.tensors.keys() - placed)
    return found


def _places(names: gguf.TensorNameMap, name: str) -> list[str]:
    """The names of the tensors that make up a weight of the model: one, or two whose rows are joined."""
    stem, _, leaf = name.rpartition(".")
    stems = [stem]
    if stem.endswith(_GRANITE_ROUTER):
        stems = [f"{stem}.layer"]
    elif stem.endswith(_GRANITE_SHARED):
        stems = [stem.replace(_GRANITE_SHARED, part) for part in _SHARED_PARTS]
    return [f"{names.get_name(part)}.{leaf}" for part in stems]


def _experts(header: Gguf, path: str, model_type: str) -> Iterator[tuple[str, GgufTensor, GgufTensor]]:
    """The matrices of the experts of the module `path`: its name in a checkpoint with one tensor for each expert, which
    `conversion.match` stacks; the tensor in the file; and the matrix alone."""
    match = _LAYER.search(path)
    layer = f"blk.{match[1] if match else 0}.ffn"
    leaves = _EXPERT_LEAVES.get(model_type, tuple(f"{leaf}_proj" for leaf in _FILE_LEAVES))
    for leaf, file_leaf in zip(leaves, _FILE_LEAVES, strict=True):
        for expert, (tensor, matrix) in enumerate(_matrices(header, layer, file_leaf)):
            yield f"{path}.{expert}.{leaf}.weight", tensor, matrix


def _matrices(header: Gguf, layer: str, leaf: str) -> Iterator[tuple[GgufTensor, GgufTensor]]:
    """For each expert, the tensor in the file and the expert's matrix in it. Files have one tensor of all experts, or
    one of all their gates and ups; old files have one for each expert."""
    gate_up = header.tensors.get(f"{layer}_gate_up_exps.weight")
    if leaf != "down" and gate_up is not None:
        half = gate_up.shape[-2] // 2 if len(gate_up.shape) == 3 else 0
        yield from _slices(gate_up, half if leaf == "up" else 0, half)
        return
    stacked = header.tensors.get(f"{layer}_{leaf}_exps.weight")
    if stacked is not None:
        yield from _slices(stacked, 0, stacked.shape[-2] if len(stacked.shape) == 3 else 0)
        return
    for expert in itertools.count():
        tensor = header.tensors.get(f"{layer}_{leaf}.{expert}.weight")
        if tensor is None:
            return
        yield tensor, tensor


def _slices(stacked: GgufTensor, first: int, count: int) -> Iterator[tuple[GgufTensor, GgufTensor]]:
    """For each expert of a tensor, the matrix of `count` of the expert's rows from `first`."""
    if len(stacked.shape) != 3:
        raise StartupError(
            f"{stacked.file}: the tensor {stacked.name} of all experts has the shape {stacked.shape}, and must have "
            "three dimensions. Download it again."
        )
    experts, rows, width = stacked.shape
    block, size = _type_size(stacked)
    for expert in range(experts):
        offset = stacked.offset + (expert * rows + first) * (width // block * size)
        yield stacked, replace(stacked, shape=(count, width), offset=offset)


def _joined(name: str, tensors: Sequence[GgufTensor]) -> Source:
    """A weight whose rows are in several tensors."""
    stored = [_stored(tensor, tensor.shape) for tensor in tensors]
    makers = [_maker(tensor, _unchanged) for tensor in tensors]

    def make(*data: torch.Tensor) -> Value:
        values = [make_one(part) for make_one, part in zip(makers, data, strict=True)]
        codes = [value for value in values if isinstance(value, QuantizedTensor)]
        joined = join_outputs(codes) if len(codes) == len(values) else None
        if joined is not None:
            return joined
        return torch.cat(
            [value.float() if isinstance(value, torch.Tensor) else value.dense(torch.float32) for value in values]
        )

    return source_of(name, stored, make)


def _refuse_unplaced(file: Path, names: Iterable[str]) -> None:
    """A weight that is left out, such as a bias, would change every answer."""
    unplaced = sorted(name for name in names if not _CONSTANTS.fullmatch(name))
    if unplaced:
        raise StartupError(
            f"{file} holds the tensor {unplaced[0]}, for which the model of its configuration has no place "
            f"({len(unplaced)} such tensors). Use the model's safetensors."
        )


def _stored(tensor: GgufTensor, shape: tuple[int, ...]) -> StoredTensor:
    """Raises StartupError when the file is cut off before the tensor's end."""
    rows = tensor.shape[:-1]
    block, size = _type_size(tensor)
    row_bytes, rest = divmod(tensor.shape[-1], block)
    if rest:
        raise StartupError(f"{tensor.file}: rows of the tensor {tensor.name} are no whole blocks of {block} numbers.")
    num_bytes = int(np.prod(rows, dtype=np.int64)) * row_bytes * size
    length, end = tensor.file.stat().st_size, tensor.offset + num_bytes
    if end > length:
        raise StartupError(
            f"{tensor.file} is cut off in the tensor {tensor.name}: it ends after {length} of at least {end} bytes. "
            "Download it again."
        )

    def read() -> torch.Tensor:
        return read_bytes(tensor.file, tensor.name, tensor.offset, num_bytes).view(*rows, row_bytes * size)

    def read_shard(shard: Shard) -> torch.Tensor:
        return read_shard_of_bytes(tensor.file, tensor.name, tensor.offset, torch.uint8, shard)

    return StoredTensor(tensor.name, tensor.file, shape, torch.uint8, num_bytes, read, read_shard)


def _divider(tensor: GgufTensor) -> Divide:
    """Parts of the rows of bytes, where a part begins and ends with whole blocks."""
    block, size = _type_size(tensor)

    def divide(shard: Shard) -> list[Shard | None] | None:
        edges = [edge for pair in shard.ranges for edge in pair]
        if len(tensor.shape) != 2 or shard.whole != tensor.shape:
            return None
        if shard.dim == 1 and any(edge % block for edge in edges):
            return None
        whole = (tensor.shape[0], tensor.shape[1] // block * size)
        ranges = shard.ranges
        if shard.dim == 1:
            ranges = tuple((begin // block * size, end // block * size) for begin, end in ranges)
        return [Shard(whole, shard.dim, ranges)]

    return divide


def _type_size(tensor: GgufTensor) -> tuple[int, int]:
    """Numbers and bytes of a block. Raises StartupError for types that cannot be read."""
    try:
        kind = gguf.GGMLQuantizationType(tensor.type_id)
    except ValueError:
        kind = None
    if kind not in _TYPES:
        name = f"type {tensor.type_id}" if kind is None else f"type {kind.name}"
        raise StartupError(
            f"{tensor.file}: the tensor {tensor.name} is of ggml's {name}, which cannot be read here. Use a file of "
            "another quantization."
        )
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(block), int(size)


Change = Callable[[torch.Tensor], torch.Tensor]


def _maker(tensor: GgufTensor, change: Change) -> Callable[[torch.Tensor], Value]:
    """Converts the tensor's data (rows of blocks or of plain numbers, as bytes) to a weight."""
    kind = gguf.GGMLQuantizationType(tensor.type_id)
    is_matrix = len(tensor.shape) == 2

    def make(data: torch.Tensor) -> Value:
        if kind.name in _NATIVE and is_matrix:
            return _codes(data, kind.name, change)
        return change(_dense(data, kind, is_matrix=is_matrix))

    return make


def _dense(data: torch.Tensor, kind: gguf.GGMLQuantizationType, *, is_matrix: bool) -> torch.Tensor:
    """The values of rows of blocks or plain numbers, in float32 or, in a matrix, in the half precision of the file."""
    if kind.name in _HALVES and is_matrix:
        return data.view(_HALVES[kind.name])
    if kind.name == "Q4_1":
        return _values_of_q4_1(data)
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind))


def _values_of_q4_1(data: torch.Tensor) -> torch.Tensor:
    """Blocks of two float16 numbers, scale and minimum, and 32 codes of 4 bits, all low halves before all high ones.

    A few rows at a time, which stay in the caches: four times as fast as the package's function.
    """
    blocks = data.view(-1, 4 + _GROUP // 2)
    values = torch.empty(len(blocks), 2, _GROUP // 2)
    for begin in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part, found = blocks[begin : begin + _BLOCKS_AT_ONCE], values[begin : begin + _BLOCKS_AT_ONCE]
        scale, minimum = part[:, :4].contiguous().view(torch.float16).float().view(-1, 2, 1, 1).unbind(1)
        codes = part[:, 4:]
        found[:, 0] = codes & 15
        found[:, 1] = codes >> 4
        found.mul_(scale).add_(minimum)
    return values.view(*data.shape[:-1], -1)


def _codes(data: torch.Tensor, kind: str, change: Change) -> QuantizedTensor:
    """Blocks of a float16 scale and 32 codes: signed bytes (Q8_0), or 4-bit codes with zero point 8, all low halves
    before all high halves (Q4_0)."""
    rows = data.shape[0]
    size = 2 + (_GROUP if kind == "Q8_0" else _GROUP // 2)
    blocks = data.view(torch.uint8).reshape(rows, -1, size)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    codes = blocks[..., 2:]
    zeros = None
    if kind == "Q8_0":
        codes = codes.contiguous().view(torch.int8)
    else:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        zeros = change(torch.full_like(scales, 8.0))
    return QuantizedTensor(change(codes.reshape(rows, -1)), change(scales), zeros, _NATIVE[kind], _GROUP)


def _change(kind: str, name: str, shape: Sequence[int], config: Any) -> Change:
    """Conversion of a weight from llama.cpp's convention to that of transformers."""
    if kind in _PERMUTED and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        head_dim = shape[0] // heads
        return lambda rows: _unpaired(rows, head_dim)
    if kind in _GEMMAS and "norm" in name:
        return lambda weight: weight - 1
    return _unchanged


def _unchanged(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _unpaired(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head for RoPE: rotated pairs are adjacent in llama.cpp, and half a head apart in
    transformers. `rows`: of some heads."""
    paired = rows.reshape(rows.shape[0] // head_dim, head_dim // 2, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape)
