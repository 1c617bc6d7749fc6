"""A digest of an adapter's tensors: are they, byte for byte, those that were saved?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.checkpoint.header import data_start, read_header

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 22
# What safetensors calls torch's dtypes.
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors in the order of their names: name, dtype, shape, bytes.

    The same as `files_digest` of the files that they are written to.
    """
    import torch

    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        whole.update(_title(name, _CODES.get(dtype, dtype), tensor.shape))
        # Bytes as they lie in the file: in C order.
        flat: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(flat)
    return whole.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """The same of safetensors files, however the tensors are shared out among them; no torch.

    Raises:
        CheckpointError: one is not a safetensors file, or is cut off.
    """
    places = {}
    for path in paths:
        header, _ = read_header(path)
        start = data_start(path)
        places.update({name: (path, start, entry) for name, entry in header.items()})
    whole = hashlib.sha256()
    for name in sorted(places):
        path, start, entry = places[name]
        begin, end = entry["data_offsets"]
        whole.update(_title(name, entry["dtype"], entry["shape"]))
        with path.open("rb") as opened:
            opened.seek(start + begin)
            for left in range(end - begin, 0, -_CHUNK):
                whole.update(opened.read(min(left, _CHUNK)))
    return whole.hexdigest()


def _title(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    return f"{name}\0{dtype}\0{'x'.join(map(str, shape))}\0".encode()
