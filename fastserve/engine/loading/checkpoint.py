"""Lists the tensors in a checkpoint's files, and reads them one by one.

Tensors are read only on request. Each is read into a buffer, not memory-mapped: memory then holds
only the tensors in use, and a failing disk raises an error instead of a signal that ends the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch

from fastserve.engine.huge_pages import Bytes, map_bytes
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.loading.tensor_shards import take
from fastserve.errors import StartupError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_HEADER_LIMIT = 100_000_000
"""Maximum size of a safetensors header in bytes, by the format."""
_DIRECT_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20
"""When only a part of each row is kept: the size from which such a part is read by itself, and the size of blocks of
rows that are read for smaller parts."""
_OTHER_WEIGHTS = ("adapter_model", "training_args", "optimizer", "scheduler", "consolidated")
"""File name prefixes of tensors that are not the model's weights, or are a second copy under other names."""

_CODE = re.compile(r"\bGLOBAL ([\w.]+)")
"""The function that a pickle calls, in torch's error message."""


class BufferPool:
    """Read buffers for tensors. They are mapped, not allocated on the C library's heap, which would keep much of the
    memory for the reading threads. They are reused for tensors of the same size: mapping and unmapping takes longer
    than reading."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: bytes in use and kept for reuse; when more are in use, none are kept."""
        self._max_bytes = max_bytes
        self._used_bytes = self._kept_bytes = 0
        self._free: dict[int, list[Bytes]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, size: int) -> Bytes:
        with self._lock:
            self._used_bytes += size
            if self._free[size]:
                self._kept_bytes -= size
                return self._free[size].pop()
        return map_bytes(size)

    def as_tensor(self, buffer: Bytes) -> torch.Tensor:
        """The buffer as a tensor. It returns to the pool when the last tensor that shares its memory is deleted."""
        view = buffer[:]
        weakref.finalize(view, self._release, buffer).atexit = False
        return torch.from_numpy(view)

    def clear(self) -> None:
        """Unmap all buffers that are not in use."""
        with self._lock:
            self._free.clear()
            self._kept_bytes = 0

    def _release(self, buffer: Bytes) -> None:
        with self._lock:
            self._used_bytes -= len(buffer)
            if self._used_bytes + self._kept_bytes + len(buffer) <= self._max_bytes:
                self._kept_bytes += len(buffer)
                self._free[len(buffer)].append(buffer)


buffer_pool = BufferPool(max_bytes=32 << 20)
"""Cleared after a model is loaded."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    read: Callable[[], torch.Tensor]
    """Raises StartupError that names tensor and file."""
    read_shard: Callable[[Shard], torch.Tensor] | None = None
    """Reads a part without reading the whole tensor. None: parts of the stored form are not parts of the weight."""
    offset: int | None = None
    """Place of its bytes in the file; None: they are stored in another form."""


Tensors = Mapping[str, StoredTensor]


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model's folder by name; safetensors files are preferred. Raises StartupError when there are
    none, when a shard is missing, or when a file is broken or cut off."""
    for suffix in (".safetensors", ".bin", ".pt"):
        files = _files(folder, suffix)
        if files:
            return open_files(files)
    raise StartupError(
        f"{folder} holds no weights: there is no .safetensors, .bin, .pt or .gguf file in it. Download the model "
        "again, or start with --dummy to have random weights."
    )


