"""Every faster path gives what the reference gives, and does no more than it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lamina.engine.ops import dispatch, reference


class CountOps(TorchDispatchMode):
    """Counts the operations that make new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name not in ("t", "view", "detach", "_unsafe_view", "alias"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operands(
    batch: tuple[int, ...], n_in: int, n_out: int, r: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*batch, n_out), (*batch, n_in), (r, n_in), (n_out, r))
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    )


@given(
    batch=st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    r=st.integers(1, 5),
    scaling=st.sampled_from([0.5, 1.0, 2.0, -1.3]),
    with_bias=st.booleans(),
)
def test_output_and_gradients_equal_the_reference(
    batch: tuple[int, ...], n_in: int, n_out: int, r: int, scaling: float, with_bias: bool
) -> None:
    y, x, a, b = operands(batch, n_in, n_out, r, torch.float32)
    bias = torch.linspace(-1, 1, n_out).requires_grad_() if with_bias else None
    leaves = [y, x, a, b, *([bias] if bias is not None else [])]
    fast = dispatch.add_lora_linear(y, x, a, b, bias, scaling)
    plain = y + reference.lora_linear(x, a, b, bias, scaling)
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-5)
    weights = torch.linspace(0.5, 1.5, fast.numel()).view_as(fast)
    for one, other in zip(
        torch.autograd.grad((fast * weights).sum(), leaves),
        torch.autograd.grad((plain * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_the_factors_dtype(dtype: torch.dtype) -> None:
    y, x, a, b = operands((6,), 8, 7, 3, torch.float32)
    half = y.to(dtype)
    result = dispatch.add_lora_linear(half, x, a, b, None, 2.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, half.float() + reference.lora_linear(x, a, b, None, 2.0))


def test_one_dtype_takes_two_operations() -> None:
    y, x, a, b = operands((2, 5), 8, 7, 3, torch.float32)
    with torch.no_grad(), CountOps() as counted:
        dispatch.add_lora_linear(y, x, a, b, None, 2.0)
    assert counted.names == ["mm", "addmm"]
