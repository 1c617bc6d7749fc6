"""The variants of LoRA under peft's names, and how it finds where aLoRA begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lamina.engine import variants as native
from lamina.engine.routing import BASE
from lamina.engine.variants.alora import invocation_offsets
from lamina.engine.variants.bdlora import BlockDiagonalLinear
from lamina.engine.variants.mica import MicaLora
from lamina.errors import RoutingError
from lamina.interop.peft.layer_variants import NamedVariant
from lamina.model.routing import warn_unfound

__all__ = ["BlockDiagonalLinear"]


class DoraLinearVariant(NamedVariant):
    """DoRA; in Lamina one object serves all kinds of layers."""

    stands_for = native.Dora


class DoraEmbeddingVariant(NamedVariant):
    """DoRA of an embedding."""

    stands_for = native.Dora


class DoraConv1dVariant(NamedVariant):
    """DoRA of a convolution."""

    stands_for = native.Dora


class DoraConv2dVariant(NamedVariant):
    """DoRA of a convolution."""

    stands_for = native.Dora


class DoraConv3dVariant(NamedVariant):
    """DoRA of a convolution."""

    stands_for = native.Dora


class ArrowLinearVariant(NamedVariant):
    """Arrow."""

    stands_for = native.Arrow


class ALoraLinearVariant(NamedVariant):
    """aLoRA."""

    stands_for = native.ALora


class KasaLinearVariant(NamedVariant):
    """KaSA."""

    stands_for = native.Kasa


class VeloraLinearVariant(NamedVariant):
    """VeLoRA."""

    stands_for = native.Velora


class BdLoraLinearVariant(NamedVariant):
    """BD-LoRA."""

    stands_for = native.BdLora


class MontecloraLinearVariant(NamedVariant):
    """MonteCLoRA."""

    stands_for = native.Monteclora


class QALoraLinearVariant(NamedVariant):
    """QA-LoRA."""

    stands_for = native.QALora


class MiCALinearVariant(NamedVariant):
    """MiCA."""

    stands_for = MicaLora


class MiCAEmbeddingVariant(NamedVariant):
    """MiCA of an embedding."""

    stands_for = MicaLora


def calculate_alora_offsets(
    peft_config: Mapping[str, Any],
    active_adapter: str,
    input_ids: torch.Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """For each row the tokens from its adapter's last invocation to the end; None without one.

    Args:
        peft_config: adapter -> config.
        active_adapter: the adapter of rows for which `adapter_names` names none.
        input_ids: rows x tokens.
        adapter_names: an adapter for each row.
    """
    if input_ids is None:
        return []
    count = input_ids.shape[0]
    names = [*(adapter_names or ())][:count]
    names += [active_adapter] * (count - len(names))
    found: dict[str, list[int | None]] = {}
    for row, name in enumerate(names):
        if name in found:
            continue
        config = peft_config.get(name)
        if config is None and name != BASE:
            warnings.warn(
                f"Adapter '{name}' not found in peft_config. Using base model for row {row}.",
                stacklevel=2,
            )
        tokens = getattr(config, "alora_invocation_tokens", None)
        found[name] = [None] * count if tokens is None else invocation_offsets(input_ids, tokens)
    return [found[name][row] for row, name in enumerate(names)]


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether an adapter that acts from a token on takes part."""
    configs = [model.active_peft_config]
    configs += [model.peft_config.get(name) for name in adapter_names or ()]
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def get_alora_offsets_for_forward(
    model: Any, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """`kwargs` with the `alora_offsets` of a forward, where it needs them."""
    if kwargs.get("alora_offsets") is None:
        return _with_offsets(model, input_ids, kwargs, inputs_embeds is not None, False)
    return kwargs


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`kwargs` with the `alora_offsets` of a generation, where it needs them."""
    if kwargs.get("alora_offsets") is not None:
        return kwargs
    ids = kwargs.get("input_ids")
    if ids is None and args and isinstance(args[0], torch.Tensor):
        ids = args[0]
    if ids is not None and ids.ndim == 1:
        ids = ids.unsqueeze(0)
    return _with_offsets(model, ids, kwargs, True, True)


def _with_offsets(
    model: Any, ids: Any, kwargs: dict[str, Any], warn: bool, generates: bool
) -> dict[str, Any]:
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names):
        return kwargs
    if ids is None:
        if warn:
            warn_unfound(generates=generates)
        return {**kwargs, "alora_offsets": None}
    found = calculate_alora_offsets(model.peft_config, model.active_adapter, ids, names)
    return {**kwargs, "alora_offsets": found}


def refuse_as_peft(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what peft refuses of mixed batches and aLoRA, although Lamina does it.

    Raises:
        RoutingError: rows go to a DoRA adapter, or aLoRA meets a beam search.
    """
    names = kwargs.get("adapter_names")
    rows = names if isinstance(names, (list, tuple)) else ()
    if any(model.peft_config[name].use_dora for name in rows if name in model.peft_config):
        raise RoutingError(
            "Cannot pass `adapter_names` when DoRA is enabled.",
            cure="lamina.PeftModel mixes DoRA adapters in a batch",
        )
    beams = kwargs.get("num_beams")
    if not isinstance(beams, int) or beams < 2:
        return
    if kwargs.get("alora_offsets") is not None or is_alora_relevant_in_batch(model, rows):
        raise RoutingError(
            "Beam search not yet supported for aLoRA.",
            cure="lamina.PeftModel searches beams with aLoRA",
        )


def refuse_second_forward(model: Any) -> None:
    """Refuse, as peft does, aLoRA's second forward before a backward that recomputes layers.

    Lamina would recompute each by its own invocations.

    Raises:
        RoutingError: there was no backward since the last one.
    """
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    relevant = model.training and torch.is_grad_enabled() and not model.adapter_state.disabled
    if not relevant or not recomputes or not is_alora_relevant_in_batch(model):
        return
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    if trained is None:
        return
    waiting = model.__dict__.setdefault("_forwards_without_backward", [])
    if waiting:
        raise RoutingError(
            "Multiple invocations of PEFT forward hooks before .backward() with gradient "
            "checkpointing.",
            cure="loss.backward() after each forward, or lamina.PeftModel, which allows it",
        )

    def seen(parameter: torch.Tensor) -> None:
        waiting.pop().remove()

    waiting.append(trained.register_post_accumulate_grad_hook(seen))
