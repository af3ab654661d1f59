"""A model that pools: loaded by transformers, tried, and computed in batches of texts of many requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from fastserve.engine.contract import PoolingInfo
from fastserve.engine.devices.find import device_of, find_device
from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS
from fastserve.engine.layers.layouts.onednn import OneDnnWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.modules import replace_module
from fastserve.engine.loading.config_values import require_sound_values
from fastserve.engine.loading.context_length import context_length
from fastserve.engine.loading.loader import cannot_be_read, choose_dtype, failing_in_a_sentence, read_config
from fastserve.engine.loading.streaming import Progress
from fastserve.engine.pooling.forward import (
    OWN_ATTENTION,
    HiddenStates,
    PackedHiddenStates,
    PaddedHiddenStates,
    TextBatch,
    first_position,
    padded_fields,
)
from fastserve.engine.pooling.heads import ClassifierHead, VectorHead, make_activation
from fastserve.engine.pooling.packed import UnsupportedAttentionError
from fastserve.engine.settings import EngineConfig, PoolingOptions
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_TRIAL_LENGTHS = (37, 23, 9, 3, 1)
_FARTHEST_TRIAL = 2048
"""Longest text of the trial: windows begin to matter well below."""
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Allowed difference of hidden states or logits in their standard deviations (root mean square of the worst text)."""
ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")


def _computing(function: Callable[ParametersT, ResultT]) -> Callable[ParametersT, ResultT]:
    """torch.inference_mode as a decorator that keeps types."""
    found: Callable[ParametersT, ResultT] = torch.inference_mode()(function)
    return found


class PoolingModel:
    """Raises StartupError if the model cannot be served."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        _refuse_options(config)
        device = find_device(config.device)
        self.device = device.torch_device
        self.settings = config.pooling_options or PoolingOptions("embed", ("mean",), normalize=True)
        model_config = read_config(config.model_dir, config.trust_remote_code)
        if getattr(model_config, "is_encoder_decoder", False):
            raise StartupError(f"{model_config.model_type} is an encoder-decoder model, which cannot be served.")
        self.dtype = choose_dtype(config.dtype, model_config, device)
        begin = time.perf_counter()
        progress("Loading weights", 0, 1)
        self._model = _load(config, model_config, self.settings, self.dtype).to(self.device)
        self._model.eval().requires_grad_(False)
        progress("Loading weights", 1, 1)
        self.load_s = time.perf_counter() - begin
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.architecture = type(self._model).__name__
        self.vocab_size: int = model_config.get_text_config().vocab_size
        self.max_length = self._find_max_length(config.max_model_len)
        base = self._model.base_model if self.settings.kind == "classify" else self._model
        with failing_in_a_sentence(self.architecture):
            hidden_size = self._own_outputs(_trial_batch((2,), self.vocab_size)).shape[-1]
        self._vectors = None
        self._classifier: ClassifierHead | None = None
        if self.settings.kind == "embed":
            self._vectors = VectorHead(self.settings, hidden_size, self.device)
        else:
            self._classifier = ClassifierHead(self._model, self.device)
            name = self.settings.activation or ("Sigmoid" if self._classifier.width == 1 else "Softmax")
            self._activation = torch.nn.Softmax(dim=-1) if name == "Softmax" else make_activation(name)
        with failing_in_a_sentence(self.architecture):
            self._hidden_states = self._choose_way(base)

    @property
    def info(self) -> PoolingInfo:
        if self._vectors is not None:
            return PoolingInfo("embed", self._vectors.width, is_normalized=self.settings.normalize)
        assert self._classifier is not None
        labels = self._model.config.id2label or {}
        names = tuple(str(labels.get(index, f"LABEL_{index}")) for index in range(self._classifier.width))
        return PoolingInfo("classify", self._classifier.width, names)

    @property
    def way(self) -> str:
        """Name of the way in which batches are computed."""
        return self._hidden_states.name

    @_computing
    def compute(
        self, batch: TextBatch, prompt_lengths: Sequence[int], by_token: Sequence[bool]
    ) -> Iterator[torch.Tensor]:
        """A row for each text: its vector before normalisation, or its logits. `by_token`: texts that get the hidden
        states of their tokens instead. On the CPU, float32."""
        lengths = batch.lengths
        hidden = self._hidden_states(batch)
        if self._classifier is not None:
            rows = self._classifier(hidden, batch).cpu()
        else:
            assert self._vectors is not None
            rows = self._vectors(hidden, lengths, prompt_lengths).cpu()
        states = hidden.float().cpu().split(lengths) if any(by_token) else [None] * len(lengths)
        return iter([state.clone() if by else row for row, state, by in zip(rows, states, by_token, strict=True)])

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of a classifier from its logits (texts, labels)."""
        scores: torch.Tensor = self._activation(logits)
        return scores

    def _find_max_length(self, wanted: int | None) -> int:
        config = self._model.config.get_text_config()
        longest = context_length(config) - first_position(self._model)
        if self.settings.max_length is not None:
            longest = min(longest, self.settings.max_length)
        if wanted is not None and wanted > longest:
            raise StartupError(
                f"--max-model-len {wanted} is more than the {longest} tokens that {self.architecture} takes: give at "
                "most that, or leave it out."
            )
        return wanted or longest

    @_computing
    def _own_outputs(self, batch: TextBatch) -> torch.Tensor:
        """Hidden states (tokens, hidden) or logits (texts, labels) of the model's own code on a padded batch."""
        fields = padded_fields(self._model, batch, self.device)
        output = self._model(**fields)
        if self.settings.kind == "classify":
            logits: torch.Tensor = output.logits
            return logits.float()
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[fields["attention_mask"].bool()].float()

    def _choose_way(self, base: PreTrainedModel) -> HiddenStates:
        """The fastest way that computes what the model's own code does."""
        longest = min(self.max_length, _FARTHEST_TRIAL)
        lengths = sorted({min(length, longest) for length in (longest, *_TRIAL_LENGTHS)}, reverse=True)
        batch = _trial_batch(lengths, self.vocab_size)
        expected = self._own_outputs(batch)
        if not bool(expected.isfinite().all()):
            raise StartupError(
                f"{self.architecture} computes numbers that are not finite in "
                f"{str(self.dtype).removeprefix('torch.')}: the checkpoint is broken, or needs --dtype float32."
            )
        reason = "it is no attention of transformers' interface"
        if getattr(base, "_supports_attention_backend", False):
            way = PackedHiddenStates(base, self.device)
            replaced = _pack_linears(base)
            try:
                distance = _distance(self._outputs(way, batch), expected)
                if distance <= _TOLERANCES[self.dtype]:
                    return way
                reason = f"it differs from the model's own code by {distance:.2g}"
            except (*MODEL_CODE_ERRORS, UnsupportedAttentionError) as error:
                reason = str(error).strip().partition("\n")[0]
            for path, module in replaced:
                replace_module(base, path, module)
        logger.info("%s is computed in padded batches: %s", self.architecture, reason)
        padded = PaddedHiddenStates(base, self.device)
        distance = _distance(self._outputs(padded, batch), expected)
        if distance > _TOLERANCES[self.dtype]:
            raise StartupError(
                f"{self.architecture} cannot be served: its head computes something else ({distance:.2g}) when it "
                "gets its hidden states from the engine."
            )
        return padded

    @_computing
    def _outputs(self, way: HiddenStates, batch: TextBatch) -> torch.Tensor:
        hidden = way(batch)
        return hidden.float() if self._classifier is None else self._classifier(hidden, batch)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    by_row = (found - expected).square().mean(dim=-1).sqrt()
    return float(by_row.max() / expected.std().clamp_min(1e-3)) if expected.numel() > 1 else float(by_row.max())


