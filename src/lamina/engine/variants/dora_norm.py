"""The norms that DoRA divides by, and where they may be kept between forwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import accumulation_dtype, exact
from lamina.engine.ops.dispatch import rows_at_a_time


@torch.no_grad()
def row_norms(
    weight_OI: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`norm(W + scaling * B @ A)` of each row, in the accumulation dtype: shape (out,).

    It is made a block of rows at a time, so that B @ A never exists as a whole.
    """
    dtype = accumulation_dtype(A_RI.dtype)
    a, b = A_RI.to(dtype), B_OR.to(dtype)
    step = rows_at_a_time(weight_OI.shape[1])
    with exact(weight_OI.device):
        blocks = [
            torch.linalg.vector_norm(
                torch.addmm(weight_OI[i : i + step].to(dtype), b[i : i + step], a, alpha=scaling),
                dim=1,
            )
            for i in range(0, weight_OI.shape[0], step)
        ]
    return torch.cat(blocks)


def device_for(config: Any, stored: torch.device) -> torch.device:
    """Where a first norm is computed: where the weight is stored, or on the accelerator if asked.

    Args:
        config: the adapter's; `runtime_config.ephemeral_gpu_offload` asks for it.
        stored: the device of the weight.
    """
    asked = config.runtime_config.ephemeral_gpu_offload and stored.type == "cpu"
    if not asked or not torch.accelerator.is_available():
        return stored
    accelerator: torch.device | None = torch.accelerator.current_accelerator()
    return accelerator or stored


class DoraCaching:
    """Keep DoRA's norms between forwards in eval mode: faster, for the memory of one vector each.

    A norm is made anew when A, B, the scaling or the base weight was changed; what is written
    through `.data` goes unseen. In training mode, and outside, nothing is kept.

        with DoraCaching():
            output = model(inputs)

        DoraCaching()(enabled=True)  # from now on

    Args:
        enabled: False turns keeping off inside.
    """

    _on = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        self._before.append(DoraCaching._on)
        DoraCaching._on = self.enabled
        return self

    def __exit__(self, *exception: object) -> None:
        DoraCaching._on = self._before.pop()

    def __call__(self, enabled: bool = True) -> None:
        """Turn keeping on or off until further notice."""
        DoraCaching._on = enabled

    @classmethod
    def is_on(cls) -> bool:
        """Whether norms are kept now."""
        return cls._on


class Magnitude(nn.Module):
    """The length that DoRA gives each row of the weight.

    Args:
        shape: as it is on disk.
        dtype: of the adapter.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))
        self._dora_cache: dict[str, Any] = {}

    def train(self, mode: bool = True) -> Magnitude:
        if mode:
            self._dora_cache.clear()
        return super().train(mode)

    def kept(self, key: Callable[[], Hashable], norm: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The norm, kept from before if `key` says that nothing has changed since."""
        if self.training or not DoraCaching.is_on():
            self._dora_cache.clear()
            return norm()
        now = key()
        if self._dora_cache.get("key") != now:
            self._dora_cache.update(key=now, norm=norm())
        found: torch.Tensor = self._dora_cache["norm"]
        return found


def state_of(tensor: Any) -> Hashable:
    """Something that is different after a tensor was changed, or replaced."""
    if not isinstance(tensor, torch.Tensor):
        return None
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.device, tensor.dtype
