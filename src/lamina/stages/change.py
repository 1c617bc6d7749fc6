"""What a stage changed against the one that it was built on, from their files alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.origin import PREFIX, ROWS
from lamina.checkpoint.shapes import natural_order
from lamina.engine.compose import Factors, concatenate
from lamina.model import PeftModel
from lamina.stages.diff import blocks_in, summed
from lamina.stages.lamination import Chain, Part, check_finite, take_apart

# B of older ranks is written anew with every stage, rounded once.
_ROUNDING = 2.0**-20


@dataclass(frozen=True)
class UpdateChange:
    """The change of one module's update, in fp64.

    Attributes:
        module: its plain name.
        change: dW of the stage, less dW of the one before; only of ranks that aren't the same.
        before: dW of the one before, all ranks; None without one.
        blocks: experts that lie side by side in the factors.
    """

    module: str
    change: Factors
    before: Factors | None
    blocks: int


@dataclass(frozen=True)
class WholeChange:
    """A tensor that is no factor: of a module trained whole, a bias, rows, what a variant keeps.

    Attributes:
        name: its plain name: a parameter's, a table's for rows, else as on disk.
        now: its values.
        before: those of the stage before; None if it had none, so that they were the base's.
        rows: the rows of the table that `now` has; None for all else.
        rows_before: those of them that the stage before had replaced; others were the base's.
        owned_by_base: whether the base has a tensor of this name, or such a table, that is the
            same whenever it is loaded: a task's head is drawn at random.
    """

    name: str
    now: torch.Tensor
    before: torch.Tensor | None
    rows: tuple[int, ...] | None = None
    rows_before: Mapping[int, torch.Tensor] = field(default_factory=dict)
    owned_by_base: bool = True


@dataclass(frozen=True)
class StageChange:
    """All that a stage changed.

    Attributes:
        updates: of the modules with ranks that are new or were trained on.
        wholes: of what is no factor.
    """

    updates: tuple[UpdateChange, ...]
    wholes: tuple[WholeChange, ...]


def change_of(stage: str | Path, before: str | Path | None) -> StageChange:
    """Compare a stage with the one that it was built on; ranks that it left alone drop out.

    Args:
        stage: its directory.
        before: that of the other; None if it was begun on the base.

    Raises:
        CheckpointError: a file can't be read, or has NaN or infinity.
        RecordError: record and tensors contradict each other.
    """
    new = _opened(stage)
    old = None if before is None else _opened(before)
    return StageChange(tuple(_updates(new, old)), tuple(_wholes(new, old)))


def _opened(path: str | Path) -> Chain:
    chain = take_apart(read_adapter(path))
    check_finite(chain)
    return chain


# --- ranks ---------------------------------------------------------------------------------------


def _updates(new: Chain, old: Chain | None) -> Iterator[UpdateChange]:
    olds = old.parts if old else ()
    kept = {part.lamina.stage for part in new.parts for other in olds if _same(part, other)}
    added = _summed(part for part in new.parts if part.lamina.stage not in kept)
    gone = _summed(part for part in olds if part.lamina.stage not in kept)
    whole = _summed(olds)
    blocks = blocks_in(new.parts[-1], {**gone, **added})
    for module in sorted({**added, **gone}, key=natural_order):
        parts = [added[module]] if module in added else []
        if module in gone:
            one = gone[module]
            parts.append(Factors(one.A, -one.B, one.scaling))
        yield UpdateChange(
            module, concatenate(parts, 1.0), whole.get(module), blocks.get(module, 1)
        )


def _summed(parts: Iterable[Part]) -> dict[str, Factors]:
    return summed(list(parts))


def _same(one: Part, other: Part) -> bool:
    """Whether these are the same ranks of the same stage, as far as fp32 can tell."""
    if one.lamina.stage != other.lamina.stage or one.factors.keys() != other.factors.keys():
        return False
    return all(_equal(own, other.factors[module]) for module, own in one.factors.items())


def _equal(one: Factors, other: Factors) -> bool:
    if one.A.shape != other.A.shape or one.B.shape != other.B.shape:
        return False
    theirs = other.B.double() * other.scaling
    apart = (one.B.double() * one.scaling - theirs).abs().max() if theirs.numel() else 0.0
    room = _ROUNDING * float(theirs.abs().max()) if theirs.numel() else 0.0
    return torch.equal(one.A.double(), other.A.double()) and float(apart) <= room


# --- what is no factor ---------------------------------------------------------------------------


def _wholes(new: Chain, old: Chain | None) -> Iterator[WholeChange]:
    heads = PeftModel.for_task(new.parts[-1].config.task_type).task_heads
    olds = {} if old is None else _others(old)
    for key, now in _others(new).items():
        name = key.removeprefix(PREFIX)
        table = name.removesuffix(f".{ROWS}")
        if table != name:
            yield _rows(table, now, new, old, olds.get(key))
        else:
            plain = name.replace(".base_layer.", ".")
            head = plain.rpartition(".")[0].endswith(heads) if heads else False
            yield WholeChange(plain, now, _like(olds.get(key), now), owned_by_base=not head)
    before = {} if old is None else old.parts[-1].extras
    for key, now in new.parts[-1].extras.items():
        name = key.removeprefix(PREFIX)
        yield WholeChange(name, now, _like(before.get(key), now), owned_by_base=False)
    yield from _biases_of_B(new, old)


def _others(chain: Chain) -> Mapping[str, torch.Tensor]:
    """What belongs to a stage by the record; a base's own weights in the file don't."""
    record = chain.record
    found = {}
    for key, tensor in chain.others.items():
        name = key.removeprefix(PREFIX)
        bias = name.replace(".base_layer.", ".") in record.biases
        saved = any(name.startswith(f"{module}.") for module in record.saved_modules)
        if bias or saved or name.endswith(f".{ROWS}"):
            found[key] = tensor
    return found


def _like(tensor: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor | None:
    return tensor if tensor is not None and tensor.shape == now.shape else None


def _rows(
    table: str,
    now: torch.Tensor,
    new: Chain,
    old: Chain | None,
    before: torch.Tensor | None,
) -> WholeChange:
    """Those of a table that are other ones than before, or weren't replaced then."""
    indices = new.rows[table]
    had = {} if old is None or before is None else dict(zip(old.rows[table], before, strict=True))
    changed = [
        place
        for place, row in enumerate(indices)
        if row not in had or not torch.equal(had[row], now[place])
    ]
    rows = tuple(indices[place] for place in changed)
    known = {row: had[row] for row in rows if row in had}
    return WholeChange(table, now[changed], None, rows, known)


def _biases_of_B(new: Chain, old: Chain | None) -> Iterator[WholeChange]:
    """What `lora_bias` adds to outputs."""
    ours, theirs = _summed_biases(new), {} if old is None else _summed_biases(old)
    for module, now in ours.items():
        before = theirs.get(module, torch.zeros_like(now))
        yield WholeChange(f"{module}.lora_B.bias", now, before, owned_by_base=False)


def _summed_biases(chain: Chain) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for part in chain.parts:
        for module, own in part.factors.items():
            if own.bias is not None:
                bias = own.bias.double() * own.scaling
                found[module] = found.get(module, torch.zeros_like(bias)) + bias
    return found
