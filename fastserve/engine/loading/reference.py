"""Logits of the model's own code, computed before its layers are replaced, to verify the engine (see selfcheck)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS
from fastserve.engine.layers.linear import threads_for_kernels
from fastserve.engine.loading.layer_kinds import layer_kinds
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

SHORT_LENGTH = 3
"""Prompts of this length are computed in one batch. A step of up to eight tokens takes little more time than one of a
single token, which reads all weights too."""
_MAX_FAR_PROMPTS = 3
_NUM_PERTURBED = 1
"""Number of short prompts that the noise is measured on."""
_USUAL_LENGTH = 8192
"""A prompt is placed here too when the context is longer: with little memory the engine may serve no longer ones."""
_BOUNDARY_NAMES = ("window", "chunk", "original_max", "floor_scale", "max_position")
"""Parts of the names of settings that say where in a sequence a model begins to compute otherwise."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens at consecutive positions, with nothing before the first one.

    Far positions cost no more than near ones this way; rotary embeddings and scales by position are those of a long
    text, masks those of a short one.
    """

    token_ids: list[int]
    first_position: int = 0

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.first_position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Reference:
    prompts: list[Prompt]
    logits: torch.Tensor
    """(tokens of all prompts, vocabulary), float32: logits of the model's own code after each token."""
    noise: float
    """Distance between the logits of two computations that round the embeddings differently: the effect of rounding
    alone on this model in its dtype. Measured on the first short prompt."""
    of_median: bool = False
    """Whether distances are those of the median token."""
    layer_kinds: list[Hashable] = field(default_factory=list)
    """A value for each layer (see layer_kinds.py)."""
    seconds: float = 0.0
    """Time that the computation took."""

    def distance(self, found: torch.Tensor, which: Mapping[int, tuple[int, int]]) -> float:
        """The distance of logits (tokens, vocabulary) from those of the model's own code. `which`: the prompts that
        these tokens belong to, in their order, and of each the begin and end of its tokens."""
        rows = self.logits.split([len(prompt.token_ids) for prompt in self.prompts])
        expected = [rows[index][begin:end] for index, (begin, end) in which.items()]
        return distance(found, torch.cat(expected), of_median=self.of_median)


def distance(found: torch.Tensor, expected: torch.Tensor, *, of_median: bool) -> float:
    """The difference of logits (tokens, vocabulary), in standard deviations, of the token that differs most or of the
    median one: the root mean square, or an eighth of the largest difference of a logit if that is more (four to five
    times the mean are usual)."""
    difference = (found - expected).abs()
    by_token = torch.maximum(difference.square().mean(dim=-1).sqrt(), difference.amax(dim=-1) / 8)
    return float((by_token.median() if of_median else by_token.max()) / expected.std().clamp_min(1e-6))


def boundaries(config: PretrainedConfig) -> list[int]:
    """Positions at which a model with this (text) config may begin to compute otherwise: windows, chunks, original
    lengths, ... Smallest first."""
    return sorted(
        {
            value
            for name, value in integers(config.to_dict())
            if any(part in name for part in _BOUNDARY_NAMES) and not name.endswith("layers")
        }
    )


def integers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names and values of all integers, also those in nested mappings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def near_and_far_prompts(
    config: PretrainedConfig, vocab_size: int, context_length: int, near_lengths: Sequence[int], far: Sequence[int]
) -> list[Prompt]:
    """Prompts of random tokens: some from position 0, and short ones across each of the positions `far` that is within
    the context, and at its end."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        found: list[int] = torch.randint(vocab_size, (length,), generator=generator).tolist()
        return found

    near = [Prompt(tokens(min(length, context_length))) for length in near_lengths]
    last = context_length - SHORT_LENGTH
    if _changes_whole_sequences(config):
        # A prompt across the change would be one of the tokens alone for the engine, but not for the model's own code.
        firsts = {first for first in (*far, last) if not any(first < other < first + SHORT_LENGTH for other in far)}
    else:
        firsts = {position - 1 for position in far} | {last}
    return near + [Prompt(tokens(SHORT_LENGTH), first) for first in sorted(firsts) if max(near_lengths) < first <= last]


def _changes_whole_sequences(config: PretrainedConfig) -> bool:
    """Whether all tokens of a sequence get other rotary frequencies once it is long (LongRoPE)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return "longrope" in {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, Mapping)}


