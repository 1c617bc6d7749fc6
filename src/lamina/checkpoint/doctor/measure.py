"""What the values of an adapter's tensors are like, all of them read once; no torch.

Of a pair of factors only r x r matrices are kept, `A A^T` and `B^T B`: from them the norms of
ranks, of the update and its singular values follow without ever making `B A`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.numbers import FORMATS, as_reals
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.header import data_start
from lamina.checkpoint.shapes import FactorShapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lamina.checkpoint.doctor.numbers import Bits, Reals

# Entries that are worked on at once.
_CHUNK = 1 << 22
# Beyond it (the ranks of all experts of a layer side by side) only norms are taken.
_MOST_RANKS = 512


@dataclass(frozen=True)
class Values:
    """What the entries of one tensor are like.

    Attributes:
        nan: how many are NaN.
        infinite: how many are infinite.
        largest: the largest finite magnitude, or a bound above it that is below 65504.
    """

    nan: int
    infinite: int
    largest: float

    @property
    def finite(self) -> bool:
        """Whether all entries are finite numbers."""
        return self.nan == self.infinite == 0

    @property
    def zero(self) -> bool:
        """Whether all entries are zero."""
        return self.finite and self.largest == 0


@dataclass(frozen=True)
class Pair:
    """The factors of one module, by rank.

    Attributes:
        module: plain name of the module.
        norms_A: norm of each row of A.
        norms_B: norm of each column of B.
        gram_A: `A A^T` (r x r); None where ranks are too many or not in pairs.
        gram_B: `B^T B` (r x r); likewise.
    """

    module: str
    norms_A: NDArray[np.float64]
    norms_B: NDArray[np.float64]
    gram_A: NDArray[np.float64] | None = None
    gram_B: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Measures:
    """All that was measured.

    Attributes:
        values: plain name of a tensor -> its values; integers are passed over.
        pairs: plain name of a module -> its factors, where all entries are finite.
        unread: names of tensors that can't be read.
    """

    values: Mapping[str, Values] = field(default_factory=dict)
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def measure(tensors: Mapping[str, StoredTensor], contents: Contents | None) -> Measures:
    """Read all tensors of an adapter, a pair of factors at a time."""
    reader = _Reader()
    values: dict[str, Values] = {}
    pairs: dict[str, Pair] = {}
    for shapes in contents.factors if contents else ():
        a, b = (tensors[key] for key in shapes.keys)
        found = reader.pair(shapes, a, b)
        if found is None:
            continue
        values[shapes.keys[0]], values[shapes.keys[1]], pair = found
        if pair is not None:
            pairs[shapes.module] = pair
    for name, tensor in tensors.items():
        if name not in values and tensor.dtype in FORMATS:
            bits = reader.bits(tensor)
            if bits is not None:
                values[name] = survey(bits, tensor.dtype)
    return Measures(values, pairs, tuple(reader.unread))


class _Reader:
    """The files of one adapter, mapped."""

    def __init__(self) -> None:
        self.unread: list[str] = []
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def bits(self, tensor: StoredTensor) -> Bits | None:
        """The bits of a tensor's entries in its shape; None if they can't be had."""
        width, _, _ = FORMATS[tensor.dtype]
        if not tensor.size:
            return None
        try:
            content = self._map(tensor)[tensor.begin : tensor.end]
            return content.view(f"<u{width}").reshape(tensor.shape or (1,))
        except (OSError, ValueError):
            self.unread.append(tensor.key)
            return None

    def _map(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        name = str(tensor.file)
        if name not in self._maps:
            start = data_start(tensor.file)
            self._maps[name] = np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=start)
        return self._maps[name]

    def pair(
        self, shapes: FactorShapes, a: StoredTensor, b: StoredTensor
    ) -> tuple[Values, Values, Pair | None] | None:
        """(values of A, values of B, the pair); None if they are no factors of numbers."""
        if a.dtype not in FORMATS or b.dtype not in FORMATS:
            return None
        bits_a, bits_b = self.bits(a), self.bits(b)
        if bits_a is None or bits_b is None:
            return None
        # Ranks are the rows of both.
        rows_a = bits_a.reshape(shapes.rank, -1)
        columns_b = bits_b.reshape(bits_b.shape[0], bits_b.shape[1], -1)
        whole = shapes.rank == shapes.shape_B[1] and shapes.rank <= _MOST_RANKS
        with np.errstate(all="ignore"):
            norms_a, gram_a = _rows(rows_a, a.dtype, whole)
            norms_b, gram_b = _columns(columns_b, b.dtype, whole)
        values_a = _values(norms_a, bits_a, a.dtype)
        values_b = _values(norms_b, bits_b, b.dtype)
        measured = np.isfinite(norms_a).all() and np.isfinite(norms_b).all()
        pair = Pair(shapes.module, norms_a, norms_b, gram_a, gram_b) if measured else None
        return values_a, values_b, pair


def _rows(
    bits: Bits, dtype: str, whole: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """(norms of the rows, their products with one another) of a matrix r x n."""
    ranks, length = bits.shape
    step = max(1, _CHUNK // max(1, ranks))
    squares = np.zeros(ranks)
    gram = np.zeros((ranks, ranks)) if whole else None
    for start in range(0, length, step):
        part = as_reals(np.ascontiguousarray(bits[:, start : start + step]), dtype)
        if gram is None:
            squares += np.einsum("ij,ij->i", part, part)
        else:
            gram += part @ part.T
    return _norms(squares, gram), gram


def _columns(
    bits: Bits, dtype: str, whole: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """(norms of the columns, their products with one another) of out x r x kernel."""
    out, ranks, kernel = bits.shape
    step = max(1, _CHUNK // max(1, ranks * kernel))
    squares = np.zeros(ranks)
    gram = np.zeros((ranks, ranks)) if whole else None
    for start in range(0, out, step):
        part = as_reals(np.ascontiguousarray(bits[start : start + step]), dtype)
        flat = part[:, :, 0] if kernel == 1 else _kernel_last(part)
        if gram is None:
            squares += np.einsum("ij,ij->j", flat, flat)
        else:
            gram += flat.T @ flat
    return _norms(squares, gram), gram


def _kernel_last(part: Reals) -> Reals:
    """out x r x kernel -> (out kernel) x r."""
    return np.ascontiguousarray(part.transpose(0, 2, 1)).reshape(-1, part.shape[1])


def _norms(squares: NDArray[np.float64], gram: NDArray[np.float64] | None) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.sqrt(squares if gram is None else np.diagonal(gram))
    return found


def _values(norms: NDArray[np.float64], bits: Bits, dtype: str) -> Values:
    """A factor's values: from its norms where these say enough, else entry by entry."""
    largest = float(norms.max(initial=0.0))
    if 0 < largest < 65504:
        return Values(0, 0, largest)
    return survey(bits, dtype)


def survey(bits: Bits, dtype: str) -> Values:
    """Count NaN and infinity, and find the largest magnitude, by the bits."""
    width, limit, infinity = FORMATS[dtype]
    magnitude = bits.dtype.type((1 << (8 * width - 1)) - 1)
    nan = infinite = largest = 0
    for part in _parts(bits):
        chunk = part & magnitude
        peak = int(chunk.max(initial=0))
        if peak >= limit:
            bad = chunk[chunk >= limit]
            here = 0 if infinity is None else int(np.count_nonzero(bad == infinity))
            infinite += here
            nan += bad.size - here
            peak = int(chunk[chunk < limit].max(initial=0))
        largest = max(largest, peak)
    peak_bits = np.array([largest], dtype=bits.dtype)
    return Values(nan, infinite, float(as_reals(peak_bits, dtype)[0]))


def _parts(bits: Bits) -> list[Bits]:
    flat = bits.reshape(-1)
    return [flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK)]
