"""compressed-tensors, as llm-compressor writes it: integers of 8, 4 and 2 bits, and 8-bit floats.

- "int-quantized": `weight` int8 (out, in), `weight_scale` (out, groups)
- "pack-quantized": `weight_packed` (out, in * bits / 32) int32, packed along the inputs, codes made
  unsigned by adding half their range; `weight_scale` (out, groups), `weight_shape` (2,); if asymmetric,
  `weight_zero_point` (out * bits / 32, groups) int32; with activation order, `weight_g_idx` (in,)
- "float-quantized": `weight` float8 (out, in), `weight_scale` (out, 1), (1,) or by blocks: dequantized when loaded

Settings for quantized activations are ignored: activations are never quantized here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastserve.engine.loading.checkpoint import StoredTensor, Tensors
from fastserve.engine.loading.formats.fp8 import spread
from fastserve.engine.loading.formats.source import (
    QuantizedTensor,
    Settings,
    Source,
    input_order_of,
    layers_of,
    plain_source,
    require_parts,
    source_of,
    unpack_bits,
)
from fastserve.engine.settings import PackedCheckpoint
from fastserve.errors import StartupError

_PACKED = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
_KNOWN = ("int-quantized", "naive-quantized", "pack-quantized", "float-quantized", "dense", "mixed-precision")
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale")


def sources(tensors: Tensors, settings: Settings, stated: PackedCheckpoint) -> list[Source]:
    """Raises StartupError for formats that are not served (sparse ones, 4-bit floats)."""
    name = settings.get("format", "dense")
    if name not in _KNOWN:
        raise StartupError(
            f"compressed-tensors of the format {name} are not served: int-quantized, pack-quantized (4 and 8 bits) and "
            "float-quantized (8 bits) are."
        )
    packed, rest = layers_of(tensors, "weight_packed", _PACKED)
    scaled, rest = layers_of(rest, "weight_scale", ("weight", "weight_zero_point", "weight_g_idx"))
    found = []
    for layer, parts in packed.items():
        require_parts(layer, parts, ("weight_scale",))
        make = _packed_maker(_bits(layer, parts, settings), parts)
        found.append(_source(layer, parts, "weight_packed", make))
    for layer, parts in scaled.items():
        require_parts(layer, parts, ("weight",))
        whole = parts["weight"].dtype is torch.int8
        make = _make_integers if whole else _float_maker(_block(settings))
        found.append(_source(layer, parts, "weight", make))
    return found + [plain_source(tensor) for name, tensor in rest.items() if not name.endswith(_ACTIVATIONS)]


def _source(layer: str, parts: dict[str, StoredTensor], first: str, make: Any) -> Source:
    keys = [key for key in (first, "weight_scale", "weight_zero_point", "weight_g_idx") if key in parts]

    def named(*values: torch.Tensor) -> Any:
        return make(**dict(zip(keys, values, strict=True)))

    return source_of(f"{layer}.weight", (parts[key] for key in keys), named)


def _groups(settings: Settings) -> list[Mapping[str, Any]]:
    found = (settings.get("config_groups") or {}).values()
    return [group["weights"] for group in found if isinstance(group.get("weights"), Mapping)]


def _bits(layer: str, parts: dict[str, StoredTensor], settings: Settings) -> int:
    stated = {int(group["num_bits"]) for group in _groups(settings) if "num_bits" in group}
    if len(stated) != 1 or not stated <= {2, 4, 8}:
        raise StartupError(
            f"{parts['weight_packed'].file}: {layer} is packed, and config_groups in config.json state widths of "
            f"{sorted(stated)} bits; one of 2, 4 and 8 for all layers is served."
        )
    return stated.pop()


def _block(settings: Settings) -> tuple[int, int] | None:
    block = next((group["block_structure"] for group in _groups(settings) if group.get("block_structure")), None)
    return None if block is None else (int(block[0]), int(block[1]))


def _packed_maker(bits: int, parts: dict[str, StoredTensor]) -> Any:
    def make(
        weight_packed: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_zero_point: torch.Tensor | None = None,
        weight_g_idx: torch.Tensor | None = None,
    ) -> QuantizedTensor:
        # The rest of the last word is padding, which belongs to no group.
        codes = unpack_bits(weight_packed.t(), bits).t()[:, : _width(parts, weight_packed.shape[1] * 32 // bits)]
        out, width = codes.shape
        groups = weight_scale.shape[1]
        group = -(-width // groups)
        half = float(1 << (bits - 1))
        if weight_zero_point is None:
            zeros = torch.full((out, groups), half)
        elif weight_zero_point.dtype is torch.int32:
            zeros = unpack_bits(weight_zero_point, bits)[:out].float()
        else:
            zeros = weight_zero_point.float() + half
        order = None if weight_g_idx is None else input_order_of(weight_g_idx.long(), group, groups)
        if order is not None:
            codes = codes[:, order]
        return QuantizedTensor(codes.contiguous(), weight_scale, zeros, max(bits, 4), group, order)

    return make


def _width(parts: dict[str, StoredTensor], padded: int) -> int:
    shape = parts.get("weight_shape")
    return padded if shape is None else int(shape.read()[1])


def _make_integers(
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero_point: torch.Tensor | None = None
) -> QuantizedTensor:
    out, width = weight.shape
    scales = weight_scale.reshape(-1, 1).expand(out, 1) if weight_scale.numel() in (1, out) else weight_scale
    zeros = None if weight_zero_point is None else weight_zero_point.reshape(-1, scales.shape[1]).expand_as(scales)
    return QuantizedTensor(weight, scales.contiguous(), zeros, 8, -(-width // scales.shape[1]))


def _float_maker(block: tuple[int, int] | None) -> Any:
    def make(
        weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero_point: torch.Tensor | None = None
    ) -> torch.Tensor:
        del weight_zero_point  # always zero for floats
        values = weight.float()
        if block is not None:
            return spread(values, weight_scale.float(), block)
        scale = weight_scale.float().reshape(-1, 1) if weight_scale.numel() != 1 else weight_scale.float()
        return values * scale

    return make
