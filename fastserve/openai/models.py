"""The answer of `/v1/models`: OpenAI's fields, and FastChat's `root`, `parent` and `permission`."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel


class ModelPermission(BaseModel):
    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = True
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds at which this server began to serve the model."""
    owned_by: str = "fastserve"
    root: str
    parent: str | None = None
    permission: list[ModelPermission]
    max_model_len: int | None = None
    """Maximum tokens of a prompt and its answer together, by vLLM's name; of several workers the least."""
    context_length: int | None = None
    """The same, by another common name."""
    weight_version: str | None = None
    """Version of the weights that compute, where they may change."""


class ModelCards(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def describe_model(
    name: str,
    created: int,
    *,
    context_length: int | None,
    parent: str | None = None,
    root: str | None = None,
    weight_version: str | None = None,
) -> Model:
    """Describe a served model, or an adapter of the model `parent` from `root`. The permission's id is derived from the
    name, so that it is stable.
    """
    digest = hashlib.sha256(name.encode()).hexdigest()[:24]
    permission = ModelPermission(id=f"modelperm-{digest}", created=created)
    return Model(
        id=name,
        created=created,
        root=name if root is None else root,
        parent=parent,
        permission=[permission],
        max_model_len=context_length,
        context_length=context_length,
        weight_version=weight_version,
    )
