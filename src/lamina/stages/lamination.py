"""Many groups of ranks <-> one adapter file: exactly, through concatenation along the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.origin import (
    A_LEAVES,
    B_LEAVES,
    LEAVES,
    PREFIX,
    plain_key,
    rows_in,
    split_key,
)
from lamina.checkpoint.record import Lamina, StageRecord
from lamina.checkpoint.shapes import fit_together
from lamina.config import AdaLoraConfig, LoraConfig, PeftConfig
from lamina.engine.compose import Factors, concatenate, separate
from lamina.engine.variants import variant_for
from lamina.errors import CheckpointError
from lamina.stages.configs import refuse_edited_config, scaling_of

# Why AdaLoRA is trained apart from stages.
WITHOUT_STAGES = "its ranks are shared out in training, and belong to no stage"


@dataclass(frozen=True)
class Part:
    """One lamina with its weights.

    Attributes:
        lamina: its entry in the record.
        config: its config.
        factors: plain module name -> its factors there.
        extras: what its variant keeps beside them, such as DoRA's magnitudes, by names on disk.
    """

    lamina: Lamina
    config: LoraConfig
    factors: dict[str, Factors]
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_sum(self) -> bool:
        """Whether its update is a sum of ranks, so that others can be laid beside it."""
        return variant_for(self.config).is_sum


@dataclass(frozen=True)
class Chain:
    """A chain as it was read from a file.

    Attributes:
        source: where it came from.
        record: its record; of a plain adapter, one stage of unknown origin.
        parts: its laminae, oldest first.
        others: modules trained whole, biases and replaced rows, by their names on disk.
        embeddings: plain names of the adapted embeddings, whose factors have names of their own.
        rows: plain name of a table -> the indices of its replaced rows, in the file's order.
    """

    source: str
    record: StageRecord
    parts: tuple[Part, ...]
    others: dict[str, torch.Tensor]
    embeddings: frozenset[str] = frozenset()
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)


def take_apart(file: AdapterFile, *, as_stored: bool = False) -> Chain:
    """The laminae of a file, each with its own factors.

    The biases of B are summed in the file; the newest lamina that has one in a module carries
    the sum there.

    Args:
        file: what was read.
        as_stored: leave B as it is in the file, with the file's scaling in front, rather than as
            the lamina's own config means it: nothing is rounded then.

    Raises:
        CheckpointError: a module lacks one of its factors, or it is AdaLoRA.
        RecordError: record, config and tensors contradict each other.
    """
    if isinstance(file.config, AdaLoraConfig):
        raise CheckpointError(
            f"{file.source} is an adapter of AdaLoRA: {WITHOUT_STAGES}.",
            cure="PeftModel.from_pretrained(model, DIR) opens it; lamina.save_as_lora(path, model, "
            "rank) makes plain LoRA of it, to build stages on",
        )
    file = replace(file, tensors={plain_key(key): x for key, x in file.tensors.items()})
    record = file.record()
    refuse_edited_config(file, record)
    if not record.laminae:
        raise CheckpointError(
            f"{file.source} has no ranks of any stage.",
            cure="PeftModel.from_pretrained(model, DIR) opens what is in it",
        )
    wholes, others, extras = _wholes(file)
    configs = [
        cast(LoraConfig, PeftConfig.from_dict(lamina.config, source=f"{file.source} (record)"))
        for lamina in record.laminae
    ]
    factors: list[dict[str, Factors]] = [{} for _ in configs]
    for module, whole in wholes.items():
        here = [i for i, lamina in enumerate(record.laminae) if module in lamina.ranks]
        ranks = [record.laminae[i].ranks[module] for i in here]
        scalings = [whole.scaling if as_stored else scaling_of(configs[i], module) for i in here]
        carrier = next((i for i in reversed(here) if configs[i].lora_bias), None)
        for i, part in zip(here, separate(whole, ranks, scalings), strict=True):
            factors[i][module] = _with_bias(part, whole, configs[i], carries=i == carrier)
    parts = [
        Part(lamina, config, own)
        for lamina, config, own in zip(record.laminae, configs, factors, strict=True)
    ]
    if extras:
        _refuse_several(parts, f"in {file.source}")
        parts[-1] = replace(parts[-1], extras=extras)
    embeddings = {split_key(key)[0] for key in file.tensors if split_key(key)[1] == A_LEAVES[1]}
    rows = rows_in(file.config, file.shapes)
    return Chain(file.source, record, tuple(parts), others, frozenset(embeddings), rows)


def _refuse_several(parts: Sequence[Part], where: str) -> None:
    """Raise if there is more than one lamina, and one of them can't be laid beside others."""
    if len(parts) > 1:
        raise CheckpointError(
            f"The laminae {where} can't share one file: the update of at least one is no sum of "
            "ranks.",
            faults=[
                f"{part.lamina.stage!r}: {type(variant_for(part.config)).__name__}"
                for part in parts
                if part.extras or not part.is_sum
            ],
            cure="lamina merge PARENT -o MERGED folds the parent into its base; begin on that",
        )


