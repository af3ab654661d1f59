"""Logits of the model's own code, computed before its layers are replaced, to verify the engine (see verify.py)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

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
            plain, perturbed = (
                model(inputs_embeds=_plain_and_perturbed(model, last), use_cache=False).logits[:, -1].float()
            )
            logits = torch.stack([logits[0], plain])
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        name = type(model).__name__
        logger.exception("%s failed on plain tokens", name)
        raise StartupError(f"{name} cannot be served: its own code fails on plain tokens ({error}).") from error
    finally:
        model.set_attn_implementation(ours)
    noise = float((perturbed - plain).abs().max() / logits.std().clamp_min(1e-6))
    return Reference(prompts, logits, noise)


def _plain_and_perturbed(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of `ids` (1, tokens), and the same rounded differently: (2, tokens, hidden), for a single pass over
    the weights."""
    embeddings: torch.Tensor = model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(1)
    perturbation = (
        torch.randn(embeddings.shape, generator=generator).to(embeddings.device) * torch.finfo(embeddings.dtype).eps
    )
    return torch.cat([embeddings, (embeddings.float() * (1 + perturbation)).to(embeddings.dtype)])
