"""Every message that our processes send each other over HTTP.

FastChat's wire (register, heartbeat, status) is a subset: its fields keep their names and meaning, ours stand beside
them with defaults, so a FastChat worker or controller on the other end is understood. Statuses ignore fields that they
do not know, so processes of neighbouring versions work together.

In-flight counts are exact. The API server makes a lease id for each request, asks the controller for a worker with it
(`/acquire`), sends it to the worker in the header LEASE_HEADER, and gives it back (`/release`) when the answer has
ended. The worker lists the leases that it is serving in each heartbeat, so a restarted controller knows them again,
and a lease whose API server died is forgotten once the worker no longer lists it.

Everything here has a bound, so that no message of a defective or hostile neighbour costs more than an error that names
the field. Lists stop at their first wrong element, and numbers are numbers: no NaN, no strings, no booleans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fastserve.breaker import State as BreakerState

LEASE_HEADER = "x-fastserve-lease"
REQUEST_ID_HEADER = "x-request-id"
MAY_PRIORITISE_HEADER = "x-fastserve-may-prioritise"
"""Set by the API server: "1" for requests whose key may put them before others, else "0". Only who has the cluster key
is believed (with --insecure, everybody)."""
SEED_HEADER = "x-fastserve-seed"
"""Set by the API server: the seed of a request that brings none of its own, a decimal number up to MAX_SEED. Every
worker that the request is sent to samples the same tokens with it. Believed as MAY_PRIORITISE_HEADER is."""
CHOICES_HEADER = "x-fastserve-choices"
"""Indices of the choices that this worker is to generate, of all that the request asks for, separated by commas
(`0,3`); they keep their indices in the answer, and their noise. Without it, all. Believed as MAY_PRIORITISE_HEADER
is."""
HOPS_HEADER = "x-fastserve-hops"
"""Ids of the API servers that have passed the request on, separated by commas."""

MAX_NAME_CHARS = 512
MAX_ADDRESS_CHARS = 300
MAX_LEASE_CHARS = 128
MAX_MODEL_NAMES = 256
"""For one worker."""
MAX_LEASES = 32_768
"""For one worker; together they fit the controller's limit of a body."""
MAX_RELEASES = 4_096
"""In one message."""
MAX_EXCLUDED = 64
MAX_REQUESTS = 1_000_000
"""Requests on one worker."""
MAX_WORKERS = 100_000
"""Rows of a routing table."""
MAX_CAPABILITIES = 16
"""For one worker."""
MAX_CAPABILITY_CHARS = 64

MAX_SEED = 2**63 - 1
MAX_CHOICES_CHARS = 4096
"""Longest value of CHOICES_HEADER."""

ASSUMED_CAPABILITIES = ("chat", "completions")
"""Capabilities of a worker that does not state any: FastChat's workers, other OpenAI-compatible servers, older ones."""

NAME_PATTERN = r"^[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+$"
"""No control characters: they forge log lines, steer terminals and turn the direction of writing."""

