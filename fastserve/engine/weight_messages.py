"""Messages about live weight updates, between worker, engine and ranks. No torch here."""

from __future__ import annotations

from typing import Literal

import msgspec

UpdateMode = Literal["drain", "retract", "in_place", "abort"]
"""What becomes of running requests. drain: they finish under the old weights, while new ones wait; retract: they go on
under the new weights, their KV cache recomputed; in_place: they go on with the KV cache of the old weights; abort: they
end with finish_reason "abort". While the engine is paused, requests cannot finish: drain then is as in_place."""

DEFAULT_VERSION = "default"
"""Version of the weights that an engine was started with."""
MAX_UPDATED_TENSORS = 1 << 16
MAX_GROUPS = 16
MAX_SHOWN_VALUES = 1 << 18
"""Values of a weight that one reply shows."""


class NeedsWindowError(Exception):
    """There is no memory for a second copy of the weights: steps must stop while they are received."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    name: str
    """In the checkpoint or, where that differs, in the model."""
    dtype: str
    """As torch names it, with or without "torch."."""
    shape: tuple[int, ...]


class GroupSettings(msgspec.Struct, frozen=True):
    """A trainer's process group, which the engine joins."""

    group_name: str
    master_address: str
    master_port: int
    rank: int
    """This engine's first rank in the group; each further rank of the model has the next one."""
    world_size: int
    backend: Literal["gloo", "nccl"]
    timeout_s: float
    """For the connection, and for each collective."""
    warm_up: bool
    """Sum one number over the group: its first collective sets up connections. The trainer must do so too."""


class FromGroup(msgspec.Struct, frozen=True, tag=True):
    """Tensors that a member of a group broadcasts, one after the other."""

    group_name: str
    tensors: list[TensorSpec]
    root: int = 0
    """Rank of the sender in the group."""
    bucket_bytes: int | None = None
    """None: each tensor comes in a broadcast of its own. Otherwise as the bytes of several ones, in order and without
    gaps: a bucket ends before the tensor with which it would have more bytes than this. A larger tensor has its own."""


class FromBytes(msgspec.Struct, frozen=True, tag=True):
    """A safetensors file."""

    data: bytes


class FromDisk(msgspec.Struct, frozen=True, tag=True):
    """All weights, from a folder on the engine's machine."""

    path: str


WeightSource = FromGroup | FromBytes | FromDisk


class UpdateOptions(msgspec.Struct, frozen=True):
    mode: UpdateMode = "drain"
    version: str | None = None
    """None: the number of updates so far."""


class Received(msgspec.Struct, frozen=True):
    """Weights that have arrived."""

    num_tensors: int = 0
    num_bytes: int = 0
    num_buckets: int = 0
    """Broadcasts, or files."""
    setup_s: float = 0.0
    """Checks, before the first byte was received."""
    first_s: float = 0.0
    """From then until the first bucket was there."""
    transfer_s: float = 0.0
    """From then until the last one was there."""
    load_s: float = 0.0
    """Spent converting weights to the layouts that compute, most of it during the transfer."""
    total_s: float = 0.0

    def __add__(self, other: Received) -> Received:
        return Received(
            self.num_tensors + other.num_tensors,
            self.num_bytes + other.num_bytes,
            self.num_buckets + other.num_buckets,
            self.setup_s + other.setup_s,
            self.first_s or other.first_s,
            self.transfer_s + other.transfer_s,
            self.load_s + other.load_s,
            self.total_s + other.total_s,
        )


class WeightUpdate(msgspec.Struct, frozen=True):
    """The reply to an update."""

    success: bool
    message: str
    weight_version: str
    num_bytes: int = msgspec.field(default=0, name="bytes")
    tensors: int = 0
    buckets: int = 0
    setup_s: float = 0.0
    first_s: float = 0.0
    transfer_s: float = 0.0
    load_s: float = 0.0
    """These four: see `Received`."""
    flush_s: float = 0.0
    """During which no step was computed: copying the new weights into place, and emptying the prefix cache."""
    total_s: float = 0.0
    gb_per_s: float = 0.0
    """Bytes by the time of the transfer."""
    num_preempted: int = 0
    num_aborted: int = 0


class GroupState(msgspec.Struct, frozen=True):
    """The reply to joining and leaving a group."""

    success: bool
    message: str
    setup_s: float = 0.0
    first_s: float = 0.0
    """Time of the first collective, if there was one."""


class WeightValues(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: list[float]
    """The first rows, flattened."""


class WeightsState(msgspec.Struct, frozen=True):
    """The reply to calls that change only what the weights are called, or that check them."""

    success: bool
    message: str
    weight_version: str
    checksum: str = ""
    """SHA-256 over the names and bytes of all weights, in the order of their names."""
    changed: list[str] = []
    """Weights that differ from the snapshot."""
