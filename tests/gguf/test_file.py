"""The header of GGUF files: what is read, and what is refused."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from fastserve.errors import StartupError
from fastserve.gguf.file import find_gguf, read_gguf

from .writing import write_header


def add_all_types(writer: gguf.GGUFWriter) -> None:
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -5)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -(2**31))
    writer.add_uint64("a.u64", 2**63)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_string("a.text", "Straße 世界")
    writer.add_array("a.numbers", [3, 1, 2])
    writer.add_array("a.texts", ["x", "", "yz"])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.ones(5, dtype=np.float16))


def test_all_types_of_metadata_and_places_of_tensors(tmp_path: Path) -> None:
    found = read_gguf(write_header(tmp_path / "model.gguf", "llama", add_all_types))
    assert found.architecture == "llama"
    values = {key.removeprefix("a."): value for key, value in found.metadata.items() if key.startswith("a.")}
    assert values == {
        "u8": 200, "i8": -5, "u16": 60000, "i16": -30000, "u32": 2**32 - 1, "i32": -(2**31), "u64": 2**63,
        "i64": -(2**62), "f32": 0.5, "f64": 0.1, "yes": True, "text": "Straße 世界", "numbers": [3, 1, 2],
        "texts": ["x", "", "yz"], "flags": [True, False],
    }  # fmt: skip
    one, two = found.tensors["one"], found.tensors["two"]
    assert (one.shape, one.type_id, two.shape, two.type_id) == ((2, 3), 0, (5,), 1)
    data = one.file.read_bytes()
    assert np.frombuffer(data, "<f4", 6, one.offset).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.frombuffer(data, "<f2", 5, two.offset).tolist() == [1] * 5


def test_a_header_cut_off_anywhere_is_a_sentence(tmp_path: Path) -> None:
    whole = write_header(tmp_path / "model.gguf", "llama", add_all_types)
    data, end = whole.read_bytes(), min(tensor.offset for tensor in read_gguf(whole).tensors.values())
    file = tmp_path / "cut.gguf"
    for length in range(0, end - 32, 3):
        file.write_bytes(data[:length])
        with pytest.raises(StartupError, match=r"cut\.gguf cannot be read as a GGUF file: it is broken or cut off"):
            read_gguf(file)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"NOPE" + bytes(40), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648; 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60) + bytes(50), "inside its header"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61) + bytes(50), "inside its header"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(50), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 2**31) + bytes(50), "dimensions"),
    ],
)
def test_headers_that_lie_are_refused_without_memory(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(StartupError, match=reason):
        read_gguf(tmp_path / "model.gguf")


def write_parts(folder: Path, count: int = 3, stem: str = "model") -> list[Path]:
    def add(number: int, writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        if number == 0:
            writer.add_string("general.name", stem)
        writer.add_tensor(f"tensor{number}", np.full(3, number, dtype=np.float32))

    return [
        write_header(folder / f"{stem}-{number + 1:05}-of-{count:05}.gguf", "llama", partial(add, number))
        for number in range(count)
    ]


def test_parts_are_one_model_whichever_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    for part in parts:
        found = read_gguf(part)
        assert found.metadata["general.name"] == "model"
        assert [tensor.file for tensor in found.tensors.values()] == parts
    assert find_gguf(tmp_path) == parts[0]
    (tmp_path / "mmproj-model.gguf").write_bytes(b"")  # eyes, which a language model goes without
    assert find_gguf(tmp_path) == parts[0]
    write_parts(tmp_path, stem="other")
    with pytest.raises(StartupError, match="holds 6 GGUF files"):
        find_gguf(tmp_path)


def test_a_missing_or_foreign_part_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(StartupError, match=r"00003-of-00003\.gguf is no part of the same model"):
        read_gguf(parts[0])
    parts[1].unlink()
    with pytest.raises(StartupError, match=r"is one of 3 parts .* model-00002-of-00003\.gguf is missing"):
        read_gguf(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(StartupError, match="its name does not say which"):
        read_gguf(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("key", ["split.count", "split.no"])
@pytest.mark.parametrize("value", ["many", 1.5, [1, 2]])
def test_a_number_of_parts_of_another_type_is_a_sentence(tmp_path: Path, key: str, value: object) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)

    with pytest.raises(StartupError, match=rf"{key} is .* and must be a whole number"):
        read_gguf(write_header(tmp_path / "odd.gguf", "llama", add))


def test_a_folder_named_like_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    assert find_gguf(tmp_path) is None
    file = write_header(tmp_path / "b.gguf", "llama", add_all_types)
    assert find_gguf(tmp_path) == file
