"""The header of a safetensors file: what is in it, read without torch and without the tensors."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from lamina.errors import CheckpointError
from lamina.storage.source import AdapterFiles
from lamina.storage.untrusted import open_regular, parse_json

# dtype on disk -> bits of an entry.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
_MAX_HEADER = 100_000_000
# What torch and numpy can have.
_MOST_DIMENSIONS, _LARGEST = 32, 2**62
_SHOWN = 6
_AGAIN = "copy, download or save the file again"

Header = dict[str, dict[str, Any]]


def read_header(path: Path, *, check_layout: bool = True) -> tuple[Header, dict[str, str]]:
    """Names, dtypes and shapes of the tensors in a safetensors file, and its strings; no torch.

    Args:
        path: the file.
        check_layout: whether the tensors have to have the bytes of their shapes and dtypes, and
            to lie one after the other up to the file's end, as the format wants it.

    Returns:
        name -> {"dtype", "shape", "data_offsets"}, and the `__metadata__`. The offsets count from
        the end of the header, see `data_start`. Types are checked, and no tensor reaches beyond
        the file, so that they can be relied upon.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the header is not one, or contradicts itself or the file's length.

    Source: https://huggingface.co/docs/safetensors (format)
    """
    with open_regular(path) as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            length = _length(opened, size)
            header = parse_json(opened.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            metadata = _strings(header.pop("__metadata__", None))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file: {error}", cure=_AGAIN
            ) from error
    faults = [fault for key, entry in header.items() for fault in _entry_faults(key, entry)]
    if faults:
        raise _broken(f"{path} is not a safetensors file: its header makes no sense", faults)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    missing = 8 + length + end - size
    if missing > 0:
        raise CheckpointError(f"{path} is cut off: {missing:,} bytes are missing.", cure=_AGAIN)
    if check_layout and (faults := _layout_faults(header, size - 8 - length)):
        raise _broken(f"{path} is damaged: its tensors don't lie as they should", faults)
    return header, metadata


def read_headers(files: AdapterFiles) -> tuple[dict[Path, Header], dict[str, str]]:
    """The headers of all files with an adapter's weights, and the strings of all together.

    Raises:
        CheckpointError: one is broken, or a tensor is in two of them, or not where the index says.
    """
    headers: dict[Path, Header] = {}
    metadata: dict[str, str] = {}
    owners: dict[str, Path] = {}
    faults = []
    for file in files.weights:
        headers[file], strings = read_header(file)
        metadata.update(strings)
        faults += [
            f"'{key}' is in '{owners[key].name}' and in '{file.name}'"
            for key in headers[file]
            if key in owners
        ]
        owners.update(dict.fromkeys(headers[file], file))
    faults = faults or _index_faults(files, owners)
    if faults:
        raise _broken(f"The shards of {files.root} contradict each other or their index", faults)
    return headers, metadata


def _index_faults(files: AdapterFiles, owners: Mapping[str, Path]) -> list[str]:
    table = files.weight_map
    if not table:
        return []
    named = dict(zip(sorted(set(table.values())), files.weights, strict=True))
    return [
        *(
            f"'{key}' is to be in '{name}', and isn't"
            for key, name in table.items()
            if owners.get(key) != named[name]
        ),
        *(f"'{key}' is in '{owners[key].name}', not in the index" for key in owners - table.keys()),
    ]


def data_start(path: Path) -> int:
    """The byte at which the tensors of a safetensors file begin.

    Raises:
        ValueError: the header's length can't be true.
    """
    with open_regular(path) as opened:
        return 8 + _length(opened, os.fstat(opened.fileno()).st_size)


def _length(opened: BinaryIO, size: int) -> int:
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", opened.read(8))
    if length > _MAX_HEADER:
        raise ValueError(f"its header claims to have {length:,} bytes")
    if length > size - 8:
        raise ValueError(f"its header claims to have {length:,} bytes, the file has {size:,}")
    return int(length)


def _broken(what: str, faults: list[str]) -> CheckpointError:
    if len(faults) > _SHOWN:
        faults = [*faults[:_SHOWN], f"and {len(faults) - _SHOWN:,} more"]
    return CheckpointError(f"{what}.", faults=faults, cure=_AGAIN)


def _strings(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no object of strings")
    return metadata


def _entry_faults(key: str, entry: Any) -> list[str]:
    """What keeps one entry from describing a tensor at all."""
    name = repr(key[:200])
    if not isinstance(entry, dict):
        return [f"{name} has no entry of dtype, shape and offsets"]
    faults = []
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        faults.append(f"{name} has the fields {_some(sorted(entry))}")
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        faults.append(f"{name} has the unknown dtype {_some(dtype)}")
    if not _is_shape(shape):
        faults.append(f"{name} has the impossible shape {_some(shape)}")
    if not _is_span(offsets):
        faults.append(f"{name} has the impossible offsets {_some(offsets)}")
    return faults


def _some(value: object) -> str:
    # Nothing that is as long as the file.
    text = repr(value[:8] if isinstance(value, (list, str)) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _LARGEST for n in value)


def _is_span(offsets: Any) -> bool:
    return _are_counts(offsets) and len(offsets) == 2 and bool(offsets[0] <= offsets[1])


def _is_shape(shape: Any) -> bool:
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        return False
    count: int = math.prod(size for size in shape if size)
    return count < _LARGEST


def _layout_faults(header: Mapping[str, Mapping[str, Any]], size: int) -> list[str]:
    """Tensors that haven't the bytes that they need, that overlap or leave gaps."""
    faults = [
        f"{key!r} is {entry['dtype']} of the shape {entry['shape']} in "
        f"{entry['data_offsets'][1] - entry['data_offsets'][0]:,} bytes"
        for key, entry in header.items()
        if not _has_its_length(entry)
    ]
    spans = sorted((*entry["data_offsets"], key) for key, entry in header.items())
    if spans and spans[0][0] != 0:
        faults.append(f"{spans[0][2]!r} is the first and begins at byte {spans[0][0]:,}")
    faults += [
        f"{key!r} {'begins inside' if begin < end else 'leaves a gap after'} {before!r}"
        for (_, end, before), (begin, _, key) in pairwise(spans)
        if begin != end
    ]
    left = size - (spans[-1][1] if spans else 0)
    if left and not faults:
        faults.append(f"{left:,} bytes lie behind the last tensor")
    return faults


def _has_its_length(entry: Mapping[str, Any]) -> bool:
    begin, end = entry["data_offsets"]
    bits: int = math.prod(entry["shape"]) * DTYPE_BITS[entry["dtype"]]
    return bits == 8 * int(end - begin)
