"""Routes that replace the model's weights while it serves, under SGLang's names and those of the calls that it had
before, and vLLM's calls of the same kind. All but those that only read are for administrators."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from fastserve.access.admin import require_admin
from fastserve.engine.calls.pause import Pause, Resume
from fastserve.engine.calls.reset_prefix_cache import ResetPrefixCache
from fastserve.engine.calls.weights import (
    CheckWeights,
    FinishWeightUpdate,
    GetWeight,
    JoinWeightGroup,
    LeaveWeightGroup,
    SetWeightVersion,
    StartWeightUpdate,
    UpdateWeights,
)
from fastserve.engine.weight_messages import (
    MAX_UPDATED_TENSORS,
    FromBytes,
    FromDisk,
    FromGroup,
    GroupSettings,
    TensorSpec,
    UpdateMode,
    UpdateOptions,
    WeightSource,
)
from fastserve.errors import FastserveError, InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import Flag, Integer, Number
from fastserve.worker.admin_routes import AdminBody, BodyT, call_engine, read_admin_body, read_query
from fastserve.worker.caller import read_body
from fastserve.worker.runtime import runtime_of

logger = logging.getLogger(__name__)
router = APIRouter()
admin_router = APIRouter(dependencies=[Depends(require_admin)])

GROUP_NAME = "weight_update_group"
"""SGLang's default."""
_GROUP_TIMEOUT_S = 300.0
_MAX_RANKS = 1 << 16
_MAX_BUCKET_BYTES = 1 << 40
_PICKLE = (b"\x80", b"PK\x03\x04")
"""First bytes of pickled tensors: of a pickle, and of torch.save's zip file."""
_LONG = frozenset({"names", "dtypes", "shapes", "update_info", "serialized_named_tensors"})

_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Names = Annotated[list[_Name], Field(min_length=1, max_length=MAX_UPDATED_TENSORS)]
_Dtype = Annotated[str, Field(min_length=1, max_length=64)]
_Dtypes = Annotated[list[_Dtype], Field(max_length=MAX_UPDATED_TENSORS)]
_Shape = Annotated[list[Annotated[Integer, Field(ge=0)]], Field(max_length=8)]
_Shapes = Annotated[list[_Shape], Field(max_length=MAX_UPDATED_TENSORS)]
_Version = Annotated[str, Field(min_length=1, max_length=128)]
_Path = Annotated[str, Field(min_length=1, max_length=4096)]
_Rank = Annotated[Integer, Field(ge=0, lt=_MAX_RANKS)]
_Port = Annotated[Integer, Field(ge=1, le=65535)]
_Bytes = Annotated[Integer, Field(ge=1, le=_MAX_BUCKET_BYTES)]


class InitGroupBody(BaseModel):
    master_address: _Name
    master_port: _Port
    rank_offset: _Rank = 1
    """This worker's first rank in the group; the trainer is rank 0 in most."""
    world_size: Annotated[Integer, Field(ge=2, le=_MAX_RANKS)]
    group_name: _Name = GROUP_NAME
    backend: Literal["gloo", "nccl"] = "nccl"
    warm_up: Flag = False
    """Sum one number over the group once it has formed; the trainer must do so too."""
    timeout_s: Annotated[Number, Field(gt=0, le=86400)] = _GROUP_TIMEOUT_S
    """For the group to form, and for each collective."""


class GroupBody(AdminBody):
    group_name: _Name = GROUP_NAME


class UpdateBody(AdminBody):
    """Fields of all updates."""

    mode: UpdateMode = "drain"
    abort_all_requests: Flag = False
    """SGLang's name of the mode "abort"."""
    weight_version: _Version | None = None
    flush_cache: Flag = True
    """SGLang's; the prefix cache is emptied in any case, since it would hold keys and values of other weights."""

    def options(self) -> UpdateOptions:
        return UpdateOptions("abort" if self.abort_all_requests else self.mode, self.weight_version)


class FromGroupBody(UpdateBody):
    names: _Names
    dtypes: _Dtypes
    shapes: _Shapes
    group_name: _Name = GROUP_NAME
    load_format: Literal["flattened_bucket"] | None = None
    """The bytes of all tensors in one broadcast."""
    bucket_bytes: _Bytes | None = None
    """The bytes of several tensors in each broadcast: a bucket ends before the tensor with which it would have more."""
    src: _Rank = 0
    """Rank of the sender."""


class OneTensorBody(UpdateBody):
    name: _Name
    dtype: _Dtype
    shape: _Shape
    group_name: _Name = GROUP_NAME
    empty_cache: Flag = False
    """The call's of the time; has no effect, because nothing is kept after an update."""
    src: _Rank = 0


class FromTensorBody(UpdateBody):
    serialized_named_tensors: str
    """A safetensors file in base64. The file itself may be the body instead, as application/octet-stream."""


class FromDiskBody(UpdateBody):
    model_path: _Path


