"""From a folder to a model that is ready to run: what it is, whether it can be served, and the order of the steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fastserve.engine.attention.paged import PagedAttention, attention_implementation
from fastserve.engine.contract import FusedLayers
from fastserve.engine.devices.device import Device
from fastserve.engine.devices.find import attention_backend, elementwise_ops, find_device
from fastserve.engine.kernels.elementwise_ops import ElementwiseOps
from fastserve.engine.layers.fused_attention import fuse_attention
from fastserve.engine.layers.fusion import fuse_norms
from fastserve.engine.layers.quantizer import find_quantizer
from fastserve.engine.loading.assembly import Assembly, OneDevice, install
from fastserve.engine.loading.context_length import context_length
from fastserve.engine.loading.conversion import match
from fastserve.engine.loading.formats.find import find_sources
from fastserve.engine.loading.placement import Placement
from fastserve.engine.loading.reference import Reference, own_logits
from fastserve.engine.loading.skeleton import build_skeleton, read_generation_config
from fastserve.engine.loading.streaming import Progress, stream_weights
from fastserve.engine.loading.weight_table import WeightTable
from fastserve.engine.settings import WeightOptions
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_STATEFUL_LAYERS = {"conv", "linear_attention", "mamba", "mamba2", "recurrent"}
"""`layer_types` of hybrid models that are no attention."""
FindPlaces = Callable[[PreTrainedModel, torch.device], Placement | None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    attention: PagedAttention
    weights: WeightTable
    reference: Reference
    device: torch.device
    """Where token ids come from and logits go to."""
    dtype: torch.dtype
    context_length: int
    eos_token_ids: tuple[int, ...]
    placement: Placement | None = None
    """Of a model on several devices."""
    fused_layers: tuple[FusedLayers, ...] = ()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that a step is computed on, `device` first."""
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
) -> LoadedModel:
    """Load the weights of a decoder-only model. `find_places` says where its parts go, None: all of it to the device.
    Raises StartupError with the reason when that is not possible."""
    found = find_device(device_name)
    device = found.torch_device
    folder = Path(model_dir)
    config = _read_config(model_dir, trust_remote_code)
    dtype = _choose_dtype(dtype_name, config, found)
    _refuse_unpageable(config)
    packed_settings = _packed_settings(config)
    attention = PagedAttention(attention_backend)
    model = _make_skeleton(model_dir, config, dtype, attention_implementation(), trust_remote_code=trust_remote_code)
    read_generation_config(model, folder)
    deliveries, unexpected = match(model, find_sources(model, folder, packed_settings, options))
    placement = find_places(model, device)
    kernels = elementwise_ops((device,) if placement is None else placement.devices, dtype)
    quantize = None if options.quantize is None else find_quantizer(options.quantize)
    assembly = Assembly(model, kernels, placement or OneDevice(device), quantize)
    stream_weights(model, deliveries, unexpected, assembly, progress)
    return _take_over(model, assembly, attention, dtype, device, kernels, placement, reference=None)


def prepare(model: PreTrainedModel, attention: PagedAttention, dtype: torch.dtype) -> LoadedModel:
    """Take over a model that has its weights, and `attention` as its own: note what it computes as it is, then replace
    what we do faster."""
    model = model.eval().requires_grad_(False)
    device = model.device
    reference = own_logits(model, device, context_length(model.config.get_text_config(decoder=True)))
    kernels = elementwise_ops((device,), dtype)
    return _take_over(model, install(model, kernels), attention, dtype, device, kernels, None, reference)


def _take_over(
    model: PreTrainedModel,
    assembly: Assembly,
    attention: PagedAttention,
    dtype: torch.dtype,
    device: torch.device,
    kernels: ElementwiseOps | None,
    placement: Placement | None,
    reference: Reference | None,
) -> LoadedModel:
    """Of a model whose linear layers are ours: take down the reference, if there is none yet, and replace the rest."""
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
        placement.connect(model)  # also what stands in the places of others now
    return LoadedModel(
        model=model,
        attention=attention,
        weights=weights,
        device=device,
        dtype=dtype,
        reference=reference,
        context_length=longest,
        eos_token_ids=_eos_token_ids(model),
        placement=placement,
        fused_layers=fused_layers,
    )


@contextlib.contextmanager
def failing_in_a_sentence(name: str) -> Iterator[None]:
    """Model code that fails when it is first run ends the start with a sentence; the log has the rest."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
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
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        if isinstance(error, KeyError) and error.args == (attention,):  # looked up in the model's own table
            raise _own_attention(config.model_type) from error
        raise _cannot_be_read("model", model_dir, error) from error
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


def _read_config(model_dir: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_be_read("configuration", model_dir, error) from error


def _cannot_be_read(what: str, model_dir: str, error: Exception) -> StartupError:
    """transformers gives advice about its own arguments, in many lines."""
    if "trust_remote_code" in str(error):
        return StartupError(
            f"The model in {model_dir} comes with Python code of its own, which is not run unasked: read it, and start "
            "with --trust-remote-code if you trust it."
        )
    cause = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return StartupError(f"The {what} in {model_dir} cannot be loaded: {cause}.")


def _choose_dtype(name: str | None, config: PretrainedConfig, device: Device) -> torch.dtype:
    if name is not None:
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    return device.default_dtype(getattr(config, "dtype", None))


def _refuse_unpageable(config: PretrainedConfig) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise StartupError(f"{kind} is an encoder-decoder model; only decoder-only models can be served.")
    text_config = config.get_text_config(decoder=True)
    stateful = _STATEFUL_LAYERS.intersection(getattr(text_config, "layer_types", None) or ())
    if stateful:
        raise StartupError(
            f"{kind} cannot be served: its layers ({', '.join(sorted(stateful))}) keep a state that the paged KV cache "
            "does not hold."
        )
    for field in ("attention_chunk_size", "mamba_d_state", "ssm_state_size", "state_size", "linear_num_value_heads"):
        if getattr(text_config, field, None) is not None:
            raise StartupError(
                f"{kind} cannot be served: its layers keep a state ({field}) that the paged KV cache does not hold."
            )


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id if model.generation_config else None
    if found is None:
        found = model.config.get_text_config(decoder=True).eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)
