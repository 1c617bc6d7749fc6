"""Which values of a base are sampled, and how they lie in a sketch; no torch.

From each tensor come windows of neighbouring values, at places that its name and shape alone
determine. The first value of a window stands for the tensor's values as they are, and is good for
a correlation. The smallest is the one that a small update moves by the most of its own steps: at
a hundredth of the usual magnitude a bfloat16 is a hundred times finer.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import shake_256
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from lamina.checkpoint.sketch.folding import count, fold, unfold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lamina.checkpoint.record import Sketch

    Positions: TypeAlias = NDArray[np.int64]
    Floats: TypeAlias = NDArray[np.float32]

VERSION = 1
# Few tensors are looked at more closely, and of very many only some are.
_WINDOWS, _MOST_WINDOWS, _MOST_TENSORS = 640, 16, 1024
_WIDTH = 64
# A quantised weight is read as a whole, so only some are.
_QUANTISED = 16
# Of quantised weights that were looked at; of those that weren't; of what couldn't be.
_QUANTISED_NOTE, _PASSED_NOTE, _UNREAD_NOTE = "quantised", "passed", "unread"
_WITHOUT_VALUES = (_PASSED_NOTE, _UNREAD_NOTE)
_MOST_NAMES, _MOST_DIMENSIONS, _MOST_ENTRIES = 500_000, 12, 1 << 48


@dataclass(frozen=True)
class Tensor:
    """What a source says of a tensor.

    Attributes:
        shape: as in the model; of a quantised weight, as it is unquantised.
        dtype: of its values, as torch names it; None for codes whose values have another shape.
        quantised: whether its values are those of codes.
        readable: whether its values can be had.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    quantised: bool = False
    readable: bool = True


class Weights(Protocol):
    """The weights of a base, wherever they lie."""

    @property
    def whole(self) -> bool:
        """Whether these are all of its weights, by their names in the model."""

    def as_loaded(self) -> Weights | None:
        """The same by the names that they have in the model, if these may be others."""

    @property
    def quantization(self) -> str | None:
        """The quantiser, as a record names it; None if all is dense."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Plain name -> tensor; what is tied, once."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of tied tensors -> that in `tensors`."""

    def read(self, wanted: Mapping[str, Positions]) -> dict[str, Floats]:
        """The values of these tensors at flat positions, as float32."""


