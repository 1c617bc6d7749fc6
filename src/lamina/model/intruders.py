"""Take intruder dimensions out of an adapter, against forgetting.

An intruder is a leading left singular vector of the adapted weight that resembles none of the
base's. Source: LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv:2410.21228.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamina.engine.combine import truncate_product
from lamina.engine.factored import factored_layers
from lamina.engine.layers import LoraLayer
from lamina.errors import ConversionError
from lamina.model.combining import is_sum


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> None:
    """Add and activate a copy of an adapter in which intruder dimensions are weaker.

    With `W + dW = U S V'`, the dimensions `i < top_k` with `max_j |u_i . u_base_j| < epsilon` are
    intruders, and the new update is the best one of the old rank for
    `dW - (1 - lambda) * sum_i s_i u_i v_i'`. Layers without any keep their factors.

    Args:
        peft_model: the model; the old adapter stays as it is.
        old_adapter_name: the adapter to read.
        new_adapter_name: of the copy.
        top_k: how many leading dimensions are looked at.
        threshold_epsilon: the cosine below which a dimension is an intruder.
        mitigation_lambda: what is left of an intruder; 1 leaves it as it is.
        logging_sink: is told of each layer; None for silence.

    Raises:
        ConversionError: the adapter is not LoRA, or of a kind or in a layer that this doesn't fit.
    """
    tell = logging_sink or (lambda message: None)
    kind = getattr(peft_model, "peft_type", None)
    if getattr(kind, "value", kind) != "LORA":
        raise ConversionError(
            "The provided model is not using LoRA and is therefore not supported.",
            cure="pass the PeftModel with the LoRA adapter",
        )
    peft_model.adapter_state.check_known([old_adapter_name])
    layers = {
        name: layer
        for name, layer in factored_layers(peft_model)
        if old_adapter_name in layer.records
    }
    _check(layers, old_adapter_name)
    made = {
        name: _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        for name, layer in layers.items()
    }
    peft_model.add_adapter(
        new_adapter_name, peft_model.peft_config[old_adapter_name], low_cpu_mem_usage=True
    )
    for name, layer in layers.items():
        count, replaced = made[name]
        tell(f"{name}: Intruders: {count}" if count else f"{name}: No intruders")
        for leaf, value in layer.tensors(old_adapter_name).items():
            layer.assign(new_adapter_name, leaf, replaced.get(leaf, value.detach().clone()))
    tell(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _check(layers: dict[str, LoraLayer], adapter: str) -> None:
    faults = []
    for name, layer in layers.items():
        if not is_sum(layer, adapter):
            kind = type(layer.records[adapter].variant).__name__
            faults.append(f"{name}: {kind}, whose update is not scaling * B @ A")
        if layer.taken_out({adapter}) is not None:
            faults.append(f"{name}: {adapter!r} took a part out of the base when it began")
        if getattr(layer.base_layer, "groups", 1) > 1 or layer.merged_adapters:
            faults.append(f"{name}: a convolution with groups, or adapters are folded in")
    if faults:
        raise ConversionError(
            f"The intruders of {adapter!r} can't be found in {len(faults)} place(s).",
            faults=faults[:8],
        )


def _reduced(
    layer: LoraLayer, adapter: str, top_k: int, epsilon: float, remains: float
) -> tuple[int, dict[str, torch.Tensor]]:
    """(number of intruders, the new factors by their names on disk if there are any)."""
    factors = layer.factors(adapter)
    a, b = (factor.detach().float().flatten(1) for factor in factors)
    scaling = float(layer.records[adapter].scaling)
    base = layer.weight_view.read().float()
    in_by_out = layer.is_embedding or getattr(layer, "fan_in_fan_out", False)
    base = (base.T if in_by_out else base).flatten(1)
    # The vectors that are compared are those of the weight's first dimension as it is stored.
    stored, whole = (x.T if in_by_out else x for x in (base, base + scaling * (b @ a)))
    u_base = torch.linalg.svd(stored, full_matrices=False).U
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    likeness = (u[:, :top_k].T @ u_base).abs().amax(1)
    found = torch.nonzero(likeness < epsilon).flatten()
    if not len(found):
        return 0, {}
    weaker = (remains - 1) / scaling * s[found]
    left, right = u[:, found] * weaker, vh[found]
    if in_by_out:
        left, right = right.T, left.T
    new = truncate_product(torch.cat([b, left], 1), torch.cat([a, right], 0), a.shape[0])
    # Shared between both, so that they train alike.
    roots = new.B.norm(dim=0).sqrt()
    balanced = (roots[:, None] * new.A, new.B / roots.clamp(min=torch.finfo(roots.dtype).tiny))
    leaves = [leaf for leaf in layer.tensors(adapter) if not leaf.endswith(".bias")]
    return len(found), {
        leaf: value.reshape(old.shape).to(old.dtype)
        for leaf, value, old in zip(leaves, balanced, factors, strict=True)
    }
