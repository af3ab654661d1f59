"""Puts weights into a model, one at a time and in any order, and replaces its linear layers by ours.

Each weight gets its final layout when it arrives, so memory holds little more than the layouts. Each packed or
quantized layout is checked: its product must be that of the source weight. So the logits that the assembled model
computes with its own code are a reference for the engine (reference.py), and no second, unchanged model is needed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastserve.engine.contract import FusedLayers
from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.kernels.packed_linear import UNIT
from fastserve.engine.layers.experts import Experts, expert_weights
from fastserve.engine.layers.fusion import FusedGatedMLP, find_gated_mlps, place_gated_mlp, report
from fastserve.engine.layers.layouts.find import is_mapped, joint_layout, layout_of
from fastserve.engine.layers.layouts.layout import EmbeddingLayout, Quantize, WeightLayout
from fastserve.engine.layers.layouts.plain import PlainWeight
from fastserve.engine.layers.linear import Linear, TiedEmbedding, can_be_tied
from fastserve.engine.layers.modules import replace_module
from fastserve.engine.loading.formats.source import QuantizedExperts, QuantizedTensor, WeightValue
from fastserve.engine.loading.partition import WHOLE, Partition
from fastserve.engine.loading.weight_table import ExpertsSlot, LayoutSlot, ParameterSlot, WeightSlot, WeightTable
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Allowed error of a checked product, relative to its norm."""
_NOT_DENSE = "the weights are quantized or memory-mapped"
_CHECKED_ROWS = 64
"""Rows checked at each end of a weight, or a few more: a plain product with all rows takes longer than packing."""


class DeviceMap(Protocol):
    """Assigns each weight and buffer to a device."""

    def device_of(self, name: str) -> torch.device:
        """Target device of a weight or buffer."""
        ...

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a weight to its target device, if it is not there."""
        ...


class OneDevice:
    """A DeviceMap with a single device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def device_of(self, name: str) -> torch.device:
        return self.device

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)


