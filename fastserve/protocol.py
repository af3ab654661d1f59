"""Every message that our processes send each other over HTTP.

FastChat's wire (register, heartbeat, status) is a subset: its fields keep their names and meaning, ours stand beside
them with defaults, so a FastChat worker or controller on the other end is understood. Statuses ignore fields that they
do not know, so processes of neighbouring versions work together.

In-flight counts are exact. The API server makes a lease id for each request, asks the controller for a worker with it
(`/acquire`), sends it to the worker in the header LEASE_HEADER, and gives it back (`/release`) when the answer has
ended. The worker lists the leases that it is serving in each heartbeat, so a restarted controller knows them again,
and a lease whose API server died is forgotten once the worker no longer lists it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

LEASE_HEADER = "x-fastserve-lease"
REQUEST_ID_HEADER = "x-request-id"


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class WorkerStatus(Message):
    """A worker's whole status. The first four fields are FastChat's."""

    model_names: list[str]
    speed: float = 1.0
    queue_length: int = 0
    """Requests that run or wait, however they came."""
    multimodal: bool = False
    tokens_per_s: float | None = None
    """Measured decode speed on a fixed reference batch, corrected by what the machine really does; None: not known."""
    heartbeat_interval_s: float | None = None
    """None: a FastChat worker, judged by the controller's own expiration time."""
    leases: list[str] = Field(default_factory=list)
    """Lease ids of the requests that run or wait here."""
    context_length: int | None = None
    max_concurrency: int | None = None
    kv_usage: float = 0.0
    """Share of the KV cache in use by running requests, 0 to 1."""
    version: str | None = None

    @property
    def unleased(self) -> int:
        """Requests that came past the controller's `/acquire`: from clients directly, or FastChat's API server."""
        return max(0, self.queue_length - len(self.leases))


class RegisterRequest(Message):
    worker_name: str
    check_heart_beat: bool
    worker_status: WorkerStatus | None = None
    multimodal: bool = False


class HeartbeatRequest(Message):
    worker_name: str
    queue_length: int
    status: WorkerStatus | None = None
    """With it, the heartbeat alone (re-)registers the worker."""


class HeartbeatResponse(Message):
    exist: bool


class WorkerName(Message):
    """Body of `/deregister_worker` (a worker says goodbye) and `/report_failure` (a connection to it failed)."""

    worker_name: str


class ModelRequest(Message):
    model: str


class AddressResponse(Message):
    address: str


class ModelList(Message):
    models: list[str]


class AcquireRequest(Message):
    model: str
    lease: str
    exclude: list[str] = Field(default_factory=list)
    """Addresses that this request has already failed on."""


class AcquireResponse(Message):
    """`address` is "" when no worker can take the request; `known` tells whether the model is served at all."""

    address: str
    known: bool


class ReleaseRequest(Message):
    leases: list[str]


class WorkerEntry(Message):
    """One row of the routing table."""

    address: str
    status: WorkerStatus
    in_flight: int
    """Requests on the worker now, as the controller counts them."""
    speed: float
    """Relative speed: 1 is the mean of the workers whose speed is known."""


class RoutingTable(Message):
    dispatch_method: str
    workers: list[WorkerEntry]
