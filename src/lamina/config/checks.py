"""What can be wrong with the values of a config, a line for each fault."""

from __future__ import annotations

import sys
from typing import Any

from lamina.config.expressions import is_plain, why_not
from lamina.config.patterns import in_layers, whole

# Ranks are sizes of tensors, which are counted in 64 bits.
LARGEST_RANK = 2**24
_LARGEST_INDEX = 2**31
# In one table; names of modules aren't counted.
_MOST_EXPRESSIONS = 2_000
# Fields that make an adapter another variant of LoRA.
_VARIANTS = (
    "use_dora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "kasa_config",
)


def faults_of_numbers(config: Any) -> list[str]:
    """Faults of ranks, alphas and the dropout."""
    faults = []
    ranks = {"r": config.r, **{f"rank_pattern[{k!r}]": v for k, v in _items(config.rank_pattern)}}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
            faults.append(f"{name}={rank!r}: a rank is a positive integer")
        elif rank > LARGEST_RANK:
            faults.append(f"{name}={rank!r}: no layer has room for more than {LARGEST_RANK:,}")
    alphas = {f"alpha_pattern[{k!r}]": v for k, v in _items(config.alpha_pattern)}
    for name, alpha in {"lora_alpha": config.lora_alpha, **alphas}.items():
        if not _is_number(alpha) or alpha == 0:
            faults.append(f"{name}={alpha!r}: a number other than 0 (0 would switch LoRA off)")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        faults.append(f"lora_dropout={config.lora_dropout!r}: a probability from 0 to below 1")
    return faults


def faults_of_choices(config: Any) -> list[str]:
    """Faults of what is chosen from a list, and of names."""
    faults = []
    if config.bias not in ("none", "all", "lora_only"):
        faults.append(f"bias={config.bias!r}: one of 'none', 'all', 'lora_only'")
    for name in ("fan_in_fan_out", "use_rslora", "lora_bias", "inference_mode"):
        if not isinstance(getattr(config, name), bool):
            faults.append(f"{name}={getattr(config, name)!r}: True or False")
    if not isinstance(config.init_lora_weights, (bool, str)):
        faults.append(f"init_lora_weights={config.init_lora_weights!r}: True, False or a name")
    elif config.lora_bias and isinstance(config.init_lora_weights, str):
        # PEFT would not open the file.
        faults.append("lora_bias=True goes with init_lora_weights=True or False only")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        faults.extend(_faults_of_names(name, getattr(config, name)))
    if config.modules_to_save is not None and not _is_names(config.modules_to_save):
        faults.append(f"modules_to_save={config.modules_to_save!r}: a list of strings")
    return faults + faults_of_patterns(config) + faults_of_variants(config)


def faults_of_variants(config: Any) -> list[str]:
    """Faults of what makes an adapter more than plain LoRA."""
    faults = []
    if config.use_dora is not None and not isinstance(config.use_dora, bool):
        faults.append(f"use_dora={config.use_dora!r}: True or False")
    if config.use_dora and config.lora_bias:
        faults.append("lora_bias=True is not supported for DoRA, please pass use_dora=False")
    if config.use_dora and config.megatron_config:
        faults.append("DoRA does not support megatron_core, please set use_dora=False")
    size = config.qalora_group_size
    if not _is_token(size) or size == 0:
        faults.append(f"qalora_group_size={size!r}: a positive number of features")
    tokens = config.alora_invocation_tokens
    known = isinstance(tokens, (list, tuple)) and tokens and all(map(_is_token, tokens))
    if tokens is not None and not known:
        faults.append(f"alora_invocation_tokens={tokens!r}: a list of token ids, at least one")
    asked = [name for name in _VARIANTS if getattr(config, name)]
    if config.init_lora_weights == "mica":
        asked.append("init_lora_weights='mica'")
    if len(asked) > 1:
        faults.append(
            f"Invalid or unsupported variant combination: {' and '.join(asked)}; each of them says "
            "what becomes of A and B, so that an adapter has one of them"
        )
    return faults


