"""An adapter's config against its record: the ranks, the scalings and the targets it gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lamina.checkpoint.adapter import AdapterFile
from lamina.checkpoint.doctor.patterns import Targets
from lamina.checkpoint.record import KEY, StageRecord
from lamina.config import AdaLoraConfig, LoraConfig, PeftConfig, numbers
from lamina.engine.flat_config import flat_config_of_names
from lamina.engine.layers import LayerAdapter
from lamina.errors import LaminaError, RecordError

_NUMBERS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def scaling_of(config: LoraConfig, module: str) -> float:
    """The scaling that a config means in a module."""
    r, alpha = numbers(config, module)
    return LayerAdapter.of(config, r, alpha).scaling


@dataclass(frozen=True)
class ConfigFaults:
    """Where a config says something else than the record beside it.

    Attributes:
        faults: module by module.
        cure: the entries of `adapter_config.json` that mend it.
    """

    faults: tuple[str, ...] = ()
    cure: str = ""


def refuse_edited_config(file: AdapterFile, chain: StageRecord) -> None:
    """Refuse a stage whose config gives other ranks or another scaling than its record.

    What an adapter computes hangs on them as on its tensors. A plain adapter has nothing to compare
    with.

    Raises:
        RecordError: it names the modules, and the entries that mend it.
    """
    if KEY not in file.metadata:
        return
    found = config_faults(file, chain, targets=False, alike=True)
    if found.faults:
        raise RecordError(
            f"The config of {file.source} is not as it was saved: it contradicts the stage record "
            f"in {len(found.faults)} module(s).",
            faults=found.faults[:8],
            cure=f"{found.cure}; if it is meant, PeftModel.from_pretrained opens it as it is",
        )


def config_faults(
    file: AdapterFile, record: StageRecord | None, *, targets: bool, alike: bool
) -> ConfigFaults:
    """Compare ranks, scalings and targets that a config gives with those on record.

    Args:
        file: the adapter.
        record: its record.
        targets: tell also of modules that the config doesn't target.
        alike: tell also of another scaling that is the same in all modules.
    """
    config = file.config
    # A parameter's own name isn't in the file, and AdaLoRA has ranks of its own.
    apart = isinstance(config, AdaLoraConfig) or config.target_parameters
    if record is None or not record.laminae or apart:
        return ConfigFaults()
    ranks: dict[str, int] = {}
    for lamina in record.laminae:
        for module, rank in lamina.ranks.items():
            ranks[module] = ranks.get(module, 0) + rank
    try:
        own = [_config(each.config) for each in record.laminae]
        scaling = scaling_of(own[-1], "")
        of_numbers = [*_of_ranks(config, ranks), *_of_scalings(config, own, ranks, alike)]
    except (LaminaError, ZeroDivisionError):
        return ConfigFaults()
    missed = _untargeted(config, ranks) if targets else []
    cures = []
    if of_numbers:
        cures += _numbers_back(config, own, ranks, scaling)
    if missed:
        cures.append("add to target_modules " + ", ".join(repr(each) for each in missed))
    untargeted = (
        f"{module}: not in target_modules"
        for module in ranks
        if any(module.endswith(each) for each in missed)
    )
    return ConfigFaults(
        (*of_numbers, *untargeted),
        f"in adapter_config.json, {'; '.join(cures)}" if cures else "",
    )


def _config(values: dict[str, Any]) -> LoraConfig:
    config = PeftConfig.from_dict(values, source="the record")
    assert isinstance(config, LoraConfig)
    return config


def _of_ranks(config: LoraConfig, ranks: dict[str, int]) -> Iterator[str]:
    for module, rank in ranks.items():
        here = numbers(config, module)[0]
        if here != rank:
            yield f"{module}: rank {here} by the config, {rank} on record"


def _of_scalings(
    config: LoraConfig, own: list[LoraConfig], ranks: dict[str, int], alike: bool
) -> Iterator[str]:
    wanted = dict.fromkeys(ranks, scaling_of(own[-1], ""))
    here = {module: scaling_of(config, module) for module in ranks}
    if not alike and len({round(here[m] / wanted[m], 6) for m in ranks}) == 1:
        return
    alone = {module: scaling_of(own[-1], module) for module in ranks}
    if len(own) == 1 and all(_close(here[m], alone[m]) for m in ranks):
        # A stage by itself may have kept the config that it was trained with.
        return
    for module, each in here.items():
        # Of another rank, its scaling is off too.
        same_rank = numbers(config, module)[0] == ranks[module]
        if same_rank and not _close(each, wanted[module]):
            yield f"{module}: scaled by {each:g} by the config, by {wanted[module]:g} on record"


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * abs(other)


def _untargeted(config: LoraConfig, ranks: dict[str, int]) -> list[str]:
    """The last names of modules that have ranks, and are targeted by nothing."""
    targets = Targets(config.to_dict())
    missed = [m for m in ranks if not targets.hits(m) or targets.excluded(m)]
    return sorted({module.rpartition(".")[2] for module in missed})


def _numbers_back(
    config: LoraConfig, own: list[LoraConfig], ranks: dict[str, int], scaling: float
) -> list[str]:
    try:
        before = flat_config_of_names(config, own, ranks, scaling)
    except LaminaError:
        return []
    return [
        f"set {name} to {json.dumps(getattr(before, name))}"
        for name in _NUMBERS
        if getattr(before, name) != getattr(config, name)
    ]
