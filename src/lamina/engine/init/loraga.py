"""LoRA-GA: the first step of the adapter points where the full gradient does."""

from __future__ import annotations

import torch
from torch import nn

from lamina.engine.init.base import Begun, Fault, Numbers
from lamina.engine.init.matrices import matrix, put, rounded, too_high, unreadable
from lamina.engine.init.standard import kaiming

# Where the preprocessing leaves a layer's gradient, shaped like the weight.
ATTRIBUTE = "_peft_loraga_grad"


def lora_ga(layer: Begun, adapter: str) -> None:
    """A and B from the singular vectors of the gradient G of W, and W becomes `W - s B A`.

    `G = U S V.T`: `direction` says which r of its first 2r directions go to A and which to B,
    `scale` by what they are multiplied. Without a gradient (a file is being loaded, or the layer
    isn't linear) factors begin as ever, and the base stays as it is.

    Source: arXiv:2407.05000.
    """
    grad: torch.Tensor | None = getattr(layer.base_layer, ATTRIBUTE, None)
    if grad is None or layer.kind != "linear":
        kaiming(layer, adapter)
        return
    view, record = layer.weight_view, layer.records[adapter]
    settings = record.config.lora_ga_config
    G_OI = grad.to(view.device, torch.float32)
    if getattr(layer, "fan_in_fan_out", False):
        G_OI = G_OI.T
    A_RI, B_OR, S_R = _directions(G_OI, record.r, settings.direction)
    if settings.scale == "stable":
        # The weight's first dimension, even where that is its input: as in peft.
        B_OR = B_OR * (view.read().shape[0] ** 0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd":
        B_OR = B_OR * _largest_ratio(matrix(layer).float(), S_R)
    elif settings.scale == "gd_scale":
        A_RI, B_OR = A_RI / record.scaling, B_OR / record.scaling
    put(layer, adapter, rounded(A_RI, view.dtype), rounded(B_OR, view.dtype))
    layer.displace(adapter)
    delattr(layer.base_layer, ATTRIBUTE)


def _directions(
    G_OI: torch.Tensor, r: int, direction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B (times its singular values) and these values."""
    U, S, V = torch.svd_lowrank(G_OI, q=min(4 * r, *G_OI.shape), niter=4)
    if direction == "ArBr":
        to_A, to_B = torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    elif direction == "A2rBr":
        to_A, to_B = torch.arange(r, 2 * r), torch.arange(r)
    elif direction == "ArB2r":
        to_A, to_B = torch.arange(r), torch.arange(r, 2 * r)
    else:
        to_A = to_B = torch.randperm(2 * r)[:r]
    to_A, to_B = to_A.to(G_OI.device), to_B.to(G_OI.device)
    return V.T[to_A], U[:, to_B] * S[to_B], S[to_B]


def _largest_ratio(W_OI: torch.Tensor, S_R: torch.Tensor) -> torch.Tensor:
    _, largest, _ = torch.svd_lowrank(W_OI, q=S_R.shape[0], niter=4)
    return largest[0] / S_R[0] if S_R[0] > 0 else torch.ones_like(S_R[0])


def why_not(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
    """The gradient has to be finite and have 2r directions; settings say what to do with it."""
    grad: torch.Tensor | None = getattr(base, ATTRIBUTE, None)
    if kind != "linear" or grad is None:
        return None
    if record.config.lora_ga_config is None:
        return Fault(
            "lora_ga_config must be provided when init_lora_weights='lora_ga'",
            "LoraConfig(..., lora_ga_config=LoraGAConfig(...))",
        )
    if not bool(torch.isfinite(grad).all()):
        return Fault(
            "its gradient has NaN or Inf in it",
            "look for the batch that gives it; preprocess_loraga(model, config, train_step) again",
        )
    return unreadable("LoRA-GA", base, dense=True) or too_high("LoRA-GA", base, 2 * record.r)
