"""AdaLoRA while it trains: which ranks of which layers matter, and what keeps them apart.

Source: arXiv:2303.10512, sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lamina.config import AdaLoraConfig
from lamina.engine.layers import SvdLayer
from lamina.engine.layers.svd import RANKS_ALONG
from lamina.engine.names import adapted_layers
from lamina.errors import AllocationError

Masks = dict[str, list[bool]]
_PARTS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """Shares a falling budget of ranks out among the layers, by importance.

    A parameter w matters by `|w * dL/dw|`, smoothed over the steps (`beta1`), times the smoothed
    deviation from that (`beta2`). A rank matters by its entry of E, plus the mean of its row of A,
    plus that of its column of B. Of all ranks in all layers the ones that matter least have their
    entry of E set to zero; they may come back as long as the budget allows.

    Args:
        model: the adapted model.
        peft_config: an `AdaLoraConfig`.
        adapter_name: the adapter that trains.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str) -> None:
        self.peft_config = peft_config
        self.adapter_name = adapter_name
        self.beta1, self.beta2 = peft_config.beta1, peft_config.beta2
        self.reset_ipt()
        ranks = [layer.records[adapter_name].r for _, layer in svd_layers(model, adapter_name)]
        self.init_bgt = sum(ranks)
        self.target_bgt = peft_config.target_r * len(ranks)

    def set_total_step(self, total_step: int) -> None:
        """Say anew how many steps training takes."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget what mattered."""
        self.ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_ipt: dict[str, torch.Tensor] = {}
        self.exp_avg_unc: dict[str, torch.Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """How many ranks there may be at a step, and whether they are shared out anew then.

        Between the first and the last phase the budget falls with the cube of what is left of it.
        """
        config = self.peft_config
        begin, end = config.tinit, (config.total_step or 0) - config.tfinal
        if step <= begin:
            return self.init_bgt, False
        if step > end:
            return self.target_bgt, True
        left = 1 - (step - begin) / (end - begin)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Take a step's gradients into account.

        Raises:
            AllocationError: there are none; nothing has been changed.
        """
        found = dict(_parameters(model, self.adapter_name))
        without = [name for name, parameter in found.items() if parameter.grad is None]
        if without or not found:
            raise AllocationError(
                f"{len(without)} of the {len(found)} parameters of {self.adapter_name!r} have no "
                "gradients, by which AdaLoRA tells what matters.",
                faults=without[:6],
                cure="call update_and_allocate(step) after loss.backward() and before "
                "optimizer.zero_grad(), with the adapter active and trainable",
            )
        for name, parameter in found.items():
            assert parameter.grad is not None
            now = self.ipt[name] = (parameter * parameter.grad).abs()
            before = self.exp_avg_ipt.get(name, torch.zeros_like(now))
            mean = self.exp_avg_ipt[name] = self.beta1 * before + (1 - self.beta1) * now
            unsure = self.exp_avg_unc.get(name, torch.zeros_like(now))
            deviation = (now - mean).abs()
            self.exp_avg_unc[name] = self.beta2 * unsure + (1 - self.beta2) * deviation

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> Masks:
        """Set all but the `budget` ranks that matter most to zero; which are left in each layer."""
        layers = dict(svd_layers(model, self.adapter_name))
        scores = {name: self._score(name) for name in layers}
        drop = self.init_bgt - budget
        lowest = torch.cat(list(scores.values()))
        # Ranks that matter as little as the last one that goes, go too.
        limit = torch.kthvalue(lowest, drop)[0] if drop > 0 else lowest.new_tensor(-torch.inf)
        masks = {}
        for name, layer in layers.items():
            kept = scores[name] > limit.to(scores[name].device)
            layer.lora_E[self.adapter_name].masked_fill_(~kept.view(-1, 1), 0.0)
            masks[self._key(name, "lora_E")] = kept.tolist()
        return masks

    def _score(self, layer: str) -> torch.Tensor:
        a, b, e = (self._importance(self._key(layer, part)) for part in _PARTS)
        return e.view(-1) + (a.mean(1) + b.mean(0))

    def _importance(self, name: str) -> torch.Tensor:
        return self.exp_avg_ipt[name] * self.exp_avg_unc[name]

    def _key(self, layer: str, part: str) -> str:
        return f"{layer}.{part}.{self.adapter_name}"

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, Masks | None]:
        """(budget, which ranks are left; None if they were not shared out at this step)."""
        if global_step < (self.peft_config.total_step or 0) - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, shares = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if shares or force_mask else None

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, Any]) -> None:
        """Set the ranks to zero that a pattern has taken away."""
        masks = without_adapter(rank_pattern, self.adapter_name)
        for name, layer in svd_layers(model, self.adapter_name):
            e = layer.lora_E[self.adapter_name]
            mask = masks[f"{name}.lora_E"]
            # Whoever goes on from a file has only the ranks that are left.
            if len(mask) == len(e):
                e.masked_fill_(~torch.tensor(mask, device=e.device).view(-1, 1), 0.0)


def svd_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, SvdLayer]]:
    """(plain name, layer) of everything that an AdaLoRA adapter adapts."""
    for name, layer in adapted_layers(model):
        if isinstance(layer, SvdLayer) and adapter in layer.records:
            yield name, layer


def _parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in svd_layers(model, adapter):
        for leaf, parameter in layer.tensors(adapter).items():
            yield f"{name}.{leaf}.{adapter}", parameter


def orthogonality(model: nn.Module, adapter: str) -> torch.Tensor | None:
    """The mean of `|A A^T - 1|` and `|B^T B - 1|` (Frobenius norms) over all layers; None in none.

    Source: arXiv:2303.10512, equation 4.
    """
    far = []
    for _, layer in svd_layers(model, adapter):
        A_RI, B_OR = layer.factors(adapter)
        for product in (A_RI @ A_RI.T, B_OR.T @ B_OR):
            far.append(torch.linalg.matrix_norm(product - torch.eye(len(product)).to(product)))
    if not far:
        return None
    return torch.stack([each.to(far[0].device) for each in far]).sum() / len(far)


def without_adapter(masks: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """A rank pattern with names as they are on disk, which the adapter's is no part of."""
    return {name.removesuffix(f".{adapter}"): mask for name, mask in masks.items()}


def left_of(leaf: str, tensor: torch.Tensor, mask: Sequence[bool]) -> torch.Tensor:
    """The part of a parameter that belongs to ranks that are left; as it is, if it is only that."""
    along = RANKS_ALONG.get(leaf)
    if along is None or tensor.shape[along] == sum(mask):
        return tensor
    return tensor.index_select(along, torch.tensor(mask, device=tensor.device).nonzero()[:, 0])
