"""Sends the weights of a training run to the workers that serve the model.

The trainer is rank 0 of a process group that all ranks of all workers join. An update is one HTTP call to each worker,
which names the tensors, and one broadcast for each bucket of them: the next bucket is filled while one is transferred.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from fastserve.access.cluster_client import CONNECT_TIMEOUT_S, ClusterClient, Outcome, service_address
from fastserve.engine.huge_pages import zeros
from fastserve.engine.weight_messages import GroupSettings, UpdateMode
from fastserve.engine.weight_updates.buckets import Part, bytes_of, fill_bucket, part_bytes, split_into_buckets
from fastserve.engine.weight_updates.group import Broadcast, WeightGroup
from fastserve.errors import FastserveError

AnswerT = TypeVar("AnswerT")

BUCKET_BYTES = 16 << 20
"""Larger tensors are sent from where they are, and the bytes of a small bucket are still in a cache when it is read."""
_MAX_IN_FLIGHT = 4
MAX_JOIN_S = 120.0
_POLL_S = 0.0002


class SendError(Exception):
    """Workers that did not take the new weights keep their old ones; `outcomes` says which these are."""

    def __init__(self, message: str, outcomes: Sequence[Outcome] = ()) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)


@dataclass(frozen=True)
class Sent:
    """A finished update."""

    version: str
    num_tensors: int
    num_bytes: int
    num_buckets: int
    total_s: float
    outcomes: tuple[Outcome, ...] = field(repr=False)
    """The reply of each worker, with its own times."""

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.total_s / 1e9 if self.total_s else 0.0


class WeightSender:
    """Connects to one worker or, by the controller, to all workers of a model.

        with WeightSender("http://localhost:20002") as sender:
            sender.send(model.named_parameters(), version="step 100")

    The group is formed at the first `send` (or by `connect`) and again after a failure, with the workers that serve the
    model then. Calls of one sender come from one thread.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str | None = None,
        backend: Literal["gloo", "nccl"] = "gloo",
        device: torch.device | str = "cpu",
        host: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        convert: bool = True,
        timeout_s: float = 300.0,
        key: str | None = None,
        ca_file: str | None = None,
    ) -> None:
        """
        Args:
            address: Of a worker, or, with `model`, of the controller.
            model: Name under which the workers serve the model.
            backend: gloo sends from main memory; nccl from a GPU of this process to GPUs of others.
            device: The GPU that nccl uses.
            host: Where the workers reach this process; None: the own address on the route to them.
            bucket_bytes: Tensors are sent together up to this size; a few such buffers are used at a time.
            convert: Floating-point tensors to the dtype in which the model is served. Otherwise they must have it.
            timeout_s: For each broadcast, and for each call beside its broadcasts.
            key: Admin key or cluster key; None: see `ClusterClient`.
            ca_file: For workers with TLS.

        Raises StartupError for an address or a key that cannot be used.
        """
        self._cluster = ClusterClient(address, key=key, ca_file=ca_file)
        self._model = model
        self._backend: Literal["gloo", "nccl"] = backend
        self._device = torch.device(device)
        self._host = host
        self._bucket_bytes = bucket_bytes
        self._convert = convert
        self._timeout_s = timeout_s
        self._dtype: torch.dtype | None = None
        """In which the model is served; None: not known, or not wanted."""
        self._workers: list[str] = []
        self._group: WeightGroup | None = None
        self._group_name = ""
        self._store: dist.TCPStore | None = None
        self._num_sent = 0

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group; workers keep the weights that they have."""
        self._leave()
        self._cluster.close()

    def connect(self) -> None:
        """Form the group, if there is none. Raises SendError, or StartupError where no worker serves the model."""
        if self._group is not None:
            return
        self._workers = [self._cluster.address] if self._model is None else self._cluster.workers_of(self._model)
        sizes = self._ask_workers()
        host = self._host or _own_address(self._workers[0])
        self._group_name = f"fastserve-{secrets.token_hex(4)}"
        # The store's server lives as long as this object; the group finds it by its port.
        try:
            self._store = dist.TCPStore(
                host,
                0,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=self._timeout_s),
            )
        except RuntimeError as error:  # torch's errors of addresses
            raise SendError(
                f"Workers cannot meet at {host}: give an address of this machine as host. {error}"
            ) from error
        settings = GroupSettings(
            self._group_name,
            host,
            self._store.port,
            rank=0,
            world_size=1 + sum(sizes),
            backend=self._backend,
            timeout_s=min(self._timeout_s, MAX_JOIN_S),
            warm_up=True,
        )
        bodies = []
        rank = 1
        for size in sizes:
            bodies.append(
                {
                    "master_address": host,
                    "master_port": settings.master_port,
                    "rank_offset": rank,
                    "world_size": settings.world_size,
                    "group_name": settings.group_name,
                    "backend": settings.backend,
                    "timeout_s": settings.timeout_s,
                    "warm_up": True,
                }
            )
            rank += size
        with self._calls("/init_weights_update_group", bodies, settings.timeout_s) as calls:
            own = _in_thread(lambda: self._join(settings))
            calls.wait_with(own)
            self._group = own.result()

    def send(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: str | None = None,
        mode: UpdateMode = "drain",
    ) -> Sent:
        """Send tensors by their names in the checkpoint; all workers take them together or, each by itself, not at all.

        `version`: what workers call the weights afterwards; None: the number of updates sent. `mode`: what becomes of
        running requests (see docs/live_weights.md). Tensors must not change until this returns. Raises SendError.
        """
        begin = time.perf_counter()
        self.connect()
        tensors = [(name, tensor.detach(), self._sent_as(tensor)) for name, tensor in named_tensors]
        if not tensors:
            raise SendError("There are no tensors to send.")
        version = str(self._num_sent + 1) if version is None else version
        parts = [(tensor, dtype) for _, tensor, dtype in tensors]
        buckets = split_into_buckets(parts, part_bytes, self._bucket_bytes)
        body = {
            "names": [name for name, _, _ in tensors],
            "dtypes": [str(dtype).removeprefix("torch.") for _, _, dtype in tensors],
            "shapes": [list(tensor.shape) for _, tensor, _ in tensors],
            "group_name": self._group_name,
            "bucket_bytes": self._bucket_bytes,
            "mode": mode,
            "weight_version": version,
        }
        calls = self._calls("/update_weights_from_distributed", [body] * len(self._workers), None)
        with calls, _one_thread():
            self._broadcast(buckets, calls)
        self._num_sent += 1
        return Sent(
            version,
            len(tensors),
            sum(map(part_bytes, parts)),
            len(buckets),
            time.perf_counter() - begin,
            tuple(calls.outcomes()),
        )

    # ---- the group ----------------------------------------------------------------------------------------------

    def _ask_workers(self) -> list[int]:
        """The number of ranks of each worker. Learns the dtype of the model, too."""
        sizes = []
        for worker in self._workers:
            sizes.append(self._ask(worker, "/get_world_size", "world_size", int))
            if self._convert:
                dtype = getattr(torch, self._ask(worker, "/get_model_info", "dtype", str), None)
                self._dtype = dtype if isinstance(dtype, torch.dtype) else None
        return sizes

    def _ask(self, worker: str, path: str, name: str, kind: type[AnswerT]) -> AnswerT:
        outcome = self._cluster.call(worker, path, None, CONNECT_TIMEOUT_S)
        value = outcome.reply.get(name)
        if not outcome.is_success or not isinstance(value, kind):
            raise SendError(f"{worker}{path}: {outcome.message or f'the answer has no {name}'}", [outcome])
        return value

    def _sent_as(self, tensor: torch.Tensor) -> torch.dtype:
        return tensor.dtype if self._dtype is None or not tensor.is_floating_point() else self._dtype

    def _join(self, settings: GroupSettings) -> WeightGroup:
        group = WeightGroup.connect(settings, 0, self._device)
        group.warm_up()
        return group

    def _leave(self) -> None:
        group, self._group, self._store = self._group, None, None
        name, self._group_name = self._group_name, ""
        if name:  # workers may have joined where this process could not
            for worker in self._workers:  # a worker that is gone has left too
                self._cluster.call(worker, "/destroy_weights_update_group", {"group_name": name}, CONNECT_TIMEOUT_S)
        if group is not None:
            group.close()

    # ---- an update ----------------------------------------------------------------------------------------------

    def _calls(self, path: str, bodies: Sequence[dict[str, object]], timeout_s: float | None) -> _Calls:
        # An update lasts as long as its broadcasts, and those have time-outs of their own.
        limit_s = max(3600.0, self._timeout_s) if timeout_s is None else timeout_s + 10.0
        call = self._cluster.call
        works = [
            lambda worker=worker, body=body: call(worker, path, body, limit_s)
            for worker, body in zip(self._workers, bodies, strict=True)
        ]
        return _Calls(works, self._leave)

    def _broadcast(self, buckets: Sequence[Sequence[Part]], calls: _Calls) -> None:
        """Convert tensors and fill a bucket with them while others are transferred. A tensor alone in a bucket is sent
        from its own memory where that is possible."""
        group = self._group
        if group is None:
            raise SendError("The group is closed.")
        free: list[torch.Tensor] = []
        in_flight: deque[tuple[Broadcast, torch.Tensor | None]] = deque()
        for bucket in buckets:
            if len(in_flight) == _MAX_IN_FLIGHT:
                broadcast, buffer = in_flight.popleft()
                calls.wait_for(broadcast)
                free += [] if buffer is None else [buffer]
            buffer = None
            first, dtype = bucket[0]
            is_alone = len(bucket) == 1 and first.device == group.device
            if is_alone and first.dtype == dtype and first.is_contiguous():
                filled = bytes_of(bucket[0])
            else:
                size = sum(map(part_bytes, bucket))
                buffer = free.pop() if free and free[-1].numel() >= size else self._new_buffer(size, group.device)
                filled = fill_bucket(buffer, bucket)
            in_flight.append((group.broadcast(filled, 0), buffer))
        for broadcast, _ in in_flight:
            calls.wait_for(broadcast)

    def _new_buffer(self, size: int, device: torch.device) -> torch.Tensor:
        size = max(size, self._bucket_bytes)
        return (
            zeros((size,), torch.uint8) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
        )


class _Calls:
    """One call to each worker, in threads of their own. Where one fails, those who wait for the group stop waiting."""

    def __init__(self, works: Sequence[Callable[[], Outcome]], leave: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(max(1, len(works)), thread_name_prefix="worker-call")
        self._futures = [self._pool.submit(work) for work in works]
        self._leave = leave

    def __enter__(self) -> _Calls:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            wait(self._futures)
            with contextlib.suppress(SendError):
                self._check()
                self._pool.shutdown(wait=False)
                return
        self._leave()  # what still waits for the group ends
        self._pool.shutdown(wait=False)
        outcomes = self.outcomes()
        failed = [outcome for outcome in outcomes if not outcome.is_success]
        if isinstance(error, FastserveError):  # the own part failed first
            raise SendError(error.message, outcomes) from error
        if failed and (error is None or isinstance(error, SendError)):
            raise SendError(
                f"{len(failed)} of {len(self._futures)} workers did not take the weights; "
                f"{failed[0].address}: {failed[0].message}",
                outcomes,
            ) from error

    def outcomes(self) -> list[Outcome]:
        """Those of the calls that have ended."""
        return [future.result() for future in self._futures if future.done()]

    def wait_with(self, own: Future[WeightGroup]) -> None:
        """Wait for an own part of the work. Raises SendError when a call fails before."""
        pending: set[Future[object]] = {*self._futures, own}  # type: ignore[arg-type]
        while not own.done():
            _, pending = wait(pending, return_when=FIRST_COMPLETED)
            self._check()

    def wait_for(self, broadcast: Broadcast) -> None:
        """The same for a broadcast."""
        while not broadcast.is_done():
            self._check()
            time.sleep(_POLL_S)
        broadcast.wait()

    def _check(self) -> None:
        if any(not outcome.is_success for outcome in self.outcomes()):
            raise SendError("a worker refused the weights")


def _in_thread(work: Callable[[], WeightGroup]) -> Future[WeightGroup]:
    """Run `work` in a thread that does not keep the process from ending."""
    done: Future[WeightGroup] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except (FastserveError, RuntimeError) as error:
            done.set_exception(error)

    threading.Thread(target=run, name="weight-group", daemon=True).start()
    return done


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One copies faster than gloo sends, and others that wait for their next part would take gloo's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _own_address(worker: str) -> str:
    """Own address on the route to the worker. Sends nothing."""
    parsed = service_address(worker)
    family, kind, protocol, _, address = socket.getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
