"""Adapters of mixture-of-experts models from before transformers fused the experts' weights.

Such a model had a linear layer for each expert and projection; now one parameter holds all experts,
and gate and up projections side by side. For expert e, with A (r x in) and B (out x r):

    A_e = [A_gate; A_up]        (2r x in),       B_e = diag(B_gate, B_up)     (2 out x 2r)

so that the sum of the two old updates is the new one, exactly.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.config import ALL_LINEAR
from lamina.interop.peft.matching import all_linear, check_target_module_exists


@dataclass(frozen=True)
class Experts:
    """How an architecture's experts were called.

    Attributes:
        fused: the projections that are side by side now, in that order.
        down: the other projection.
        renamed: parts of names that have changed, as (old, new).
    """

    fused: tuple[str, str]
    down: str
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def parameters(self) -> dict[str, str]:
        """Old module -> the parameter that holds its weights now."""
        names = dict.fromkeys(self.fused, "gate_up_proj")
        return {"gate": "gate.weight", **names, self.down: "down_proj"}


_KINDS = {
    "mixtral": Experts(("w1", "w3"), "w2", ((".block_sparse_moe.", ".mlp."),)),
    "qwen2_moe": Experts(("gate_proj", "up_proj"), "down_proj"),
}


def experts_of(model: Any) -> Experts | None:
    """What there is to know of a model's experts; None where nothing was fused."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as patterns
    except ImportError:
        return None
    return _KINDS.get({**patterns, "mixtral": "mixtral", "qwen2_moe": "qwen2_moe"}.get(kind, ""))


def fuse_config(config: Any, model: nn.Module) -> None:
    """Let a config target the fused parameters where it names the layers of before, in place.

    Raises:
        ValueError: it targets only one of two projections that are one now.
    """
    kind = experts_of(model)
    if kind is None or config.target_modules is None:
        return
    targets = _leaves(config, model, kind)
    if not targets:
        return
    old = {target: target.rpartition(".")[2] for target in targets}
    moved = {target for target, leaf in old.items() if leaf in kind.parameters}
    present = {old[target] for target in moved} & set(kind.fused)
    if len(present) == 1:
        missing = set(kind.fused) - present
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(present)} without also targeting "
            f"{', '.join(missing)} because they are fused into gate_up_proj."
        )
    if not moved and not isinstance(config.target_modules, str):
        return
    parameters = {kind.parameters[old[target]] for target in moved}
    config.target_parameters = {*(config.target_parameters or ()), *parameters}
    config.target_modules = set(targets) - moved
    if present:
        # Two updates of rank r are one of rank 2r; the scaling alpha / r stays.
        config.rank_pattern = {**config.rank_pattern, r".*\.gate_up_proj": 2 * config.r}
        alpha = {r".*\.gate_up_proj": 2 * config.lora_alpha}
        config.alpha_pattern = {**config.alpha_pattern, **alpha}


def _leaves(config: Any, model: nn.Module, kind: Experts) -> set[str]:
    """The targets as names; those of a string are the last parts of what it means."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return set(targets)
    if targets.lower() == ALL_LINEAR:
        linear = all_linear(config, model)
        return {name.rpartition(".")[2] for name in linear} | set(kind.parameters)
    whole = [name for name, _ in model.named_modules()]
    held = [name for name, _ in model.named_parameters()]
    found = {n.rpartition(".")[2] for n in (*whole, *held) if check_target_module_exists(config, n)}
    for old, new in kind.parameters.items():
        before = (name.rpartition(".")[0] + f".{old}" for name in held if name.endswith(f".{new}"))
        if any(check_target_module_exists(config, name) for name in before):
            found.add(old)
    return found


def fuse_tensors(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter from before, as its parameters hold them now."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = experts_of(base)
    if kind is None:
        return tensors
    names = "|".join((*kind.fused, kind.down))
    old = re.compile(rf"^(.*\.experts)\.(\d+)\.({names})\.(lora_[AB])\.weight$")
    groups: dict[tuple[str, str, str], dict[int, torch.Tensor]] = defaultdict(dict)
    kept: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = old.match(key)
        if match is None:
            kept[_renamed(key, kind)] = tensor
        else:
            place, expert, projection, factor = match.groups()
            groups[place, projection, factor][int(expert)] = tensor
    for place, factor in sorted({(place, factor) for place, _, factor in groups}):
        down = _stacked(groups.get((place, kind.down, factor)))
        both = [_stacked(groups.get((place, name, factor))) for name in kind.fused]
        new = _renamed(place, kind)
        if down is not None:
            kept[f"{new}.{factor}.weight"] = fused([down], factor)
        if all(part is not None for part in both):
            inner = "base_layer." if down is not None else ""
            kept[f"{new}.{inner}{factor}.weight"] = fused(
                [p for p in both if p is not None], factor
            )
    return kept


def _renamed(key: str, kind: Experts) -> str:
    for old, new in kind.renamed:
        key = key.replace(old, new)
    return key


def _stacked(by_expert: dict[int, torch.Tensor] | None) -> torch.Tensor | None:
    return None if by_expert is None else torch.stack([by_expert[e] for e in sorted(by_expert)])


def fused(parts: Sequence[torch.Tensor], factor: str) -> torch.Tensor:
    """The factor of a fused parameter from those of its parts.

    Args:
        parts: for each projection, the experts' A (experts, r, in) or B (experts, out, r).
        factor: "lora_A" or "lora_B".

    Returns:
        A (experts * r, in), an expert's ranks side by side; or B (out, r * experts), a rank's
        experts side by side.
    """
    if factor == "lora_A":
        return torch.cat(list(parts), dim=1).flatten(0, 1)
    diagonal = torch.stack([torch.block_diag(*of_expert) for of_expert in _by_expert(parts)])
    return diagonal.permute(2, 0, 1).flatten(0, 1).T.contiguous()


def _by_expert(parts: Sequence[torch.Tensor]) -> Iterable[tuple[torch.Tensor, ...]]:
    return zip(*parts, strict=True)


def convert_peft_config_for_transformers(
    peft_config: Any, model: nn.Module, conversions: Any = None
) -> None:
    """`fuse_config` by peft's name."""
    if hasattr(peft_config, "target_parameters"):
        fuse_config(peft_config, model)


def convert_peft_adapter_state_dict_for_transformers(
    model: Any,
    peft_config: Any,
    adapter_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """`fuse_tensors` by peft's name."""
    return fuse_tensors(model, adapter_state_dict)
