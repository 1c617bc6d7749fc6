"""Whether a tensor of an adapter is a tensor of its base over again; read in pieces, no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.numbers import FORMATS, as_reals
from lamina.checkpoint.header import data_start, read_header
from lamina.checkpoint.sketch import FileWeights

_CHUNK = 1 << 22


def same_values(stored: StoredTensor, weights: FileWeights, name: str) -> bool:
    """Whether all values are equal, in whatever dtypes they are stored.

    A base that is stored in fewer bits is compared with the adapter's values rounded to these.
    """
    found = _find(weights.directory, name)
    if found is None or stored.dtype not in FORMATS or found.dtype not in FORMATS:
        return False
    if stored.shape != found.shape:
        return False
    width, other = FORMATS[stored.dtype][0], FORMATS[found.dtype][0]
    count = stored.size // width
    mine, theirs = _bytes(stored), _bytes(found)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        ours = as_reals(mine[start * width : stop * width].view(f"<u{width}"), stored.dtype)
        base = as_reals(theirs[start * other : stop * other].view(f"<u{other}"), found.dtype)
        if not np.array_equal(ours, base):
            return False
    return True


def _bytes(tensor: StoredTensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    start = data_start(tensor.file) + tensor.begin
    return np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=start, shape=(tensor.size,))


def _find(directory: Path, name: str) -> StoredTensor | None:
    for file in sorted(directory.glob("*.safetensors")):
        header, _ = read_header(file)
        entry = header.get(name)
        if entry is not None:
            begin, end = entry["data_offsets"]
            return StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), begin, end)
    return None
