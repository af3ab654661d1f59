"""GGUF files (llama.cpp), read with the package `gguf`, which knows their tensor names and block formats.

Q8_0 and Q4_0 stay quantized (groups of 32 inputs with one scale); all other types are dequantized when loaded. Settings
and tokenizer come from config.json and tokenizer.json in the same folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastserve.engine.loading.checkpoint import StoredTensor
from fastserve.engine.loading.formats.source import QuantizedTensor, Source, Value, source_of
from fastserve.errors import StartupError

_GROUP = 32
_NATIVE = {"Q8_0": 8, "Q4_0": 4}
"""Types that stay quantized, with their bits."""
_ARCHITECTURES = {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"}
_GEMMAS = {"gemma", "gemma2", "gemma3"}
"""Architectures whose stored norm weights include the 1 that the model adds."""


def gguf_sources(model: PreTrainedModel, file: Path) -> list[Source]:
    """All weights of `model` in `file`. Raises StartupError when the package is missing, the file is broken, or its
    architecture is not served."""
    try:
        import gguf
    except ImportError as error:
        raise StartupError(
            f"{file} needs the package gguf to be read: pip install 'fastserve[gguf]', or use the model's safetensors."
        ) from error
    try:
        reader = _open(file)
        kind = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise StartupError(
            f"{file} cannot be read as a GGUF file: it is broken or cut off ({error}). Download it again."
        ) from error
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise StartupError(
            f"{file} is one of several parts of a model, which are not served: join them with llama.cpp's "
            "llama-gguf-split --merge."
        )
    if kind not in _ARCHITECTURES:
        raise StartupError(
            f"{file} holds a model of the architecture {kind}; of GGUF files {', '.join(sorted(_ARCHITECTURES))} are "
            "served. Use the model's safetensors."
        )
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    config = model.config.get_text_config(decoder=True)
    names = gguf.get_tensor_name_map(numbers[kind], config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stem, _, leaf = name.rpartition(".")
        tensor = tensors.get(f"{names.get_name(stem)}.{leaf}")
        if tensor is None:
            continue  # tied, or missing, which the loader reports
        change = _change(kind, name, config)
        stored = _stored(file, tensor, tuple(parameter.shape))
        found.append(source_of(name, [stored], _maker(tensor, change)))
    return found


def _open(file: Path) -> Any:
    """A GGUFReader. Raises StartupError that names the tensor in which the file is cut off."""
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        # The library maps tensors without checking the file's length. It calls this with their descriptions.
        def _build_tensors(self, start: int, fields: list[Any]) -> None:
            for field in fields:
                *_, dims, kind, offset = field.parts
                block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                end = int(start + offset[0]) + int(np.prod(dims)) // block * size
                if end > len(self.data):
                    raise StartupError(
                        f"{file} is cut off in the tensor {field.name}: it ends after {len(self.data)} of at least "
                        f"{end} bytes. Download it again."
                    )
            super()._build_tensors(start, fields)

    return Reader(file)


def _stored(file: Path, tensor: Any, shape: tuple[int, ...]) -> StoredTensor:
    num_bytes = int(tensor.n_bytes)
    # A copy, since the file is mapped and the tensor may be changed in place.
    return StoredTensor(
        tensor.name, file, shape, torch.uint8, num_bytes, lambda: torch.from_numpy(np.array(tensor.data))
    )


Change = Callable[[torch.Tensor], torch.Tensor]


def _maker(tensor: Any, change: Change) -> Callable[[torch.Tensor], Value]:
    """Converts the tensor's data (rows of blocks or of plain numbers) to a weight."""
    kind = tensor.tensor_type.name
    is_matrix = len(tensor.shape) == 2

    def make(data: torch.Tensor) -> Value:
        if kind in _NATIVE and is_matrix:
            return _codes(data, kind, change)
        import gguf

        return change(torch.from_numpy(gguf.quants.dequantize(data.numpy(), tensor.tensor_type)))

    return make


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


def _change(kind: str, name: str, config: Any) -> Change:
    """Conversion of a weight from llama.cpp's convention to that of transformers."""
    if kind == "llama" and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return lambda rows: _unpaired(rows, heads)
    if kind in _GEMMAS and "norm" in name:
        return lambda weight: weight - 1
    return lambda weight: weight


def _unpaired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head for RoPE: rotated pairs are adjacent in llama.cpp, and half a head apart in
    transformers."""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape)
