"""aLoRA: an adapter that acts only from the last invocation on, a sequence of tokens.

So all that comes before, its keys and values included, is the base's, and can be shared.
Source: arXiv:2504.12397.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.engine.variants.base import Update, Variant


class ALora(Variant):
    """`y = base(x) + scaling * B(A(dropout(x)))` from the invocation's first token on.

    Where that is, the routing in the shared state says; a row without an invocation is the base's.
    """

    routes_itself = True

    def add(
        self, layer: Update, adapter: str, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        length = result.shape[1] if result.dim() > 2 else 1
        routing = layer.adapter_state.routing
        acting = routing and routing.acting(adapter, result.shape[0], length, result.device)
        if acting is None:
            if not torch.is_grad_enabled():
                return result
            # Nowhere; yet gradients are zero rather than absent.
            acting = torch.zeros(1, 1, dtype=torch.bool, device=result.device)
        acting = acting.view(*acting.shape, *[1] * (result.dim() - 2))
        return torch.where(acting, result + layer.low_rank(adapter, x), result)

    def why_not_foldable(self, layer: Update, adapter: str) -> str | None:
        return "aLoRA does not support merging: it acts on some of the tokens only"


def invocation_offsets(input_ids: torch.Tensor, invocation: Sequence[int]) -> list[int | None]:
    """For each row the tokens from the start of its last invocation to the end; None without one.

    Args:
        input_ids: rows x tokens.
        invocation: the sequence of tokens.
    """
    length, span = input_ids.shape[1], len(invocation)
    if span > length:
        return [None] * input_ids.shape[0]
    wanted = torch.as_tensor(list(invocation), device=input_ids.device)
    hits = (input_ids.unfold(1, span, 1) == wanted).all(-1)
    starts = torch.arange(hits.shape[1], device=hits.device)
    last = torch.where(hits, starts, -1).amax(1).tolist()
    return [None if start < 0 else length - start for start in last]
