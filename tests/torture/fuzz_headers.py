"""Mutators of safetensors headers."""

from __future__ import annotations

import json
import random
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.fuzz_bytes import Mutator, weights_in
from tests.torture.fuzz_json import dumps, rewritten, strange

Header = dict[str, Any]
Edit = Callable[[random.Random, Header, bytes], tuple[str, bytes] | None]


def parts(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def _tensors(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _one(rng: random.Random, header: Header) -> tuple[str, Any]:
    name = rng.choice(_tensors(header))
    return name, header[name]


def offsets(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, entry = _one(rng, header)
    begin, end = entry["data_offsets"]
    lies: list[Any] = [
        [end, begin],
        [begin, begin],
        [begin - 4, end],
        [begin + 4, end + 4],
        [0, len(data)],
        [0, end - begin],
        [-4, end],
        [begin, 2**63],
        [begin, 2**64 + end],
        [float(begin), float(end)],
        [begin + 0.5, end],
        [str(begin), str(end)],
        [True, end],
        [begin],
        [begin, end, end],
        [],
        None,
        {"0": begin},
        end,
    ]
    entry["data_offsets"] = rng.choice(lies)
    return f"offsets of {name}: {entry['data_offsets']}", data


def shape(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, entry = _one(rng, header)
    old = list(entry["shape"])
    lies: list[Any] = [
        old[::-1],
        [],
        [0],
        [0, *old[1:]],
        [*old, 1],
        [1, *old],
        [-old[0], -(old[-1])],
        [2**32, 2**32],
        [2**63, 2],
        [2**64, 0],
        [10**30, 0],
        [*old, 0],
        [float(x) for x in old],
        [str(x) for x in old],
        [True, *old[1:]],
        [None],
        None,
        "2x2",
        old[0],
        [1] * 10_000,
        [old[0] * old[-1]],
        [0, 10**12],
    ]
    entry["shape"] = rng.choice(lies)
    return f"shape of {name}: {str(entry['shape'])[:60]}", data


def dtype(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, entry = _one(rng, header)
    kinds = ["F16", "BF16", "F64", "I32", "U32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4"]
    kinds += ["F8_E8M0", "F6_E2M3", "C64", "f32", "X", "", "F32 ", "float32"]
    entry["dtype"] = rng.choice([*kinds, strange(rng)])
    if rng.random() < 0.3:
        width = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"])
        if width == 2 and entry["shape"]:
            entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] * 2]
    return f"dtype of {name}: {str(entry['dtype'])[:60]}", data


def same_width(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, entry = _one(rng, header)
    entry["dtype"] = rng.choice(["I32", "U32"])
    return f"{name} is {entry['dtype']}", data


def half_precision(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    """All tensors are bf16 and the data is half: a right file of other values."""
    half = len(data) // 2
    for name in _tensors(header):
        begin, end = header[name]["data_offsets"]
        if header[name]["dtype"] != "F32":
            return "nothing", data
        header[name].update(dtype="BF16", data_offsets=[begin // 2, end // 2])
    return "all bf16", data[:half]


def entry_value(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, entry = _one(rng, header)
    field = rng.choice(["dtype", "shape", "data_offsets", "extra", None])
    value = strange(rng)
    if field is None:
        header[name] = value
    elif rng.random() < 0.2:
        entry.pop(field, None)
    else:
        entry[field] = value
    return f"{name}: {field} {str(value)[:40]!r}", data


def names(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, _ = _one(rng, header)
    new = rng.choice(
        [
            name.upper(),
            name.replace("lora_A", "lora_B"),
            name.replace(".lora_A.weight", ".lora_A.default.weight"),
            name.removeprefix("base_model.model."),
            "base_model.model." + name,
            "module." + name,
            name.replace(".", "/"),
            "../" + name,
            name + "\0",
            name + "\ud800",
            name + "\u202e",
            "\x1b[2J" + name,
            "[bold]" + name,
            unicodedata.normalize("NFD", name + "é"),
            "",
            ".",
            "..",
            ".lora_A.weight",
            "lora_A.weight",
            "__metadata__x",
            name + "." * 1000,
            "x" * 1_000_000,
            "base_model.model." + "layers.9." * 5000 + "lora_A.weight",
            "base_model.model." + "_orig_mod." * 20_000 + "q.lora_A.weight",
            "base_model.model." + "9" * 5000 + ".lora_A.weight",
            "base_model.model.\u0663.lora_A.weight",
            "base_model.model.\u00b2.lora_A.weight",
            name.replace("lora_A", "lora_" + "A" * 50_000),
        ]
    )
    header[new] = header.pop(name)
    return f"{name} is called {new[:80]!r}", data


def twin(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    """One more tensor that means the same place."""
    name, entry = _one(rng, header)
    begin, end = entry["data_offsets"]
    other = rng.choice(
        [
            "module." + name,
            name.removeprefix("base_model.model."),
            name.replace(".lora_A.weight", ".lora_A.default.weight"),
            name.replace(".lora_A.", ".lora_B."),
            name.replace(".lora_A.weight", ".lora_embedding_A"),
            name + "\u0301",
        ]
    )
    if other in header:
        return "nothing", data
    header[other] = {**entry, "data_offsets": [len(data), len(data) + end - begin]}
    return f"{name} again as {other[:80]!r}", data + data[begin:end]


def drop(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    name, _ = _one(rng, header)
    if rng.random() < 0.2:
        header.clear()
        return "no tensors", rng.choice([b"", data])
    del header[name]
    return f"{name} is gone", data


def drop_cleanly(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    """A tensor less, in a file that is otherwise whole."""
    name, _ = _one(rng, header)
    held = {n: data[slice(*header[n]["data_offsets"])] for n in _tensors(header) if n != name}
    del header[name]
    return f"without {name}", _laid_out(header, held)


def reshape_cleanly(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    """A tensor of another shape, in a file that is otherwise whole."""
    name, entry = _one(rng, header)
    held = {n: data[slice(*header[n]["data_offsets"])] for n in _tensors(header)}
    old = entry["shape"]
    choices = [[0, *old[1:]], [*old[:-1], 0], [], [0], [1], [1, *old], [*old, 1], [old[0] + 1]]
    new = rng.choice([*choices, [old[0] + 1, *old[1:]], [*old[:-1], old[-1] + 1], [4096, 64]])
    entry.update(shape=new, dtype="F32")
    count = 1
    for size in new:
        count *= size
    held[name] = rng.randbytes(4 * count)
    return f"{name}: {old} -> {new}", _laid_out(header, held)


def not_finite(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    """NaN or infinity as a value: that is what the file says."""
    name, entry = _one(rng, header)
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "F32":
        return "nothing", data
    value = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 0.0]))
    count = (end - begin) // 4
    return f"{name}: {value!r}", data[:begin] + value * count + data[end:]


def _laid_out(header: Header, held: dict[str, bytes]) -> bytes:
    begin = 0
    for name, content in held.items():
        header[name]["data_offsets"] = [begin, begin + len(content)]
        begin += len(content)
    return b"".join(held.values())


def metadata(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    value = strange(rng)
    told = header.get("__metadata__")
    if isinstance(told, dict) and rng.random() < 0.6:
        key = rng.choice([*told, "x", "lamina", "lamina_vocabulary", "format"])
        told[key] = value
        return f"metadata[{key!r}]: {str(value)[:40]!r}", data
    header["__metadata__"] = value
    return f"metadata: {str(value)[:40]!r}", data


def many_tensors(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    count = rng.choice([*[100] * 5, 20_000])
    for number in range(count):
        header[f"base_model.model.x.{number}.lora_A.weight"] = {
            "dtype": "F32",
            "shape": [0, 4],
            "data_offsets": [len(data), len(data)],
        }
    return f"{count} empty tensors more", data


def unordered(rng: random.Random, header: Header, data: bytes) -> tuple[str, bytes]:
    """The same in another order: that is a right file."""
    entries = list(header.items())
    rng.shuffle(entries)
    header.clear()
    header.update(entries)
    return "another order", data


EDITS: list[Edit] = [
    offsets,
    shape,
    dtype,
    same_width,
    half_precision,
    entry_value,
    names,
    names,
    twin,
    drop,
    drop_cleanly,
    reshape_cleanly,
    not_finite,
    metadata,
    many_tensors,
    unordered,
]


def _mutator(edit: Edit) -> Mutator:
    def mutate(rng: random.Random, path: Path) -> str | None:
        found = weights_in(path)
        if not found:
            return None
        file = rng.choice(found)
        header, data = parts(file)
        done = edit(rng, header, data)
        if done is None:
            return None
        put(file, dumps(header), done[1])
        return done[0]

    mutate.__name__ = f"header_{edit.__name__}"
    return mutate


def header_text(rng: random.Random, path: Path) -> str | None:
    """The header's JSON as text that is larger, deeper or stranger."""
    found = weights_in(path)
    if not found:
        return None
    file = rng.choice(found)
    header, data = parts(file)
    told, text = rewritten(rng, json.dumps(header))
    put(file, text, data)
    return f"header: {told}"


def twice_in_header(rng: random.Random, path: Path) -> str | None:
    """One name twice, with different tensors."""
    found = weights_in(path)
    if not found:
        return None
    file = rng.choice(found)
    header, data = parts(file)
    name, other = _one(rng, header)[0], _one(rng, header)[1]
    text = json.dumps(header).replace(
        "{", "{" + json.dumps(name) + ":" + json.dumps(other) + ",", 1
    )
    put(file, text.encode(), data)
    return f"{name} twice"


def same_in_two_shards(rng: random.Random, path: Path) -> str | None:
    """A tensor that two shards have, with different values."""
    found = weights_in(path)
    if len(found) < 2:
        return None
    one, other = rng.sample(found, 2)
    header, _ = parts(one)
    name, entry = _one(rng, header)
    begin, end = entry["data_offsets"]
    into, held = parts(other)
    into[name] = {**entry, "data_offsets": [len(held), len(held) + end - begin]}
    put(other, dumps(into), held + rng.randbytes(end - begin))
    return f"{name} in {one.name} and {other.name}"


MUTATORS: list[Mutator] = [
    *map(_mutator, EDITS),
    header_text,
    header_text,
    twice_in_header,
    same_in_two_shards,
]
