"""Logits of the model's own code, computed before its layers are replaced, to verify the engine (see verify.py)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fastserve.engine.layers.fusion import MODEL_CODE_ERRORS
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)

_LENGTHS = (19, 8)


@dataclass(frozen=True, slots=True)
class Reference:
    """Prompts, and the logits (prompts, vocabulary) of the model's own code after each of them."""

    prompts: list[list[int]]
    logits: torch.Tensor
    noise: float
    """Largest change of a logit, in standard deviations, when the embeddings are rounded differently: the effect of
    rounding alone on this model in its dtype. Measured on the second prompt only."""


def own_logits(model: PreTrainedModel, device: torch.device, context_length: int) -> Reference:
    """Run the model's own code, with its own attention. Raises StartupError when that fails on plain tokens: then
    config.json contradicts itself, or the model needs other inputs besides tokens."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, context_length) for length in _LENGTHS]
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            first, last = [torch.tensor([prompt], device=device) for prompt in prompts]
            logits = model(input_ids=first, use_cache=False).logits[:, -1].float()
            with _second_row_perturbed(model):
                plain, perturbed = model(input_ids=last.repeat(2, 1), use_cache=False).logits[:, -1].float()
            logits = torch.stack([logits[0], plain])
    except MODEL_CODE_ERRORS as error:
        name = type(model).__name__
        logger.exception("%s failed on plain tokens", name)
        raise StartupError(f"{name} cannot be served: its own code fails on plain tokens ({error}).") from error
    finally:
        model.set_attn_implementation(ours)
    noise = float((perturbed - plain).abs().max() / logits.std().clamp_min(1e-6))
    return Reference(prompts, logits, noise)


@contextlib.contextmanager
def _second_row_perturbed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the embeddings of the second of two equal rows are rounded differently. A single pass over the
    weights then shows the effect. (From embeddings alone some models cannot be run: they look ids up again.)"""

    def perturb(_: torch.nn.Module, __: Any, embeddings: torch.Tensor) -> torch.Tensor | None:
        if embeddings.shape[0] != 2:  # a look-up of something else
            return None
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(embeddings.shape[1:], generator=generator).to(embeddings.device)
        perturbed = embeddings[1].float() * (1 + noise * torch.finfo(embeddings.dtype).eps)
        return torch.stack([embeddings[0], perturbed.to(embeddings.dtype)])

    handle = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()
