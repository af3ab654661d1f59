"""The header of a GGUF file: its metadata, and where its tensors are. Reads no tensor.

The reader of the package `gguf` creates several objects for each vocabulary entry and takes twenty times as long; every
start of a worker reads the vocabulary.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.errors import StartupError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_KINDS = {bool: "true or false", str: "a text", int: "a whole number", float: "a finite number"}
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    type_id: int
    """Number of the type in ggml."""
    file: Path
    offset: int
    """Bytes from the start of `file`."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """A model in one file, or in several parts."""

    file: Path
    """The first part."""
    parts: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.scalar("general.architecture", str, ""))

    def scalar(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of this kind (bool, str, int or float). Raises StartupError for one of another."""
        return self.checked(key, self.metadata.get(key, default), kind, default)

    def checked(self, key: str, value: Any, kind: type, default: Any = None) -> Any:
        """`value`, which is what `key` has, or one of its items."""
        if value is not default and not _is_of(value, kind):
            raise StartupError(
                f"{self.file}: {key[:80]} is {repr(value)[:80]}, and must be {_KINDS[kind]}. Download it again."
            )
        return value


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name or, as in Ollama's folder of blobs, by its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False  # who needs the file says why it cannot be read


def _is_of(value: Any, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def read_gguf(path: Path) -> Gguf:
    """Read the header of a model, of which `path` is the file or any part. Raises StartupError when it is broken or cut
    off, or a part is missing."""
    parts = part_files(path)
    headers = [_read_header(part) for part in parts]
    metadata = headers[0][0]
    count = _split_number(parts[0], metadata, "split.count", 1)
    if count > 1 and count != len(parts):
        raise StartupError(
            f"{path} is one of {count} parts of a model, and its name does not say which: name the parts "
            f"NAME-00001-of-{count:05}.gguf and so on, as they were published."
        )
    tensors: dict[str, GgufTensor] = {}
    for part, (own, found) in zip(parts, headers, strict=True):
        same_count = _split_number(part, own, "split.count", 1) == count
        if not same_count or _split_number(part, own, "split.no", 0) != parts.index(part):
            raise StartupError(f"{part} is no part of the same model as {parts[0]}: download all parts again.")
        tensors |= found
    return Gguf(parts[0], tuple(parts), metadata, tensors)


def _split_number(file: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int):
        raise StartupError(f"{file}: {key} is {str(value)[:80]!r}, and must be a whole number. Download it again.")
    return value


def part_files(path: Path) -> list[Path]:
    """The files of all parts of a model, of which `path` is one. Raises StartupError if one is missing."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    files = [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise StartupError(f"{path} is one of {count} parts of a model, of which {file.name} is missing beside it.")
    return files or [path]


def find_gguf(folder: Path) -> Path | None:
    """The only GGUF model in a folder (the first part of a split one), or None. Raises StartupError if there are
    several."""
    files = [file for file in sorted(folder.glob("*.gguf")) if file.is_file() and not file.name.startswith("mmproj")]
    if not files:
        return None
    match = _PART.fullmatch(files[0].name)
    others = [
        file for file in files[1:]
        if match is None or (other := _PART.fullmatch(file.name)) is None or other["stem"] != match["stem"]
    ]  # fmt: skip
    if others:
        raise StartupError(f"{folder} holds {len(files)} GGUF files: name one, such as --model-path {files[0]}.")
    return files[0]


def _read_header(file: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(file, data).read()
    except (OSError, ValueError, struct.error) as error:
        raise StartupError(
            f"{file} cannot be read as a GGUF file: it is broken or cut off ({error}). Download it again."
        ) from error


class _Header:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file = file
        self._data = data
        self._position = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Raises ValueError or struct.error when the header is malformed."""
        if self._bytes(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; {' and '.join(map(str, _VERSIONS))} are read")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = math.ceil(self._position / alignment) * alignment
        tensors = {
            name: GgufTensor(name, shape, type_id, self._file, start + offset)
            for name, shape, type_id, offset in entries
        }
        return metadata, tensors

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name[:80]!r} has {num_dimensions} dimensions")
        shape = self._numbers("Q", num_dimensions)[::-1]
        return name, tuple(shape), self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_scalar(kind))
        of, count = self._number("I"), self._number("Q")
        if of == _STRING:
            return self._strings(self._checked(count, _LENGTH.size))
        return list(self._numbers(_scalar(of), count))

    def _strings(self, count: int) -> list[str]:
        # A vocabulary has a hundred thousand of them, so this loop calls as little as possible.
        data, position, found = self._data, self._position, []
        length_at, size = _LENGTH.unpack_from, len(data)
        for _ in range(count):
            begin = position + _LENGTH.size
            position = begin + length_at(data, position)[0]
            if position > size:
                raise self._cut_off()
            found.append(data[begin:position])
        self._position = position
        return [text.decode("utf-8", errors="replace") for text in found]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", errors="replace")

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, count: int) -> Sequence[Any]:
        form = f"<{self._checked(count, struct.calcsize('<' + code))}{code}"
        found = struct.unpack_from(form, self._data, self._position)
        self._position += struct.calcsize(form)
        return found

    def _bytes(self, count: int) -> bytes:
        end = self._position + self._checked(count, 1)
        found = self._data[self._position : end]
        self._position = end
        return found

    def _checked(self, count: int, size: int) -> int:
        """`count`, if that many items of `size` bytes can follow: a malformed length must not allocate memory."""
        if count * size > len(self._data) - self._position:
            raise self._cut_off()
        return count

    def _cut_off(self) -> ValueError:
        return ValueError(f"it ends after {len(self._data)} bytes, inside its header")


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]
