"""What code in the wild reads from, and calls on, an adapted layer: PEFT's names for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.dtypes import exact
from lamina.engine.layers.displacing import Displacing
from lamina.engine.layers.folding import warn_of_rounding
from lamina.engine.layers.record import FrozenView, LayerAdapter, RecordView, VariantView
from lamina.errors import FoldError, NotFoldableError

# Places that code looks for in every layer, whether it has them or not.
_MODULE_PLACES = ("lora_A", "lora_B", "lora_magnitude_vector")
_PARAMETER_PLACES = ("lora_embedding_A", "lora_embedding_B")
_PLACES: dict[str, type[nn.Module]] = {
    **dict.fromkeys(_MODULE_PLACES, nn.ModuleDict),
    **dict.fromkeys(_PARAMETER_PLACES, nn.ParameterDict),
}


class PeftNames(Displacing):
    """A layer under PEFT's names; the dict-like attributes are views of the records."""

    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )
    # What a layer's printed name begins with.
    family = "lora."
    # Whether an adapter's input is cast to the dtype of its weights.
    cast_input_dtype_enabled = True

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The places in which adapters of this layer have parameters."""
        own = {place for record in self.records.values() for place in record.variant.places}
        return (*_MODULE_PLACES[:2], *_PARAMETER_PLACES, *sorted({_MODULE_PLACES[2], *own}))

    # --- one adapter's numbers ---------------------------------------------------------------

    @property
    def r(self) -> RecordView:
        """adapter -> rank."""
        return RecordView(self.records, "r")

    @property
    def lora_alpha(self) -> RecordView:
        """adapter -> lora_alpha."""
        return RecordView(self.records, "lora_alpha")

    @property
    def scaling(self) -> RecordView:
        """adapter -> scaling."""
        return RecordView(self.records, "scaling")

    @property
    def use_rslora(self) -> RecordView:
        """adapter -> whether its scaling is by the root of the rank."""
        return RecordView(self.records, "use_rslora")

    @property
    def use_dora(self) -> RecordView:
        """adapter -> whether its method is DoRA."""
        return RecordView(self.records, "use_dora")

    @property
    def lora_bias(self) -> RecordView:
        """adapter -> whether its B has a bias."""
        return RecordView(self.records, "lora_bias")

    @property
    def lora_variant(self) -> VariantView:
        """adapter -> its variant, where it is not plain LoRA."""
        return VariantView(self.records)

    @property
    def frozen_peft_weight_names(self) -> FrozenView:
        """adapter -> its places that never train, where there are any."""
        return FrozenView(self.records)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter's scaling `scale` times what its rank and alpha give."""
        if adapter in self.records:
            self.scaling[adapter] = scale * self.records[adapter].natural_scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of each active adapter by `scale`."""
        for name in self._active_here() if scale != 1 else ():
            self.scaling[name] = self.scaling[name] * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of each active adapter by `scale`; None restores the natural one."""
        for name in self._active_here():
            natural = self.records[name].natural_scaling
            self.scaling[name] = natural if scale is None else self.scaling[name] / scale

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.records]

    # --- adapters ----------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **options: Any
    ) -> None:
        """Add an adapter to this layer alone, or begin it anew.

        Args:
            adapter_name: its name.
            r: its rank in this layer.
            lora_alpha: the numerator of its scaling.
            config: all other settings.
            options: `target_name`, the layer's name in the model.
        """
        if adapter_name in self.records:
            self.delete_adapter(adapter_name)
        record = LayerAdapter.of(config, r, lora_alpha, options.get("target_name", ""))
        self.add_adapter(adapter_name, record, init=config.init_lora_weights)
        self.set_requires_grad(
            adapter_name, adapter_name in self.active_adapters and not config.inference_mode
        )

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Begin an adapter's weights anew; False leaves them as they are."""
        if adapter_name in self.records and init_lora_weights is not False:
            self.initialise(adapter_name, init_lora_weights)

    # --- folding -----------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter is folded into the base weight."""
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None) -> None:
        """Fold adapters (None: the active ones) into this layer's base weight.

        Raises:
            FoldError: the weight can't be written, or with `safe_merge`, NaN or Inf would come out.
        """
        wanted = self.active_adapters if adapter_names is None else list(adapter_names)
        missing = [n for n in wanted if n in self.records and n not in self.merged_adapters]
        if not missing:
            return
        reason = self.why_not_foldable(missing) or self.why_not_rounded(None)
        if reason:
            raise NotFoldableError(f"This layer can't be folded into: {reason}.")
        if safe_merge and not self.is_finite(missing):
            raise FoldError(
                f"NaNs detected in the merged weights. The adapter {missing} seems to be broken"
            )
        warn_of_rounding([self])
        self.fold(missing)

    def unmerge(self) -> None:
        """Give the base its weight back, bit for bit."""
        self.unfold()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A` in the factors' dtype, shaped like the base's weight."""
        a, _ = self.factors(adapter)
        with exact(a.device):
            return self.records[adapter].variant.delta(self, adapter).to(a.dtype)

    # --- the base ----------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The layer as it was before it was adapted."""
        base: nn.Module = self.base_layer
        return base

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight; the codes, where a quantiser keeps them under its own name."""
        packed = getattr(self.base_layer, "qweight", None)
        weight: torch.Tensor = self.base_layer.weight if packed is None else packed
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        bias: torch.Tensor | None = self.base_layer.bias
        return bias

    def __repr__(self) -> str:
        return f"{self.family}{super().__repr__()}"

    def __getattr__(self, name: str) -> Any:
        # Every forward comes by here for the base layer and the factors.
        own = self.__dict__.get("_modules", {}).get(name)
        if own is not None:
            return own
        # Models read attributes of their own layers: in_features, embedding_dim, stride ...
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _PLACES:
                # Kept: what somebody puts there has to stay.
                setattr(self, name, _PLACES[name]())
                return self._modules[name]
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)
