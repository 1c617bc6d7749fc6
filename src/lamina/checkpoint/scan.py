"""Find factors that are all zero, and tensors with NaN or infinity, by their bits; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lamina.checkpoint.header import data_start

if TYPE_CHECKING:
    # It takes longer to import than all of numpy.
    from numpy.typing import NDArray

    Bits: TypeAlias = NDArray[np.unsignedinteger[Any]]

# dtype on disk -> bytes, and the bits of the smallest magnitude that is not a finite number.
# Without the sign, the bits of floating-point numbers are ordered as the numbers are.
_FORMATS = {
    "F64": (8, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7F80_0000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Span:
    """The part of a factor's rank dimension that one stage trained last."""

    stage: str | None
    begin: int
    end: int


@dataclass(frozen=True)
class Question:
    """What to ask of one tensor.

    Attributes:
        key: its name in the file.
        module: plain name of its module.
        factor: "A" or "B"; None for other tensors, which may be all zero.
        axis: its rank dimension.
        spans: the parts to look at one by one; empty for the whole.
    """

    key: str
    module: str
    factor: Literal["A", "B"] | None = None
    axis: int = 0
    spans: Sequence[Span] = ()


@dataclass(frozen=True)
class Suspect:
    """A tensor, or a stage's part of it, that is not as trained weights are.

    Attributes:
        key: its name in the file.
        module: plain name of its module.
        factor: "A", "B" or None.
        stage: whose ranks; None for the whole tensor.
        kind: "zero" (all of it) or "not finite" (NaN or infinity in it).
        entries: how many entries are so.
    """

    key: str
    module: str
    factor: Literal["A", "B"] | None
    stage: str | None
    kind: Literal["zero", "not finite"]
    entries: int


def scan(
    file: Path, header: Mapping[str, Mapping[str, Any]], questions: Sequence[Question]
) -> list[Suspect]:
    """The suspects in one safetensors file, which is mapped and read once.

    Integer tensors are passed over. NaN and infinity are looked for in every tensor, zero in
    factors only.
    """
    asked = [each for each in questions if header[each.key]["dtype"] in _FORMATS]
    if not asked or not any(_length(header[each.key]) for each in asked):
        return []
    content = np.memmap(file, dtype=np.uint8, mode="r", offset=data_start(file))
    return [
        suspect
        for each in asked
        if _length(header[each.key])
        for suspect in _suspects(each, content, header[each.key])
    ]


def _length(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


def _suspects(
    question: Question, content: NDArray[np.uint8], entry: Mapping[str, Any]
) -> Iterator[Suspect]:
    width, limit = _FORMATS[entry["dtype"]]
    begin, end = entry["data_offsets"]
    bits: Bits = content[begin:end].view(f"<u{width}").reshape(entry["shape"] or [1])
    for span in question.spans or [Span(None, 0, bits.shape[question.axis])]:
        part = _slice(bits, question.axis, span)
        largest, bad = _survey(part, width, limit)
        named = (question.key, question.module, question.factor, span.stage)
        if bad:
            yield Suspect(*named, "not finite", bad)
        elif largest == 0 and question.factor is not None:
            yield Suspect(*named, "zero", part.size)


def _slice(bits: Bits, axis: int, span: Span) -> Bits:
    part: Bits = bits[span.begin : span.end] if axis == 0 else bits[:, span.begin : span.end]
    return part


def _survey(bits: Bits, width: int, limit: int) -> tuple[int, int]:
    """The largest magnitude's bits, and the number of entries that are not finite."""
    magnitude = bits.dtype.type((1 << (8 * width - 1)) - 1)
    largest = bad = 0
    rows = max(1, _CHUNK * len(bits) // bits.size)
    for start in range(0, len(bits), rows):
        chunk = bits[start : start + rows] & magnitude
        peak = int(chunk.max(initial=0))
        largest = max(largest, peak)
        if peak >= limit:
            bad += int(np.count_nonzero(chunk >= limit))
    return largest, bad
