"""OpenAI's /v1/files and /v1/batches. A client sees what was made with its own API key."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse

from fastserve.errors import EntryNotFoundError, InvalidRequestError, ServiceError, UnsupportedCapabilityError
from fastserve.gateway.api_docs import answers_with, json_body, may_refuse
from fastserve.gateway.batches.runner import BatchRunner
from fastserve.gateway.batches.store import BatchStore
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.batches import MAX_METADATA, PURPOSES, Batch, BatchRequest, File, ListQuery, page
from fastserve.openai.body import RequestBounds, read_fields, shown, validate

MAX_NAME_CHARS = 255
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": list(PURPOSES)}},
}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}}
_BOUNDS = RequestBounds()


@dataclass(frozen=True)
class Batches:
    """Objects that the routes use. `store`: None if the server keeps no files."""

    store: BatchStore | None
    runner: BatchRunner | None
    endpoints: Sequence[str]
    """Routes that batches may use."""


def _store(request: Request) -> BatchStore:
    batches = cast(Batches, request.state.batches)
    if batches.store is None:
        raise UnsupportedCapabilityError(
            "This server keeps no files and runs no batches: it was started with --batches-folder none."
        )
    return batches.store


def _owner(request: Request) -> str:
    return cast(str, request.state.key_owner)


StoreDep = Annotated[BatchStore, Depends(_store)]
OwnerDep = Annotated[str, Depends(_owner)]
router = APIRouter()


def _json(content: Any, status: int = 200) -> Response:
    return Response(encode_json(content), status_code=status, media_type=JSON)


@router.post("/v1/files", openapi_extra=_FORM, responses=may_refuse(429))
async def upload(request: Request, store: StoreDep, owner: OwnerDep) -> Response:
    """Upload a file: multipart/form-data with `file` and `purpose` (`batch` for /v1/batches)."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequestError(
            "Send the file as multipart/form-data with the fields 'file' and 'purpose'.", param="file"
        )
    async with request.form(max_files=1, max_fields=8) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequestError("Missing required field 'file'.", param="file", code="missing_required_parameter")
        if purpose not in PURPOSES:
            raise InvalidRequestError(
                f"Invalid value for 'purpose': {shown(purpose)}. Give one of: {', '.join(PURPOSES)}.", param="purpose"
            )
        file_id, path = await store.new_content()
        try:
            size = await asyncio.to_thread(_copy, file, path)
            name = (file.filename or "file")[:MAX_NAME_CHARS]
            made = File(file_id, size, int(store.clock()), name, str(purpose))
            await store.add_file(owner, made)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise ServiceError(
                f"The file cannot be written now ({error.strerror}). Try again in a moment.", code="store_unavailable"
            ) from error
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return _json(made)


def _copy(source: UploadFile, target: Path) -> int:
    target.touch(mode=0o600)
    with target.open("wb") as out:
        while piece := source.file.read(2**20):
            out.write(piece)
        return out.tell()


@router.get("/v1/files")
async def list_files(
    store: StoreDep, owner: OwnerDep, query: Annotated[ListQuery, Query()], purpose: str | None = None
) -> Response:
    """The files of this API key, newest first."""
    is_descending = query.order == "desc"
    files, has_more = await store.files(
        owner, after=query.after, limit=query.limit, descending=is_descending, purpose=purpose
    )
    return _json(page(files, has_more=has_more))


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, store: StoreDep, owner: OwnerDep) -> Response:
    """One file, without its content."""
    return _json(await store.file(owner, file_id))


@router.get(
    "/v1/files/{file_id}/content", response_class=FileResponse, responses=answers_with("application/octet-stream")
)
async def get_content(file_id: str, store: StoreDep, owner: OwnerDep) -> Response:
    """The content of a file."""
    file = await store.file(owner, file_id)
    path = store.path_of(file.id)
    if not await asyncio.to_thread(path.exists):
        raise EntryNotFoundError(f"The content of {file.id} is not there any more.")
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", responses=may_refuse(409))
async def delete_file(file_id: str, store: StoreDep, owner: OwnerDep) -> Response:
    """Delete a file that no batch still reads."""
    await store.delete_file(owner, file_id)
    return _json({"id": file_id, "object": "file", "deleted": True})


@router.post("/v1/batches", openapi_extra=json_body(BatchRequest), responses=may_refuse(404, 429))
async def create_batch(request: Request, store: StoreDep, owner: OwnerDep) -> Response:
    """Run the requests of a file of JSON lines with spare capacity."""
    batches = cast(Batches, request.state.batches)
    fields = read_fields(await request.body(), _BOUNDS, BatchRequest.model_fields)
    wanted = validate(BatchRequest, fields, _BOUNDS)
    if wanted.endpoint not in batches.endpoints:
        raise InvalidRequestError(
            f"Invalid value for 'endpoint': {shown(wanted.endpoint)}. Give one of: {', '.join(batches.endpoints)}.",
            param="endpoint",
        )
    if wanted.metadata is not None and len(wanted.metadata) > MAX_METADATA:
        raise InvalidRequestError(f"'metadata' has at most {MAX_METADATA} entries.", param="metadata")
    file = await store.file(owner, wanted.input_file_id)
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"The file {file.id} has the purpose {shown(file.purpose)}. Upload it with purpose 'batch'.",
            param="input_file_id",
        )
    now = int(store.clock())
    batch = Batch(
        id=f"batch_{secrets.token_hex(12)}",
        endpoint=wanted.endpoint,
        input_file_id=file.id,
        completion_window=wanted.completion_window,
        created_at=now,
        expires_at=now + wanted.window_s,
        metadata=wanted.metadata,
    )
    await store.add_batch(owner, batch)
    if batches.runner is not None:
        batches.runner.wake()
    return _json(batch)


@router.get("/v1/batches")
async def list_batches(store: StoreDep, owner: OwnerDep, query: Annotated[ListQuery, Query()]) -> Response:
    """The batches of this API key, newest first."""
    is_descending = query.order == "desc"
    found, has_more = await store.batches(owner, after=query.after, limit=query.limit, descending=is_descending)
    return _json(page(found, has_more=has_more))


@router.get("/v1/batches/{batch_id}")
async def get_batch(batch_id: str, store: StoreDep, owner: OwnerDep) -> Response:
    """One batch and how far it is."""
    return _json(await store.batch(owner, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", responses=may_refuse(409))
async def cancel_batch(batch_id: str, store: StoreDep, owner: OwnerDep) -> Response:
    """End a batch. The answers that it has are kept."""
    return _json(await store.cancel(owner, batch_id))
