"""Headers are read without torch; what isn't one is told."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lamina.checkpoint.header import data_start, read_header
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
