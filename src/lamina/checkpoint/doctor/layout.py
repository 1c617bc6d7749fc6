"""How tensors lie in a safetensors file: each its length, one after the other, to the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.header import data_start

# dtype -> bits of an entry.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_AGAIN = "save or download it again; readers that check refuse it"


def layout_findings(file: Path, tensors: Sequence[StoredTensor]) -> list[Finding]:
    """What is wrong with where a file's header says that its tensors lie."""
    wrong = [each.key for each in tensors if not _has_its_length(each)]
    ordered = sorted(tensors, key=lambda each: (each.begin, each.end))
    apart = [b.key for a, b in pairwise(ordered) if a.end != b.begin]
    findings = []
    if wrong:
        what = f"{file.name}: tensors don't have the bytes of their shape and dtype"
        findings.append(Finding("error", "layout-broken", what, tuple(wrong), _AGAIN))
    elif apart or (ordered and ordered[0].begin != 0):
        what = f"{file.name}: tensors overlap or have gaps between them"
        findings.append(Finding("error", "layout-broken", what, tuple(apart), _AGAIN))
    left = file.stat().st_size - data_start(file) - (ordered[-1].end if ordered else 0)
    if left > 0 and not findings:
        what = f"{file.name} has {left:,} bytes behind its last tensor"
        findings.append(Finding("error", "layout-broken", what, (file.name,), _AGAIN))
    return findings


def _has_its_length(tensor: StoredTensor) -> bool:
    bits = BITS.get(tensor.dtype)
    return bits is None or math.prod(tensor.shape) * bits == 8 * tensor.size
