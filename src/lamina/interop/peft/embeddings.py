"""When peft writes embeddings of the base beside an adapter, and which tensors those are."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lamina.engine.layers import ModulesToSaveWrapper
from lamina.engine.names import places, way_in
from lamina.interop.peft.constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from lamina.interop.peft.parts import check_file_exists_on_hf_hub, match_target_against_key


def embedding_tensors(model: Any, config: Any, wanted: str | bool) -> dict[str, torch.Tensor]:
    """The weights of the base's embeddings that go with an adapter, by their names on disk.

    Args:
        model: a facade, or a model with injected adapters.
        config: the adapter's.
        wanted: "auto" asks whether they are adapted, or were resized since the base was saved.
    """
    targeted = _is_targeted(model, config)
    if not (_is_needed(model, config, targeted) if wanted == "auto" else wanted):
        return {}
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers "
            "model.",
            stacklevel=4,
        )
        return {}
    return dict(_tensors(model, targeted))


def _base(model: Any) -> nn.Module:
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _is_targeted(model: Any, config: Any) -> bool:
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        ends = "|".join(EMBEDDING_LAYER_NAMES)
        names = [place.name for place in places(_base(model))]
        named = [name for name in names if re.fullmatch(rf"(.*\.)?({ends})", name)]
        return any(match_target_against_key(targets, name) for name in named)
    return any(name in targets for name in EMBEDDING_LAYER_NAMES) if targets else False


def _is_needed(model: Any, config: Any, targeted: bool) -> bool:
    # Trained tokens are there to be saved without their table.
    by_token = config.peft_type == "TRAINABLE_TOKENS" or config.trainable_token_indices is not None
    if targeted and not by_token:
        why = "embedding layers found in `target_modules`"
    elif _is_resized(model, config):
        why = "the embedding layer has been resized during finetuning"
    else:
        return False
    warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", stacklevel=5)
    return True


def _is_resized(model: Any, config: Any) -> bool:
    """Whether the vocabulary is another one than that of the base on disk or the hub."""
    settings: Any = getattr(model, "config", None)
    size = getattr(settings, "vocab_size", None)
    base = getattr(config, "base_model_name_or_path", None)
    if not size or not base:
        return False
    exists: bool | None = os.path.exists(os.path.join(base, "config.json"))
    exists = exists or check_file_exists_on_hf_hub(base, "config.json")
    if exists is None:
        warnings.warn(
            f"Could not find a config file in {base} - will assume that the vocabulary was not "
            "modified.",
            stacklevel=6,
        )
    return bool(exists) and size != type(settings).from_pretrained(base).vocab_size


def _tensors(model: Any, targeted: bool) -> Iterator[tuple[str, torch.Tensor]]:
    base = _base(model)
    prefix = "" if base is model else "base_model.model."
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    held = {id(end) for end in ends if end is not None}
    for place in places(base):
        if not {id(place.module), id(place.original)} & held:
            continue
        # What an adapter trains whole, it has all of.
        if isinstance(place.module, ModulesToSaveWrapper):
            continue
        inner = way_in(place.module)
        if inner or not targeted:
            for leaf, tensor in place.original.state_dict(keep_vars=True).items():
                yield f"{prefix}{place.name}.{inner}{leaf}", tensor
