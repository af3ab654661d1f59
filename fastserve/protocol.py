"""Messages that fastserve's processes send each other over HTTP.

They extend FastChat's (register, heartbeat, status): its fields keep their names and meaning, and our own have
defaults, so FastChat's workers and controllers are compatible. Unknown fields are ignored, so neighbouring versions of
fastserve are compatible too.

In-flight counts are exact. The API server makes a lease id for each request, acquires a worker from the controller with
it (`/acquire`), sends it to the worker in the header LEASE_HEADER, and releases it (`/release`) when the answer has
ended. The worker lists the leases that it is serving in each heartbeat, so a restarted controller learns them again,
and a lease whose API server died is dropped once the worker no longer lists it.

All fields are bounded, so that a message of a defective or hostile process costs no more than an error that names the
field. Validation of a list stops at its first invalid element. Numbers exclude NaN, strings and booleans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fastserve.breaker import State as BreakerState

LEASE_HEADER = "x-fastserve-lease"
REQUEST_ID_HEADER = "x-request-id"
MAY_PRIORITISE_HEADER = "x-fastserve-may-prioritise"
"""Set by the API server: "1" if the request's key may raise its priority, else "0". Accepted only from senders with the
cluster key (with --insecure, from everybody)."""
SEED_HEADER = "x-fastserve-seed"
"""Set by the API server: the sampling seed for a request without one, a decimal number up to MAX_SEED. With it, every
worker that the request is sent to samples the same tokens. Accepted like MAY_PRIORITISE_HEADER."""
CHOICES_HEADER = "x-fastserve-choices"
"""Comma-separated indices (`0,3`) of the request's choices that this worker generates; without it, all. In the answer
they keep their indices, and they are sampled as if all were generated. Accepted like MAY_PRIORITISE_HEADER."""
RESPONSE_HEADER = "x-fastserve-response"
"""The head of a response (`fastserve/openai/responses/head.py`), from an API server that keeps a store of responses.
Accepted like MAY_PRIORITISE_HEADER."""
HOPS_HEADER = "x-fastserve-hops"
"""Comma-separated ids of the API servers that have forwarded the request."""

MAX_NAME_CHARS = 512
MAX_ADDRESS_CHARS = 300
MAX_LEASE_CHARS = 128
MAX_MODEL_NAMES = 256
"""For one worker."""
MAX_LEASES = 32_768
"""For one worker; a list of so many fits into the controller's limit on request bodies."""
MAX_RELEASES = 4_096
"""In one message."""
MAX_EXCLUDED = 64
MAX_REQUESTS = 1_000_000
"""Requests on one worker."""
MAX_WORKERS = 100_000
"""Rows of a routing table."""
MAX_ADAPTERS = 4096
"""Served by one worker; the upper bound of `--max-adapters`."""
MAX_ADAPTER_NAME_CHARS = 128
MAX_ADAPTER_ROOT_CHARS = 512
MAX_ADAPTER_LIST_BYTES = 2**19
"""Of a worker's adapters in a heartbeat: half of a controller's `--max-body-bytes` by default."""
MAX_LISTED_ADAPTERS = 100_000
MAX_HELD_ADAPTERS = 64
"""In one heartbeat."""
MAX_CAPABILITIES = 16
"""For one worker."""
MAX_CAPABILITY_CHARS = 64

MAX_SEED = 2**63 - 1
MAX_CHOICES_CHARS = 4096
"""Longest value of CHOICES_HEADER."""

ASSUMED_CAPABILITIES = ("chat", "completions")
"""Capabilities of a worker that states none: FastChat's workers, other OpenAI-compatible servers, older versions."""

NAME_PATTERN = r"^[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+$"
"""No control characters: they can forge log lines, control terminals and reverse the direction of text."""

