"""The forward pass of a whole step as one call of a kernel (CPU).

Most decoder-only models have the same structure: norms at a few possible places, attention with rotary embedding, a
gated MLP. A model of this structure is recognised by its modules and described to the kernel (kernels/decoder.h);
whether the description is complete is tested at start, not inferred from the model's name (engine/selfcheck). The
model's modules stay, and compute steps with adapters where these change layers that the kernel does not know.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from fastserve.engine.attention.cpu_backend import CpuAttention
from fastserve.engine.attention.metadata import LayerShape
from fastserve.engine.devices.find import device_of
from fastserve.engine.kernels.decoder import ACTIVATIONS, DecoderKernel, DecoderStruct, LayerStruct
from fastserve.engine.kernels.lora import CpuLoraKernel, LoraRowsStruct, LoraSiteStruct
from fastserve.engine.kernels.packed_linear import WeightStruct
from fastserve.engine.layers.fused_attention import FusedAttention
from fastserve.engine.layers.fusion import FusedGatedMLP, FusedRMSNorm
from fastserve.engine.layers.layouts.layout import WeightLayout
from fastserve.engine.layers.linear import Linear, TiedEmbedding, embedding_scale
from fastserve.engine.layers.parallel import RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.engine.runner.forward.forward_pass import AbsentError, ForwardParts, UnsupportedError
from fastserve.engine.runner.packed_step import PackedStep

logger = logging.getLogger(__name__)

_NORM_FIELDS = (
    {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
    {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "mlp_out_norm"},
)
"""Names of a layer's norms in known models, and their fields in `LayerStruct`."""
_STATIC_ROPE = {"default", "linear", "llama3", "proportional", "yarn"}
"""RoPE types whose angles depend on the position alone."""


