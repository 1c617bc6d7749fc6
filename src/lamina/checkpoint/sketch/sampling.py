"""Which values of a base are sampled, and how they lie in a sketch; no torch.

From each tensor come windows of neighbouring values, at places that its name and shape alone
determine. The first value of a window stands for the tensor's values as they are, and is good for
a correlation. The smallest is the one that a small update moves by the most of its own steps: at
a hundredth of the usual magnitude a bfloat16 is a hundred times finer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lamina.checkpoint.sketch.folding import fold
from lamina.checkpoint.sketch.stored import (
    MOST_TENSORS,
    MOST_WINDOWS,
    PASSED,
    QUANTISED,
    UNREAD,
    VERSION,
    WITHOUT_VALUES,
    entries,
    evenly,
    packed,
    places_in,
    shape_note,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lamina.checkpoint.record import Sketch
    from lamina.checkpoint.sketch.stored import Floats, Positions

# Few tensors are looked at more closely.
_WINDOWS = 640
# A quantised weight is read as a whole, so only some are.
_SOME_QUANTISED = 16


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


def sketch(weights: Weights) -> Sketch:
    """The sketch of a base."""
    # Here, because a record checks its sketch by what is in this file.
    from lamina.checkpoint.record import Sketch

    tensors = weights.tensors
    through = set(some_quantised(tensors))
    notes = {}
    # In order of their names, so that files give the same sketch as the model.
    for name, tensor in sorted(tensors.items()):
        notes[name] = f"{shape_note(tensor.shape)} {_note(tensor, name in through)}".rstrip()
    patterns = fold(notes)
    names = evenly(
        [n for n, _, note in entries(patterns) if note not in WITHOUT_VALUES], MOST_TENSORS
    )
    windows = max(1, min(MOST_WINDOWS, _WINDOWS // max(1, len(names))))
    places = {name: places_in(name, tensors[name].shape, windows) for name in names}
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
        values=packed([_bfloat16(each) for each in values]),
        offsets=packed(offsets),
        dtype=_dtype_of(dense or [tensors[name] for name in names]),
        quantization=weights.quantization,
        whole=weights.whole,
    )


def _note(tensor: Tensor, looked_at: bool) -> str:
    if not _has_values(tensor):
        return UNREAD
    if not tensor.quantised:
        return ""
    return QUANTISED if looked_at else PASSED


def _dtype_of(tensors: Iterable[Tensor]) -> str | None:
    dtypes = [tensor.dtype for tensor in tensors if tensor.dtype]
    # It has the smallest range, so where there is one, values may have been rounded to it.
    if "float16" in dtypes:
        return "float16"
    return max(dtypes, key=dtypes.count, default=None)


def some_quantised(tensors: Mapping[str, Tensor]) -> list[str]:
    """The quantised tensors that are looked at: some of the smaller half."""
    found = [name for name, each in tensors.items() if each.quantised and _has_values(each)]
    sizes = sorted(math.prod(tensors[name].shape) for name in found)
    small = [n for n in found if math.prod(tensors[n].shape) <= sizes[len(sizes) // 2]]
    return evenly(small, _SOME_QUANTISED)


def _has_values(tensor: Tensor) -> bool:
    return tensor.readable and math.prod(tensor.shape) > 0


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