def default_prompts(config: PretrainedConfig, context_length: int) -> list[Prompt]:
    """The prompts that a model with this (text) config is checked with at start."""
    far = [position for position in (*boundaries(config), _USUAL_LENGTH) if position < context_length]
    far = far[1 - _MAX_FAR_PROMPTS :]
    return near_and_far_prompts(config, config.vocab_size, context_length, [SHORT_LENGTH], far)


def own_logits(
    model: PreTrainedModel, device: torch.device, context_length: int, prompts: Sequence[Prompt] | None = None
) -> Reference:
    """Run the model's own code, with its own attention. Raises StartupError when that fails on plain tokens: then
    config.json contradicts itself, or the model needs other inputs besides tokens."""
    begin = time.perf_counter()
    if prompts is None:
        prompts = default_prompts(model.config.get_text_config(decoder=True), context_length)
    of_median = _rounds_by_expert(model)
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), threads_for_kernels(model):
            logits, noise = _compute(model, device, prompts, of_median=of_median)
    except MODEL_CODE_ERRORS as error:
        name = type(model).__name__
        logger.exception("%s failed on plain tokens", name)
        raise StartupError(f"{name} cannot be served: its own code fails on plain tokens ({error}).") from error
    finally:
        model.set_attn_implementation(ours)
    return Reference(
        list(prompts), torch.cat(logits), noise, of_median, layer_kinds(model), time.perf_counter() - begin
    )


def _compute(
    model: PreTrainedModel, device: torch.device, prompts: Sequence[Prompt], *, of_median: bool
) -> tuple[list[torch.Tensor], float]:
    """Logits of each prompt, and the noise."""
    short = [index for index, prompt in enumerate(prompts) if len(prompt.token_ids) == SHORT_LENGTH]
    found = {index: _run(model, device, [prompt])[0] for index, prompt in enumerate(prompts) if index not in short}
    noise = 0.0
    if short:
        again = short[:_NUM_PERTURBED]
        with _last_rows_perturbed(model, len(short) + len(again), len(again)):
            rows = _run(model, device, [prompts[index] for index in short + again])
        plain, perturbed = rows.split([len(short), len(again)])
        found.update(zip(short, plain, strict=True))
        noise = max(distance(*pair, of_median=of_median) for pair in zip(perturbed, plain, strict=False))
    return [found[index] for index in range(len(prompts))], noise


def _rounds_by_expert(model: PreTrainedModel) -> bool:
    """Whether rounding can send a token to another expert, which changes its logits as much as an error would. In
    float32 it hardly ever does."""
    if model.dtype is torch.float32:
        return False
    return any(part in name for name, _ in model.named_modules() for part in ("experts", "router"))


def _run(model: PreTrainedModel, device: torch.device, batch: Sequence[Prompt]) -> torch.Tensor:
    """Logits (prompts, tokens, vocabulary) of prompts of one length."""
    # At the beginning of a text the model counts for itself: some begin at another position than 0 (RoBERTa).
    positions = {}
    if any(prompt.first_position for prompt in batch):
        rows = [range(prompt.first_position, prompt.end) for prompt in batch]
        positions["position_ids"] = torch.tensor(rows, device=device)
    token_ids = torch.tensor([prompt.token_ids for prompt in batch], device=device)
    logits: torch.Tensor = model(input_ids=token_ids, use_cache=False, **positions).logits
    return logits.float()


@contextlib.contextmanager
def _last_rows_perturbed(model: PreTrainedModel, size: int, count: int) -> Iterator[None]:
    """Within the block, the embeddings of the last `count` rows of a batch of `size` are rounded differently. A single
    pass over the weights then shows the effect. (From embeddings alone some models cannot be run: they look ids up
    again.)"""

    def perturb(_: torch.nn.Module, __: Any, embeddings: torch.Tensor) -> torch.Tensor | None:
        if embeddings.shape[0] != size:  # a look-up of something else
            return None
        plain, other = embeddings.split([size - count, count])
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(other.shape, generator=generator).to(other.device) * torch.finfo(other.dtype).eps
        return torch.cat([plain, (other.float() * (1 + noise)).to(other.dtype)])

    handle = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()
