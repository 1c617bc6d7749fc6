"""Mutators of bytes, and of what lies at a file's place in a directory."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.torture.fuzz_corpus import CONFIG, INDEX, PICKLE, WEIGHTS

Mutator = Callable[[random.Random, Path], str | None]
HUGE_SPARSE = 100_000_000_000


def files_in(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.suffix in (".safetensors", ".json"))


def weights_in(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _any(rng: random.Random, path: Path) -> Path:
    return rng.choice([*files_in(path), *path.glob("*.bin")])


def flip_bits(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    content = bytearray(file.read_bytes())
    reach = len(content) if rng.random() < 0.3 else min(len(content), 4000)
    places = [rng.randrange(reach) for _ in range(rng.choice([1, 1, 2, 8, 64]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{len(places)} bits of {file.name}"


def set_bytes(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    span = content[start : start + rng.choice([1, 4, 100])]
    value = rng.choice([0, 0x20, 0x22, 0x2C, 0x39, 0x7B, 0x7D, 0xFF, None])
    new = rng.randbytes(len(span)) if value is None else bytes([value]) * len(span)
    content[start : start + len(span)] = new
    file.write_bytes(content)
    return f"{len(span)} bytes of {file.name} at {start}"


def cut(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    content = file.read_bytes()
    keep = rng.choice([0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content))])
    file.write_bytes(content[:keep])
    return f"{file.name} cut to {keep}"


def extend(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    more = rng.choice([b"\0", b" " * 9, b"{}", b"\0" * 4096, rng.randbytes(100), file.read_bytes()])
    file.write_bytes(file.read_bytes() + more)
    return f"{file.name} and {len(more)} bytes"


def remove_or_insert(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    content = bytearray(file.read_bytes())
    at, count = rng.randrange(len(content)), rng.choice([1, 2, 8])
    if rng.random() < 0.5:
        del content[at : at + count]
    else:
        content[at:at] = rng.randbytes(count)
    file.write_bytes(content)
    return f"{file.name} shifted at {at}"


def swap_files(rng: random.Random, path: Path) -> str | None:
    one, other = rng.sample([*files_in(path), *path.glob("*.bin")], 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{one.name} for {other.name}"


def remove_file(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    file.unlink()
    return f"no {file.name}"


def other_content(rng: random.Random, path: Path) -> str:
    file = _any(rng, path)
    contents = {
        "gzip": lambda: gzip.compress(file.read_bytes()),
        "gzip bomb": lambda: gzip.compress(b"\0" * 5_000_000),
        "pickle": lambda: pickle.dumps({"a": 1}),
        "hostile pickle": lambda: b"cos\nsystem\n(S'touch /tmp/lamina-was-here'\ntR.",
        "elf": lambda: b"\x7fELF" + rng.randbytes(500),
        "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "html": lambda: b"<!DOCTYPE html><html>404</html>",
        "empty": lambda: b"",
        "null": lambda: b"null",
        "zeros": lambda: b"\0" * 1000,
    }
    name = rng.choice(sorted(contents))
    file.write_bytes(contents[name]())
    return f"{file.name} is {name}"


def zip_bomb(rng: random.Random, path: Path) -> str:
    name = rng.choice([PICKLE, WEIGHTS, CONFIG])
    for each in weights_in(path) if name == PICKLE else ():
        each.unlink()
    (path / INDEX).unlink(missing_ok=True)
    with zipfile.ZipFile(path / name, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", pickle.dumps({"a": list(range(1000))}))
        made.writestr("archive/data/0", b"\0" * 50_000_000)
        made.writestr("archive/version", "3")
    return f"zip bomb as {name}"


def no_file(rng: random.Random, path: Path) -> str:
    """Something that is no regular file, at a file's place."""
    file = rng.choice([*files_in(path), *path.glob("*.bin")])
    content = file.read_bytes()
    file.unlink()
    kinds: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(file),
        "directory": file.mkdir,
        "full directory": lambda: (file.mkdir(), (file / file.name).write_bytes(content)),
        "dangling link": lambda: file.symlink_to(path / "nowhere"),
        "loop": lambda: file.symlink_to(file),
        "link to /dev/zero": lambda: file.symlink_to("/dev/zero"),
        "link to /dev/stdin": lambda: file.symlink_to("/dev/stdin"),
        "link to /etc/passwd": lambda: file.symlink_to("/etc/passwd"),
        "link to a fifo": lambda: (os.mkfifo(path / "pipe"), file.symlink_to(path / "pipe")),
        "link to a directory": lambda: file.symlink_to("/"),
        "socket": lambda: _socket(file),
        "sparse": lambda: _sparse(file, content),
        "sparse, short": lambda: _sparse(file, b""),
        "no permission": lambda: (file.write_bytes(content), file.chmod(0)),
        # As the cache of the hub has them: that is right.
        "link": lambda: _linked(file, content),
    }
    name = rng.choice(list(kinds))
    kinds[name]()
    return f"{file.name} is a {name}"


def _socket(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(here)


def _sparse(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    os.truncate(file, HUGE_SPARSE)


def _linked(file: Path, content: bytes) -> None:
    blob = file.parent / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(content)
    file.symlink_to(blob)


def strange_neighbours(rng: random.Random, path: Path) -> str:
    """Files that are none of ours; the adapter is what it was."""
    names = [
        "adapter_model.bin",
        "x\u202egnp.exe",
        "a\nb",
        "\udcff",
        "-rf",
        "config.json",
        "é" * 60,
    ]
    for name in rng.sample(names, 3):
        if not (path / name).exists():
            (path / name).write_bytes(rng.randbytes(50))
    (path / "sub").mkdir()
    shutil.copy(path / CONFIG, path / "sub" / CONFIG)
    os.mkfifo(path / "pipe.safetensors")
    return "strange neighbours"


def length_lie(rng: random.Random, path: Path) -> str | None:
    found = weights_in(path)
    if not found:
        return None
    file = rng.choice(found)
    content = file.read_bytes()
    (true,) = struct.unpack("<Q", content[:8])
    lies = [0, 1, 2, 2**63, 2**64 - 1, true - 1, true + 1, true * 2, 99_999_999, len(content)]
    lie = rng.choice([*lies, len(content) - 8, rng.randrange(2**40)])
    file.write_bytes(struct.pack("<Q", lie) + content[8:])
    return f"{file.name} claims a header of {lie}"


MUTATORS: list[Mutator] = [
    flip_bits,
    set_bytes,
    cut,
    extend,
    remove_or_insert,
    swap_files,
    remove_file,
    other_content,
    zip_bomb,
    no_file,
    no_file,
    strange_neighbours,
    length_lie,
]
