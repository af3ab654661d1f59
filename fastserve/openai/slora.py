"""S-LoRA's request to generate: `inputs`, `parameters` and `lora_dir`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class GenerateParameters(BaseModel):
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    max_new_tokens: int = 16
    stop_sequences: str | list[str] | None = None
    return_details: bool = False


class GenerateRequest(BaseModel):
    """Describes the body; the worker reads it field by field, since S-LoRA's fields become those of a completion."""

    model_config = ConfigDict(protected_namespaces=())

    inputs: str
    parameters: GenerateParameters | None = None
    lora_dir: str | None = None
    """An adapter: its path as given to the worker, or its name; none: the base model."""
    model: str | None = None
    """The base model, needed where several are served; not S-LoRA's."""
    req_id: str | None = None
    model_dir: str | None = None
