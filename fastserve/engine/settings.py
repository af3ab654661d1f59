"""Configuration that the worker passes to an engine process at its start."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import msgspec

from fastserve.config import EngineOptions, ServerConfig
from fastserve.distributed.gang import Gang
from fastserve.engine.contract import PoolingKind
from fastserve.options import same_option

PoolingMode = Literal["cls", "mean", "max", "last", "mean_sqrt_len", "weighted_mean"]


class PackedCheckpoint(msgspec.Struct, frozen=True):
    """A quantized checkpoint named by flags. Fields that are None are inferred from its tensors."""

    method: str
    """gptq or awq"""
    path: str | None = None
    """A file or folder; None: the model's own folder."""
    bits: int | None = None
    group_size: int | None = None
    act_order: bool = False


class WeightOptions(msgspec.Struct, frozen=True):
    """Source and storage of the weights."""

    quantize: str | None = None
    """int8 or nf4: format to which weights of linear layers are quantized while loading."""
    packed: PackedCheckpoint | None = None
    gguf_file: str | None = None
    adapter_dir: str | None = None
    """Folder of a LoRA adapter to add to the weights."""
    dummy: bool = False
    """Use random weights; weight files are neither needed nor read."""


class AdapterOptions(msgspec.Struct, frozen=True):
    """Adapters that are served beside the bare base model, and bounds on them."""

    modules: tuple[tuple[str, str], ...] = ()
    """(name, folder) of those that are known from the start. They are read when they are first asked for."""
    max_loras: int = 32
    """Maximum number of different adapters in a step."""
    max_lora_rank: int = 64
    max_cpu_loras: int = 256
    """Maximum number of copies in host memory."""
    pool_size_lora: int = 0
    """Tokens' worth of blocks that the pool has in addition."""
    prefetch: bool = True
    """Read adapters of waiting requests while others run; off: only that of the first waiting request."""
    no_lora_compute: bool = False
    """For measurements: do everything but the products, so answers are the base model's."""
    no_lora_swap: bool = False
    """For measurements: adapters stay on the device."""
    no_mem_pool: bool = False
    """For measurements: weights in memory of their own, not in blocks of the KV cache."""
    bmm: bool = False
    """For measurements: products padded to the largest rank."""


class DenseOptions(msgspec.Struct, frozen=True):
    """A linear layer after pooling."""

    folder: str
    in_features: int
    out_features: int
    has_bias: bool
    activation: str
    """Class in torch.nn, such as Tanh."""


class PoolingOptions(msgspec.Struct, frozen=True):
    """How a model that embeds or classifies turns the hidden states of a text into its result."""

    kind: PoolingKind
    modes: tuple[PoolingMode, ...] = ()
    """Several: their vectors are concatenated. None for a classifier."""
    dense: tuple[DenseOptions, ...] = ()
    normalize: bool = False
    max_length: int | None = None
    """Maximum tokens of a text; None: the model's own."""
    pools_prompt: bool = True
    """Whether the tokens of a prompt (an instruction before the text) are pooled too."""
    lowercase: bool = False
    prompts: dict[str, str] = {}
    """Texts to put before an input, by name."""
    default_prompt: str | None = None
    """Name of the prompt for inputs without one."""
    activation: str | None = None
    """Class in torch.nn for the scores of a classifier; None: sigmoid for one label, else softmax."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(EngineOptions):
    """Sent to the engine process (start_settings.py). Unset sizes are derived from the model and free memory."""

    model_dir: str
    tokenizer_dir: str | None = None
    """Folder of the tokenizer, whose tokens grammars are applied to; None: grammars are refused."""
    log_level: str = same_option(ServerConfig, "log_level")
    speculative_model_dir: str | None = None
    """Folder of a draft model, which replaces `speculative_method`."""
    speculative_gguf_file: str | None = None
    """The file with the draft model's weights, if they are not in its folder."""
    weights: WeightOptions = field(default_factory=WeightOptions)
    adapters: AdapterOptions | None = None
    """None: adapters are not served."""
    pooling_options: PoolingOptions | None = None
    """None: the model generates."""
    gang: Gang | None = None
    """The machines, if the ranks are on several of them."""

    @property
    def num_local_ranks(self) -> int:
        """Ranks on this machine."""
        return self.tp_size if self.gang is None else self.gang.local_size

    @classmethod
    def of(cls, options: EngineOptions, **others: Any) -> EngineConfig:
        """`options` unchanged, and the fields of this class, which the worker determines."""
        return cls(**{item.name: getattr(options, item.name) for item in fields(EngineOptions)}, **others)
