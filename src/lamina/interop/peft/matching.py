"""Which modules a config's patterns mean, by peft's functions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from lamina.config import ALL_LINEAR, TaskType
from lamina.config.expressions import fullmatch
from lamina.config.patterns import means
from lamina.engine.linears import linear_names
from lamina.engine.names import places, suffixes
from lamina.engine.targets import layer_index

# Linear layers of quantisers and accelerators, which derive from none of torch's.
_QUANTISED = {
    "BaseQuantLinear",
    "EetqLinear",
    "HQQLinear",
    "LayerNormLinear",
    "Linear",
    "PatchedLinear",
    "QuantizedLinear",
}


class ExcludedModule:
    """Says no, because a module is excluded."""

    def __bool__(self) -> bool:
        return False


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Whether a regular expression means a module's whole name."""
    return re.fullmatch(r".*", key, re.DOTALL) if fullmatch(target_pattern, key) else None


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first pattern that means a module, or its whole name if none does."""
    for key in pattern_keys:
        if means(key, key_to_match):
            return key
    return key_to_match


def _means(patterns: Collection[str] | str, name: str) -> bool:
    if isinstance(patterns, str):
        return bool(match_target_against_key(patterns, name))
    return any(suffix in patterns for suffix in suffixes(name))


def check_target_module_exists(config: Any, key: str) -> Any:
    """Whether a config's `target_modules` mean a module of this name.

    Returns:
        True or a match; else something false: an `_ExcludedModule` if it is excluded.
    """
    if getattr(config, "exclude_modules", None) and _means(config.exclude_modules, key):
        return ExcludedModule()
    for saved in getattr(config, "modules_to_save", None) or ():
        if fullmatch(rf"(.*\.)?({saved})(\..*)?", key):
            return ExcludedModule()
    targets = config.target_modules
    if targets is None and getattr(config, "target_parameters", None) is not None:
        return False
    if isinstance(targets, str):
        return match_target_against_key(targets, key)
    if key in targets:
        return True
    return _means(targets, key) and _layer_wanted(config, key)


def _layer_wanted(config: Any, key: str) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    index = layer_index(key, getattr(config, "layers_pattern", None) or None)
    return index in ([wanted] if isinstance(wanted, int) else wanted)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of a model's modules, sorted into matched and unmatched by an adapter."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in tuner.model.named_modules():
        hit = tuner._check_target_module_exists(config, key)
        found["matched" if hit else "unmatched"].append(key)
    return found


def maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace "all-linear" by the names that it means in a model."""
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        peft_config.target_modules = set(all_linear(peft_config, model))
    return peft_config


def all_linear(config: Any, model: nn.Module) -> list[str]:
    """What "all-linear" means: a head is left out only where transformers or the task names it."""
    from transformers import PreTrainedModel

    base: Any = model
    known = isinstance(base, PreTrainedModel)
    named = known and base.get_output_embeddings() is not None
    classifies = known and config.task_type == TaskType.SEQ_CLS
    # Adapting a head that is kept tied would adapt the embedding, which isn't linear.
    tied = getattr(config, "ensure_weight_tying", False)
    with_head = not (named or classifies or tied)
    return linear_names(list(places(model)), model, include_head=with_head)


def find_minimal_target_modules(
    target_modules: Collection[str], other_module_names: Collection[str]
) -> set[str]:
    """The fewest endings that mean all targets and none of the other modules.

    Raises:
        ValueError: there are no targets, one is empty, or one is among the others.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    targets, others = set(target_modules), set(other_module_names)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if targets & others:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not "
            "happen, please open a GitHub issue at https://github.com/huggingface/peft/issues with "
            "the code to reproduce this issue"
        )
    taken = {ending for name in others for ending in suffixes(name)}
    chosen: set[str] = set()
    for name in sorted(targets, key=lambda name: list(reversed(list(suffixes(name))))):
        endings = list(suffixes(name))[::-1]
        free = [ending for ending in endings if ending not in taken]
        if free and not any(ending in chosen for ending in endings[:-1]):
            chosen.add(free[0])
    return chosen or targets


def get_in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """(in, out) features of anything that has them; (None, None) and a warning else."""
    for names in (
        ("in_features", "out_features"),
        ("in_channels", "out_channels"),
        ("num_embeddings", "embedding_dim"),
        ("infeatures", "outfeatures"),
        ("input_size", "output_size"),
        ("nx", "nf"),
    ):
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            if names[0] in ("in_features", "in_channels") and not _is_known(module):
                _warn_unknown(module)
            return sizes[0], sizes[1]
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    _warn_unknown(module)
    return None, None


def _is_known(module: nn.Module) -> bool:
    torchs = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, torchs) or any(
        kind.__name__ in _QUANTISED for kind in type(module).__mro__
    )


def _warn_unknown(module: nn.Module) -> None:
    warnings.warn(
        f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.",
        UserWarning,
        stacklevel=3,
    )
