"""Combine adapters on their factors, never on dense matrices.

Concatenation along the rank is exact: the sum of low-rank updates
`s1*B1@A1 + s2*B2@A2` is `s * [B1*(s1/s), B2*(s2/s)] @ [A1; A2]` for any s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ULPS = 4 * 2.0**-52


@dataclass(frozen=True)
class Factors:
    """One update of one layer: `scaling * B @ A`.

    Attributes:
        A: rank x in (further dimensions for a convolution).
        B: out x rank (likewise).
        scaling: the number in front.
        bias: the bias of B, or None; it adds `scaling * bias` to the output.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank: rows of A, columns of B."""
        return self.A.shape[0]


def is_power_of_two(ratio: float) -> bool:
    """Whether multiplying by `ratio` changes exponents only, so that nothing is rounded."""
    return math.frexp(abs(ratio))[0] == 0.5


def rescale(tensor: torch.Tensor, ratio: float) -> torch.Tensor:
    """`tensor * ratio`, rounded once; half precision becomes fp32 where it would lose digits."""
    # `alpha / r` of the same scaling differs by the rounding of the alpha that was written.
    if abs(ratio - 1) <= _ULPS:
        return tensor
    exact = tensor.double() * ratio
    rounded = exact.to(tensor.dtype)
    if tensor.dtype.itemsize >= 4 or (
        # fp16 runs out of exponents: its small numbers lose digits even by a power of two.
        is_power_of_two(ratio) and torch.equal(rounded.double(), exact)
    ):
        return rounded
    return exact.float()


def concatenate(parts: Sequence[Factors], scaling: float) -> Factors:
    """The one update with `scaling` in front that is the sum of `parts`, their ranks in order.

    Factors of a part with this very scaling are not touched; of others, B is multiplied by the
    ratio of the scalings, which is exact when it is a power of two. Biases are summed.
    """
    lifted = [rescale(part.B, part.scaling / scaling) for part in parts]
    dtype = _widest([*lifted, *(part.A for part in parts)])
    biases = [
        part.bias.double() * (part.scaling / scaling) for part in parts if part.bias is not None
    ]
    return Factors(
        A=_stack_rows([part.A.to(dtype) for part in parts], lifted),
        B=torch.cat([b.to(dtype) for b in lifted], dim=1),
        scaling=scaling,
        bias=torch.stack(biases).sum(0).to(dtype) if biases else None,
    )


def separate(whole: Factors, ranks: Sequence[int], scalings: Sequence[float]) -> list[Factors]:
    """Undo `concatenate`: the parts of these ranks and scalings, biases left out.

    B comes back bit-exactly where a ratio of scalings is a power of two, else within one unit in
    the last place of fp32.
    """
    groups = whole.rank // whole.B.shape[1]
    widths = [rank // groups for rank in ranks]
    rows = [a.flatten(0, 1) for a in whole.A.unflatten(0, (groups, -1)).split(widths, dim=1)]
    columns = whole.B.split(widths, dim=1)
    return [
        Factors(a.contiguous(), rescale(b, whole.scaling / scaling).contiguous(), scaling)
        for a, b, scaling in zip(rows, columns, scalings, strict=True)
    ]


def _stack_rows(rows: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> torch.Tensor:
    # A convolution with groups gives each group its own block of ranks: B has r/groups columns.
    groups = rows[0].shape[0] // columns[0].shape[1]
    return torch.cat([a.unflatten(0, (groups, -1)) for a in rows], dim=1).flatten(0, 1)


def _widest(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