def faults_of_patterns(config: Any) -> list[str]:
    """Faults of the two tables of patterns."""
    faults = []
    for name in ("rank_pattern", "alpha_pattern"):
        table = getattr(config, name)
        if table is not None and not isinstance(table, dict):
            faults.append(f"{name}={table!r}: a dict from names to numbers")
        keys = [key for key, _ in _items(table)]
        expressions = sum(not is_plain(str(key)) for key in keys)
        if expressions > _MOST_EXPRESSIONS:
            limit = f"{_MOST_EXPRESSIONS:,}"
            faults.append(f"{name} has {expressions:,} regular expressions, more than {limit}")
            continue
        for key in keys:
            faults.extend(_pattern_faults(name, key))
    return faults


def _faults_of_names(name: str, value: Any) -> list[str]:
    if value is not None and not _is_names(value) and not isinstance(value, str):
        return [f"{name}={value!r}: a string or a list of strings"]
    if name != "layers_pattern":
        return _regex_faults(name, value) if isinstance(value, str) else []
    patterns = [value] if isinstance(value, str) else (value or ())
    faults = [why_not(in_layers(pattern), with_groups=True) for pattern in patterns]
    return [f"{name}: {fault}" for fault in faults if fault]


def _pattern_faults(name: str, key: object) -> list[str]:
    if isinstance(key, str) and is_plain(key):
        return []
    shown = f"{name}[{key!r}]"
    # By itself it may be whole where it isn't as a part, and the other way around.
    faults = _regex_faults(shown, key)
    return faults or _regex_faults(shown, whole(str(key)))


def faults_of_targets(config: Any) -> list[str]:
    """Faults of what says which layers are adapted."""
    faults = []
    if not _is_indices(config.layers_to_transform):
        faults.append(
            f"layers_to_transform={config.layers_to_transform!r}: an index from 0 up, or a list"
        )
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) not in (None, [], "", ()):
                faults.append(f"{name} can't be combined with a string as target_modules")
    if config.layers_pattern and config.layers_to_transform is None:
        faults.append("layers_pattern says where layers are, layers_to_transform which: set it")
    parameters = config.target_parameters
    if parameters is not None and not _is_names(parameters):
        faults.append(f"target_parameters={parameters!r}: a list of strings")
    faults += _faults_of_tokens(config.trainable_token_indices)
    others = parameters or config.trainable_token_indices
    if config.target_modules is not None and not (config.target_modules or others):
        faults.append("target_modules is empty; leave it at None for the usual ones")
    return faults


def _faults_of_tokens(tokens: Any) -> list[str]:
    lists = tokens if isinstance(tokens, dict) else {"": tokens}
    return [
        f"trainable_token_indices={tokens!r}: a list of indices from 0 up, or a dict from names to "
        "such lists"
        for name, indices in lists.items()
        if not isinstance(name, str) or not (indices is None or _is_index_list(indices))
    ][:1]


def _is_index_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and _is_indices(value)


def _items(pattern: Any) -> list[tuple[str, Any]]:
    return list(pattern.items()) if isinstance(pattern, dict) else []


def _is_number(value: object) -> bool:
    """Whether it is a finite number; a whole one may be too large to be one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_INDEX


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(name, str) for name in value
    )


def _is_indices(value: object) -> bool:
    indices = value if isinstance(value, (list, tuple)) else [value]
    return value is None or all(
        isinstance(index, int) and not isinstance(index, bool) and 0 <= index < _LARGEST_INDEX
        for index in indices
    )


def _regex_faults(name: str, pattern: object) -> list[str]:
    if not isinstance(pattern, str):
        return [f"{name}: {pattern!r} is not a string"]
    fault = why_not(pattern)
    return [] if fault is None else [f"{name}: {fault}"]


def is_off(value: object) -> bool:
    """Whether a field's value means that its feature isn't asked for."""
    return value is None or value is False or value in ({}, [], ())
