"""Bodies and objects of OpenAI's Files and Batches APIs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

PURPOSES = ("batch", "user_data", "evals", "fine-tune", "assistants", "vision")
"""Purposes that a client may give to a file. Batches read those of purpose `batch`; the others are only kept."""
OUTPUT_PURPOSE = "batch_output"
MAX_METADATA = 16
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED = ("failed", "completed", "expired", "cancelled")


class BatchRequest(BaseModel):
    """Body of POST /v1/batches."""

    model_config = ConfigDict(extra="allow")

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    """A file of purpose `batch`: JSON lines, one request each."""
    endpoint: Annotated[str, Field(min_length=1, max_length=128)]
    """The route of all its requests."""
    completion_window: Annotated[str, Field(pattern=r"^([1-9][0-9]{0,2}h|[1-9]d)$")] = "24h"
    """Requests that have no answer after this time expire. OpenAI's is 24h; 1h to 999h, or 1d to 9d, here."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    """Up to 16 names with texts, which the batch returns."""

    @property
    def window_s(self) -> int:
        number = int(self.completion_window[:-1])
        return number * (3600 if self.completion_window.endswith("h") else 86_400)


class ListQuery(BaseModel):
    """Paging of lists."""

    after: Annotated[str, Field(max_length=128)] | None = Field(
        None, description="Id of the last entry of the page before."
    )
    limit: int = Field(20, ge=1, le=10_000, description="Most entries of a page. Default: 20.")
    order: Literal["asc", "desc"] = Field("desc", description="desc (the default) lists the newest first.")


class File(msgspec.Struct, frozen=True):
    id: str
    bytes: int
    created_at: int
    """Unix time in seconds, as all times here."""
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"
    expires_at: int | None = None


class RequestCounts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, frozen=True):
    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """Number of the line in the input file, from 1."""


class BatchErrors(msgspec.Struct, frozen=True):
    data: list[BatchError]
    object: str = "list"


class Batch(msgspec.Struct):
    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    object: str = "batch"
    model: str | None = None
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


def page(items: list[Any], *, has_more: bool) -> dict[str, Any]:
    """The answer of a list. `items`: structs with ids."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
        "has_more": has_more,
    }
