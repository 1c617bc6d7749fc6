"""Look at a merged model by other arithmetic: entries read back, and computed again in fp64.

It shares nothing with what made them but where they lie: another reader, the adapter's tensors as
they are in the file, and the formula of the paper, row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lamina.checkpoint.origin import plain_key, split_key
from lamina.checkpoint.shapes import scaling_in
from lamina.checkpoint.stream.changes import Folded, Replaced
from lamina.checkpoint.stream.plan import Plan, Task
from lamina.engine.layers.embedding import Embedding
from lamina.engine.layers.linear import Linear
from lamina.engine.variants import Dora, PlainLora

_TENSORS = 512
_ROWS = 3
_U32 = 2.0**-23


@dataclass(frozen=True)
class Sampled:
    """What was found.

    Attributes:
        entries: how many were looked at.
        worst: the largest difference from what it should be, in units of the last place, beyond
            what sums in fp32 explain: half a unit is the least that rounding can do.
        wrong: tensors with entries that rounding doesn't explain.
        unseen: changed tensors of kinds that aren't looked at.
    """

    entries: int
    worst: float
    wrong: tuple[str, ...]
    unseen: int


@dataclass(frozen=True)
class _Row:
    """What a row should be, and how far it may be off because fp32 was summed in."""

    exact: torch.Tensor
    slack: torch.Tensor


def sample(
    plan: Plan,
    base: Path,
    made: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
) -> Sampled:
    """Compute some rows of a merged model again.

    Args:
        plan: where everything lies.
        base: the base's directory.
        made: the merged model's.
        tensors: the adapter's, by their names on disk.
        config: the adapter's, as a dict.
    """
    adapter: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, leaf = split_key(plain_key(key))
        adapter.setdefault(module, {})[leaf or ""] = tensor
    entries, worst, unseen = 0, 0.0, 0
    wrong = []
    for task in _evenly([task for task in plan.tasks if task.sources]):
        expected = _expected(task, base, adapter, config)
        if expected is None:
            unseen += len(task.outputs)
            continue
        for row, wanted in expected:
            actual = _read(made, task.outputs[0].place.file, task.outputs[0].place.key, row)
            off, fine = _off(actual, wanted)
            entries += actual.numel()
            worst = max(worst, off)
            if not fine and task.outputs[0].place.key not in wrong:
                wrong.append(task.outputs[0].place.key)
    return Sampled(entries, worst, tuple(wrong), unseen)


def _evenly(tasks: list[Task]) -> list[Task]:
    step = max(1, -(-len(tasks) // _TENSORS))
    return tasks[::step]


def _expected(
    task: Task,
    base: Path,
    adapter: Mapping[str, Mapping[str, torch.Tensor]],
    config: Mapping[str, Any],
) -> Iterator[tuple[int, _Row]] | None:
    """Some rows of a tensor; None if this doesn't know how they come about."""
    output, source = task.outputs[0], task.sources[0]
    if task.unit is not None or not output.place.shape or not source.is_dense:
        return iter(()) if task.is_copy else None
    rows = _rows(output.place.key, output.place.shape[0])
    if not task.changes:
        return ((row, _as_it_was(_read(base, source.file, source.key, row))) for row in rows)
    change = task.changes[output.name]
    if isinstance(change, Replaced):
        return ((row, _as_it_was(change.value[row].detach())) for row in rows)
    module = output.name.rpartition(".")[0]
    if not isinstance(change, Folded) or not _known(change) or module not in adapter:
        return None
    factors = adapter[module]
    held = change.module._parameters[change.leaf]

    def before(row: int) -> torch.Tensor:
        if held is not None and not held.is_meta:
            # The adapter has brought along what it lies over.
            return held[row].detach()
        return _read(base, source.file, source.key, row)

    return (
        (row, _summed(before(row), row, change, factors, config, module))
        for row in rows
        if row < source.shape[0]
    )


def _known(change: Folded) -> bool:
    layer, *more = change.layers
    variant = type(layer.records[change.adapter].variant)
    if more or type(layer) not in (Linear, Embedding):
        return False
    return variant is PlainLora or (variant is Dora and not _by_columns(layer))


def _by_columns(layer: Any) -> bool:
    return bool(layer.is_embedding or layer.fan_in_fan_out)


def _as_it_was(row: torch.Tensor) -> _Row:
    exact = row.double()
    return _Row(exact, torch.zeros_like(exact))


def _summed(
    before: torch.Tensor,
    row: int,
    change: Folded,
    factors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    module: str,
) -> _Row:
    """`W + s B A`, and for DoRA that times `m / norm`."""
    layer = change.layers[0]
    a, b = (factors[leaf] for leaf in _leaves(layer.is_embedding))
    scaling = scaling_in(config, module, a.shape[0])
    across = _by_columns(layer)
    left, right = (a[:, row], b.T) if across else (b[row], a)
    left, right = left.double(), right.double()
    exact = before.double() + scaling * (left @ right)
    sizes = before.double().abs() + abs(scaling) * (left.abs() @ right.abs())
    slack = _U32 * (a.shape[0] + 4) * sizes
    if "lora_magnitude_vector" in factors:
        norm = exact.norm()
        ratio = factors["lora_magnitude_vector"].flatten()[row].double() / norm
        exact, slack = exact * ratio, (slack + 8 * _U32 * exact.abs()) * ratio.abs() * 4
    return _Row(exact, slack)


def _leaves(is_embedding: bool) -> tuple[str, str]:
    if is_embedding:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _rows(key: str, count: int) -> list[int]:
    """The first, the last, and some between, the same each time."""
    drawn = hashlib.sha256(key.encode()).digest()
    between = [
        int.from_bytes(drawn[i * 8 : i * 8 + 8], "little") % max(1, count) for i in range(_ROWS)
    ]
    return sorted({0, count - 1, *between}) if count else []


def _read(directory: Path, file: str, key: str, row: int) -> torch.Tensor:
    with safe_open(directory / file, framework="pt") as opened:
        found: torch.Tensor = opened.get_slice(key)[row : row + 1]
    return found[0]


def _off(actual: torch.Tensor, wanted: _Row) -> tuple[float, bool]:
    """(largest difference in units of the last place, whether rounding explains all)."""
    if actual.shape != wanted.exact.shape:
        return float("inf"), False
    info = torch.finfo(actual.dtype)
    least = torch.full_like(wanted.exact, info.smallest_normal)
    exponent = torch.maximum(wanted.exact.abs(), least).log2().floor()
    unit = info.eps * torch.exp2(exponent)
    difference = (actual.double() - wanted.exact).abs()
    fine = difference <= 0.501 * unit + wanted.slack
    beyond = (difference - wanted.slack).clamp(min=0)
    return float((beyond / unit).max()), bool(fine.all())