@dataclass(frozen=True)
class Sample:
    """What a sketch holds of a tensor.

    Attributes:
        name: of the tensor.
        shape: its shape.
        quantised: whether it was stored in codes.
        positions: flat positions in that shape; None if no values were looked at.
        values: what was there, rounded to bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    quantised: bool = False
    positions: Positions | None = None
    values: Floats | None = None


def sketch(weights: Weights) -> Sketch:
    """The sketch of a base."""
    # Here, because a record checks its sketch by what is in this file.
    from lamina.checkpoint.record import Sketch

    tensors = weights.tensors
    through = set(some_quantised(tensors))
    notes = {}
    # In order of their names, so that files give the same sketch as the model.
    for name, tensor in sorted(tensors.items()):
        notes[name] = f"{_shape_note(tensor.shape)} {_note(tensor, name in through)}".rstrip()
    patterns = fold(notes)
    names = _sampled([n for n, _, note in _entries(patterns) if note not in _WITHOUT_VALUES])
    windows = max(1, min(_MOST_WINDOWS, _WINDOWS // max(1, len(names))))
    places = {name: _windows(name, tensors[name].shape, windows) for name in names}
    read = weights.read({name: place.ravel() for name, place in places.items()})
    values, offsets = [], []
    for name, place in places.items():
        there = read[name].reshape(place.shape)
        smallest = np.where(np.isnan(there), np.inf, np.abs(there)).argmin(axis=1)
        offsets.append(smallest.astype(np.uint8))
        values += [there[:, 0], np.take_along_axis(there, smallest[:, None], axis=1)[:, 0]]
    dense = [tensors[name] for name in names if not tensors[name].quantised]
    return Sketch(
        version=VERSION,
        tensors=patterns,
        samples=2 * windows,
        values=_packed([_bfloat16(each) for each in values]),
        offsets=_packed(offsets),
        dtype=_dtype_of(dense or [tensors[name] for name in names]),
        quantization=weights.quantization,
        whole=weights.whole,
    )


def _note(tensor: Tensor, looked_at: bool) -> str:
    if not _has_values(tensor):
        return _UNREAD_NOTE
    if not tensor.quantised:
        return ""
    return _QUANTISED_NOTE if looked_at else _PASSED_NOTE


def _dtype_of(tensors: Iterable[Tensor]) -> str | None:
    dtypes = [tensor.dtype for tensor in tensors if tensor.dtype]
    # It has the smallest range, so where there is one, values may have been rounded to it.
    if "float16" in dtypes:
        return "float16"
    return max(dtypes, key=dtypes.count, default=None)


def samples(found: Sketch) -> list[Sample]:
    """What a sketch of this version holds, tensor by tensor.

    Raises:
        ValueError: its parts don't belong together, or can't be true.
    """
    if not 2 <= found.samples <= 2 * _MOST_WINDOWS or found.samples % 2:
        raise ValueError(f"{found.samples} values per tensor")
    total = sum(count(pattern.partition(" ")[0]) for pattern in found.tensors)
    if total > _MOST_NAMES:
        raise ValueError(f"{total:,} tensors")
    entries = _entries(found.tensors)
    if len({name for name, _, _ in entries}) < len(entries):
        raise ValueError("a tensor is there twice")
    names = _sampled([name for name, _, note in entries if note not in _WITHOUT_VALUES])
    windows = found.samples // 2
    values = np.frombuffer(_unpacked(found.values), "<u2")
    offsets = np.frombuffer(_unpacked(found.offsets), np.uint8)
    if len(values) != len(names) * found.samples or len(offsets) != len(names) * windows:
        raise ValueError(f"{len(values)} values of {len(names)} tensors")
    each = zip(values.reshape(-1, 2 * windows), offsets.reshape(-1, windows), strict=True)
    held = dict(zip(names, each, strict=True))
    return [_sample(name, shape, note, held.get(name)) for name, shape, note in entries]


def _sample(name: str, shape: tuple[int, ...], note: str, held: Any) -> Sample:
    quantised = note in (_QUANTISED_NOTE, _PASSED_NOTE)
    if held is None:
        return Sample(name, shape, quantised)
    if not math.prod(shape):
        raise ValueError(f"{name} is empty, and has values")
    bits, offsets = held
    places = _windows(name, shape, len(offsets))
    if offsets.max() >= places.shape[1]:
        raise ValueError(f"{name}: a value out of its window")
    smallest = np.take_along_axis(places, offsets[:, None].astype(np.int64), axis=1)[:, 0]
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    return Sample(name, shape, quantised, np.concatenate([places[:, 0], smallest]), values)


def _entries(patterns: Iterable[str]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, note) in the order of the samples."""
    found = []
    for pattern in patterns:
        folded, _, rest = pattern.partition(" ")
        shape, _, note = rest.partition(" ")
        if note not in ("", _QUANTISED_NOTE, *_WITHOUT_VALUES):
            raise ValueError(f"{note[:40]!r} is said of {folded[:80]}")
        dims = _shape_of(shape)
        found += [(name, dims, note) for name in unfold(folded)]
    return found


def _shape_note(shape: Sequence[int]) -> str:
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


def _sampled(names: Sequence[str]) -> list[str]:
    return evenly(names, _MOST_TENSORS)


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of them, at even distances."""
    if len(names) <= most:
        return list(names)
    return [names[i * len(names) // most] for i in range(most)]


def some_quantised(tensors: Mapping[str, Tensor]) -> list[str]:
    """The quantised tensors that are looked at: some of the smaller half."""
    found = [name for name, each in tensors.items() if each.quantised and _has_values(each)]
    sizes = sorted(math.prod(tensors[name].shape) for name in found)
    small = [n for n in found if math.prod(tensors[n].shape) <= sizes[len(sizes) // 2]]
    return evenly(small, _QUANTISED)


def _has_values(tensor: Tensor) -> bool:
    return tensor.readable and math.prod(tensor.shape) > 0


def _windows(name: str, shape: tuple[int, ...], windows: int) -> Positions:
    """Flat positions, windows x width; a window lies within one row, so that rows may be added."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    # Windows of short rows have to differ too.
    width = max(1, min(_WIDTH, columns // 4))
    drawn = shake_256(f"{VERSION} {name} {_shape_note(shape)}".encode()).digest(16 * windows)
    numbers = np.frombuffer(drawn, "<u8").reshape(windows, 2)
    row = (numbers[:, 0] % np.uint64(rows)).astype(np.int64)
    column = (numbers[:, 1] % np.uint64(columns - width + 1)).astype(np.int64)
    return (row * columns + column)[:, None] + np.arange(width, dtype=np.int64)


def _bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, to even in the middle."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # Rounding must not carry a NaN over into infinity.
    bits = np.where(np.isnan(values), bits | np.uint32(0x400000), rounded)
    return (bits >> np.uint32(16)).astype(np.uint16)


def rounded(values: Floats) -> Floats:
    """The nearest bfloat16, as float32."""
    return (_bfloat16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _packed(parts: Sequence[NDArray[Any]]) -> str:
    raw = b"".join(part.astype(part.dtype.newbyteorder("<")).tobytes() for part in parts)
    return base64.b64encode(raw).decode()


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