ModelName = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS, pattern=NAME_PATTERN)]
Address = Annotated[str, StringConstraints(max_length=MAX_ADDRESS_CHARS, pattern=NAME_PATTERN)]
Capability = Annotated[str, StringConstraints(max_length=MAX_CAPABILITY_CHARS, pattern=r"^[a-z][a-z0-9_.-]*$")]
Capabilities = Annotated[list[Capability], Field(min_length=1, max_length=MAX_CAPABILITIES, fail_fast=True)]
LeaseId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LEASE_CHARS)]
LeaseIds = Annotated[list[LeaseId], Field(max_length=MAX_LEASES, fail_fast=True)]
Releases = Annotated[list[LeaseId], Field(max_length=MAX_RELEASES, fail_fast=True)]
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
    """A worker's whole status. The first four fields are FastChat's."""

    model_names: Annotated[list[ModelName], Field(max_length=MAX_MODEL_NAMES, fail_fast=True)]
    speed: Speed = 1.0
    queue_length: RequestCount = 0
    """Requests that run or wait, however they came."""
    multimodal: Flag = False
    tokens_per_s: TokensPerS | None = None
    """Measured decode speed on a fixed reference batch, corrected by what the machine really does; None: not known."""
    heartbeat_interval_s: IntervalS | None = None
    """None: a FastChat worker, judged by the controller's own expiration time."""
    leases: LeaseIds = Field(default_factory=list)
    """Lease ids of the requests that run or wait here. Left out of the rows of a routing table."""
    context_length: TokenCount | None = None
    max_concurrency: RequestCount | None = None
    kv_usage: Share = 0.0
    """Share of the KV cache in use by running requests, 0 to 1."""
    version: Annotated[str, StringConstraints(max_length=64)] | None = None
    ready: Flag = True
    """False while the model loads or the engine restarts: the models are known, but no request is sent here."""
    paused: Flag = False
    """An administrator has paused the engine: requests are accepted, and wait."""
    capabilities: Capabilities | None = None
    """Kinds of requests that the worker answers for its models (`chat`, `completions`, ...); each stands for a route of
    the API server. None: not stated, or not known before the model is loaded.
    """

    @property
    def offered(self) -> Sequence[str]:
        """The stated capabilities, or those that are assumed of a worker that states none."""
        return ASSUMED_CAPABILITIES if self.capabilities is None else self.capabilities

    @property
    def unleased(self) -> int:
        """Requests that came past the controller's `/acquire`: from clients directly, or FastChat's API server."""
        return max(0, self.queue_length - len(self.leases))


class RegisterRequest(Message):
    worker_name: Address
    check_heart_beat: Flag
    worker_status: WorkerStatus | None = None
    multimodal: Flag = False


class HeartbeatRequest(Message):
    worker_name: Address
    queue_length: RequestCount
    status: WorkerStatus | None = None
    """With it, the heartbeat alone (re-)registers the worker."""


class WorkerName(Message):
    """Body of `/deregister_worker` (a worker says goodbye) and `/report_failure` (a connection to it failed)."""

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
    """What the worker must offer; None: anything."""


class AcquireResponse(Message):
    """`address` is "" when no worker can take the request now."""

    address: Address | Literal[""]
    known: Flag
    """Whether the model is served, loads, or was served lately."""
    retry_after_s: Seconds | None = None
    """When another try may succeed; set when the model is known and no worker can take the request."""
    capabilities: Capabilities | None = None
    """Set when the model is served, but not with the capability that was asked for: those that it is served with."""


class ReleaseRequest(Message):
    """Requests that have ended, and what each says about the worker that had it.

    A lease in `leases` alone is a success: the worker answered as it should. One that is in `failed` too counts against
    the worker (a 500, an answer that is none, a cut stream, a timeout). One in `unused` too says nothing about it
    (never sent, or the client left before the end).
    """

    leases: Releases
    failed: Releases = Field(default_factory=list)
    unused: Releases = Field(default_factory=list)


class ServingRequest(Message):
    """Body of `/serving`: which of these leases did their workers list in their last heartbeats?"""

    leases: Releases


class ServingResponse(Message):
    leases: Releases


class WorkerEntry(Message):
    """One row of the routing table."""

    address: Address
    status: WorkerStatus
    in_flight: RequestCount
    """Requests on the worker now, as the controller counts them."""
    speed: Speed
    """Relative speed: 1 is the mean of the workers whose speed is known."""
    breaker: BreakerState = "closed"


class RoutingTable(Message):
    """The workers that can take requests: all of them, or what has changed since a version that the reader has."""

    dispatch_method: Annotated[str, StringConstraints(max_length=64)]
    workers: Annotated[list[WorkerEntry], Field(max_length=MAX_WORKERS, fail_fast=True)]
    epoch: Annotated[str, StringConstraints(max_length=64)] = ""
    """Chosen anew at each start of the controller; versions of different epochs have nothing to do with each other."""
    version: Annotated[int, Field(strict=True, ge=0)] = 0
    is_delta: Flag = False
    """Whether `workers` and `removed` are only what has changed since the version that was asked for."""
    removed: Annotated[list[Address], Field(max_length=MAX_WORKERS, fail_fast=True)] = Field(default_factory=list)
