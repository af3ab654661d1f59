"""Loads a model from its folder until it is ready to run, or refuses one that cannot be served."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fastserve.engine.attention.packed_positions import give_positions
from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.contract import FusedLayers
from fastserve.engine.devices.device import Device
from fastserve.engine.devices.find import attention_backend, elementwise_ops, find_device
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.layers.fused_attention import fuse_attention
from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS, fuse_norms
from fastserve.engine.layers.quantizer import find_quantizer
from fastserve.engine.layers.rope_switch import switch_rope_by_sequence
from fastserve.engine.loading.assembly import Assembly, OneDevice, install
from fastserve.engine.loading.config_values import described, largest_size, require_sound_values
from fastserve.engine.loading.context_length import context_length, rope_switch_length
from fastserve.engine.loading.conversion import Conversion
from fastserve.engine.loading.division_check import try_partition
from fastserve.engine.loading.file_versions import FileVersions
from fastserve.engine.loading.formats.find import find_sources, stored_format_of
from fastserve.engine.loading.lora.merge import merge_adapter
from fastserve.engine.loading.lora.targets import AdapterTargets
from fastserve.engine.loading.placement import Placement
from fastserve.engine.loading.reference import Prompt, Reference, own_logits
from fastserve.engine.loading.skeleton import build_skeleton, read_generation_config
from fastserve.engine.loading.streaming import Progress, stream_weights
from fastserve.engine.loading.weight_table import WeightTable
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives
from fastserve.engine.settings import WeightOptions
from fastserve.errors import StartupError
from fastserve.gguf.file import part_files
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

_STATEFUL_LAYERS = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "mamba2", "recurrent"}
"""`layer_types` that keep a state beside keys and values, or instead of them."""
_MAX_CAUSE_CHARS = 500
"""Maximum length of a message of the model's own code within ours."""
_MAX_LAYERS = 10_000
"""Far more than any model has: a broken number must not have us build layers until memory ends."""
_SPARSE_LAYERS = {"compressed_sparse_attention", "heavily_compressed_attention", "indexed_attention"}
"""`layer_types` that choose or compress the tokens that they attend to."""
_STATE_SIZES = ("mamba_d_state", "ssm_state_size", "state_size", "linear_num_value_heads")
"""Fields that show a state in the configuration of a model whose layers are of one type."""
FindPlaces = Callable[[PreTrainedModel, torch.device], Placement | None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    attention: PagedAttention
    weights: WeightTable
    reference: Reference
    device: torch.device
    """Device of token ids and logits."""
    dtype: torch.dtype
    context_length: int
    rope_switch_length: int | None
    """Length in tokens beyond which all tokens of a sequence have other rotary frequencies; None: never."""
    eos_token_ids: tuple[int, ...]
    placement: Placement | None = None
    """None for a model on a single device."""
    fused_layers: tuple[FusedLayers, ...] = ()
    conversion: Conversion | None = None
    """The names of its checkpoints; None for a model that was not loaded from one."""
    stored_format: str | None = None
    """The quantization method of its checkpoint, or "gguf"."""
    adapter_targets: AdapterTargets | None = None
    """The layers that adapters of a batch may change, if there are to be any."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices of the model, `device` first."""
        return (self.device,) if self.placement is None else self.placement.devices


def load_model(
    model_dir: str,
    device_name: str | None,
    dtype_name: str | None,
    *,
    trust_remote_code: bool,
    progress: Progress,
    find_places: FindPlaces = lambda model, device: None,
    options: WeightOptions = WeightOptions(),  # noqa: B008  # frozen
    collectives: Collectives = SINGLE_RANK,
    expert_parallel: bool = False,
    has_adapters: bool = False,
) -> LoadedModel:
    """Load a decoder-only model. `find_places` returns the placement of its parts, or None to load all of it onto the
    device. With `collectives` of several ranks, all of them call this together, and each loads its part
    (`expert_parallel`: some of the experts whole). `has_adapters`: adapters will be applied to it while batches are
    computed. Raises StartupError with the reason when the model cannot be served."""
    found = find_device(device_name)
    device = found.torch_device
    folder = Path(model_dir)
    files = FileVersions(_paths(folder, options))
    config = read_config(model_dir, trust_remote_code)
    dtype = choose_dtype(dtype_name, config, found)
    _refuse_unpageable(config)
    packed_settings = _packed_settings(config)
    attention = PagedAttention(attention_backend)
    model = _make_skeleton(model_dir, config, dtype, attention_implementation(), trust_remote_code=trust_remote_code)
    prepare_positions(model, attention)
    read_generation_config(model, folder)
    conversion = Conversion(model)
    weight_loads, unexpected = conversion.match(find_sources(model, folder, packed_settings, options))
    stored_format = None if options.dummy else stored_format_of(folder, packed_settings, options)
    if model.config is not config:  # it is the language model of a composite
        unexpected = [source for source in unexpected if "language_model" in source.name]
    if options.adapter_dir is not None:
        weight_loads = merge_adapter(model, weight_loads, Path(options.adapter_dir))
    partition = try_partition(model, collectives, expert_parallel=expert_parallel)
    adapter_targets = AdapterTargets(model, partition.plan.weights, collectives.size) if has_adapters else None
    if partition.own_experts is not None:
        logger.info("rank %d has %s", collectives.rank, partition.own_experts)
    collectives.barrier()  # no rank reads weights before all have found that they can be divided
    partition.divide(model)
    for weight_load in weight_loads:
        weight_load.divide(partition.shards)
    placement = find_places(model, device)
    kernels = elementwise_ops((device,) if placement is None else placement.devices, dtype)
    quantize = None if options.quantize is None else find_quantizer(options.quantize)
    assembly = Assembly(model, kernels, placement or OneDevice(device), quantize, partition)
    with files.unchanged():
        stream_weights(model, weight_loads, unexpected, assembly, progress)
    loaded = _finish_model(model, assembly, attention, dtype, device, kernels, placement, reference=None)
    return dataclasses.replace(
        loaded, conversion=conversion, stored_format=stored_format, adapter_targets=adapter_targets
    )


def _paths(folder: Path, options: WeightOptions) -> Iterator[Path]:
    """The files and folders that a model is made of."""
    packed = None if options.packed is None else options.packed.path
    for path in (folder, options.adapter_dir, packed):
        if path is not None:
            yield Path(path).expanduser()
    if options.gguf_file is not None:
        yield from part_files(Path(options.gguf_file))


def prepare(
    model: PreTrainedModel, attention: PagedAttention, dtype: torch.dtype, prompts: Sequence[Prompt] | None = None
) -> LoadedModel:
    """Prepare a model that already has its weights and uses `attention`: compute its reference logits (of `prompts`, or
    of the usual ones), then replace its layers by faster ones."""
    model = model.eval().requires_grad_(False)
    prepare_positions(model, attention)
    device = model.device
    reference = own_logits(model, device, context_length(model.config.get_text_config(decoder=True)), prompts)
    kernels = elementwise_ops((device,), dtype)
    return _finish_model(model, install(model, kernels), attention, dtype, device, kernels, None, reference)


def prepare_positions(model: PreTrainedModel, attention: PagedAttention) -> None:
    """Have the model take each token's position and rotary frequencies from its own sequence of a packed batch."""
    give_positions(model)
    switch_rope_by_sequence(model, attention, rope_switch_length(model.config.get_text_config(decoder=True)))


def _finish_model(
    model: PreTrainedModel,
    assembly: Assembly,
    attention: PagedAttention,
    dtype: torch.dtype,
    device: torch.device,
    kernels: ElementwiseOps | None,
    placement: Placement | None,
    reference: Reference | None,
) -> LoadedModel:
    """With the weights loaded, compute the reference if there is none, and replace norms, MLPs and attention."""
    weights = assembly.finish()
    longest = context_length(model.config.get_text_config(decoder=True))
    if placement is not None:
        device = placement.main
        placement.connect(model)
    if reference is None:
        reference = own_logits(model, device, longest)
        _require_finite(reference, weights)
    with failing_in_a_sentence(type(model).__name__):
        fused_layers = (
            fuse_norms(model, kernels),
            assembly.fused_mlps(),
            fuse_attention(model, attention, kernels, longest, device),
        )
    if placement is not None:
        placement.connect(model)  # again, for the layers that were replaced
    return LoadedModel(
        model=model,
        attention=attention,
        weights=weights,
        device=device,
        dtype=dtype,
        reference=reference,
        context_length=longest,
        rope_switch_length=rope_switch_length(model.config.get_text_config(decoder=True)),
        eos_token_ids=_eos_token_ids(model),
        placement=placement,
        fused_layers=fused_layers,
    )


@contextlib.contextmanager
def failing_in_a_sentence(name: str) -> Iterator[None]:
    """Turn an exception of model code into a StartupError with one sentence; the log has the traceback."""
    try:
        yield
    except MODEL_CODE_ERRORS as error:
        logger.exception("%s failed when it was tried", name)
        raise StartupError(f"{name} cannot be served: its code failed when it was tried ({error}).") from error


def _require_finite(reference: Reference, weights: WeightTable) -> None:
    if bool(reference.logits.isfinite().all()):
        return
    for name in weights.names():
        if not bool(weights.get(name).isfinite().all()):
            raise StartupError(f"{name} holds values that are not finite: the checkpoint is broken.")
    raise StartupError("The model's logits are not finite in this dtype; start with --dtype float32.")


def _make_skeleton(
    model_dir: str, config: PretrainedConfig, dtype: torch.dtype, attention: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        model = build_skeleton(config, dtype, attention, trust_remote_code=trust_remote_code)
    except (*MODEL_CODE_ERRORS, OSError, ImportError) as error:
        if isinstance(error, KeyError) and error.args == (attention,):  # looked up in its own table
            raise _own_attention(config.model_type) from error
        raise cannot_be_read("model", model_dir, error) from error
    if not getattr(model, "_supports_attention_backend", False):
        raise _own_attention(type(model).__name__)
    return model


def _packed_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None or isinstance(settings, dict):
        return settings
    found: dict[str, Any] = settings.to_dict()
    return found


def _own_attention(name: str) -> StartupError:
    return StartupError(
        f"{name} cannot be served: its code in transformers does not let the engine replace its attention, so its KV "
        "cache cannot be paged."
    )


def read_config(model_dir: str, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of the model in a folder. Raises StartupError."""
    try:
        stated, _ = PretrainedConfig.get_config_dict(model_dir, local_files_only=True)
        require_sound_values(stated, model_dir)
        return AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code, local_files_only=True, **_readable_dtype(stated)
        )
    except (*MODEL_CODE_ERRORS, OSError, ImportError, StrictDataclassError) as error:
        raise cannot_be_read("configuration", model_dir, error) from error


def cannot_be_read(kind: str, model_dir: str, error: Exception) -> StartupError:
    """The error for a `kind` of file that model code could not load."""
    # transformers' messages have many lines, with advice about its own arguments.
    if "trust_remote_code" in str(error):
        return StartupError(
            f"The model in {model_dir} comes with Python code of its own, which is not run unasked: read it, and start "
            "with --trust-remote-code if you trust it."
        )
    lines = str(error).strip().split("\n")
    cause = " ".join(map(str.strip, lines if isinstance(error, StrictDataclassError) else lines[:1])).rstrip(".")
    cause = cause or type(error).__name__
    field = _named_field(model_dir, cause)
    cause = printable(cause, _MAX_CAUSE_CHARS)
    if field is None:
        return StartupError(f"The {kind} in {model_dir} cannot be loaded: {cause}.")
    return StartupError(
        f"The {kind} in {model_dir} cannot be loaded: {field} in its config.json. Correct it, or download config.json "
        f"again. The model's code says: {cause}."
    )


def _named_field(model_dir: str, message: str) -> str | None:
    """The field of config.json that an error's message is about, with its value; None if it names none."""
    try:
        stated = json.loads((Path(model_dir) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stated, dict):
        return None
    if "allocate memory" in message:
        name = largest_size(stated)
    else:
        words = re.findall(r"\w+", message)
        by_name = (name for name in words if "_" in name and name in stated)
        by_value = (name for name, value in stated.items() if isinstance(value, str) and value in words)
        name = next(itertools.chain(by_name, by_value, _with_rare_number(stated, words)), None)
    return None if name is None else described(name, stated[name])


def _with_rare_number(stated: Mapping[str, Any], words: Sequence[str]) -> Iterator[str]:
    """The fields with a number that the words have, and no other field."""
    numbers = Counter(str(value) for value in stated.values())
    for name, value in stated.items():
        if type(value) is int and value > _MAX_LAYERS and str(value) in words and numbers[str(value)] == 1:
            yield name


def _readable_dtype(stated: Mapping[str, Any]) -> dict[str, torch.dtype | None]:
    """Arguments for AutoConfig where config.json states a dtype in words that it cannot read ("auto",
    "torch.bfloat16"): the dtype that is meant, or None for the default.
    """
    names = [stated[key] for key in ("dtype", "torch_dtype") if isinstance(stated.get(key), str)]
    if all(isinstance(getattr(torch, name, None), torch.dtype) for name in names):
        return {}
    found = getattr(torch, names[0].removeprefix("torch."), None)
    dtype = found if isinstance(found, torch.dtype) else None
    return {"dtype": dtype, "torch_dtype": dtype}


def choose_dtype(name: str | None, config: PretrainedConfig, device: Device) -> torch.dtype:
    """The dtype that the user names, or else the one for this checkpoint on the device."""
    if name is not None:
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    return device.default_dtype(getattr(config, "dtype", None))


def _refuse_unpageable(config: PretrainedConfig) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise StartupError(f"{kind} is an encoder-decoder model; only decoder-only models can be served.")
    text_config = config.get_text_config(decoder=True)
    depth = getattr(text_config, "num_hidden_layers", None)
    if isinstance(depth, int) and not 0 < depth <= _MAX_LAYERS:
        raise StartupError(
            f"{kind} cannot be served: num_hidden_layers is {depth} in its config.json, and a model has 1 to "
            f"{_MAX_LAYERS} layers. Download config.json again."
        )
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if stateful := _STATEFUL_LAYERS & layer_types:
        raise StartupError(
            f"{kind} cannot be served: its layers ({', '.join(sorted(stateful))}) keep a state that the paged KV cache "
            "does not hold."
        )
    if sparse := _SPARSE_LAYERS & layer_types:
        raise StartupError(
            f"{kind} cannot be served: its layers ({', '.join(sorted(sparse))}) choose or compress the tokens they "
            "attend to, which the paged KV cache does not support."
        )
    # Where the types of all layers are stated, hybrid models without such layers may still have sizes for them.
    for field in () if layer_types else _STATE_SIZES:
        if getattr(text_config, field, None) is not None:
            raise StartupError(
                f"{kind} cannot be served: its layers keep a state ({field}) that the paged KV cache does not hold."
            )


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id if model.generation_config else None
    if found is None:
        found = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if found is None:
        return ()
    ids = found if isinstance(found, list | tuple) else (found,)
    for token_id in ids:
        if type(token_id) is not int:
            raise StartupError(
                f"{type(model).__name__} cannot be served: eos_token_id is {printable(repr(found))} in its "
                "generation_config.json or config.json. Write the ids of the tokens that end an answer, whole numbers."
            )
    return tuple(token_id for token_id in ids if token_id >= 0)
