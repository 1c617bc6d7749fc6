"""`AdaLoraModel`: the model that is adapted, with ranks that are shared out while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from lamina.config import AdaLoraConfig
from lamina.engine.allocation import (
    RankAllocator,
    left_of,
    orthogonality,
    svd_layers,
    without_adapter,
)
from lamina.errors import AllocationError
from lamina.model.tuner import LoraModel


class SharesRanks(LoraModel):
    """What a model with AdaLoRA adapters does beside what one with LoRA does.

    One of its adapters may train: the budget is that one's.
    """

    peft_type = "ADALORA"
    trainable_adapter_name: str | None = None
    rankallocator: RankAllocator | None = None

    def begin_allocation(self, name: str) -> None:
        """Let the ranks of an adapter be shared out from now on."""
        config = self._config_of(name)
        self.trainable_adapter_name = name
        self.rankallocator = RankAllocator(self.model, config, name)

    def _config_of(self, name: str) -> AdaLoraConfig:
        config = self.adapter_state.configs[name]
        assert isinstance(config, AdaLoraConfig)
        return config

    def update_and_allocate(self, global_step: int) -> None:
        """Share the ranks out anew, if a step is one for it; see `AdaLoraConfig`.

        Call it in every step, after `loss.backward()` and before `optimizer.zero_grad()`.

        Args:
            global_step: the number of the step.

        Raises:
            AllocationError: no adapter trains, or there are no gradients.
        """
        name, allocator = self.trainable_adapter_name, self.rankallocator
        if name is None or allocator is None:
            raise AllocationError(
                "None of the adapters trains, so there are no ranks to share out.",
                cure="PeftModel.from_pretrained(model, DIR, is_trainable=True)",
            )
        config = self._config_of(name)
        last = (config.total_step or 0) - config.tfinal
        if global_step > last:
            allocator.mask_using_rank_pattern(self.model, config.rank_pattern or {})
            return
        _, masks = allocator.update_and_allocate(self.model, global_step, global_step == last)
        if masks:
            config.rank_pattern = masks
        if global_step == last:
            allocator.reset_ipt()

    def finish(self, outputs: Any) -> Any:
        """`outputs` with the penalty on A and B that aren't orthogonal added to the loss."""
        name, loss = self.trainable_adapter_name, getattr(outputs, "loss", None)
        if name is None or self.adapter_state.disabled or not isinstance(loss, torch.Tensor):
            return outputs
        weight = self._config_of(name).orth_reg_weight
        far = orthogonality(self.model, name) if weight else None
        if far is not None:
            outputs.loss = loss + weight * far.to(loss.device)
        return outputs

    def resize_modules_by_rank_pattern(
        self, rank_pattern: Mapping[str, Any], adapter_name: str
    ) -> None:
        """Leave an adapter only the ranks that a pattern has left; its output stays the same."""
        masks = without_adapter(rank_pattern, adapter_name)
        for name, layer in svd_layers(self.model, adapter_name):
            mask = masks.get(f"{name}.lora_E")
            if mask is not None and len(mask) == layer.r[adapter_name]:
                layer.keep_ranks(adapter_name, [bool(left) for left in mask])

    def resize_state_dict_by_rank_pattern(
        self,
        rank_pattern: Mapping[str, Any],
        state_dict: dict[str, torch.Tensor],
        adapter_name: str,
    ) -> dict[str, torch.Tensor]:
        """The tensors of an adapter, by their names in the model, for the ranks that are left."""
        for name, mask in without_adapter(rank_pattern, adapter_name).items():
            module = name.rpartition(".lora_E")[0]
            for leaf in ("lora_A", "lora_B", "lora_E"):
                key = f"base_model.model.{module}.{leaf}.{adapter_name}"
                state_dict[key] = left_of(leaf, state_dict[key], mask)
        return state_dict

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for AdaLoRA: the combination of adapters is plain LoRA."""
        raise AllocationError(
            f"{type(self).__name__} does not support add_weighted_adapter method.",
            cure="lamina.convert_to_lora(model, rank) makes plain LoRA of an adapter",
        )


class AdaLoraModel(SharesRanks):
    """A model with AdaLoRA adapters. Source: arXiv:2303.10512.

    Args and methods are those of `LoraModel`.
    """

    def add(self, name: str, config: Any, *, trainable: bool | None = None, **options: Any) -> None:
        """Add an adapter; it becomes active only if it is the first.

        Raises:
            AllocationError: another one trains already.
        """
        trains = not config.inference_mode if trainable is None else trainable
        others = sorted(self.adapter_state.trainable)
        if trains and others:
            raise AllocationError(
                f"AdaLoraModel supports only 1 trainable adapter; {others[0]!r} is one.",
                cure="set inference_mode=True in the new one's config, or load it with "
                f"is_trainable=False; or model.set_requires_grad({others[0]!r}, False) first",
            )
        super().add(name, config, trainable=trainable, **options)
        if trains:
            self.begin_allocation(name)


def tuner_for(config: Any) -> type[LoraModel]:
    """The class of model that a config's method asks for."""
    return AdaLoraModel if isinstance(config, AdaLoraConfig) else LoraModel
