"""LoftQ: the adapter makes up for what quantising the base loses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lamina.engine.init.base import Begun, Fault, Numbers
from lamina.engine.init.matrices import matrix, put, too_high, unreadable
from lamina.errors import ConfigError, MissingExtraError

_CURE = "loftq_config={'loftq_bits': 4} (or 8), as bitsandbytes quantises"


def loftq(layer: Begun, adapter: str) -> None:
    """W becomes Q(W), rounded to what `bits` hold; B and A its remainder `W - Q(W)`, at rank r.

    The factors are as their paper has them: what they make up for is whole with a scaling of 1.

    Source: arXiv:2310.08659.
    """
    settings = layer.records[adapter].config.loftq_config
    quantised, A_RI, B_OR = decompose(
        matrix(layer).float(),
        settings.get("loftq_bits", 4),
        layer.records[adapter].r,
        settings.get("loftq_iter", 1),
        stored_across=getattr(layer, "fan_in_fan_out", False),
    )
    put(layer, adapter, A_RI, B_OR)
    layer.displace(adapter, quantised.T if getattr(layer, "fan_in_fan_out", False) else quantised)


def decompose(
    W_OI: torch.Tensor, bits: int, rank: int, iterations: int = 1, *, stored_across: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Q, A, B) with `Q + B A` close to W, by turns of quantising and factorising.

    Args:
        W_OI: the weight, fp32.
        bits: 4 (nf4 in blocks of 64) or 8 (int8 by rows).
        rank: of A and B.
        iterations: how many turns.
        stored_across: quantise the transposed weight, since that is how it is stored.

    Raises:
        ConfigError: bits or iterations are none of these.
        MissingExtraError: bitsandbytes isn't installed.
    """
    faults = [f"loftq_bits={bits}: Only nf4 and int8 quantization is supported"] * (
        bits not in (4, 8)
    )
    faults += [f"loftq_iter={iterations}: Number of iterations must be greater than 0"] * (
        iterations <= 0
    )
    if faults:
        raise ConfigError("LoftQ can't be done as asked.", faults=faults, cure=_CURE)
    rest = W_OI
    for _ in range(iterations):
        Q_OI = _quantised(rest.T, bits).T if stored_across else _quantised(rest, bits)
        B_OR, A_RI = low_rank(W_OI - Q_OI, rank)
        rest = W_OI - B_OR @ A_RI
    return Q_OI, A_RI, B_OR


def low_rank(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) whose product is the closest to a matrix that a rank allows."""
    if residual.dim() != 2:
        raise ConfigError(f"Only support 2D matrix, but your input has {residual.dim()} dimensions")
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def _quantised(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of values after they were stored in so many bits."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "LoftQ quantises with bitsandbytes, which isn't installed.",
            cure="pip install bitsandbytes",
        )
    from bitsandbytes import functional

    bnb: Any = functional
    values = values.contiguous()
    if bits == 4:
        stored, state = bnb.quantize_4bit(values, compress_statistics=False, quant_type="nf4")
        dense: torch.Tensor = bnb.dequantize_4bit(stored, state)
        return dense.to(values)
    # The kernel takes half precision, as the layer that would hold it does.
    stored, scales, _ = bnb.int8_vectorwise_quant(values.half())
    dense = bnb.int8_vectorwise_dequant(stored, scales)
    return dense.to(values)


def why_not(kind: str, base: nn.Module, record: Numbers) -> Fault | None:
    """Needs a dense weight, bits that bitsandbytes has, and bitsandbytes."""
    bits = record.config.loftq_config.get("loftq_bits", 4)
    if bits not in (4, 8):
        return Fault(f"loftq_bits={bits}: Only nf4 and int8 quantization is supported", _CURE)
    if find_spec("bitsandbytes") is None:
        return Fault("bitsandbytes is not available", "pip install bitsandbytes")
    return unreadable("LoftQ", base, dense=True) or too_high("LoftQ", base, record.r)