class WholeStepForward:
    """Computes the logits of a step with one call."""

    name: ClassVar[str] = "whole_step"
    follows_description: ClassVar[bool] = True

    def __init__(self, kernel: DecoderKernel, backend: CpuAttention, parts: ForwardParts) -> None:
        self._kernel = kernel
        self._backend = backend
        self._attention = parts.attention
        self._dtype = parts.dtype
        self._sampled_ids = parts.sampled_ids
        self._struct = DecoderStruct()
        self._adapters = parts.adapters
        sites = () if parts.adapters is None else parts.adapters.sites
        self._sites = {(site.layer, site.out_begin): site for site in sites}
        """Sites of adapters that the description does not have yet."""
        self._ranks: SharedMemoryCollectives | None = None
        """The ranks' collectives if the model is divided over ranks, else None."""
        self._head_is_divided = False
        self._noted: set[tuple[str, float]] = set()
        self._alive: list[Any] = []
        """Keeps alive the memory that the structs point to."""

    @classmethod
    def build(cls, parts: ForwardParts) -> Self:
        """The model's linear layers, norms and attention layers must have been replaced by ours before."""
        backend = parts.attention.backend
        if not isinstance(backend, CpuAttention):
            if device_of(parts.device).packs_weights:
                raise UnsupportedError("there is no attention kernel for its layers")
            raise AbsentError("the kernel computes on CPUs")
        kernel = DecoderKernel.load(parts.dtype)
        if kernel is None or not _is_on_cpu(parts.model):
            raise UnsupportedError("there is no kernel for this device")
        forward = cls(kernel, backend, parts)
        forward._describe(parts.model, parts.max_model_len + 1)
        if forward._sites:
            logger.info("Steps with adapters are not computed at once: these change other layers than the kernel's.")
        return forward

    def supports(self, step: PackedStep) -> str | None:
        if self._ranks is not None and not self._ranks.fits(len(step.input_ids), self._struct.hidden):
            return "its sums do not fit the memory that the ranks share"
        if step.adapters is None or self._adapters is None or not self._adapters.computes:
            return None
        if self._sites or not isinstance(self._adapters.kernel, CpuLoraKernel):
            return "its adapters may change layers that the kernel does not compute with them"
        return None

    def __call__(self, step: PackedStep) -> torch.Tensor:
        """Logits in float32."""
        input_ids, positions, rows = map(torch.from_numpy, (step.input_ids, step.positions, step.logit_rows))
        if step.input_ids.min() < 0:
            self._sampled_ids.fill_in(input_ids)
        kernel_step = self._backend.kernel_step(step.metadata, self._struct.heads // self._struct.kv_heads)
        adapters = None
        if step.adapters is not None and self._adapters is not None and self._adapters.computes:
            adapters = LoraRowsStruct.of(step.adapters)
        loss, logits = self._kernel(self._struct, kernel_step, input_ids, positions, rows, adapters)
        if self._ranks is None:
            return logits
        self._ranks.check(loss)
        return self._ranks.all_gather(logits) if self._head_is_divided else logits

    # ---- description --------------------------------------------------------------------------------------------

    def _describe(self, model: PreTrainedModel, max_positions: int) -> None:
        base = getattr(model.base_model, "language_model", model.base_model)
        layers, norm, head = getattr(base, "layers", None), getattr(base, "norm", None), model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        if isinstance(embedding, VocabParallelEmbedding):
            self._join(embedding.collectives)
            self._struct.first_token, self._struct.vocabulary = embedding.first, embedding.count
            embedding = embedding.part
        if not isinstance(layers, torch.nn.ModuleList) or not isinstance(embedding, torch.nn.Embedding | TiedEmbedding):
            raise UnsupportedError("it has no list of layers or no plain embedding")
        shapes = [self._attention.shapes.get(index) for index in range(len(layers))]
        shape = shapes[0]
        if shape is None or any(other is None or other.without_window() != shape.without_window() for other in shapes):
            raise UnsupportedError("its layers have attention of different shapes")
        if shape.key_dim != shape.value_dim or shape.has_sinks or shape.chunk is not None:
            raise UnsupportedError("its values have another size than its keys, or it has attention sinks or chunks")
        config = model.config.get_text_config(decoder=True)
        structs = (LayerStruct * len(layers))()
        self._alive.append(structs)
        rotary = _RotaryTable(base, config, self._dtype, max_positions)
        for struct, layer, layer_shape, cache in zip(structs, layers, shapes, self._attention.caches(), strict=True):
            struct.keys, struct.values = (self._pointer(tensor) for tensor in cache)
            struct.window = (layer_shape.window if layer_shape else None) or 0
            self._describe_layer(struct, layer, shape)
        for index, struct in enumerate(structs):
            struct.cos, struct.sin = (self._pointer(table) for table in rotary.of_layer(index))
        whole = self._struct
        self._head_is_divided = isinstance(head, VocabParallelHead)
        whole.layers = structs
        whole.head = self._weight(head)
        whole.head_lora, whole.embedding_lora = self._site(head), self._site(embedding)
        if isinstance(embedding, torch.nn.Embedding):
            whole.embedding = self._pointer(embedding.weight)
        elif embedding.layout is not head.layout:
            raise UnsupportedError("its embedding is stored another way than its head")
        whole.norm = self._norm(norm)
        whole.num_layers = len(layers)
        whole.hidden = embedding.embedding_dim
        whole.heads, whole.kv_heads, whole.head_dim = shape.num_heads, shape.num_kv_heads, shape.key_dim
        whole.rotary_dim = rotary.dim
        whole.block_size = self._backend.block_size
        # Rounded as the model's own code does.
        whole.embedding_scale = float(torch.tensor(embedding_scale(embedding), dtype=self._dtype))
        whole.scaling = shape.scaling
        whole.softcap = shape.softcap or 0.0
        whole.logit_softcap = getattr(config, "final_logit_softcapping", None) or 0.0

    def _describe_layer(self, struct: LayerStruct, layer: torch.nn.Module, shape: LayerShape) -> None:
        children = dict(layer.named_children())
        attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
        field_names = next((names for names in _NORM_FIELDS if names.keys() == children.keys()), None)
        if field_names is None or attention is None or mlp is None:
            raise UnsupportedError("a layer has other parts")
        for name, field in field_names.items():
            setattr(struct, field, self._norm(children[name]))
        if not isinstance(attention, FusedAttention) or len(attention.inputs) != 3:
            raise UnsupportedError("its attention is not fused")
        for norm, field in zip(attention.norms, ("query_norm", "key_norm"), strict=True):
            if norm is not None:
                setattr(struct, field, self._norm(norm))
                setattr(struct, f"{field}_size", norm.weight.shape[0])
        for projection, field in zip(attention.inputs, ("query", "key", "value"), strict=True):
            setattr(struct, field, self._weight(projection))
            setattr(struct, f"{field}_lora", self._site(projection))
        struct.output = self._weight_of_sum(attention.output)
        struct.output_lora = self._site(attention.output)
        if struct.query.out != shape.num_heads * shape.key_dim or struct.key.out != shape.num_kv_heads * shape.key_dim:
            raise UnsupportedError("its attention projects to another size")
        self._describe_mlp(struct, mlp)

    def _describe_mlp(self, struct: LayerStruct, mlp: torch.nn.Module) -> None:
        children = dict(mlp.named_children())
        if isinstance(mlp, FusedGatedMLP):
            struct.gate, struct.up = (self._layout(part, None) for part in mlp.parts)
            struct.gate_lora, struct.up_lora = self._site(mlp.gate_up), self._site(mlp.gate_up, struct.gate.out)
            activation = "silu"
        elif children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            struct.gate, struct.up = self._weight(children["gate_proj"]), self._weight(children["up_proj"])
            struct.gate_lora, struct.up_lora = self._site(children["gate_proj"]), self._site(children["up_proj"])
            activation = _activation(children["act_fn"])
        else:
            raise UnsupportedError("its MLP has another build")
        if struct.gate.bias or struct.up.bias or struct.gate.out != struct.up.out:
            raise UnsupportedError("its MLP has a bias, or gate and up of different sizes")
        struct.down = self._weight_of_sum(mlp.down_proj)
        struct.down_lora = self._site(mlp.down_proj)
        self._same("activation", ACTIVATIONS[activation])
        self._same("intermediate", struct.gate.out)

    def _weight(self, linear: torch.nn.Module | None) -> WeightStruct:
        if not isinstance(linear, Linear):
            raise UnsupportedError("a linear layer has another class")
        if isinstance(linear, VocabParallelHead):
            self._join(linear.collectives)
        return self._layout(linear.layout, linear.bias)

    def _weight_of_sum(self, linear: torch.nn.Module | None) -> WeightStruct:
        """The weight of a product that is added to the residual stream; on several ranks, a part of the sum."""
        self._require_same("division over ranks", isinstance(linear, RowParallelLinear))
        if not isinstance(linear, RowParallelLinear):
            return self._weight(linear)
        self._join(linear.collectives)
        # One rank adds the bias to its part.
        return self._layout(linear.layout, linear.bias if linear.collectives.rank == 0 else None)

    def _site(self, layer: torch.nn.Module | None, out_begin: int = 0) -> int | None:
        """The address of a site's struct; None if adapters cannot change the layer."""
        site = None if layer is None else self._sites.pop((layer, out_begin), None)
        if site is None or self._adapters is None:
            return None
        struct = LoraSiteStruct.of(self._adapters.tables(site), 0)
        self._alive.append(struct)
        return ctypes.addressof(struct)

    def _join(self, collectives: Collectives) -> None:
        """Have the kernel exchange with the other ranks by itself."""
        if not isinstance(collectives, SharedMemoryCollectives):
            raise UnsupportedError("its ranks share no memory")
        self._ranks = collectives
        self._struct.ranks = ctypes.addressof(collectives.struct)

    def _layout(self, layout: WeightLayout, bias: torch.Tensor | None) -> WeightStruct:
        struct = layout.struct(bias)
        if struct is None:
            raise UnsupportedError("the kernel cannot multiply with the layout of a weight")
        self._alive += [layout, bias]
        return struct

    def _norm(self, norm: torch.nn.Module | None) -> int:
        if not isinstance(norm, FusedRMSNorm):
            raise UnsupportedError("a norm is not fused")
        self._same("eps", norm.eps)
        self._same("norm_offset", norm.offset)
        return self._pointer(norm.weight)

    def _same(self, name: str, value: float) -> None:
        """Set a value that all layers must share. Raises UnsupportedError when they differ."""
        self._require_same(name, value)
        setattr(self._struct, name, value)

    def _require_same(self, name: str, value: float) -> None:
        if (name, value) not in self._noted and any(other == name for other, _ in self._noted):
            raise UnsupportedError(f"layers differ in {name}")
        self._noted.add((name, value))

    def _pointer(self, tensor: torch.Tensor) -> int:
        if tensor.dtype != self._dtype or not tensor.is_contiguous():
            raise UnsupportedError(
                f"a weight or an angle is in {str(tensor.dtype).removeprefix('torch.')}, or not contiguous"
            )
        self._alive.append(tensor)
        return int(tensor.data_ptr())


def _is_on_cpu(model: PreTrainedModel) -> bool:
    """Whether all of it is: the embedding or the head may be on a GPU, whose memory the kernel cannot read."""
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


class _RotaryTable:
    """Cosines and sines of the rotary embedding (positions, dim), for each type of layer."""

    def __init__(self, base: torch.nn.Module, config: Any, dtype: torch.dtype, max_positions: int) -> None:
        rotary = getattr(base, "rotary_emb", None)
        if not isinstance(rotary, torch.nn.Module):
            raise UnsupportedError("it has no rotary positions")
        kinds = getattr(rotary, "rope_type", "default")
        if not set(kinds.values() if isinstance(kinds, dict) else [kinds]) <= _STATIC_ROPE:
            raise UnsupportedError("its rotary positions depend on the length")
        # Only its dtype is read.
        like = torch.zeros(1, dtype=dtype)
        positions = torch.arange(max_positions).unsqueeze(0)
        by_layer = "layer_type" in inspect.signature(rotary.forward).parameters
        self._types: list[str | None] = list(config.layer_types) if by_layer else []
        with torch.inference_mode():
            self._found = {
                kind: tuple(table[0].contiguous() for table in rotary(like, positions, *([kind] if kind else [])))
                for kind in dict.fromkeys(self._types or [None])
            }
        sizes = {table.shape[1] for pair in self._found.values() for table in pair}
        if len(sizes) != 1:
            raise UnsupportedError("its layers rotate parts of different sizes")
        self.dim: int = sizes.pop()

    def of_layer(self, index: int) -> tuple[torch.Tensor, ...]:
        return self._found[self._types[index] if self._types else None]


def _activation(function: torch.nn.Module) -> str:
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    x = torch.linspace(-6.0, 6.0, 101)
    for name, like in known.items():
        if torch.allclose(function(x), like(x), rtol=1e-5, atol=1e-6):
            return name
    raise UnsupportedError("its MLP has another activation")
