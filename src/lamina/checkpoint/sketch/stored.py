"""How samples lie in a sketch, and what is refused of one; no torch."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import shake_256
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lamina.checkpoint.sketch.folding import count, unfold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lamina.checkpoint.record import Sketch

    Positions: TypeAlias = NDArray[np.int64]
    Floats: TypeAlias = NDArray[np.float32]

VERSION = 1
# Of very many tensors only some are sampled.
MOST_WINDOWS, MOST_TENSORS = 16, 1024
# Of quantised weights that were looked at; of those that weren't; of what couldn't be.
QUANTISED, PASSED, UNREAD = "quantised", "passed", "unread"
WITHOUT_VALUES = (PASSED, UNREAD)
_WIDTH = 64
_MOST_NAMES, _MOST_DIMENSIONS, _MOST_ENTRIES = 200_000, 12, 1 << 48


@dataclass(frozen=True)
class Sample:
    """What a sketch holds of a tensor.

    Attributes:
        name: of the tensor.
        shape: its shape.
        quantised: whether it was stored in codes.
        unread: whether its values could not be had.
        positions: flat positions in that shape; None if no values were looked at.
        values: what was there, rounded to bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    quantised: bool = False
    unread: bool = False
    positions: Positions | None = None
    values: Floats | None = None


def check(found: Sketch) -> None:
    """See, without writing out a name, that the parts of a sketch of this version fit together.

    Raises:
        ValueError: they don't, or can't be true.
    """
    if not 2 <= found.samples <= 2 * MOST_WINDOWS or found.samples % 2:
        raise ValueError(f"{found.samples} values per tensor")
    total = sampled = 0
    for folded, shape, note in _patterns(found.tensors):
        number = count(folded)
        total += number
        if note not in WITHOUT_VALUES:
            sampled += number
            if not math.prod(shape):
                raise ValueError(f"{folded[:80]} is empty, and has values")
    if total > _MOST_NAMES:
        raise ValueError(f"{total:,} tensors")
    _values(found, min(sampled, MOST_TENSORS))


def samples(found: Sketch) -> list[Sample]:
    """What a sketch of this version holds, tensor by tensor.

    Raises:
        ValueError: its parts don't belong together, or can't be true.
    """
    check(found)
    named = entries(found.tensors)
    if len({name for name, _, _ in named}) < len(named):
        raise ValueError("a tensor is there twice")
    names = evenly([name for name, _, note in named if note not in WITHOUT_VALUES], MOST_TENSORS)
    held = dict(zip(names, zip(*_values(found, len(names)), strict=True), strict=True))
    return [_sample(name, shape, note, held.get(name)) for name, shape, note in named]


def _values(found: Sketch, tensors: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """The bits of values, tensors x samples, and the offsets, tensors x windows."""
    values, offsets = _unpacked(found.values), _unpacked(found.offsets)
    windows = found.samples // 2
    if len(values) != 4 * tensors * windows or len(offsets) != tensors * windows:
        raise ValueError(f"{len(values)} bytes of values for {tensors} tensors")
    return (
        np.frombuffer(values, "<u2").reshape(tensors, 2 * windows),
        np.frombuffer(offsets, np.uint8).reshape(tensors, windows),
    )


def _sample(name: str, shape: tuple[int, ...], note: str, held: Any) -> Sample:
    quantised = note in (QUANTISED, PASSED)
    if held is None:
        return Sample(name, shape, quantised, note == UNREAD)
    bits, offsets = held
    places = places_in(name, shape, len(offsets))
    if offsets.max() >= places.shape[1]:
        raise ValueError(f"{name}: a value out of its window")
    smallest = np.take_along_axis(places, offsets[:, None].astype(np.int64), axis=1)[:, 0]
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    positions = np.concatenate([places[:, 0], smallest])
    return Sample(name, shape, quantised, False, positions, values)


def entries(patterns: Iterable[str]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, note) of every tensor, in the order of the samples."""
    return [
        (name, shape, note)
        for folded, shape, note in _patterns(patterns)
        for name in unfold(folded)
    ]


def _patterns(patterns: Iterable[str]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for pattern in patterns:
        folded, _, rest = pattern.partition(" ")
        shape, _, note = rest.partition(" ")
        if note not in ("", QUANTISED, *WITHOUT_VALUES):
            raise ValueError(f"{note[:40]!r} is said of {folded[:80]}")
        yield folded, _shape_of(shape), note


def shape_note(shape: Sequence[int]) -> str:
    """A shape as it is written in a sketch."""
    return "x".join(map(str, shape)) or "scalar"


def _shape_of(note: str) -> tuple[int, ...]:
    if note == "scalar":
        return ()
    dims = note.split("x")
    if len(dims) > _MOST_DIMENSIONS or not all(d.isascii() and d.isdigit() for d in dims):
        raise ValueError(f"{note[:40]!r} is not a shape")
    if sum(map(len, dims)) > 40 or math.prod(map(int, dims)) > _MOST_ENTRIES:
        raise ValueError(f"no tensor has the shape {note[:40]}")
    return tuple(map(int, dims))


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of them, at even distances."""
    if len(names) <= most:
        return list(names)
    return [names[i * len(names) // most] for i in range(most)]


def places_in(name: str, shape: tuple[int, ...], windows: int) -> Positions:
    """Flat positions, windows x width; a window lies within one row, so that rows may be added."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    # Windows of short rows have to differ too.
    width = max(1, min(_WIDTH, columns // 4))
    drawn = shake_256(f"{VERSION} {name} {shape_note(shape)}".encode()).digest(16 * windows)
    numbers = np.frombuffer(drawn, "<u8").reshape(windows, 2)
    row = (numbers[:, 0] % np.uint64(rows)).astype(np.int64)
    column = (numbers[:, 1] % np.uint64(columns - width + 1)).astype(np.int64)
    return (row * columns + column)[:, None] + np.arange(width, dtype=np.int64)


def packed(parts: Sequence[NDArray[Any]]) -> str:
    """Numbers as they are written in a sketch."""
    raw = b"".join(part.astype(part.dtype.newbyteorder("<")).tobytes() for part in parts)
    return base64.b64encode(raw).decode()


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
