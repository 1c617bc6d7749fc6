"""What each target writes for one fixed adapter, kept in `golden/`.

`python -m tests.checkpoint.export.golden` writes it anew: do so where a format changes on purpose,
and read the difference.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf

from lamina.checkpoint.export.base_config import read_base_config
from lamina.checkpoint.export.registry import TARGETS
from lamina.stages.export import export
from tests.checkpoint.export import made

FOLDER = Path(__file__).with_name("golden")


def write_all(folder: Path) -> None:
    """Write the fixed adapter for every target."""
    with tempfile.TemporaryDirectory() as place:
        adapter = made.write(Path(place) / "a")
        base = read_base_config(str(made.base_config(Path(place) / "base")))
        for target in TARGETS:
            out = folder / target
            export(adapter, out, target=target, base=base, served_base="llama3.2:1b", force=True)


def contents(file: Path) -> Any:
    """A file as programs see it: bytes, or for containers their tensors and strings."""
    if file.suffix == ".gguf":
        reader = gguf.GGUFReader(file)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            # Of the container itself; it may lie otherwise with another release of gguf.
            if not name.startswith("GGUF.")
        }
        tensors = {
            each.name: (each.tensor_type.name, tuple(map(int, each.shape)), each.data.tobytes())
            for each in reader.tensors
        }
        return fields, tensors
    if file.suffix == ".safetensors":
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        return json.loads(raw[8 : 8 + length]), raw[8 + length :]
    return file.read_bytes()


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_all(FOLDER)