def open_files(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of several files by name. Raises StartupError for a name that occurs twice."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in open_file(file).items():
            if name in found:
                raise StartupError(f"{found[name].file} and {file} both hold the tensor {name}: keep one of them.")
            found[name] = tensor
    return found


def open_file(file: Path) -> dict[str, StoredTensor]:
    """All tensors of a file by name. Raises StartupError when the file is missing, broken or cut off."""
    if not file.is_file():
        raise StartupError(f"{file}: there is no such file.")
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickled(file)


def _files(folder: Path, suffix: str) -> list[Path]:
    whole = [folder / f"{stem}{suffix}" for stem in ("model", "pytorch_model")]
    single = next((path for path in whole if path.is_file()), None)
    if single is not None:
        return [single]
    # Further indices belong to variants, such as model.fp16.safetensors.index.json.
    indices = sorted(folder.glob(f"*{suffix}.index.json"), key=lambda path: (len(path.name), path.name))
    if indices:
        return _indexed(indices[0])
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith(_OTHER_WEIGHTS))


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise StartupError(
            f"{index} cannot be read as an index of shards ({type(error).__name__}: {error}). Download it again."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise StartupError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names: download it again.")
    return files


# ---- safetensors ------------------------------------------------------------------------------------------------


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        header = read_header(file)
        entries: dict[str, Any] = json.loads(header)
        size = file.stat().st_size
        begin = 8 + len(header)
        found = {
            name: _stored(file, name, entry, begin, size) for name, entry in entries.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise StartupError(f"{file} cannot be loaded: its header is broken or cut off ({error}).") from error
    return found


def read_header(file: Path) -> bytes:
    """The header of a safetensors file: names, dtypes, shapes and places of its tensors. Raises OSError, and ValueError
    for one that is too long or cut off."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(f"it would be {length} bytes long")
        header = stream.read(length)
        if len(header) < length:
            raise ValueError(f"it has {len(header)} of {length} bytes")
        return header


def _stored(file: Path, name: str, entry: dict[str, Any], data: int, file_size: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise StartupError(
            f"{file}: the tensor {name} has the dtype {entry['dtype']}, which is not served: use a checkpoint in 8, "
            "16 or 32 bits."
        )
    dtype = _DTYPES[entry["dtype"]]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise StartupError(
            f"{file} is broken: the tensor {name} of shape {shape} has {last - first} bytes. Download it again."
        )
    if data + last > file_size:
        raise StartupError(
            f"{file} is cut off in the tensor {name}: it ends after {file_size} of at least {data + last} bytes. "
            "Download it again."
        )

    def read() -> torch.Tensor:
        return read_bytes(file, name, data + first, last - first).view(dtype).view(shape)

    def read_shard(shard: Shard) -> torch.Tensor:
        return read_shard_of_bytes(file, name, data + first, dtype, shard)

    return StoredTensor(name, file, shape, dtype, last - first, read, read_shard, data + first)


def read_ahead(file: Path) -> None:
    """Have the system begin to read a whole file that is going to be read in small parts. No errors: it is a hint."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError), file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def read_stacked(tensors: Sequence[StoredTensor], file: Path) -> torch.Tensor:
    """Several tensors of one shape and dtype, as one: (tensors, ...). `file`: theirs, or another with an equal header.
    Raises StartupError that names tensor and file."""
    first = tensors[0]
    if any(tensor.offset is None for tensor in tensors):
        return torch.stack([tensor.read() for tensor in tensors])
    buffer = buffer_pool.take(first.num_bytes * len(tensors))
    name = first.name
    try:
        with file.open("rb", buffering=0) as stream:
            for index, tensor in enumerate(tensors):
                name = tensor.name
                _fill(buffer[index * first.num_bytes : (index + 1) * first.num_bytes], stream, tensor.offset or 0)
    except OSError as error:
        raise StartupError(f"{file}: the tensor {name} cannot be read: {error}.") from error
    return buffer_pool.as_tensor(buffer).view(first.dtype).view(len(tensors), *first.shape)


def read_shard_of_bytes(file: Path, name: str, offset: int, dtype: torch.dtype, shard: Shard) -> torch.Tensor:
    """The ranges of a tensor, read piece by piece: runs of adjacent bytes directly, short ones in blocks of rows."""
    if shard.dim == 0 and len(shard.ranges) == 1:
        [(begin, end)] = shard.ranges
        row_bytes = math.prod(shard.whole[1:]) * dtype.itemsize
        return (
            read_bytes(file, name, offset + begin * row_bytes, (end - begin) * row_bytes).view(dtype).view(shard.shape)
        )
    rows, inner = math.prod(shard.whole[: shard.dim]), math.prod(shard.whole[shard.dim + 1 :]) * dtype.itemsize
    row_bytes = shard.whole[shard.dim] * inner
    kept = torch.empty(0, dtype=torch.uint8)
    size = rows * shard.size * inner
    if size:
        kept = buffer_pool.as_tensor(buffer_pool.take(size)).view(rows, shard.size * inner)
    at = 0
    for begin, end in shard.ranges if size else ():
        width = (end - begin) * inner
        if width >= _DIRECT_BYTES:
            for row in range(rows):
                part = read_bytes(file, name, offset + row * row_bytes + begin * inner, width)
                kept[row, at : at + width] = part
        else:
            step = max(1, _BLOCK_BYTES // row_bytes)
            for row in range(0, rows, step):
                count = min(step, rows - row)
                block = read_bytes(file, name, offset + row * row_bytes, count * row_bytes).view(count, row_bytes)
                kept[row : row + count, at : at + width] = block[:, begin * inner : end * inner]
        at += width
    return kept.view(-1).view(dtype).view(shard.shape)


def read_bytes(file: Path, name: str, offset: int, size: int) -> torch.Tensor:
    """`size` bytes of the tensor `name`. Raises StartupError that names tensor and file."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    buffer = buffer_pool.take(size)
    try:
        with file.open("rb", buffering=0) as stream:
            _fill(buffer, stream, offset)
    except OSError as error:
        raise StartupError(f"{file}: the tensor {name} cannot be read: {error}.") from error
    return buffer_pool.as_tensor(buffer)


def _fill(buffer: Bytes, stream: RawIOBase, offset: int) -> None:
    """Read until `buffer` is full. Raises OSError if the file ends before."""
    stream.seek(offset)
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:].data)
        if not count:
            raise OSError(f"it ends {len(buffer) - done} bytes too early")
        done += count


# ---- pickled (.bin, .pt) ----------------------------------------------------------------------------------------


def _open_pickled(file: Path) -> dict[str, StoredTensor]:
    """Reads tensors only: no code of the pickle is run."""
    try:
        state = _unpickle(file)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        code = _CODE.search(str(error))
        if code is not None:
            raise StartupError(
                f"{file} is refused: besides tensors it contains a call of code ({code[1]}), and weights are read "
                "without running any. Use the model's safetensors, or convert the file where you trust it."
            ) from error
        raise StartupError(
            f"{file} cannot be loaded: it is broken, cut off, or no file of weights. Download it again."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise StartupError(
            f"{file} holds no table of tensors, but {type(state).__name__}: use a file of the model's weights."
        )
    return {name: _held(file, name, tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def _held(file: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    num_bytes = tensor.numel() * tensor.itemsize

    def read() -> torch.Tensor:
        # A copy, since the file is mapped and the tensor may be changed in place.
        return tensor.clone(memory_format=torch.contiguous_format)

    def read_shard(shard: Shard) -> torch.Tensor:
        return take(shard, tensor).clone(memory_format=torch.contiguous_format)

    return StoredTensor(name, file, tuple(tensor.shape), tensor.dtype, num_bytes, read, read_shard)
