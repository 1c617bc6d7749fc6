"""AdaLoRA's layers: an update by singular values, `B @ (A * E)`.

A layer of these holds parameters where a LoRA layer holds modules, so that names in the model and
on disk are those of PEFT; so it takes adapters of AdaLoRA only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype, to_adapter_input
from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.layers.linear import is_conv1d, linear_shape
from lamina.engine.ops.dispatch import lora_linear, lora_linear_delta
from lamina.engine.state import AdapterState

# The dimension of a parameter along which its ranks lie.
RANKS_ALONG = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
# What keeps a layer without ranks from dividing by zero.
TINY = 1e-5


class SvdLayer(LoraLayer):
    """The base of AdaLoRA's layers: A (r x n), E (r x 1), B (out x r), `ranknum` (1).

    `ranknum` is the rank that the adapter began with. It divides the scaling, never trains and is
    not saved.
    """

    family = "adalora."
    in_features: int
    out_features: int

    def _get_name(self) -> str:
        return type(self).__name__.replace("Svd", "SVD")

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()
        self.ranknum = nn.ParameterDict()

    @property
    def inputs(self) -> int:
        """The columns of A."""
        return self.in_features

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        shapes = {
            "lora_A": (record.r, self.inputs),
            "lora_E": (record.r, 1),
            "lora_B": (self.out_features, record.r),
        }
        for place, shape in shapes.items():
            empty = torch.empty(shape, device="meta", dtype=dtype)
            getattr(self, place)[name] = nn.Parameter(empty)
        device = self.weight_view.device
        begun = record.config.init_r if record.config.rank_pattern else record.r  # type: ignore[attr-defined]
        # Not in any file, so it has to be there even where all else waits on the meta device.
        with torch.device("cpu" if device.type == "meta" else device):
            ranknum = torch.tensor([float(begun)])
        self.ranknum[name] = nn.Parameter(ranknum, requires_grad=False)

    @torch.no_grad()
    def initialise(self, name: str, init: bool | str) -> None:
        """E zero, A and B normal with standard deviation 0.02; False: all standard normal."""
        device = self.weight_view.device
        if device.type == "meta":
            return
        tensors = self.tensors(name)
        # As many numbers as PEFT draws, and in its order.
        drawn = {leaf: torch.randn(tensors[leaf].shape) for leaf in ("lora_A", "lora_E", "lora_B")}
        torch.randn(1)
        if init:
            drawn["lora_E"].zero_()
            drawn["lora_A"].normal_(std=0.02)
            drawn["lora_B"].normal_(std=0.02)
        for leaf, value in drawn.items():
            self.assign(name, leaf, value.to(device, tensors[leaf].dtype))

    def assign(self, name: str, leaf: str, value: torch.Tensor) -> None:
        super().assign(name, leaf, value)
        if leaf == "lora_A":
            self.r[name] = len(value)

    def right_vectors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A * E` and B."""
        a, b = self.factors(adapter)
        return a * self.lora_E[adapter], b

    def dropped(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        if self.cast_input_dtype_enabled:
            x = to_adapter_input(x, self.lora_A[adapter].dtype)
        dropped: torch.Tensor = self.lora_dropout[adapter](x)
        return dropped

    def divisor(self, adapter: str) -> torch.Tensor:
        """What divides the scaling; a tensor, so that no device has to be waited for."""
        a, ranknum = self.lora_A[adapter], self.ranknum[adapter]
        begun: torch.Tensor = ranknum.to(a.device, accumulation_dtype(a.dtype))
        return begun + TINY

    def flat_delta(self, adapter: str) -> torch.Tensor:
        """`scaling / ranknum * B @ (A * E)`, out x n, summed in at least fp32."""
        a, b = self.right_vectors(adapter)
        delta = lora_linear_delta(a, b, self.records[adapter].scaling)
        return delta / self.divisor(adapter)

    @torch.no_grad()
    def keep_ranks(self, adapter: str, mask: list[bool]) -> None:
        """Leave only some of an adapter's ranks; its scaling stays the same."""
        for leaf, parameter in self.tensors(adapter).items():
            kept = torch.tensor(mask, device=parameter.device)
            value = parameter[:, kept] if RANKS_ALONG[leaf] else parameter[kept]
            self.assign(adapter, leaf, value.clone())


class SvdLinear(SvdLayer):
    """`y = base(x) + scaling / ranknum * x @ (A * E).T @ B.T`."""

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.in_features, self.out_features = linear_shape(base_layer)

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        a, b = self.right_vectors(adapter)
        update = lora_linear(x, a, b, None, self.records[adapter].scaling)
        return update / self.divisor(adapter)

    def delta_weight(self, adapter: str) -> torch.Tensor:
        delta = self.flat_delta(adapter)
        return delta.T if self.fan_in_fan_out else delta


class SvdConv2d(SvdLayer):
    """A convolution by the kernel `scaling / ranknum * B @ (A * E)`, A (r x in * height * width).

    Stride, padding, dilation and padding mode are the base's.
    """

    kind = "conv"

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__(base_layer, state)
        self.in_features = int(self.base_layer.in_channels)
        self.out_features = int(self.base_layer.out_channels)

    @property
    def inputs(self) -> int:
        height, width = self.base_layer.kernel_size
        return int(self.in_features * height * width)

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        base: Any = self.base_layer
        # The precise sum is for folding: a forward has the dtype of the factors.
        kernel = self.delta_weight(adapter).to(x.dtype)
        convolved: torch.Tensor = base._conv_forward(x, kernel, None)
        return convolved

    def delta_weight(self, adapter: str) -> torch.Tensor:
        kernel = self.base_layer.kernel_size
        return self.flat_delta(adapter).reshape(self.out_features, self.in_features, *kernel)
