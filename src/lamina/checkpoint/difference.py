"""What changed between two updates of a module, told from their factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lamina.engine.compose import Factors

# Singular values below this share of the factors' size are the rounding of files in fp32.
_NOTHING = 2.0**-22


@dataclass(frozen=True)
class ModuleChange:
    """How the update of one module differs: D = dW_b - dW_a, where dW = scaling * B @ A.

    Of several matrices (experts, the groups of a convolution), norms are over all of them,
    ranks and angles the mean.

    Attributes:
        module: its plain name.
        norm_a: Frobenius norm of dW_a; 0 without one.
        norm_b: likewise.
        norm_change: Frobenius norm of D; what is only rounding of files in fp32 counts as 0.
        cosine: of the angle between dW_a and dW_b as vectors; None if one of them is 0.
        effective_rank: exp of the entropy of D's singular values, divided by their sum: between 1
            and the rank of D; 0 if nothing changed.
        output_angle: between the spaces of outputs that dW_a and dW_b reach (or, where b was built
            on a, dW_a and D), in degrees: acos sqrt(|U_1^T U_2|_F^2 / min(rank_1, rank_2)), U an
            orthonormal basis. 0: one space lies in the other; 90: they have nothing in common. None
            if one of them is 0.
        input_angle: likewise, between the spaces of inputs that they read.

    Sources: Roy and Vetterli, "The effective rank" (EUSIPCO 2007); the angle from the measure of
    similarity in section 7.2 of LoRA, arXiv:2106.09685.
    """

    module: str
    norm_a: float
    norm_b: float
    norm_change: float
    cosine: float | None
    effective_rank: float
    output_angle: float | None
    input_angle: float | None

    @property
    def relative(self) -> float | None:
        """The norm of the change over that of `dW_a`; None if there was nothing before."""
        return self.norm_change / self.norm_a if self.norm_a else None


@dataclass(frozen=True)
class UpdateSize:
    """How large an update is, and how much it has in common with what was there before.

    Of several matrices, the norm is over all of them, the rest the mean.

    Attributes:
        norm: Frobenius norm; what is only rounding of files in fp32 counts as 0.
        effective_rank: as in `ModuleChange`.
        rank: of the factors, or that of any matrix of this shape, if that is less.
        output_overlap: |U_1^T U_2|_F^2 / min(rank_1, rank_2) of orthonormal bases U of the spaces
            of outputs, 0 to 1: the share of the smaller space that lies in the other, cos^2 of the
            angle in `ModuleChange`. None if one of them is 0.
        input_overlap: likewise, of inputs.
    """

    norm: float
    effective_rank: float
    rank: int
    output_overlap: float | None
    input_overlap: float | None


@dataclass(frozen=True)
class TensorChange:
    """How a tensor that is no factor differs: one trained whole, a bias, a magnitude.

    Attributes:
        name: its name in the file, without the prefix.
        norm_a: Frobenius norm in the first file; None if it isn't there.
        norm_b: likewise.
        norm_change: of the difference; None if only one has it, or they differ in shape.
    """

    name: str
    norm_a: float | None
    norm_b: float | None
    norm_change: float | None


@dataclass(frozen=True)
class _Update:
    """`left @ right` in fp64, a stack of matrices: blocks x out x R, blocks x R x in."""

    left: torch.Tensor
    right: torch.Tensor

    @cached_property
    def core(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Orthonormal bases of both sides, and the small matrix between them."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.mT)
        return q_left, r_left @ r_right.mT, q_right


def module_change(
    module: str,
    one: Factors | None,
    other: Factors | None,
    *,
    blocks: int = 1,
    built_on: bool = False,
) -> ModuleChange:
    """Compare two updates of a module, either of which may be missing.

    Args:
        module: its name.
        one: dW_a.
        other: dW_b.
        blocks: experts that lie side by side in the factors, as in an adapted parameter.
        built_on: b was built on a, so that its own space holds that of a: take D's for the angles.

    Raises:
        ValueError: they are of different shapes, or their factors don't go together.
    """
    try:
        a, b = (None if each is None else _update(each, blocks) for each in (one, other))
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error
    if a is None and b is None:
        raise ValueError(f"{module} has no update on either side")
    if a and b and (_outer(a) != _outer(b)):
        raise ValueError(f"{module}: {_outer(a)} and {_outer(b)} are different shapes")
    change = _minus(b, a)
    values = _singular_values(change)
    spaces = [None if each is None else _spaces(each) for each in (a, change if built_on else b)]
    angles = [
        _angle(spaces[0][side], spaces[1][side]) if spaces[0] and spaces[1] else None
        for side in (0, 1)
    ]
    return ModuleChange(
        module=module,
        norm_a=_norm(a),
        norm_b=_norm(b),
        norm_change=float(values.norm()),
        cosine=_cosine(a, b),
        effective_rank=_effective_rank(values),
        output_angle=angles[0],
        input_angle=angles[1],
    )


def update_size(update: Factors, before: Factors | None = None, *, blocks: int = 1) -> UpdateSize:
    """Measure an update of a module, and lay it beside another.

    Args:
        update: scaling * B @ A.
        before: of the same module.
        blocks: experts that lie side by side in the factors.

    Raises:
        ValueError: the factors don't go together.
    """
    own = _update(update, blocks)
    values = _singular_values(own)
    shared: list[float | None] = [None, None]
    if before is not None:
        mine, theirs = _spaces(own), _spaces(_update(before, blocks))
        shared = [_mean(_shared(mine[side], theirs[side])) for side in (0, 1)]
    return UpdateSize(
        norm=float(values.norm()),
        effective_rank=_effective_rank(values),
        rank=min(own.left.shape[-2], own.left.shape[-1], own.right.shape[-1]),
        output_overlap=shared[0],
        input_overlap=shared[1],
    )


def effective_rank(matrix: torch.Tensor) -> float:
    """That of one dense matrix, from all of its singular values."""
    return _effective_rank(torch.linalg.svdvals(matrix.double())[None])


def tensor_change(name: str, one: torch.Tensor | None, other: torch.Tensor | None) -> TensorChange:
    """Compare two tensors, either of which may be missing."""
    a, b = (None if each is None else each.double() for each in (one, other))
    comparable = a is not None and b is not None and a.shape == b.shape
    return TensorChange(
        name=name,
        norm_a=None if a is None else float(a.norm()),
        norm_b=None if b is None else float(b.norm()),
        norm_change=float((b - a).norm())
        if comparable and a is not None and b is not None
        else None,
    )


def _update(factors: Factors, blocks: int) -> _Update:
    a, b = factors.A.double(), factors.B.double() * factors.scaling
    matrices = a.dim() == b.dim() == 2
    whole = min(a.dim(), b.dim()) >= 2 and b.shape[1] > 0 and a.shape[0] % b.shape[1] == 0
    if not whole or (blocks > 1 and not matrices):
        raise ValueError(f"factors of shapes {tuple(a.shape)} and {tuple(b.shape)} are no update")
    if blocks > 1:
        # Ranks are the outer dimension of A and the inner one of B.
        return _Update(b.unflatten(1, (-1, blocks)).permute(2, 0, 1), a.unflatten(0, (blocks, -1)))
    groups = a.shape[0] // b.shape[1]
    right = a.flatten(1).unflatten(0, (groups, -1))
    return _Update(b.flatten(1).unflatten(0, (groups, -1)), right)


def _outer(update: _Update) -> tuple[int, ...]:
    blocks, out, _ = update.left.shape
    return blocks, out, update.right.shape[-1]


def _minus(b: _Update | None, a: _Update | None) -> _Update:
    if a is None or b is None:
        either = b or a
        assert either is not None
        return either
    return _Update(torch.cat([b.left, -a.left], dim=-1), torch.cat([b.right, a.right], dim=-2))


def _singular_values(update: _Update) -> torch.Tensor:
    """Blocks x ranks, largest first; what is rounding is 0."""
    return _cleaned(torch.linalg.svdvals(update.core[1]), update)


def _cleaned(values: torch.Tensor, update: _Update) -> torch.Tensor:
    # Two updates that cancel leave rounding of their own size, not of the difference's.
    size = float(update.left.norm()) * float(update.right.norm())
    return torch.where(values > _NOTHING * size, values, 0.0)


def _norm(update: _Update | None) -> float:
    return 0.0 if update is None else float(update.core[1].norm())


def _cosine(a: _Update | None, b: _Update | None) -> float | None:
    norms = _norm(a) * _norm(b)
    if a is None or b is None or not norms:
        return None
    inner = ((a.left.mT @ b.left) * (a.right @ b.right.mT)).sum()
    return max(-1.0, min(1.0, float(inner) / norms))


def _effective_rank(values: torch.Tensor) -> float:
    ranks = []
    for block in values:
        if not bool(block.any()):
            ranks.append(0.0)
            continue
        shares = block[block > 0] / block.sum()
        ranks.append(math.exp(float(-(shares * shares.log()).sum())))
    return sum(ranks) / len(ranks)


def _spaces(update: _Update) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Bases of the spaces of outputs and inputs, a matrix with orthonormal columns per block."""
    q_left, core, q_right = update.core
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    outputs, inputs = [], []
    for index, values in enumerate(_cleaned(s, update)):
        kept = values > 0
        outputs.append(q_left[index] @ u[index][:, kept])
        inputs.append(q_right[index] @ vh[index].mT[:, kept])
    return outputs, inputs


def _angle(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float | None:
    shares = _shared(one, other)
    return _mean([math.degrees(math.acos(math.sqrt(share))) for share in shares])


def _shared(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[float]:
    """The share of the smaller space that lies in the other, of all pairs with two spaces."""
    found = []
    for a, b in zip(one, other, strict=True):
        smaller = min(a.shape[1], b.shape[1])
        if smaller:
            shared = float((a.mT @ b).square().sum()) / smaller
            found.append(max(0.0, min(1.0, shared)))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
