"""A config for given total ranks: one that every PEFT reader takes to mean exactly these."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lamina.config import LoraConfig, numbers
from lamina.engine.names import places
from lamina.engine.targets import make_plan, spell, spell_saved
from lamina.errors import StageError


def flat_config(
    model: nn.Module,
    newest: LoraConfig,
    all_configs: Sequence[LoraConfig],
    ranks: Mapping[str, int],
    scaling: float,
    saved: Sequence[str],
) -> LoraConfig:
    """The config of a file with these total ranks, and `scaling` in every module.

    `alpha / r` is the same number everywhere, because some readers take only the global one, and
    `r` is the largest rank, because some allocate by it.

    Args:
        model: the base model, adapted.
        newest: the config of the newest lamina; what is not about ranks is taken from it.
        all_configs: the configs of all laminae.
        ranks: plain module name -> total rank.
        scaling: the file's.
        saved: plain names of the modules trained whole.

    Raises:
        StageError: no config means exactly this; a fault of Lamina, told before it is written.
    """
    everything = list(places(model))
    begun = replace(
        as_written(newest),
        **EVERYWHERE,
        target_modules=set(spell(everything, set(ranks))),
        modules_to_save=spell_saved(everything, saved) or None,
    )
    for config in _candidates(begun, all_configs, ranks, scaling):
        if _means(model, config, ranks, scaling):
            return config
    raise StageError("No adapter config describes these ranks; please report the model.")


def flat_config_of_names(
    begun: LoraConfig,
    all_configs: Sequence[LoraConfig],
    ranks: Mapping[str, int],
    scaling: float,
) -> LoraConfig:
    """`flat_config` where there is no model, only the names in a file.

    Args:
        begun: what is not about ranks; its targets are those of the file.
        all_configs: the configs of all laminae.
        ranks: plain module name -> total rank.
        scaling: the file's.

    Raises:
        StageError: no config means exactly this.
    """
    for config in _candidates(as_written(begun), all_configs, ranks, scaling):
        found = {module: numbers(config, module) for module in ranks}
        if all(
            r == ranks[module] and abs(alpha / r - scaling) <= 1e-12 * abs(scaling)
            for module, (r, alpha) in found.items()
        ):
            return config
    raise StageError("No adapter config describes these ranks; please report the names.")


# The fields that narrow down what `target_modules` hits.
EVERYWHERE: dict[str, Any] = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}


def as_written(config: LoraConfig) -> LoraConfig:
    """A config as it is written to a file: how A and B began is over."""
    return replace(
        config,
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
        inference_mode=True,
    )


def _candidates(
    begun: LoraConfig,
    all_configs: Sequence[LoraConfig],
    ranks: Mapping[str, int],
    scaling: float,
) -> Iterator[LoraConfig]:
    """Configs with these ranks in shorter patterns, and in such that can't mean anything else."""
    top = max(ranks.values())
    for escape in (False, True):
        patterns = _rank_patterns(ranks, escape=escape)
        yield replace(
            begun,
            r=top,
            lora_alpha=_tidy(scaling * top),
            use_rslora=False,
            rank_pattern=patterns,
            alpha_pattern={key: _tidy(scaling * rank) for key, rank in patterns.items()},
            bias=_widest_bias(all_configs),
            lora_bias=any(each.lora_bias for each in all_configs),
        )


def _rank_patterns(ranks: Mapping[str, int], *, escape: bool) -> dict[str, int]:
    """Patterns for the ranks that aren't the largest: a last component where it decides."""
    top = max(ranks.values())
    by_leaf: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(rank)
    patterns: dict[str, int] = {}
    for module, rank in ranks.items():
        leaf = module.rpartition(".")[2]
        if len(by_leaf[leaf]) == 1 and not escape:
            if rank != top:
                patterns[leaf] = rank
        elif rank != top or len(by_leaf[leaf]) > 1:
            patterns[f"^{re.escape(module)}" if escape else module] = rank
    # Sorted, as tools that write a config anew sort it: the first entry that matches counts.
    return dict(sorted(patterns.items()))


def _widest_bias(configs: Sequence[LoraConfig]) -> str:
    kinds = Counter(config.bias for config in configs)
    return next((kind for kind in ("all", "lora_only") if kind in kinds), "none")


def _means(model: nn.Module, config: LoraConfig, ranks: Mapping[str, int], scaling: float) -> bool:
    plan = make_plan(model, config, strict=False)
    found = {layer.name: layer.record.r for layer in plan.layers}
    close = all(abs(x.record.scaling - scaling) <= 1e-12 * abs(scaling) for x in plan.layers)
    return close and found == dict(ranks)


def _tidy(value: float) -> Any:
    return int(value) if value == int(value) else value
