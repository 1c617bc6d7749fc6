"""What changed between two adapters, or two stages of a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.checkpoint.adapter import read_adapter
from lamina.checkpoint.chain import chain_of
from lamina.checkpoint.difference import ModuleChange, TensorChange, module_change, tensor_change
from lamina.checkpoint.origin import PREFIX
from lamina.checkpoint.shapes import natural_order
from lamina.config import LoraConfig, numbers
from lamina.engine.compose import Factors, concatenate
from lamina.errors import CheckpointError, StageError, nearest
from lamina.stages.lamination import Chain, Part, check_finite, take_apart

# What a config says of its surroundings, or that is shown as ranks and stages anyway.
_NOT_SHOWN = frozenset({"peft_version", "inference_mode", "auto_mapping"})


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: as it was asked for.
        stages: of its chain, oldest first.
        rank: the smallest and the largest rank of a module.
    """

    name: str
    stages: tuple[str, ...]
    rank: tuple[int, int]


@dataclass(frozen=True)
class AdapterDifference:
    """What changed from `a` to `b`.

    Attributes:
        a: the first.
        b: the second.
        modules: every module that either adapts.
        tensors: modules trained whole, biases, and what a variant keeps beside its factors.
        config: field -> its two values, where the newest configs differ.
        built_on: the chain of `b` begins with that of `a`; then angles are between what `a` does
            and the change, else between `a` and `b`.
        only_factors: `modules` tells of B and A, but the method (DoRA and its like) makes something
            else of them.
    """

    a: Side
    b: Side
    modules: tuple[ModuleChange, ...]
    tensors: tuple[TensorChange, ...]
    config: dict[str, tuple[Any, Any]]
    built_on: bool
    only_factors: bool

    @property
    def norm_change(self) -> float:
        """Frobenius norm of the change of all modules together."""
        return float(torch.tensor([each.norm_change for each in self.modules]).double().norm())

    @property
    def norm_a(self) -> float:
        """Frobenius norm of all updates of `a` together."""
        return float(torch.tensor([each.norm_a for each in self.modules]).double().norm())

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**dataclasses.asdict(self), "norm_change": self.norm_change, "norm_a": self.norm_a}


@dataclass(frozen=True)
class _Opened:
    side: Side
    config: LoraConfig
    factors: dict[str, Factors]
    others: dict[str, torch.Tensor]
    blocks: dict[str, int]
    only_factors: bool


def diff(a: str | Path, b: str | Path) -> AdapterDifference:
    """Compare two adapters by their updates, module by module, without the base.

    Args:
        a: an adapter's directory or hub id; `DIR#STAGE` is the chain up to and including a stage.
        b: likewise.

    Raises:
        CheckpointError: one can't be read, or the same module has other shapes in both.
        StageError: there is no such stage, or a later one has trained its ranks on.
    """
    one, other = _open(str(a)), _open(str(b))
    older, newer = one.side.stages, other.side.stages
    built_on = len(older) < len(newer) and newer[: len(older)] == older
    modules = sorted({**one.factors, **other.factors}, key=natural_order)
    changes, faults = [], []
    for module in modules:
        blocks = one.blocks.get(module, other.blocks.get(module, 1))
        try:
            changes.append(
                module_change(
                    module,
                    one.factors.get(module),
                    other.factors.get(module),
                    blocks=blocks,
                    built_on=built_on,
                )
            )
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(
            f"{a} and {b} can't be compared.",
            faults=faults[:8],
            cure="compare adapters of one base; `lamina doctor DIR` tells of damaged files",
        )
    names = sorted({**one.others, **other.others}, key=natural_order)
    return AdapterDifference(
        a=one.side,
        b=other.side,
        modules=tuple(changes),
        tensors=tuple(
            tensor_change(name, one.others.get(name), other.others.get(name)) for name in names
        ),
        config=_changed(one.config, other.config),
        built_on=built_on,
        only_factors=one.only_factors or other.only_factors,
    )


def _open(asked: str) -> _Opened:
    directory, _, stage = asked.rpartition("#")
    if not directory or Path(asked).expanduser().exists():
        directory, stage = asked, ""
    chain = take_apart(read_adapter(directory))
    check_finite(chain)
    stages = [each.name for each in chain.record.stages]
    parts = chain.parts
    if stage:
        parts = _up_to(chain, stage, directory)
        stages = stages[: stages.index(stage) + 1]
    newest = parts[-1]
    factors = summed(parts)
    ranks = [each.rank for each in factors.values()]
    return _Opened(
        side=Side(asked, tuple(stages), (min(ranks, default=0), max(ranks, default=0))),
        config=newest.config,
        factors=factors,
        others=_others(chain, newest, whole=not stage),
        blocks=blocks_in(newest, factors),
        only_factors=not all(part.is_sum for part in parts),
    )


def summed(parts: Sequence[Part]) -> dict[str, Factors]:
    """Plain module name -> the sum of all parts, in fp64."""
    found: dict[str, list[Factors]] = {}
    for part in parts:
        for module, each in part.factors.items():
            exact = Factors(each.A.double(), each.B.double(), each.scaling)
            found.setdefault(module, []).append(exact)
    return {module: concatenate(each, 1.0) for module, each in found.items()}


def _up_to(chain: Chain, stage: str, directory: str) -> tuple[Part, ...]:
    """The groups of ranks as they were when `stage` was saved."""
    summaries = chain_of(chain.record).stages
    names = [each.name for each in summaries]
    if stage not in names:
        close = nearest(stage, names)
        raise StageError(
            f"{directory} has no stage {stage!r}.",
            faults=[f"it has {', '.join(map(repr, names))}"],
            cure=f"'{directory}#{close[0] if close else names[-1]}'",
        )
    at = names.index(stage)
    kept = [each.trained for each in summaries[: at + 1] if each.trained is not None]
    later = [each.name for each in summaries[at + 1 :] if each.trained in kept]
    if later or not kept:
        raise StageError(
            f"{directory} no longer has the ranks of {stage!r} as it left them: "
            f"{' and '.join(map(repr, later)) or 'its record does not say which'} trained them on.",
            cure=f"compare with the directory that {stage!r} was saved to",
        )
    return chain.parts[: max(kept) + 1]


def _others(chain: Chain, newest: Part, *, whole: bool) -> dict[str, torch.Tensor]:
    # The file has one copy of what was trained whole: that of the end of the chain.
    tensors = {**chain.others, **newest.extras} if whole else newest.extras
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def blocks_in(part: Part, factors: Mapping[str, Factors]) -> dict[str, int]:
    """How many experts lie side by side in the factors of adapted parameters."""
    if not part.config.target_parameters:
        return {}
    ranks = {
        module: numbers(part.config, module.replace(".base_layer", ""))[0] for module in factors
    }
    return {
        module: factors[module].rank // rank
        for module, rank in ranks.items()
        if factors[module].rank % rank == 0
    }


def _changed(one: LoraConfig, other: LoraConfig) -> dict[str, tuple[Any, Any]]:
    theirs, ours = one.to_dict(), other.to_dict()
    return {
        name: (theirs[name], ours[name])
        for name in theirs
        if name in ours and name not in _NOT_SHOWN and theirs[name] != ours[name]
    }
