"""Headers are read without torch; what isn't one is told."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lamina.checkpoint.header import data_start, read_header
from lamina.checkpoint.weights import WeightsOnDisk
from lamina.errors import CheckpointError, MissingFileError


def write(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(
        {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)},
        tmp_path / "x.safetensors",
        {"lamina": "{}"},
    )
    return tmp_path / "x.safetensors"


def test_names_shapes_dtypes_and_strings(file: Path) -> None:
    header, metadata = read_header(file)
    assert {name: (e["dtype"], e["shape"]) for name, e in header.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("BF16", [4]),
    }
    assert metadata == {"lamina": "{}"}


def test_tensors_begin_where_it_says(file: Path) -> None:
    header, _ = read_header(file)
    begin, end = header["a"]["data_offsets"]
    held = file.read_bytes()[data_start(file) :][begin:end]
    assert struct.unpack("<6f", held) == (1.0,) * 6


def test_a_file_that_is_cut_off_says_by_how_much(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cut off: 5 bytes are missing"):
        read_header(file)


def test_a_missing_file_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b'"a"', b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": []}}']
)
def test_what_is_not_a_header_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(write(tmp_path / "x", header))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="claims to have"):
        read_header(write(tmp_path / "x", b"{}", length=1 << 60))


def test_a_file_shorter_than_its_length_field(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(tmp_path / "x")


def test_no_metadata_is_an_empty_one(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    write(tmp_path / "x", json.dumps({"a": entry}).encode(), b"\0")
    assert read_header(tmp_path / "x") == ({"a": entry}, {})


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown dtype": ({"a": entry(dtype="F33")}, "unknown dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "has the fields"),
    "a field more": ({"a": entry(extra=1)}, "has the fields"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, "unknown dtype"),
    "negative shape": ({"a": entry(shape=[-2])}, "impossible shape"),
    "shape is a number": ({"a": entry(shape=2)}, "impossible shape"),
    "sizes are fractions": ({"a": entry(shape=[2.0])}, "impossible shape"),
    "sizes are truths": ({"a": entry(shape=[True, 2])}, "impossible shape"),
    "sizes are text": ({"a": entry(shape=["2"])}, "impossible shape"),
    "a product beyond 64 bits": ({"a": entry(shape=[2**32, 2**32])}, "impossible shape"),
    "huge, but for a zero": ({"a": entry(shape=[2**63, 0])}, "impossible shape"),
    "too many dimensions": ({"a": entry(shape=[1] * 10_000)}, "impossible shape"),
    "reversed offsets": ({"a": entry(data_offsets=[8, 0])}, "impossible offsets"),
    "negative offsets": ({"a": entry(data_offsets=[-8, 0])}, "impossible offsets"),
    "one offset": ({"a": entry(data_offsets=[8])}, "impossible offsets"),
    "offsets are fractions": ({"a": entry(data_offsets=[0.0, 8.0])}, "impossible offsets"),
    "another width": ({"a": entry(dtype="F16")}, "F16 of the shape"),
    "another shape": ({"a": entry(shape=[3])}, "in 8 bytes"),
    "an overlap": ({"a": entry(), "b": entry(data_offsets=[4, 12])}, "begins inside"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "begins inside"),
    "a gap": ({"a": entry(), "b": entry(data_offsets=[16, 24])}, "leaves a gap"),
    "a gap before": ({"a": entry(data_offsets=[4, 12])}, "is the first and begins at byte 4"),
    "strings are numbers": ({"__metadata__": {"a": 1}, "a": entry()}, "no object of strings"),
    "strings are a list": ({"__metadata__": ["a"], "a": entry()}, "no object of strings"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    header, told = LIES[lie]
    size = max(
        (each.get("data_offsets") or [0, 0])[-1] for each in header.values() if "shape" in each
    )
    data = b"\0" * (int(size) or 8)
    with pytest.raises(CheckpointError, match=told):
        read_header(write(tmp_path / "x", json.dumps(header).encode(), data))


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    file = write(tmp_path / "x", json.dumps({"a": entry()}).encode(), b"\0" * 11)
    with pytest.raises(CheckpointError, match="3 bytes lie behind the last tensor"):
        read_header(file)
    assert read_header(file, check_layout=False)[0] == {"a": entry()}


def test_a_name_twice(tmp_path: Path) -> None:
    one = json.dumps(entry())
    with pytest.raises(CheckpointError, match="'a' twice"):
        read_header(write(tmp_path / "x", f'{{"a": {one}, "a": {one}}}'.encode(), b"\0" * 8))


def test_a_header_that_is_nested_to_exhaustion(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nested more than"):
        read_header(write(tmp_path / "x", b'{"a":' * 100_000 + b"1" + b"}" * 100_000))


def test_a_sparse_file_of_a_hundred_gigabytes(tmp_path: Path) -> None:
    file = write(tmp_path / "x", json.dumps({"a": entry()}).encode(), b"\0" * 8)
    os.truncate(file, 100_000_000_000)
    with pytest.raises(CheckpointError, match="bytes lie behind the last tensor"):
        read_header(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_header(tmp_path / "x")


def test_faults_are_not_as_long_as_the_file(tmp_path: Path) -> None:
    header = {f"{'x' * 1000}{i}": entry(dtype="?" * 1000) for i in range(1000)}
    with pytest.raises(CheckpointError, match="and 994 more") as caught:
        read_header(write(tmp_path / "x", json.dumps(header).encode()))
    assert len(str(caught.value)) < 5_000


def test_a_model_with_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_file({"a": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"are in 'two\.safetensors' and in another file"):
        WeightsOnDisk(tmp_path)