def _with_bias(part: Factors, whole: Factors, config: LoraConfig, *, carries: bool) -> Factors:
    if not config.lora_bias or whole.bias is None:
        return part
    ratio = whole.scaling / part.scaling if carries else 0.0
    return Factors(part.A, part.B, part.scaling, whole.bias * ratio)


def _wholes(
    file: AdapterFile,
) -> tuple[dict[str, Factors], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Factors by modules; tensors of no adapted module; what a variant keeps in adapted ones."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    extras = {}
    for key, tensor in file.tensors.items():
        module, leaf = split_key(key)
        if leaf is None:
            others[key] = tensor
        elif leaf not in LEAVES:
            extras[f"{PREFIX}{module}.{leaf}"] = tensor
        else:
            grouped.setdefault(module, {})[leaf] = tensor
    wholes = {}
    halves = []
    for module, leaves in grouped.items():
        a = next((leaves[leaf] for leaf in A_LEAVES if leaf in leaves), None)
        b = next((leaves[leaf] for leaf in B_LEAVES if leaf in leaves), None)
        if a is None or b is None:
            halves.append(f"{module} has no {'A' if a is None else 'B'}")
            continue
        if not fit_together(tuple(a.shape), tuple(b.shape)):
            halves.append(f"{module} has factors of the shapes {[*a.shape]} and {[*b.shape]}")
            continue
        scaling = scaling_of(file.config, module)
        wholes[module] = Factors(a, b, scaling, leaves.get("lora_B.bias"))
    if halves:
        raise CheckpointError(
            f"{file.source} lacks a factor, or has others, in {len(halves)} module(s).",
            faults=halves[:8],
            cure="save or download the adapter again; the file is incomplete",
        )
    return wholes, others, extras


def put_together(parts: Sequence[Part], scaling: float) -> dict[str, Factors]:
    """Plain module name -> the one update that is the sum of all parts, with one scaling.

    Raises:
        CheckpointError: there are several, and one is no sum of ranks.
    """
    if not all(part.is_sum for part in parts):
        _refuse_several(parts, "of this model")
    with_bias = any(part.config.lora_bias for part in parts)
    modules = dict.fromkeys(module for part in parts for module in part.factors)
    together = {}
    for module in modules:
        whole = concatenate(
            [part.factors[module] for part in parts if module in part.factors], scaling
        )
        if with_bias and whole.bias is None:
            zeros = whole.B.new_zeros(whole.B.shape[0])
            whole = Factors(whole.A, whole.B, whole.scaling, zeros)
        together[module] = whole
    return together


def to_tensors(wholes: Mapping[str, Factors], embeddings: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file, by their names on disk."""
    tensors = {}
    for module, whole in wholes.items():
        place = 1 if module in embeddings else 0
        tensors[f"{PREFIX}{module}.{A_LEAVES[place]}"] = whole.A
        tensors[f"{PREFIX}{module}.{B_LEAVES[place]}"] = whole.B
        if whole.bias is not None:
            tensors[f"{PREFIX}{module}.lora_B.bias"] = whole.bias
    return tensors


def check_finite(chain: Chain) -> None:
    """Refuse a chain with factors that are no numbers: no algebra can be done with them.

    Raises:
        CheckpointError: it names the modules.
    """
    faults = [
        f"{module} in the ranks of {part.lamina.stage!r}"
        for part in chain.parts
        for module, own in part.factors.items()
        if not (own.A.isfinite().all() and own.B.isfinite().all())
    ]
    if faults:
        raise CheckpointError(
            f"{chain.source} has NaN or infinity in {len(faults)} module(s).",
            faults=faults[:8],
            cure="lamina inspect DIR shows them; an earlier stage may be whole",
        )
