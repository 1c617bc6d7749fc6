"""How far honest answers may lie apart.

Two runs of one model in one dtype differ by the order of their sums. Each block rounds what it
reads and what it gives, to a relative `u`, the unit roundoff; such errors are independent from
block to block, so that they grow by the square root of their number. With `m` the largest logit,

    tolerance = 8 * u * sqrt(depth + 1) * m

where `u` is that of the coarsest dtype that took part: 2^-8 for bfloat16, 2^-11 for float16. In
float32 it would be 2^-24, but the record has six digits, and processors sum thousands of terms in
orders of their own; 2^-17 leaves room for both. Measured on a trained model of four blocks, between
eager and fused attention, folded and unfolded, bfloat16 and float32, honest differences are a sixth
of that in bfloat16 and float16; of 24 blocks of random weights a fifth, or all of it where these
are so large that every block amplifies errors. The same quantiser on both sides gives the same
codes, so that only what is computed differs, at least as much as in bfloat16.

Against another quantiser, or a dense base, no such bound says anything: rounding weights to 4 bits
moves single logits by more than an adapter does. There the predictions are judged, by their
divergence and by how often the first choice is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_ROUNDOFF = {
    "float64": 2.0**-17,
    "float32": 2.0**-17,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}
# What is stored in fewer bits.
_COARSEST = 2.0**-8
_SAFETY = 8.0
_KL = 0.25
_TOP1 = 0.5


@dataclass(frozen=True)
class Tolerance:
    """What answers are judged by; what is None isn't judged.

    Attributes:
        difference: of two logits.
        kl: mean divergence of the predictions, in nats.
        top1: the least share of positions with the same first choice.
        reason: why these, for people to read.
    """

    difference: float | None
    kl: float | None
    top1: float | None
    reason: str


def tolerance_for(
    largest: float,
    depth: int,
    dtypes: Iterable[str],
    quantizations: tuple[str | None, str | None] = (None, None),
    *,
    kind: str = "logits",
) -> Tolerance:
    """The tolerance for two answers of the same model.

    Args:
        largest: the largest magnitude among the expected answers.
        depth: blocks of the model, one after another.
        dtypes: all that the answers were computed in, or their weights rounded to.
        quantizations: the quantiser of each side; None where it is dense.
        kind: "logits", or "hidden states", of which there are no predictions.
    """
    one, other = quantizations
    coarsest = max(dtypes, key=lambda dtype: _ROUNDOFF.get(dtype, _COARSEST), default="float32")
    if one != other and kind == "logits":
        return Tolerance(None, _KL, _TOP1, f"{one or 'dense'} against {other or 'dense'}")
    roundoff = _ROUNDOFF.get(coarsest, _COARSEST)
    reason = coarsest
    if one is not None or other is not None:
        roundoff = max(roundoff, _COARSEST)
        reason = f"{one} in {coarsest}"
    if one != other:
        # Hidden states are normalised: a share of the largest is all that can be asked.
        return Tolerance(0.5 * largest, None, None, f"{one or 'dense'} against {other or 'dense'}")
    difference = _SAFETY * roundoff * math.sqrt(depth + 1) * largest
    return Tolerance(difference, None, None, reason)