def _trial_batch(lengths: Sequence[int], vocab_size: int) -> TextBatch:
    random = np.random.default_rng(0)
    ids = [random.integers(vocab_size // 2, vocab_size, length).astype(np.int32) for length in lengths]
    return TextBatch(ids, [max(1, length // 2) for length in lengths])


def _load(
    config: EngineConfig, model_config: PretrainedConfig, settings: PoolingOptions, dtype: torch.dtype
) -> PreTrainedModel:
    require_sound_values(model_config.to_dict(), config.model_dir)
    model_config.use_cache = False
    auto: Any = AutoModelForSequenceClassification if settings.kind == "classify" else AutoModel
    options = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    try:
        try:
            return _make(auto, config, model_config, settings, options | {"attn_implementation": OWN_ATTENTION})
        except (ValueError, ImportError) as error:  # its code has no such attention
            if "attention" not in str(error):
                raise
            return _make(auto, config, model_config, settings, options)
    except StartupError:
        raise
    except (*MODEL_CODE_ERRORS, OSError, ImportError) as error:
        raise cannot_be_read("model", config.model_dir, error) from error


def _make(
    auto: Any, config: EngineConfig, model_config: PretrainedConfig, settings: PoolingOptions, options: dict[str, Any]
) -> PreTrainedModel:
    if config.weights.dummy:
        made: PreTrainedModel = auto.from_config(model_config, **options)
        return made
    model, report = auto.from_pretrained(
        config.model_dir, config=model_config, local_files_only=True, output_loading_info=True, **options
    )
    missing = sorted(report["missing_keys"])
    if settings.kind == "embed":
        missing = [name for name in missing if not name.startswith("pooler.")]  # vectors are pooled otherwise
    if missing:
        raise StartupError(
            f"The checkpoint in {config.model_dir} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]}: it is another kind of model, or incomplete."
        )
    loaded: PreTrainedModel = model
    return loaded


def _pack_linears(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Pack the weights of linear layers for steps of a thousand tokens, where oneDNN is four times as fast as our
    kernel for a few; returns the layers that were replaced, by path."""
    replaced = []
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            layout = OneDnnWeight.of(module.weight) if device_of(module.weight.device).packs_weights else None
            if layout is not None:
                replace_module(model, path, Linear(layout, module.bias))
                replaced.append((path, module))
    return replaced


def _refuse_options(config: EngineConfig) -> None:
    weights = config.weights
    given = {
        "--tp-size": config.tp_size > 1,
        "--num-gpus": config.num_gpus > 1,
        "--cpu-offloading": config.cpu_offloading,
        "--load-8bit and --load-4bit": weights.quantize is not None,
        "the gptq and awq flags": weights.packed is not None,
        "a GGUF file": weights.gguf_file is not None,
        "an adapter as --model-path": weights.adapter_dir is not None,
        "the adapters' flags": config.adapters is not None,
        "--speculative-model": config.speculative_model_dir is not None,
    }
    for flag, is_given in given.items():
        if is_given:
            raise StartupError(f"A model that embeds or classifies is served without {flag}: leave it out.")