class Assembly:
    """Assembles one model, whose parameters are on the meta device or already hold their values."""

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: ElementwiseOps | None,
        device_map: DeviceMap,
        quantize: Quantize | None = None,
        partition: Partition = WHOLE,
    ) -> None:
        """With `kernels`, gate and up projections are fused. `quantize` is applied to dense weights of linear layers
        and experts, except the LM head. `partition`: the part of a larger model that `model` is."""
        self._model = model
        self._kernels = kernels
        self._device_map = device_map
        self._quantize = quantize
        self._partition = partition
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._tied = _tied_names(parameters)
        self._buffers = {name for name in model.state_dict() if name not in parameters}
        self._layers = {f"{path}.weight": path for path, module in model.named_modules() if _is_linear(module)}
        self._transposed = {f"{path}.weight" for path, module in model.named_modules() if type(module) is Conv1D}
        self._experts = expert_weights(model)
        self._embeddings = {f"{path}.weight": module for path, module in model.named_modules() if can_be_tied(module)}
        self._to_quantize = set() if quantize is None else set(linear_weights(model))
        self._mlps = find_gated_mlps(model, kernels, device_map.device_of)
        self._gated = _gated_pairs([path for path, reason in self._mlps.items() if reason is None])
        self._lock = threading.RLock()
        """Guards state shared by several weights: ties, gate and up, replaced modules."""
        self._waiting: dict[str, torch.Tensor] = {}
        """Gate or up weights whose counterpart has not arrived."""
        self._slots: dict[str, WeightSlot] = {}

    def shape_of(self, name: str) -> torch.Size:
        """Shape of a weight or buffer in the model. Raises KeyError."""
        return self._shapes[name] if name in self._shapes else self._model.get_buffer(name).shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a weight or buffer in the model; the model's dtype for an unknown name."""
        if name in self._dtypes:
            return self._dtypes[name]
        return self._model.get_buffer(name).dtype if name in self._buffers else self._model.dtype

    @property
    def packs_weights(self) -> bool:
        """Whether all weights are packed in place, in host memory."""
        return isinstance(self._device_map, OneDevice) and device_of(self._device_map.device).packs_weights

    def needs_all_ranks(self, name: str) -> bool:
        """Whether all ranks must add this weight at the same time: its scales are those of whole rows, of which each
        rank has a part."""
        return name in self._to_quantize and self._partition.is_partial_sum(name)

    @property
    def missing(self) -> list[str]:
        """Names of weights without a value so far."""
        return [name for name in self._shapes if name not in self._slots and name not in self._waiting]

    def add(self, name: str, value: WeightValue) -> None:
        """Set a weight (in the checkpoint's shape) and those tied to it, or a buffer. Thread-safe. Raises ValueError
        for another shape."""
        self._require_shape(name, value)
        if name in self._buffers:
            self._set_buffer(name, value)
        elif len(self._tied[name]) == 1 and name not in self._slots:
            self._set(name, value)
        else:
            with self._lock:
                self._add_tied(name, value)

    def finish(self) -> WeightTable:
        """The table of all weights, once none is `missing`."""
        for name in list(self._waiting):
            self._set_linear(name, self._waiting.pop(name))
        for name, buffer in list(self._model.named_buffers()):
            self._set_buffer(name, buffer)
        partition = self._partition
        partition.place_embedding(self._model)
        slots = {slot: partition.slot(name, slot) for name, slot in self._slots.items()}
        return WeightTable(
            {name: [slots[self._slots[other]] for other in self._tied[name]] for name in self._shapes},
            {name: partition.whole_shape(name, shape) for name, shape in self._shapes.items()},
            self._dtypes,
        )

    def fused_mlps(self) -> FusedLayers:
        """The number of fused gated MLPs, and why others are not fused."""
        reasons = [
            reason if reason or isinstance(self._model.get_submodule(path), FusedGatedMLP) else _NOT_DENSE
            for path, reason in self._mlps.items()
        ]
        return report("gated_mlp", reasons)

    def _add_tied(self, name: str, value: WeightValue) -> None:
        if name in self._slots:
            self._add_beside_tied(name, value)
            return
        for other in self._linear_first(self._tied[name]):
            self._set(other, value)

    def _require_shape(self, name: str, value: WeightValue) -> None:
        needed = tuple(self.shape_of(name))
        found = tuple(value.shape)
        if isinstance(value, QuantizedTensor) and name in self._transposed:
            found = found[::-1]
        if found != needed:
            raise ValueError(f"{name} has the shape {needed} by config.json, and {found} in the checkpoint")

    def _add_beside_tied(self, name: str, value: WeightValue) -> None:
        """Older files repeat tied weights. If the two differ, config.json is wrong, and the weights are untied."""
        dense = self._dense(name, value)
        if torch.equal(self._slots[name].get().cpu(), dense.cpu()):
            return
        group = [other for other in self._tied[name] if other != name]
        logger.warning("%s differs from %s in the checkpoint, so they are not tied.", name, group[0])
        self._tied |= dict.fromkeys(group, group) | {name: [name]}
        first = self._slots[group[0]].get()
        for other in self._linear_first(group):
            if other in self._embeddings:  # it may share the weight that is set next
                self._set(other, first)
        self._set(name, value)

    def _linear_first(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: name not in self._layers)

    def _set(self, name: str, value: WeightValue) -> None:
        if name in self._embeddings and self._tie(name):
            return
        if name in self._experts and self._has_layouts(name, value):
            self._set_experts(name, value)
        elif name not in self._layers:
            self._set_parameter(name, self._device_map.put(name, self._dense(name, value)))
        elif name in self._gated and isinstance(value, torch.Tensor) and name not in self._to_quantize:
            self._set_gated(name, self._device_map.put(name, self._dense(name, value)))
        else:
            self._set_linear(name, value)

    def _dense(self, name: str, value: WeightValue) -> torch.Tensor:
        dtype = self._dtypes[name]
        if isinstance(value, torch.Tensor):
            return value.to(dtype)
        dense = value.dense(dtype)
        return dense.t().contiguous() if tuple(dense.shape) != tuple(self._shapes[name]) else dense

    def _tie(self, name: str) -> bool:
        """Let an embedding share the weight of a linear layer that it is tied to, if one is on the same device."""
        device_of = self._device_map.device_of
        embedding, path = self._embeddings[name], name.removesuffix(".weight")
        for other in self._tied[name]:
            linear = self._model.get_submodule(self._layers[other]) if other in self._layers else None
            layout = linear.layout if isinstance(linear, Linear) else None
            if isinstance(layout, EmbeddingLayout) and device_of(other) == device_of(name):
                replace_module(self._model, path, TiedEmbedding(layout, embedding))
                self._slots[name] = self._slots[other]
                return True
        replace_module(self._model, path, embedding)
        return False

    def _set_parameter(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        with self._lock:
            self._model.get_submodule(path)._parameters[leaf] = parameter
        self._slots[name] = ParameterSlot(parameter)

    def _set_buffer(self, name: str, value: WeightValue) -> None:
        path, _, leaf = name.rpartition(".")
        buffers = self._model.get_submodule(path)._buffers
        assert isinstance(value, torch.Tensor)
        buffers[leaf] = value.to(self._device_map.device_of(name), buffers[leaf].dtype)

    # ---- linear layers ------------------------------------------------------------------------------------------

    def _has_layouts(self, name: str, value: WeightValue) -> bool:
        """Whether each expert's weight gets its own layout. Dense weights on a GPU do not: there, one grouped product
        of all experts is faster."""
        is_plain = isinstance(value, torch.Tensor) and name not in self._to_quantize
        if self._partition.collectives.size > 1:  # the model's own code does not add what other ranks have
            return True
        return not is_plain or device_of(self._device_map.device_of(name)).packs_weights

    def _set_experts(self, name: str, value: WeightValue) -> None:
        path, _, leaf = name.rpartition(".")
        with self._lock:
            experts = self._model.get_submodule(path)
            if not isinstance(experts, Experts):
                experts = self._partition.experts(path, experts)
                replace_module(self._model, path, experts)
        transposed = experts.is_transposed
        if isinstance(value, QuantizedExperts):
            layouts = [self._layout(name, codes, transposed=False) for codes in value.experts]
        elif name in self._to_quantize:
            layouts = [self._layout(name, weight, transposed=transposed) for weight in self._dense(name, value)]
        else:
            weights = self._device_map.put(name, self._dense(name, value))
            layouts = [self._packed(name, weight.t() if transposed else weight) for weight in weights]
        experts.set_layouts(leaf, layouts)
        self._slots[name] = ExpertsSlot([LayoutSlot(layout, transposed=transposed) for layout in layouts])

    def _set_linear(self, name: str, value: WeightValue) -> None:
        path = self._layers[name]
        transposed = name in self._transposed
        layout = self._layout(name, value, transposed=transposed)
        self._slots[name] = LayoutSlot(layout, transposed=transposed)
        with self._lock:
            module = self._model.get_submodule(path)
            if isinstance(module, Linear):  # set a second time
                module.layout = layout
            else:
                replace_module(self._model, path, self._partition.linear(path, layout, module.bias))

    def _layout(self, name: str, value: WeightValue, *, transposed: bool) -> WeightLayout:
        dtype = self._dtypes[name]
        if isinstance(value, QuantizedTensor):
            layout = value.layout(dtype, self._device_map.device_of(name))
            self._check_rows(name, layout, lambda rows: value.dense(dtype, rows), value.shape[0])
            return layout
        assert isinstance(value, torch.Tensor)
        weight = value.t() if transposed else value
        if self._quantize is not None and name in self._to_quantize:
            across = self._partition.collectives.all_reduce_max if self.needs_all_ranks(name) else None
            layout = self._quantize(weight.to(self._device_map.device_of(name)).contiguous(), dtype, across)
            self._check_rows(name, layout, lambda rows: layout.part(rows).get(), weight.shape[0])
            return layout
        return self._packed(name, self._device_map.put(name, weight.to(dtype)))

    def _packed(self, name: str, weight: torch.Tensor) -> WeightLayout:
        layout = layout_of(weight if is_mapped(weight) else weight.contiguous())
        self._check(name, layout, weight)
        return layout

    def _set_gated(self, name: str, tensor: torch.Tensor) -> None:
        """Fuse gate and up once both have arrived."""
        path, names = self._gated[name]
        with self._lock:
            self._waiting[name] = tensor
            if not all(other in self._waiting for other in names):
                return
            gate, up = (self._waiting.pop(other) for other in names)
        if is_mapped(gate) or is_mapped(up):
            self._set_linear(names[0], gate)
            self._set_linear(names[1], up)
            return
        assert self._kernels is not None
        whole, parts = joint_layout([gate, up])
        with self._lock:
            place_gated_mlp(self._model, path, whole, parts, self._kernels)
        for other, part, weight in zip(names, parts, (gate, up), strict=True):
            self._check(other, part, weight)
            self._slots[other] = LayoutSlot(part, transposed=False)

    # ---- checks -------------------------------------------------------------------------------------------------

    def _check(self, name: str, layout: WeightLayout, weight: torch.Tensor) -> None:
        if not isinstance(layout, PlainWeight):
            self._check_rows(name, layout, lambda rows: weight[rows], weight.shape[0])

    def _check_rows(self, name: str, layout: WeightLayout, rows_of: Callable[[slice], torch.Tensor], out: int) -> None:
        edge = max(0, out - _CHECKED_ROWS) // UNIT * UNIT  # parts of every layout can begin at a multiple of UNIT
        for rows in (slice(0, min(_CHECKED_ROWS, out)), slice(edge, out)):
            weight = rows_of(rows).to(self._device_map.device_of(name))
            x = _check_input(weight.shape[1], self._dtypes[name], weight.device)
            _require_close(name, layout.part(rows).product(x, None), F.linear(x, weight), x.dtype)


def linear_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights that can be quantized: those of linear layers and experts, except the LM head, whose errors
    would affect every logit."""
    head = model.get_output_embeddings()
    return [*expert_weights(model)] + [
        f"{path}.weight" for path, module in model.named_modules() if _is_linear(module) and module is not head
    ]


def install(model: PreTrainedModel, kernels: ElementwiseOps | None, partition: Partition = WHOLE) -> Assembly:
    """Assemble a model that already has its weights (the part of `partition`); `finish` is left to the caller."""
    assembly = Assembly(model, kernels, _CurrentDevices(model), partition=partition)
    for name, parameter in list(model.named_parameters()):
        assembly.add(name, parameter.data)
    return assembly


class _CurrentDevices:
    """A DeviceMap that keeps the tensors on their present devices."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._devices = {
            name: tensor.device for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }  # fmt: skip

    def device_of(self, name: str) -> torch.device:
        return self._devices[name]

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _check_input(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(2, width, generator=generator).to(device, dtype)


def _require_close(name: str, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = float((found.float() - expected.float()).norm())
    if not error <= _TOLERANCE[dtype] * max(float(expected.float().norm()), 1e-6):
        raise StartupError(
            f"{name}: products with the layout that it is kept in are not those of the weight itself (they differ by "
            f"{error:.3g}); either the weight is not finite, or a kernel computes wrongly on this machine."
        )


def _tied_names(parameters: dict[str, torch.nn.Parameter]) -> dict[str, list[str]]:
    """For each name, all names of the same tensor including itself, in the same order for each."""
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    return {name: groups[id(parameter)] for name, parameter in parameters.items()}


def _gated_pairs(paths: list[str]) -> dict[str, tuple[str, tuple[str, str]]]:
    """For each gate and up weight: the path of the MLP, and the names of both weights."""
    found: dict[str, tuple[str, tuple[str, str]]] = {}
    for path in paths:
        names = (f"{path}.gate_proj.weight", f"{path}.up_proj.weight")
        found |= dict.fromkeys(names, (path, names))
    return found


def _is_linear(module: torch.nn.Module) -> bool:
    # Subclasses may compute something else, so they are left alone.
    return type(module) in (torch.nn.Linear, Conv1D)