ModelName = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS, pattern=NAME_PATTERN)]
AdapterName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_ADAPTER_NAME_CHARS, pattern=r"^[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}:]+$")
]
"""Without a colon, since `BASE:NAME` is the adapter NAME of the model BASE."""
Address = Annotated[str, StringConstraints(max_length=MAX_ADDRESS_CHARS, pattern=NAME_PATTERN)]
Capability = Annotated[str, StringConstraints(max_length=MAX_CAPABILITY_CHARS, pattern=r"^[a-z][a-z0-9_.-]*$")]
Capabilities = Annotated[list[Capability], Field(min_length=1, max_length=MAX_CAPABILITIES, fail_fast=True)]
LeaseId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LEASE_CHARS)]
LeaseIds = Annotated[list[LeaseId], Field(max_length=MAX_LEASES, fail_fast=True)]
Releases = Annotated[list[LeaseId], Field(max_length=MAX_RELEASES, fail_fast=True)]
AdaptersDigest = Annotated[str, StringConstraints(max_length=64, pattern=r"^[0-9a-f]*$")]
HeldAdapters = Annotated[list[AdapterName], Field(max_length=MAX_HELD_ADAPTERS, fail_fast=True)]
Flag = Annotated[bool, Field(strict=True)]
RequestCount = Annotated[int, Field(strict=True, ge=0, le=MAX_REQUESTS)]
TokenCount = Annotated[int, Field(strict=True, ge=0, le=10**9)]
Speed = Annotated[float, Field(strict=True, ge=0, le=1e6, allow_inf_nan=False)]
TokensPerS = Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)]
IntervalS = Annotated[float, Field(strict=True, ge=0.01, le=3600, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=86400, allow_inf_nan=False)]


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class WorkerStatus(Message):
    """Status of a worker. The first four fields are FastChat's."""

    model_names: Annotated[list[ModelName], Field(max_length=MAX_MODEL_NAMES, fail_fast=True)]
    speed: Speed = 1.0
    queue_length: RequestCount = 0
    """Running and waiting requests, with or without a lease."""
    multimodal: Flag = False
    tokens_per_s: TokensPerS | None = None
    """Decode speed on a reference batch, measured at start and corrected by later steps. None: not known."""
    heartbeat_interval_s: IntervalS | None = None
    """None: a FastChat worker, which expires after the controller's own `--heartbeat-expiration-s`."""
    leases: LeaseIds = Field(default_factory=list)
    """Lease ids of the running and waiting requests. Empty in the rows of a routing table."""
    context_length: TokenCount | None = None
    max_concurrency: RequestCount | None = None
    kv_usage: Share = 0.0
    """Share of the KV cache in use by running requests, 0 to 1."""
    version: Annotated[str, StringConstraints(max_length=64)] | None = None
    ready: Flag = True
    """False while the model loads or the engine restarts: the models are known, but no requests are sent here."""
    paused: Flag = False
    """An administrator has paused the engine: requests are accepted, and wait. Dispatch prefers other workers."""
    capabilities: Capabilities | None = None
    """Kinds of requests that the worker answers for its models (`chat`, `completions`, ...), each for one route of the
    API server. None: not stated, or not known until the model is loaded.
    """

    adapters_digest: AdaptersDigest = ""
    """Digest of the names of its adapters, which the controller asks for when it does not know the digest. "": none."""
    held_adapters: HeldAdapters = Field(default_factory=list)
    """Adapters whose weights are in memory, those on the device first. Empty in the rows of a routing table."""

    @property
    def offered(self) -> Sequence[str]:
        """The stated capabilities, or the assumed ones if none are stated."""
        return ASSUMED_CAPABILITIES if self.capabilities is None else self.capabilities

    @property
    def unleased(self) -> int:
        """Requests without a lease: sent by clients directly, or by FastChat's API server."""
        return max(0, self.queue_length - len(self.leases))


class RegisterRequest(Message):
    worker_name: Address
    check_heart_beat: Flag
    worker_status: WorkerStatus | None = None
    multimodal: Flag = False


