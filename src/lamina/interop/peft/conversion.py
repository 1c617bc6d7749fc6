"""How transformers renames the tensors of an adapter that it loads by itself."""

from __future__ import annotations

import re
from typing import Any

from lamina.interop.peft.registry import PEFT_TYPE_TO_PREFIX_MAPPING

_EXPERTS = ("gate_up_proj", "down_proj")


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings from an adapter's file to a model that transformers holds.

    The names in a file begin with `base_model.model.` and lack the adapter's name. What the model
    renames in its own files is renamed here too; conversions that fuse weights don't apply.

    Args:
        weight_conversions: those of the base model.
        adapter_name: the adapter's name.
        peft_config: its config.
    """
    from transformers.core_model_loading import WeightRenaming

    if not weight_conversions:
        return []
    kind = getattr(peft_config, "peft_type", None)
    known = PEFT_TYPE_TO_PREFIX_MAPPING
    prefixes = [known[kind]] if kind in known else sorted(set(known.values()))
    renamings = [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        *(
            WeightRenaming(
                source_patterns=rf"({re.escape(prefix)}[^\.]*)",
                target_patterns=rf"\1.{adapter_name}",
            )
            for prefix in prefixes
        ),
    ]
    return renamings + [one for one in weight_conversions if isinstance(one, WeightRenaming)]
