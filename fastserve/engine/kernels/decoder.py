"""The binding of decoder.h: a whole step of a model in one call."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch

from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.kernels.lora import LoraRowsStruct
from fastserve.engine.kernels.packed_linear import WeightStruct
from fastserve.engine.kernels.paged_attention import KernelStep

WEIGHTS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "query_norm", "key_norm")
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, WeightStruct) for name in WEIGHTS),
        *((name, c_void_p) for name in NORMS),
        *((name, c_int64) for name in ("query_norm_size", "key_norm_size")),
        *((name, c_void_p) for name in ("keys", "values", "cos", "sin")),
        ("window", c_int64),
        *((f"{name}_lora", c_void_p) for name in WEIGHTS),
    ]


class DecoderStruct(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(LayerStruct)),
        ("head", WeightStruct),
        *((name, c_void_p) for name in ("embedding", "norm")),
        *((name, c_int64) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, c_int64) for name in ("intermediate", "block_size", "activation")),
        *((name, c_float) for name in ("eps", "norm_offset", "embedding_scale", "scaling", "softcap", "logit_softcap")),
        ("ranks", c_void_p),
        *((name, c_int64) for name in ("first_token", "vocabulary")),
        *((name, c_void_p) for name in ("head_lora", "embedding_lora")),
    ]


class _Workspace(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("hidden", "kept", "normed", "query", "key", "value", "inner")]


class DecoderKernel:
    """Owns the activations, which grow to the largest step seen."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        library.decode.argtypes = (*(c_void_p,) * 6, c_int64, c_void_p, c_void_p)
        self._decode: Any = library.decode
        self._dtype = dtype
        self._rows = 0
        self._activations: list[torch.Tensor] = []

    @classmethod
    def load(cls, dtype: torch.dtype) -> DecoderKernel | None:
        library = cpu_library(dtype)
        return None if library is None else cls(library, dtype)

    def __call__(
        self,
        model: DecoderStruct,
        step: KernelStep,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        adapters: LoraRowsStruct | None = None,
    ) -> tuple[int, torch.Tensor]:
        """`token_ids` and `positions` (tokens,), `logit_rows` (rows,) of the batch, all int64 -> why other
        ranks were lost (see all_reduce.h; 0 if they were not), and logits (rows, vocabulary), float32.
        `adapters`: those of the batch's rows; None where no row has one."""
        self._grow(model, len(token_ids))
        logits = torch.empty(len(logit_rows), model.head.out, dtype=torch.float32)
        space = _Workspace(*(tensor.data_ptr() for tensor in self._activations))
        loss: int = self._decode(
            ctypes.byref(model), ctypes.byref(step.struct), ctypes.byref(space), token_ids.data_ptr(),
            positions.data_ptr(), logit_rows.data_ptr(), len(logit_rows), logits.data_ptr(),
            None if adapters is None else ctypes.byref(adapters),
        )  # fmt: skip
        return loss, logits

    def _grow(self, model: DecoderStruct, rows: int) -> None:
        if rows <= self._rows:
            return
        self._rows = rows
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        widest = max(model.hidden, queries)
        sizes = (widest, widest, widest, widest, keys, keys, model.intermediate)
        self._activations = []  # the old ones go before the new ones come
        self._activations = [torch.empty(rows * size, dtype=self._dtype) for size in sizes]