class AdapterEntry(Message):
    name: AdapterName
    root: Annotated[str, StringConstraints(max_length=MAX_ADAPTER_ROOT_CHARS)] = ""
    """The path or repository id that it was loaded from, as the administrator gave it."""


class HeartbeatRequest(Message):
    worker_name: Address
    queue_length: RequestCount
    status: WorkerStatus | None = None
    """With a status, the heartbeat also registers a worker that the controller does not know."""
    adapters: Annotated[list[AdapterEntry], Field(max_length=MAX_ADAPTERS, fail_fast=True)] | None = None
    """The adapters of the status's `adapters_digest`; sent when the controller has answered with `send_adapters`."""


class WorkerName(Message):
    """Body of `/deregister_worker` (a worker shuts down) and `/report_failure` (a connection to it failed)."""

    worker_name: Address


class ModelRequest(Message):
    model: str


class AddressResponse(Message):
    address: str


class ModelList(Message):
    models: list[str]


class AcquireRequest(Message):
    model: str
    lease: LeaseId
    exclude: Annotated[list[Address], Field(max_length=MAX_EXCLUDED, fail_fast=True)] = Field(default_factory=list)
    """Addresses that this request has already failed on."""
    capability: Capability | None = None
    """Capability that the worker must offer; None: any."""


class AcquireResponse(Message):
    """`address` is "" if no worker can take the request now."""

    address: Address | Literal[""]
    known: Flag
    """Whether the model is served, loads, or was served lately."""
    retry_after_s: Seconds | None = None
    """Time to wait before a retry; set if the model is known and no worker can take the request."""
    capabilities: Capabilities | None = None
    """Capabilities that the model is served with; set if the requested one is not among them."""


class ReleaseRequest(Message):
    """Leases of requests that have ended, with the outcome of each.

    A lease in `leases` alone is a success. A lease that is also in `failed` counts as a failure of the worker (a 500,
    an invalid answer, a cut stream, a timeout). A lease that is also in `unused` counts as neither (never sent, or the
    client disconnected before the end).
    """

    leases: Releases
    failed: Releases = Field(default_factory=list)
    unused: Releases = Field(default_factory=list)


class ServingRequest(Message):
    """Body of `/serving`, which returns those of the leases that workers listed in their last heartbeats."""

    leases: Releases


class ServingResponse(Message):
    leases: Releases


class WorkerEntry(Message):
    """One row of the routing table."""

    address: Address
    status: WorkerStatus
    in_flight: RequestCount
    """Requests on the worker now, by the controller's count."""
    speed: Speed
    """Relative speed: 1 is the mean of the workers whose speed is known."""
    breaker: BreakerState = "closed"


class ServedAdapter(AdapterEntry):
    parent: ModelName
    """A name of its base model."""


class AdapterTable(Message):
    """All adapters that the controller knows; None if they are those of the version that the reader has."""

    version: Annotated[int, Field(strict=True, ge=0)]
    adapters: Annotated[list[ServedAdapter], Field(max_length=MAX_LISTED_ADAPTERS, fail_fast=True)] | None = None


class RoutingTable(Message):
    """The workers that can take requests: all of them, or the changes since a version that the reader has."""

    dispatch_method: Annotated[str, StringConstraints(max_length=64)]
    workers: Annotated[list[WorkerEntry], Field(max_length=MAX_WORKERS, fail_fast=True)]
    epoch: Annotated[str, StringConstraints(max_length=64)] = ""
    """Random id of the controller's process; versions of different epochs cannot be compared."""
    version: Annotated[int, Field(strict=True, ge=0)] = 0
    adapters_version: Annotated[int, Field(strict=True, ge=0)] = 0
    """Version of the list of adapters (`/adapters`)."""
    is_delta: Flag = False
    """Whether `workers` and `removed` are only the changes since the requested version."""
    removed: Annotated[list[Address], Field(max_length=MAX_WORKERS, fail_fast=True)] = Field(default_factory=list)
