"""Linear layers in every kind of storage, made of a dense one; and stand-ins for other quantisers.

bitsandbytes packs 4-bit weights for inference on CPUs with AVX512-BF16, if the rows are a multiple
of 32 and the columns one of 64, and fails there else: hence the sizes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# torchao and hqq tell on import which of their kernels are not for this machine.
logging.getLogger("torchao").setLevel(logging.ERROR)

IN, OUT = 64, 96


def dense(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear layer with bias, of `IN` by `OUT`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(IN, OUT).to(dtype).requires_grad_(False)


def bnb4(source: nn.Linear, quant_type: str = "nf4", double: bool = False) -> nn.Module:
    """bitsandbytes in 4 bits."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        source.in_features,
        source.out_features,
        bias=source.bias is not None,
        compute_dtype=source.weight.dtype,
        quant_type=quant_type,
        compress_statistics=double,
    )
    layer.load_state_dict(source.state_dict())
    if source.bias is not None:
        layer.bias.data = source.bias.data.clone()
    layer.weight = bnb.nn.Params4bit(
        source.weight.data.clone(),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=double,
        module=layer,
    )
    return layer.to("cpu")


def bnb8(source: nn.Linear) -> nn.Module:
    """bitsandbytes in 8 bits, as transformers loads it."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        source.in_features,
        source.out_features,
        bias=source.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
    )
    if source.bias is not None:
        layer.bias.data = source.bias.data.clone()
    layer.weight = bnb.nn.Int8Params(
        source.weight.data.clone(), requires_grad=False, has_fp16_weights=False
    )
    return layer.to("cpu")


def torchao(source: nn.Linear, make: Callable[[Any], Any]) -> nn.Module:
    """torchao by one of its configs."""
    import torchao.quantization as ao

    holder = nn.Sequential(copy.deepcopy(source))
    ao.quantize_(holder, make(ao))
    return holder[0]


def hqq(source: nn.Linear, bits: int = 4, axis: int = 1) -> nn.Module:
    """HQQ with groups of 32."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(
        copy.deepcopy(source),
        BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis),
        compute_dtype=source.weight.dtype,
        device="cpu",
    )


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": bnb4,
    "nf4-double": lambda source: bnb4(source, double=True),
    "fp4": lambda source: bnb4(source, "fp4"),
    "bnb-int8": bnb8,
    "ao-int8": lambda source: torchao(source, lambda ao: ao.Int8WeightOnlyConfig()),
    "ao-int8-dynamic": lambda source: torchao(
        source, lambda ao: ao.Int8DynamicActivationInt8WeightConfig()
    ),
    "ao-int4": lambda source: torchao(
        source,
        lambda ao: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.granularity.PerGroup(32)
        ),
    ),
    "ao-float8": lambda source: torchao(source, lambda ao: ao.Float8WeightOnlyConfig()),
    "hqq-4bit": hqq,
    "hqq-8bit": lambda source: hqq(source, bits=8, axis=0),
}


class PackedLinear(nn.Module):
    """What GPTQ, AWQ, AQLM, EETQ and others look like: sizes, codes in a buffer, a forward."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        scale = source.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (source.weight.detach() / scale).round().clamp(-8, 7)
        self.register_buffer("qweight", codes.to(torch.int32).T.contiguous())
        self.register_buffer("scales", scale)
        bias = None if source.bias is None else source.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qweight.T.to(x.dtype) * self.scales.to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class Net(nn.Module):
    """Two linear layers of one kind, with a plain one between that brings the width back."""

    def __init__(self, kind: Callable[[nn.Linear], nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.first = kind(dense(0, dtype))
        self.narrow = nn.Linear(OUT, IN, dtype=dtype)
        self.second = kind(dense(1, dtype))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            nn.init.normal_(self.narrow.weight, std=0.1)
            nn.init.zeros_(self.narrow.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.narrow(self.first(x))))
