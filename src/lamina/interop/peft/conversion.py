"""How transformers turns the tensors of an adapter that it loads by itself."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from lamina.interop.peft.experts import fused
from lamina.interop.peft.registry import PEFT_TYPE_TO_PREFIX_MAPPING


class FuseExperts(ConversionOps):  # type: ignore[misc]
    """The factor of a fused parameter from those of its projections, experts stacked already."""

    def __init__(self, factor: str) -> None:
        self.factor = factor

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """`{name in the model: factor}`, the projections in the order of their patterns."""
        # A single part comes under the target's name.
        ordered = [pattern for pattern in source_patterns if pattern in input_dict]
        parts = [input_dict[pattern] for pattern in ordered or input_dict]
        whole = [part[0] if isinstance(part, list) else part for part in parts]
        return {full_layer_name: fused(whole, self.factor)}

    @property
    def reverse_op(self) -> Any:
        """There is no way back: an adapter is saved as it is now."""
        raise NotImplementedError("an adapter's fused factors are not taken apart")


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The conversions from an adapter's file to a model that transformers holds.

    The names in a file begin with `base_model.model.` and lack the adapter's name. What the model
    renames in its own files is renamed here too; where it fuses experts, their factors are fused.

    Args:
        weight_conversions: those of the base model.
        adapter_name: the adapter's name.
        peft_config: its config.
    """
    if not weight_conversions:
        return []
    kind = getattr(peft_config, "peft_type", None)
    known = PEFT_TYPE_TO_PREFIX_MAPPING
    prefixes = [known[kind]] if kind in known else sorted(set(known.values()))
    made: list[Any] = [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
    ]
    for prefix in prefixes:
        source = rf"({re.escape(prefix)}[^\.]*)"
        made.append(WeightRenaming(source_patterns=source, target_patterns=rf"\1.{adapter_name}"))
    for one in weight_conversions:
        made += [one] if isinstance(one, WeightRenaming) else _of_experts(one, adapter_name)
    return made


def _of_experts(conversion: Any, adapter: str) -> list[Any]:
    target = conversion.target_patterns[0]
    new = {".gate_up_proj": ".base_layer", ".down_proj": ""}
    ending = next((end for end in new if target.endswith(end)), None)
    if len(conversion.target_patterns) != 1 or ending is None:
        return []
    merging = [op for op in conversion.operations if type(op).__name__ == "MergeModulelist"]
    if not merging:
        return []
    place = target.removesuffix(ending) + new[ending]
    made = []
    for factor in ("lora_A", "lora_B"):
        converter = WeightConverter(
            source_patterns=[
                f"{pattern.rpartition('.')[0]}.{factor}.*" for pattern in conversion.source_patterns
            ],
            target_patterns=[f"{place}.{factor}.{adapter}.weight"],
            operations=[*merging, FuseExperts(factor)],
        )
        converter.distributed_operation = conversion.distributed_operation
        converter.quantization_operation = conversion.quantization_operation
        made.append(converter)
    return made
