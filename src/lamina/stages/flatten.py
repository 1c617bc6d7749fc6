"""One adapter of one stage out of a chain: exactly, or with fewer ranks and the error of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lamina.checkpoint.adapter import AdapterFile, read_adapter
from lamina.checkpoint.chain import makers_of
from lamina.checkpoint.probe import ProbeComparison
from lamina.engine.variants import variant_for
from lamina.errors import StageError, nearest
from lamina.stages.adalora import as_plain_lora
from lamina.stages.approximate import approximate_updates
from lamina.stages.assembling import no_stages, with_probe, write_stage
from lamina.stages.flat import Flat, flat_of, summed
from lamina.stages.lamination import Chain, check_finite, take_apart
from lamina.stages.replay import open_base, replay
from lamina.stages.selection import Selection, select
from lamina.storage.atomic import atomic_directory
from lamina.storage.companions import copy_tokenizer
from lamina.storage.destination import check_destination


@dataclass(frozen=True)
class ModuleReport:
    """What flattening did in one module.

    Attributes:
        rank_before: of the chosen stages together.
        rank: of the result.
        relative_error: `‖ΔW - ΔW_r‖_F / ‖ΔW‖_F`, measured on the factors as they are stored; 0
            where nothing was left out.
        energy: the share of the squared singular values that is kept.
    """

    rank_before: int
    rank: int
    relative_error: float
    energy: float


@dataclass(frozen=True)
class FlattenReport:
    """What was saved.

    Attributes:
        path: the directory.
        stages: the stages that are one now, oldest first.
        left_out: stages of the chain that are not in it.
        exact: whether its update is the sum of theirs, up to one rounding of numbers.
        modules: plain module name -> what was done there.
        relative_error: as in a module, over all modules together.
        energy: likewise.
        scaling: `alpha / r` in all modules.
        parameters: entries of all tensors; before and after.
        dtypes: of the factors.
        tokenizer: the files of a tokenizer that came along.
        probe: how the answers of base and result differ from those of base and chosen chain; None
            without a base, or for a model that takes no tokens.
        notes: what is to be known beside that, a line each.
    """

    path: str
    stages: tuple[str, ...]
    left_out: tuple[str, ...]
    exact: bool
    modules: Mapping[str, ModuleReport]
    relative_error: float
    energy: float
    scaling: float
    parameters: tuple[int, int]
    dtypes: tuple[str, ...]
    tokenizer: tuple[str, ...]
    probe: ProbeComparison | None
    notes: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, int]:
        """The smallest and the largest rank of a module."""
        ranks = [module.rank for module in self.modules.values()]
        return min(ranks), max(ranks)


def flatten(
    path: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    stages: Sequence[str] | None = None,
    approximate: bool = False,
    base: nn.Module | str | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    **where: Any,
) -> FlattenReport:
    """Put a chain into one adapter of one stage: one config, the same `alpha / r` everywhere.

    Without `rank` and `energy` the sum is exact. With them each module keeps its largest singular
    values; one that has no more ranks than that stays exact. Works on files alone; a base is
    needed for a method whose update depends on it, and to compare answers.

    Args:
        path: a stage's directory, any plain PEFT adapter, or a hub id.
        out: the directory for the result.
        rank: the largest rank of a module.
        energy: the share of the squared singular values, in (0, 1], that each module's smallest
            sufficient rank is to hold.
        stages: only these, by their names; None takes all.
        approximate: take a method whose update is no sum of ranks (DoRA ...) as it acts on the
            base, and approximate that by `rank` or `energy`.
        base: the base, or its path or hub id. With it the answers of the result are compared with
            those of the chain.
        allow_base_mismatch: take a base unlike the one on record.
        force: save into a directory that has files already.
        where: `subfolder` and hub options of `path`.

    Raises:
        StageError: with everything that is wrong with the arguments for this adapter.
        CheckpointError: files are missing or broken, or `out` is taken.
    """
    place = check_destination(out, [path], force=force)
    file = as_plain_lora(read_adapter(path, **where))
    check_destination(out, [file.source], force=force)
    chain = take_apart(file, as_stored=True)
    indices, faults = _chosen(chain, stages)
    faults += [
        *_number_faults(rank, energy),
        *_method_faults(chain, approximate, base, rank, energy),
    ]
    if faults:
        raise StageError(
            f"{file.source} can't be flattened as asked.", faults=faults, cure=_cure(faults)
        )
    check_finite(chain)
    selection = select(chain, indices)
    opened = None if base is None else open_base(file, chain.record, base, allow_base_mismatch)
    if variant_for(chain.parts[-1].config).is_sum:
        made = summed(selection, rank, energy)
    else:
        made = approximate_updates(cast(nn.Module, opened), file, rank, energy)
    flat = flat_of(file, chain, selection, made)
    comparison, probe = None, flat.record.newest.probe
    if opened is not None:
        reference = (
            file
            if selection.whole
            else flat_of(file, chain, selection, summed(selection, None, None)).file
        )
        comparison, asked = replay(opened, reference, flat)
        # Of another base than the one on record, answers prove nothing.
        probe = probe or (None if allow_base_mismatch else asked)
    with atomic_directory(place) as staging:
        write_stage(staging, flat.file, with_probe(flat.record, probe))
        tokenizer = copy_tokenizer(file.source, staging)
    return _report(place, file, selection, flat, tokenizer, comparison)


def _report(
    place: Path,
    file: AdapterFile,
    selection: Selection,
    flat: Flat,
    tokenizer: tuple[str, ...],
    comparison: ProbeComparison | None,
) -> FlattenReport:
    before = {
        module: sum(part.factors[module].rank for part in parts if module in part.factors)
        for parts in [selection.chain.parts]
        for module in flat.made
    }
    tensors = flat.file.tensors
    factors = [each.factors for each in flat.made.values()]
    record = flat.record
    return FlattenReport(
        path=str(place),
        stages=tuple(stage.name for stage in record.stages),
        left_out=tuple(selection.left_out),
        exact=flat.error == 0,
        modules={
            module: ModuleReport(
                before[module],
                each.factors.rank,
                each.error / each.norm if each.norm else 0.0,
                each.energy,
            )
            for module, each in flat.made.items()
        },
        relative_error=flat.error,
        energy=flat.energy,
        scaling=factors[0].scaling,
        parameters=(_count(file.tensors), _count(tensors)),
        dtypes=tuple(
            sorted({str(x.dtype).removeprefix("torch.") for f in factors for x in (f.A, f.B)})
        ),
        tokenizer=tokenizer,
        probe=comparison,
        notes=tuple(_notes(file, selection, flat)),
    )


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _notes(file: AdapterFile, selection: Selection, flat: Flat) -> Iterator[str]:
    record = flat.record
    if file.config.task_type is not None and flat.file.config.task_type is None:
        yield "task_type is left out, since its head is that of a stage that is left out"
    along = no_stages(flat.file, record)
    if along:
        yield f"has no record: {', '.join(along[:4])} is the base's, and no stage's"
    if record.left_out:
        yield (
            f"trained on top of {', '.join(record.left_out)}, left out here; without that it is "
            "not what was trained"
        )
    yield from selection.overwritten
    for part in selection.chain.parts:
        if part.extras and part.is_sum:
            method = type(variant_for(part.config)).__name__
            yield f"what {method} keeps for its training is left out"
        if part.lamina.taken:
            yield (
                f"{part.lamina.stage} began by {part.lamina.began}: its ranks are plain ones now, "
                "over the base as it was"
            )


# --- validate -------------------------------------------------------------------------------------


def _chosen(chain: Chain, stages: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """The laminae of the stages, and what is wrong with their names."""
    if stages is None:
        return [*range(len(chain.parts))], []
    if not stages:
        return [], ["stages is empty: name at least one"]
    makers, chosen, faults = makers_of(chain.record), set(), []
    last = {part.lamina.stage: index for index, part in enumerate(chain.parts)}
    for name in stages:
        index = next((i for i, names in enumerate(makers) if name in names), None)
        if index is None:
            names = [stage.name for stage in chain.record.stages]
            close = nearest(name, names)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            faults.append(f"stages: there is no {name!r} in {' -> '.join(names)}{hint}")
        elif name not in last and not {*makers[index]} <= {*stages}:
            owner = chain.parts[index].lamina.stage
            faults.append(
                f"stages: {name!r} has no ranks of its own any more: they are in those of {owner!r}"
            )
        else:
            chosen.add(index)
    return sorted(chosen), faults


def _number_faults(rank: int | None, energy: float | None) -> list[str]:
    faults = []
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        faults.append(f"rank={rank!r} is not a positive integer")
    if energy is not None and not (isinstance(energy, (int, float)) and 0 < energy <= 1):
        faults.append(f"energy={energy!r} is not a share above 0 and up to 1")
    return faults


def _method_faults(
    chain: Chain, approximate: bool, base: object, rank: int | None, energy: float | None
) -> list[str]:
    """Why the adapter's update is not, or not yet, something that one plain LoRA can hold."""
    config = chain.parts[-1].config
    variant = variant_for(config)
    name = type(variant).__name__
    if variant.is_sum:
        return []
    if config.alora_invocation_tokens is not None or config.arrow_config is not None:
        return [f"method: {name} acts on some tokens only, which no plain LoRA does"]
    if not approximate:
        return [f"approximate: {name}'s update is no sum of ranks; it depends on the base"]
    faults = []
    if base is None:
        faults.append(f"base: {name}'s update depends on it")
    if rank is None and energy is None:
        faults.append(f"rank: {name}'s update has full rank; say how much of it to keep")
    return faults


def _cure(faults: Sequence[str]) -> str:
    ways = {
        "stages": "name stages that `lamina lineage DIR` shows with ranks",
        "rank": "rank=16 (--rank 16) or energy=0.99 (--energy 0.99)",
        "energy": "energy=0.99 (--energy 0.99)",
        "approximate": "approximate=True, base=..., rank=... (--approximate --base BASE --rank 64) "
        "takes what it does to the base and says how far off the result is; `lamina merge` keeps "
        "all of it",
        "base": "base=... (--base BASE)",
        "method": "use the adapter as it is",
    }
    return "; ".join(
        way for what, way in ways.items() if any(fault.startswith(what) for fault in faults)
    )
