"""The entries of a tensor on disk as numpy arrays, whatever its dtype; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    # It takes longer to import than all of numpy.
    from numpy.typing import NDArray

    Bits: TypeAlias = NDArray[np.unsignedinteger[Any]]
    Reals: TypeAlias = NDArray[np.floating[Any]]

# dtype on disk -> bytes of an entry, the bits of the smallest magnitude that is no finite number,
# and those of infinity (None if the format has none). Without the sign, the bits of floating-point
# numbers are ordered as the numbers are.
FORMATS: dict[str, tuple[int, int, int | None]] = {
    "F64": (8, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7F80_0000, 0x7F80_0000),
    "F16": (2, 0x7C00, 0x7C00),
    "BF16": (2, 0x7F80, 0x7F80),
    "F8_E5M2": (1, 0x7C, 0x7C),
    "F8_E4M3": (1, 0x7F, None),
}
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def as_reals(bits: Bits, dtype: str) -> Reals:
    """The numbers that bits of a dtype stand for, in float32, or float64 if they are that wide."""
    if dtype in _PLAIN:
        values = bits.view(_PLAIN[dtype])
        return values.astype(np.float32) if dtype == "F16" else values
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.take(_TABLES[dtype], bits)


def _small_floats(exponent_bits: int, bias: int) -> NDArray[np.float32]:
    """The values of all 256 floats of 8 bits that have this many bits for the exponent."""
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256, dtype=np.int64)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / float(1 << mantissa_bits)
    value = np.where(
        exponent == 0,
        np.ldexp(fraction, 1 - bias),
        np.ldexp(1 + fraction, exponent - bias),
    )
    return np.where(codes & 0x80, -value, value).astype(np.float32)


def _tables() -> dict[str, NDArray[np.float32]]:
    tables = {"F8_E5M2": _small_floats(5, 15), "F8_E4M3": _small_floats(4, 7)}
    for dtype, table in tables.items():
        _, limit, infinity = FORMATS[dtype]
        magnitude = np.arange(256) & 0x7F
        table[magnitude >= limit] = np.nan
        if infinity is not None:
            table[magnitude == infinity] = np.inf
    return tables


_TABLES = _tables()
