"""Bodies of the routes that load and unload adapters, as vLLM and SGLang define them."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, Field

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import Flag, RequestBounds, read_fields, shown, validate

BodyT = TypeVar("BodyT", bound=BaseModel)
MAX_PATH_CHARS = 4096
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_NO_BOUNDS = RequestBounds()


class LoadAdapterBody(BaseModel):
    lora_name: _Name
    """Name under which requests ask for the adapter."""
    lora_path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARS)]
    """Folder of the adapter on the workers' machines."""
    load_inplace: Flag = False
    """Replace an adapter of this name; requests that run end with the old one."""
    base_model_name: _Name | None = None
    """The model that the adapter is for; needed where several are served."""
    pinned: Flag = False
    """SGLang's; true is refused."""


class UnloadAdapterBody(BaseModel):
    lora_name: _Name
    """Name of the adapter."""
    lora_int_id: int | None = None
    """vLLM's number of the adapter; has no effect there either when the name is given."""
    base_model_name: _Name | None = None
    """The model that the adapter is for; needed where several are served."""


def read_adapter_body(body: bytes, body_class: type[BodyT]) -> BodyT:
    """Raises InvalidRequestError that names the field."""
    known = body_class.model_fields
    fields = read_fields(body, _NO_BOUNDS, known)
    for name in fields:
        if name not in known:
            raise InvalidRequestError(f"Unknown field {shown(name)}. This route knows: {', '.join(known)}.", param=name)
    required = [name for name, field in known.items() if field.is_required()]
    missing = next((name for name in required if not fields.get(name)), None)
    if missing is not None:
        raise InvalidRequestError(
            f"Missing required field '{missing}': {' and '.join(map(repr, required))} must be provided.",
            param=missing,
            code="missing_required_parameter",
        )
    made = validate(body_class, {name: value for name, value in fields.items() if value is not None}, _NO_BOUNDS)
    if getattr(made, "pinned", False):
        raise InvalidRequestError(
            "Invalid value for 'pinned': true. Adapters are kept by use; leave it out.", param="pinned"
        )
    return made


def load_message(name: str) -> str:
    """vLLM's answer."""
    return f"Success: LoRA adapter '{name}' added successfully."


def unload_message(name: str) -> str:
    return f"Success: LoRA adapter '{name}' removed successfully."
