"""Receives new weights in a thread while steps go on: over a group, from disk, or from bytes."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from fastserve.engine.kernels.build import work_alone
from fastserve.engine.loading.checkpoint import StoredTensor, open_folder
from fastserve.engine.loading.formats.find import stored_settings
from fastserve.engine.loading.formats.source import plain_source
from fastserve.engine.loading.streaming import report_unexpected
from fastserve.engine.weight_messages import (
    MAX_GROUPS,
    MAX_UPDATED_TENSORS,
    FromBytes,
    FromDisk,
    FromGroup,
    GroupSettings,
    GroupState,
    NeedsWindowError,
    Received,
    TensorSpec,
    WeightSource,
)
from fastserve.engine.weight_updates.buckets import split_bucket, split_into_buckets
from fastserve.engine.weight_updates.group import Broadcast, WeightGroup
from fastserve.engine.weight_updates.memory import UpdateMemory
from fastserve.engine.weight_updates.staging import Incoming, StagedWeights, WeightNames
from fastserve.errors import (
    ConflictError,
    FastserveError,
    InternalError,
    InvalidRequestError,
    ShortageError,
    StartupError,
    UnsupportedCapabilityError,
    WeightGroupNotFoundError,
)
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_MAX_AHEAD_BYTES = 256 << 20
"""Bytes of broadcasts that are in flight before the first of them is converted; one more always is."""
_MAX_AHEAD = 64
_MAX_NAMES = 3


@dataclass(frozen=True, slots=True)
class _Bucket:
    items: Sequence[Incoming]
    memory: torch.Tensor
    """Bytes, at least as many as are received."""
    buffer: torch.Tensor
    broadcast: Broadcast


class LocalReceiver:
    """The weights of one rank, and new ones on their way. Its methods return at once; futures are completed by other
    threads. One transfer at a time."""

    def __init__(
        self,
        names: WeightNames,
        device: torch.device,
        *,
        has_room: Callable[[int], bool],
        rank: int = 0,
        fixed: str | None = None,
        note: str | None = None,
    ) -> None:
        """`has_room`: whether there is memory for a copy of so many bytes. `fixed`: why these weights cannot be
        replaced. `note`: logged when they are for the first time."""
        self._names = names
        self._device = device
        self._has_room = has_room
        self._rank = rank
        self._fixed = fixed
        self._note = note
        self._groups: dict[str, WeightGroup | None] = {}
        """None: being joined."""
        self._staged: StagedWeights | None = None
        self._in_place: set[str] = set()
        """Weights that have been put in place since the last `discard`."""
        self._memory = UpdateMemory()
        self._thread = _Thread()

    # ---- groups -------------------------------------------------------------------------------------------------

    def join(self, settings: GroupSettings) -> Future[GroupState]:
        """Raises ConflictError when there is a group of this name, or there are too many."""
        self._require_changeable()
        name = settings.group_name
        if name in self._groups:
            raise ConflictError(
                f"There is a group {printable(name)} already: destroy it first, or give another group_name.",
                param="group_name",
            )
        if len(self._groups) >= MAX_GROUPS:
            raise ConflictError(f"There are {MAX_GROUPS} groups already: destroy one first.", param="group_name")
        self._groups[name] = None
        joined: Future[GroupState] = Future()
        threading.Thread(target=_complete, args=(joined, lambda: self._join(settings)), daemon=True).start()
        return joined

    def _join(self, settings: GroupSettings) -> GroupState:
        begin = time.perf_counter()
        group = None
        try:
            group = WeightGroup.connect(settings, self._rank, self._device)
            setup_s = time.perf_counter() - begin
            first_s = group.warm_up() if settings.warm_up else 0.0
        except FastserveError:
            self._drop(settings.group_name)
            if group is not None:
                group.close()
            raise
        self._groups[settings.group_name] = group
        return GroupState(True, f"joined {settings.world_size} members", setup_s, first_s)

    def leave(self, name: str) -> GroupState:
        """Raises WeightGroupNotFoundError, or ConflictError while the group is being joined."""
        if name in self._groups and self._groups[name] is None:
            raise ConflictError(f"The group {printable(name)} is being joined.", param="group_name")
        self._find(name).close()
        self._drop(name)
        return GroupState(True, "left the group")

    def has_group(self, name: str) -> bool:
        return self._groups.get(name) is not None

    def _find(self, name: str) -> WeightGroup:
        group = self._groups.get(name)
        if group is None:
            known = ", ".join(printable(other) for other, found in self._groups.items() if found is not None)
            raise WeightGroupNotFoundError(
                f"There is no group {printable(name)}; there are: {known or 'none'}. Call /init_weights_update_group "
                "first.",
                param="group_name",
            )
        return group

    def _drop(self, name: str) -> None:
        self._groups.pop(name, None)

    # ---- transfers ----------------------------------------------------------------------------------------------

    def receive(self, source: WeightSource, *, is_direct: bool = False) -> Future[Received]:
        """Check what is announced, and receive it beside the weights that compute, or into them. The future fails with
        NeedsWindowError before anything has been received if there is no memory for that."""
        self._require_changeable()
        if isinstance(source, FromGroup):
            self._find(source.group_name)
        staged = self._staged = self._staged or StagedWeights(self._names, self._memory.memo())
        if is_direct:
            staged.write_directly()

        def receive() -> Received:
            with torch.no_grad():
                return self._receive(source, staged, is_direct=is_direct)

        return self._thread.run(receive)

    def prepare(self, source: WeightSource) -> None:
        """Check what is announced without receiving it. Raises ShortageError when there is no memory for a copy."""
        self._require_changeable()
        items = None
        if isinstance(source, FromGroup):
            self._find(source.group_name)
            items = self._names.check(source.tensors)
        try:
            self._require_memory(items, is_direct=False)
        except NeedsWindowError:
            raise ShortageError(
                "There is no memory for a second copy of the weights, which an update of a model on several ranks "
                "needs."
            ) from None

    def commit(self) -> None:
        """Put what has been received in place. No step may be in flight."""
        if self._staged is not None:
            self._memory.keep(self._staged.commit())
            self._in_place |= self._staged.arrived
        self._staged = None
        if self._note is not None:
            logger.warning("%s", self._note)
            self._note = None

    def discard(self) -> None:
        """Forget what has been received. Called when no transfer runs."""
        self._staged = None
        self._memory.drop()
        self._in_place.clear()

    @property
    def is_complete(self) -> bool:
        """Whether all weights of the model have been put in place since the last `discard`."""
        return len(self._in_place) == len(self._names.table.names())

    def _require_changeable(self) -> None:
        if self._fixed is not None:
            raise UnsupportedCapabilityError(self._fixed)

    def _receive(self, source: WeightSource, staged: StagedWeights, *, is_direct: bool) -> Received:
        begin, load_s = time.perf_counter(), staged.load_s
        match source:
            case FromGroup():
                received = self._from_group(source, staged, is_direct=is_direct)
            case FromBytes():
                received = self._from_bytes(source, staged, is_direct=is_direct)
            case FromDisk():
                received = self._from_disk(source, staged, is_direct=is_direct)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the engine's thread puts in place what is there by now
        total_s = time.perf_counter() - begin
        return received + Received(load_s=staged.load_s - load_s, total_s=total_s)

    def _require_memory(self, items: Sequence[Incoming] | None, *, is_direct: bool, transfer_bytes: int = 0) -> None:
        """`items`: those that are received; None: all. `transfer_bytes`: needed beside their copy."""
        table = self._names.table
        targets = table.names() if items is None else {item.place.target for item in items}
        needed = sum(table.shape(target).numel() * table.dtype(target).itemsize for target in targets)
        if is_direct or self._has_room(needed + transfer_bytes):
            return
        self._memory.drop()  # the limits of a process count what it may yet use
        if not self._has_room(needed + transfer_bytes):
            raise NeedsWindowError

    def _from_group(self, source: FromGroup, staged: StagedWeights, *, is_direct: bool) -> Received:
        begin = time.perf_counter()
        if len(source.tensors) > MAX_UPDATED_TENSORS:
            raise InvalidRequestError(f"names: at most {MAX_UPDATED_TENSORS} tensors can be sent in one call.")
        group = self._find(source.group_name)
        if source.root == group.rank or not 0 <= source.root < group.settings.world_size:
            raise InvalidRequestError(
                f"src: {source.root} is not the rank of another member; the group has {group.settings.world_size}, and "
                f"this one is {group.rank}.",
                param="src",
            )
        items = self._names.check(source.tensors)
        waiting = deque(split_into_buckets(items, lambda item: item.num_bytes, source.bucket_bytes))
        num_bytes = sum(item.num_bytes for item in items)
        largest = max((sum(item.num_bytes for item in bucket) for bucket in waiting), default=0)
        transfer_bytes = min(num_bytes, largest + _MAX_AHEAD_BYTES)
        self._require_memory(items, is_direct=is_direct, transfer_bytes=transfer_bytes)
        staged.expect(items)
        num_buckets, is_bucket = len(waiting), source.bucket_bytes is not None
        in_flight: deque[_Bucket] = deque()
        arrived: _Bucket | None = None
        ahead = 0
        started = time.perf_counter()
        first_s = last_s = 0.0
        try:
            while waiting or in_flight:
                # Up to the limit of bytes, but always one beside that which is next.
                while waiting and len(in_flight) < _MAX_AHEAD and (len(in_flight) < 2 or ahead < _MAX_AHEAD_BYTES):
                    in_flight.append(self._begin(group, waiting.popleft(), source.root, is_bucket=is_bucket))
                    ahead += in_flight[-1].buffer.nbytes
                if arrived is not None:
                    self._add(arrived, staged)
                arrived = in_flight.popleft()
                arrived.broadcast.wait()
                ahead -= arrived.buffer.nbytes
                last_s = time.perf_counter() - started
                first_s = first_s or last_s
            if arrived is not None:
                self._add(arrived, staged)
        except BaseException:  # the other members are at another broadcast than this one
            self._drop(source.group_name)
            group.close()
            raise
        return Received(len(items), num_bytes, num_buckets, started - begin, first_s, last_s)

    def _begin(self, group: WeightGroup, items: Sequence[Incoming], root: int, *, is_bucket: bool) -> _Bucket:
        size = sum(item.num_bytes for item in items)
        memory = self._memory.take_buffer(size, group.device)
        buffer = memory[:size]
        if not is_bucket and items[0].dtype.itemsize > 1:  # as trainers send it; 8-bit floats come as bytes
            buffer = buffer.view(items[0].dtype)
        return _Bucket(items, memory, buffer, group.broadcast(buffer, root))

    def _add(self, bucket: _Bucket, staged: StagedWeights) -> None:
        values = split_bucket(bucket.memory, [(item.dtype, item.shape) for item in bucket.items])
        for item, value in zip(bucket.items, values, strict=True):
            staged.add(item, value)
        self._memory.give_back(bucket.memory)

    def _from_bytes(self, source: FromBytes, staged: StagedWeights, *, is_direct: bool) -> Received:
        begin = time.perf_counter()
        try:
            tensors = load_safetensors(source.data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"These bytes are no safetensors file: {printable(str(error))}. Write them with "
                "safetensors.torch.save(tensors); pickled tensors are refused."
            ) from error
        if not tensors:
            raise InvalidRequestError("There are no tensors in this update.")
        items = self._names.check([_spec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
        self._require_memory(items, is_direct=is_direct)
        staged.expect(items)
        started = time.perf_counter()
        for item in items:
            staged.add(item, tensors.pop(item.name))
        return Received(len(items), sum(item.num_bytes for item in items), 1, started - begin)

    def _from_disk(self, source: FromDisk, staged: StagedWeights, *, is_direct: bool) -> Received:
        begin = time.perf_counter()
        try:
            tensors = _open(Path(source.path).expanduser())
            known = {name: tensor for name, tensor in tensors.items() if self._names.find(name) is not None}
            unknown = [plain_source(tensor) for name, tensor in tensors.items() if name not in known]
            report_unexpected(self._names.model, unknown)
            specs = [_spec(name, tensor.dtype, tensor.shape) for name, tensor in known.items()]
            items = self._names.check(specs, converts=True)
            self._require_memory(items, is_direct=is_direct)
            staged.expect(items)
            started = time.perf_counter()
            transfer_s = 0.0
            for item in items:
                reading = time.perf_counter()
                value = known[item.name].read()
                transfer_s += time.perf_counter() - reading
                staged.add(item, value)
        except StartupError as error:  # what is wrong with a checkpoint at start is wrong with it here
            raise InvalidRequestError(error.message, param="model_path") from error
        except OSError as error:
            raise InvalidRequestError(f"{printable(source.path)}: {error}.", param="model_path") from error
        if not staged.is_complete:
            missing = [name for name in self._names.table.names() if name not in staged.arrived]
            raise InvalidRequestError(
                f"{printable(source.path)} has no {', '.join(missing[:_MAX_NAMES])}"
                + (f" (and {len(missing) - _MAX_NAMES} more)" if len(missing) > _MAX_NAMES else "")
                + ": give the folder of a whole checkpoint of this model.",
                param="model_path",
            )
        files = {tensor.file for tensor in known.values()}
        return Received(
            len(items),
            sum(tensor.num_bytes for tensor in known.values()),
            len(files),
            started - begin,
            transfer_s=transfer_s,
        )


def _open(folder: Path) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise StartupError(f"{printable(str(folder))} is no folder on the engine's machine.")
    settings = stored_settings(folder)
    if settings is not None:
        raise StartupError(f"The checkpoint in {folder} is quantized: give the unquantized one.")
    return open_folder(folder)


def _spec(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
    return TensorSpec(name, str(dtype).removeprefix("torch."), tuple(shape))


class _Thread:
    """Does one piece of work after the other, and does not keep the process from ending. It begins with the first."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_running = False

    def run(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        done: Future[ResultT] = Future()
        self._work.put(lambda: _complete(done, work))
        if not self._is_running:
            self._is_running = True
            threading.Thread(target=self._go_on, name="weights", daemon=True).start()
        return done

    def _go_on(self) -> None:
        work_alone()  # the kernels' threads serve the steps
        while True:
            self._work.get()()


def _complete(done: Future[ResultT], work: Callable[[], ResultT]) -> None:
    try:
        result = work()
    except (FastserveError, NeedsWindowError) as error:
        done.set_exception(error)
    except Exception as error:
        logger.exception("a weight update failed")
        done.set_exception(InternalError(f"The update failed: {type(error).__name__}: {error}."))
    else:
        done.set_result(result)
