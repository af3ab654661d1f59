"""S-LoRA's request to generate: `inputs`, `parameters` and `lora_dir`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class GenerateParameters(BaseModel):
    do_sample: bool = False
    """Whether tokens are sampled; else the likeliest are taken."""
    temperature: float = 1.0
    """With do_sample; likewise the next two."""
    top_p: float = 1.0
    """1 is off."""
    top_k: int = -1
    """-1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the answer has it."""
    ignore_eos: bool = False
    """Whether the model's own end tokens do not end the answer."""
    max_new_tokens: int = 16
    """Maximum tokens of the answer."""
    stop_sequences: str | list[str] | None = None
    """Texts that end the answer."""
    return_details: bool = False
    """Whether a whole answer lists its tokens."""


class GenerateRequest(BaseModel):
    """Describes the body; the worker reads it field by field, since S-LoRA's fields become those of a completion."""

    model_config = ConfigDict(protected_namespaces=())

    inputs: str
    """The text to continue."""
    parameters: GenerateParameters | None = None
    """How it is continued."""
    lora_dir: str | None = None
    """An adapter: its path as given to the worker, or its name; none: the base model."""
    model: str | None = None
    """The base model, needed where several are served; not S-LoRA's."""
    req_id: str | None = None
    """Accepted; no effect."""
    model_dir: str | None = None
    """Accepted; no effect."""