class GetWeightBody(AdminBody):
    name: _Name
    truncate_size: Annotated[Integer, Field(ge=1, le=1 << 20)] = 100
    """Rows, from the first one."""


class CheckBody(AdminBody):
    action: Literal["checksum", "snapshot", "reset_tensors", "compare"]


class PauseBody(AdminBody):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class VersionBody(AdminBody):
    new_version: _Version


class TransferInfo(BaseModel):
    master_address: _Name
    master_port: _Port
    rank_offset: _Rank = 1
    world_size: Annotated[Integer, Field(ge=2, le=_MAX_RANKS)]
    backend: Literal["gloo", "nccl"] = "nccl"


class TransferEngineBody(AdminBody):
    init_info: TransferInfo


class StartBody(AdminBody):
    is_checkpoint_format: Flag = True
    """vLLM's; false (the model's own layouts) is refused."""
    mode: UpdateMode = "drain"
    weight_version: _Version | None = None


class TransferredInfo(BaseModel):
    names: _Names
    dtype_names: _Dtypes
    shapes: _Shapes
    packed: Flag = False
    packed_buffer_size_bytes: _Bytes = 1 << 30
    packed_num_buffers: Annotated[Integer, Field(ge=1, le=64)] = 2
    """vLLM's; has no effect, because buffers are made as they are needed."""


class TransferredBody(AdminBody):
    update_info: TransferredInfo


# ---- groups -----------------------------------------------------------------------------------------------------


def _both(*paths: str, methods: tuple[str, ...] = ("POST",)) -> Callable[..., Any]:
    """Register an administrators' route under several paths."""

    def register(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except FastserveError as error:  # trainers read "success"
                body = error.body() | {"success": False}
                return JSONResponse(body, status_code=error.status, headers=error.headers())

        for path in paths:
            admin_router.add_api_route(path, answer, methods=list(methods), name=endpoint.__name__)
        return endpoint

    return register


@_both("/init_weights_update_group", "/init_parameter_update_group")
async def init_group(request: Request) -> Response:
    body = await _read(request, InitGroupBody)
    return await _join(request, body, body.group_name, warm_up=body.warm_up, timeout_s=body.timeout_s)


@_both("/init_weight_transfer_engine")
async def init_transfer_engine(request: Request) -> Response:
    body = await _read(request, TransferEngineBody)
    return await _join(request, body.init_info, GROUP_NAME, warm_up=False, timeout_s=body.timeout_s)


async def _join(
    request: Request, body: InitGroupBody | TransferInfo, name: str, *, warm_up: bool, timeout_s: float | None
) -> Response:
    if body.rank_offset >= body.world_size:
        raise InvalidRequestError(
            f"rank_offset {body.rank_offset} is no rank of a group of {body.world_size}: give one below world_size.",
            param="rank_offset",
        )
    settings = GroupSettings(
        name, body.master_address, body.master_port, body.rank_offset, body.world_size, body.backend,
        timeout_s or _GROUP_TIMEOUT_S, warm_up,
    )  # fmt: skip
    return await call_engine(request, AdminBody(), JoinWeightGroup(settings))


@_both("/destroy_weights_update_group")
async def destroy_group(request: Request) -> Response:
    body = await _read(request, GroupBody)
    return await call_engine(request, body, LeaveWeightGroup(body.group_name))


# ---- updates ----------------------------------------------------------------------------------------------------


@_both("/update_weights_from_distributed")
async def update_from_distributed(request: Request) -> Response:
    body = await _read(request, FromGroupBody)
    tensors = _tensors(body.names, body.dtypes, body.shapes, "dtypes")
    bucket_bytes = _MAX_BUCKET_BYTES if body.load_format == "flattened_bucket" else body.bucket_bytes
    return await _update(request, body, FromGroup(body.group_name, tensors, body.src, bucket_bytes))


@_both("/update_parameter_from_distributed")
async def update_parameter(request: Request) -> Response:
    body = await _read(request, OneTensorBody)
    tensors = [TensorSpec(body.name, body.dtype, tuple(body.shape))]
    return await _update(request, body, FromGroup(body.group_name, tensors, body.src))


@_both("/update_weights_from_tensor")
async def update_from_tensor(request: Request) -> Response:
    if request.headers.get("content-type", "").startswith("application/octet-stream"):
        fields = read_query(request, UpdateBody)
        data = await read_body(request)
        return await _update(request, fields, FromBytes(_safetensors(data)))
    body = await _read(request, FromTensorBody)
    try:
        data = base64.b64decode(body.serialized_named_tensors, validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(
            f"serialized_named_tensors is not base64 ({error}): send a safetensors file in base64.",
            param="serialized_named_tensors",
        ) from error
    return await _update(request, body, FromBytes(_safetensors(data)))


def _safetensors(data: bytes) -> bytes:
    if data.startswith(_PICKLE):
        raise UnsupportedParameterError(
            "These tensors are pickled, and reading a pickle would run code: send safetensors.torch.save(tensors).",
            param="serialized_named_tensors",
        )
    return data


@_both("/update_weights_from_disk")
async def update_from_disk(request: Request) -> Response:
    body = await _read(request, FromDiskBody)
    return await _update(request, body, FromDisk(body.model_path))


async def _update(request: Request, body: UpdateBody, source: WeightSource) -> Response:
    return await call_engine(
        request, body, UpdateWeights(source, body.options()), summary=f"update weights ({type(source).__name__})"
    )


@_both("/start_weight_update")
async def start_update(request: Request) -> Response:
    body = await _read(request, StartBody)
    if not body.is_checkpoint_format:
        raise UnsupportedParameterError(
            "is_checkpoint_format: false is not supported: send weights as the checkpoint has them.",
            param="is_checkpoint_format",
        )
    return await call_engine(request, body, StartWeightUpdate(UpdateOptions(body.mode, body.weight_version)))


@_both("/update_weights")
async def update_part(request: Request) -> Response:
    body = await _read(request, TransferredBody)
    info = body.update_info
    tensors = _tensors(info.names, info.dtype_names, info.shapes, "dtype_names")
    bucket_bytes = info.packed_buffer_size_bytes if info.packed else None
    source = FromGroup(GROUP_NAME, tensors, bucket_bytes=bucket_bytes)
    return await call_engine(request, body, UpdateWeights(source, is_part=True), summary="receive a part of an update")


@_both("/finish_weight_update")
async def finish_update(request: Request) -> Response:
    return await call_engine(request, await _read(request, AdminBody), FinishWeightUpdate())


def _tensors(names: list[str], dtypes: list[str], shapes: list[list[int]], param: str) -> list[TensorSpec]:
    for field, found in ((param, len(dtypes)), ("shapes", len(shapes))):
        if found != len(names):
            raise InvalidRequestError(
                f"{field} has {found} entries, and names has {len(names)}: give one for each name.", param=field
            )
    return [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in zip(names, dtypes, shapes, strict=True)]


# ---- what is not an update --------------------------------------------------------------------------------------


@_both("/get_weights_by_name", "/get_weights_by_parameter_name", methods=("GET", "POST"))
async def get_weight(request: Request) -> Response:
    """The first rows of a weight, nested as it is."""
    body = read_query(request, GetWeightBody) if request.method == "GET" else await _read(request, GetWeightBody)
    runtime_of(request).keeper.require_ready()
    shown = await runtime_of(request).keeper.engine.call(
        GetWeight(body.name, body.truncate_size), timeout_s=body.timeout_s
    )
    return JSONResponse(_nested(shown.values, shown.shape[1:]))


def _nested(values: list[float], shape: tuple[int, ...]) -> list[Any]:
    """Flat values as rows of `shape`."""
    nested: list[Any] = values
    for size in reversed(shape):
        nested = [nested[at : at + size] for at in range(0, len(nested), size)]
    return nested


@_both("/weights_checker", "/check_weights")
async def check(request: Request) -> Response:
    body = await _read(request, CheckBody)
    return await call_engine(request, body, CheckWeights(body.action))


@_both("/update_weight_version")
async def update_version(request: Request) -> Response:
    body = await _read(request, VersionBody)
    return await call_engine(request, body, SetWeightVersion(body.new_version))


@_both("/pause_generation")
async def pause_generation(request: Request) -> Response:
    body = await _read(request, PauseBody)
    answer = await call_engine(request, body, Pause("abort" if body.mode == "abort" else "keep"))
    if body.mode == "retract":
        await runtime_of(request).keeper.engine.call(ResetPrefixCache(reset_running_requests=True))
    return answer


@_both("/continue_generation")
async def continue_generation(request: Request) -> Response:
    return await call_engine(request, await _read(request, AdminBody), Resume())


@_both("/flush_cache", methods=("GET", "POST"))
async def flush_cache(request: Request) -> Response:
    body = await _read(request, AdminBody) if request.method == "POST" else AdminBody()
    return await call_engine(request, body, ResetPrefixCache())


@router.get("/get_weight_version")
async def weight_version(request: Request) -> Response:
    return JSONResponse({"weight_version": runtime_of(request).keeper.engine.stats.weight_version})


@router.get("/get_model_info")
@router.get("/model_info")
async def model_info(request: Request) -> Response:
    runtime = runtime_of(request)
    name = runtime.jobs.settings.model_names[0]
    return JSONResponse(
        {
            "model_path": name,
            "tokenizer_path": name,
            "is_generation": True,
            "dtype": runtime.info.dtype,
            "weight_version": runtime.keeper.engine.stats.weight_version,
        }
    )


@router.get("/get_world_size")
async def world_size(request: Request) -> Response:
    """vLLM's: the members that a trainer's group has for this worker."""
    return JSONResponse({"world_size": runtime_of(request).info.num_ranks})


async def _read(request: Request, body_class: type[BodyT]) -> BodyT:
    return await read_admin_body(request, body_class, long=_LONG)
