"""An adapted layer: the base layer and the factors of its adapters.

forward, fold and unfold are written here, once. A kind of layer says how its update is shaped, a
variant how it is combined, a weight how it is read and written.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.dtypes import accumulation_dtype, adapter_dtype, exact
from lamina.engine.init import initialisation
from lamina.engine.state import AdapterState
from lamina.engine.variants import Variant, variant_for
from lamina.engine.weights import BaseWeight, weight_of
from lamina.errors import FoldError


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter in one layer: its numbers and its variant."""

    r: int
    lora_alpha: float
    scaling: float
    p: float
    use_rslora: bool
    lora_bias: bool
    variant: Variant

    @classmethod
    def of(cls, config: LoraConfig, r: int, lora_alpha: float) -> LayerAdapter:
        """The record for a layer where `r` and `lora_alpha` apply."""
        return cls(
            r=r,
            lora_alpha=lora_alpha,
            scaling=lora_alpha / (math.sqrt(r) if config.use_rslora else r),
            p=config.lora_dropout,
            use_rslora=config.use_rslora,
            lora_bias=config.lora_bias,
            variant=variant_for(config),
        )


class RecordView(MutableMapping[str, Any]):
    """One field of all adapters of a layer, as the dict that code in the wild reads and writes."""

    def __init__(self, records: dict[str, LayerAdapter], attribute: str) -> None:
        assert attribute in {f.name for f in fields(LayerAdapter)}
        self._records = records
        self._attribute = attribute

    def __getitem__(self, name: str) -> Any:
        return getattr(self._records[name], self._attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        self._records[name] = replace(self._records[name], **{self._attribute: value})

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter is removed by delete_adapter, not field by field")

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return repr(dict(self))


class LoraLayer(nn.Module):
    """The base of all adapted layers.

    Args:
        base_layer: the layer that is adapted; it stays as it is.
        state: the model's shared state.
    """

    # Any: torch types the attributes of a module as Tensor | Module.
    base_layer: Any
    lora_dropout: nn.ModuleDict
    # The places where factors lie; their order is A, B.
    factor_names: tuple[str, ...] = ("lora_A", "lora_B")
    is_embedding = False

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_state = state
        self.records: dict[str, LayerAdapter] = {}
        self.merged_adapters: list[str] = []
        self._unfolded: dict[str, torch.Tensor] = {}
        self.lora_dropout = nn.ModuleDict()
        self.train(base_layer.training)

    # --- what a kind of layer says -----------------------------------------------------------

    @abstractmethod
    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        """Put factors on the meta device into the places of `factor_names`."""

    @abstractmethod
    def low_rank(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * B(A(dropout(x)))`, shaped like the base's output."""

    @abstractmethod
    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, summed in at least fp32."""

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        """None if these adapters can be folded into this layer, else the reason."""
        lacks_bias = getattr(self.base_layer, "bias", None) is None
        if lacks_bias and any(self.records[name].lora_bias for name in names):
            return "its base has no bias that could take up the bias of lora_B (lora_bias=True)"
        return self.weight_view.why_not_writable

    # --- adapters ----------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        record: LayerAdapter,
        *,
        init: bool | str | None = True,
        upcast: bool = True,
    ) -> None:
        """Add an adapter.

        Args:
            name: its name.
            record: its numbers in this layer.
            init: how the factors begin; None leaves them on the meta device, to be assigned.
            upcast: keep half-precision adapters in fp32; see `lamina.engine.dtypes`.
        """
        weight = self.weight_view
        self.records[name] = record
        self.lora_dropout[name] = nn.Dropout(record.p) if record.p > 0 else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self.add_factors(name, record, adapter_dtype(weight.dtype, upcast=upcast))
        if init is not None:
            self.initialise(name, init)

    @torch.no_grad()
    def initialise(self, name: str, init: bool | str) -> None:
        """Begin an adapter's factors anew, on the base's device; nothing to do on meta."""
        device = self.weight_view.device
        if device.type == "meta":
            return
        for leaf, parameter in self.tensors(name).items():
            make = torch.zeros_like if leaf.endswith("bias") else torch.empty_like
            self.assign(name, leaf, make(parameter, device=device))
        initialisation(init)(*self.factors(name), self.is_embedding)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter's factors; it must not be folded in."""
        if name in self.merged_adapters:
            raise FoldError(
                f"The adapter {name!r} is folded into the base weights.",
                cure="model.unmerge_adapter() first",
            )
        del self.records[name]
        for place in (*self.factor_names, "lora_dropout"):
            del getattr(self, place)[name]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter."""
        a, b = (self.tensors(name)[leaf] for leaf in self._factor_leaves())
        return a, b

    def _factor_leaves(self) -> tuple[str, ...]:
        return tuple(f"{place}.weight" for place in self.factor_names)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by their names on disk, e.g. `lora_A.weight`."""
        found = {}
        for place in self.factor_names:
            for leaf, parameter in getattr(self, place)[name].named_parameters():
                found[f"{place}.{leaf}"] = parameter
        return found

    def assign(self, name: str, leaf: str, value: torch.Tensor) -> None:
        """Make `value` the parameter that is `leaf` on disk; no copy is made."""
        place, _, attribute = leaf.partition(".")
        module = getattr(self, place)[name]
        grad = getattr(module, attribute).requires_grad
        setattr(module, attribute, nn.Parameter(value, requires_grad=grad))

    # --- forward -----------------------------------------------------------------------------

    def contributing(self) -> list[str]:
        """The adapters that the forward has to add: active, here, and not folded in."""
        merged = self.merged_adapters
        return [
            name
            for name in self.adapter_state.contributing
            if name in self.records and name not in merged
        ]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output plus what each contributing adapter adds, in the base's dtype."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.contributing():
            result = self.records[name].variant.add(self, name, x, result)
        return result.to(dtype)

    # --- fold --------------------------------------------------------------------------------

    @property
    def weight_view(self) -> BaseWeight:
        """The base layer's weight, to be read and written."""
        return weight_of(self.base_layer)

    @torch.no_grad()
    def folded(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with these adapters added, in the accumulation dtype, not yet rounded.

        Where the unfolded weight was kept, the sum starts from there, so that folding adapters
        one by one rounds no more often than folding them at once.
        """
        stored = self.weight_view.read()
        if "weight" in self._unfolded:
            stored = self._unfolded["weight"].to(stored.device)
            names = [*self.merged_adapters, *names]
        weight = stored.to(accumulation_dtype(stored.dtype), copy=True)
        with exact(weight.device):
            for name in names:
                weight = self.records[name].variant.fold(self, name, weight)
        return weight, self._folded_bias(names)

    def _folded_bias(self, names: Sequence[str]) -> torch.Tensor | None:
        biased = [name for name in names if self.records[name].lora_bias]
        if not biased:
            return None
        stored = self._unfolded.get("bias", self.base_layer.bias.data)
        total: torch.Tensor = stored.to(accumulation_dtype(stored.dtype), copy=True)
        for name in biased:
            total += self.records[name].scaling * self.tensors(name)["lora_B.bias"].data
        return total

    @torch.no_grad()
    def fold(self, names: Sequence[str], *, keep_unfolded: bool = True) -> None:
        """Add adapters to the base weight: summed in fp32, rounded once.

        Args:
            names: adapters of this layer that are not folded in yet.
            keep_unfolded: hold on to the weight as it was, so that `unfold` gives it back
                bit-exactly; costs the memory of one weight.
        """
        weight, bias = self.folded(names)
        before = {"weight": self.weight_view.swap(weight)}
        if bias is not None:
            before["bias"] = self.base_layer.bias.data
            self.base_layer.bias.data = bias.to(before["bias"].dtype)
        # What an earlier fold did not keep is lost: then there is nothing to go back to.
        if keep_unfolded and self.can_unfold:
            self._unfolded = {**before, **self._unfolded}
        if not self.merged_adapters:
            self.adapter_state.folded_layers += 1
        self.merged_adapters.extend(names)

    @property
    def can_unfold(self) -> bool:
        """Whether `unfold` has what it needs."""
        return not self.merged_adapters or "weight" in self._unfolded

    @torch.no_grad()
    def unfold(self) -> None:
        """Give the base its weight back, bit for bit.

        Raises:
            FoldError: it was folded without keeping the weight.
        """
        if not self.can_unfold:
            raise FoldError(
                "The unfolded weight was not kept, so it can't be restored exactly.",
                cure="load the base model again, or fold with keep_unfolded=True",
            )
        for attribute, before in self._unfolded.items():
            parameter = getattr(self.base_layer, attribute)
            parameter.data = before.to(device=parameter.device, dtype=parameter.dtype)
        if self.merged_adapters:
            self.adapter_state.folded_layers -= 1
        self._unfolded = {}
        self.merged_adapters.clear()

    # --- what code in the wild reads ---------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The layer as it was before it was adapted."""
        base: nn.Module = self.base_layer
        return base

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A` in the factors' dtype, shaped like the base's weight."""
        a, _ = self.factors(adapter)
        with exact(a.device):
            return self.delta_weight(adapter).to(a.dtype)

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
    def active_adapters(self) -> list[str]:
        """The adapters that are active in the model."""
        return list(self.adapter_state.active)

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off for now."""
        return self.adapter_state.disabled

    @property
    def merged(self) -> bool:
        """Whether any adapter is folded into the base weight."""
        return bool(self.merged_adapters)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        bias: torch.Tensor | None = self.base_layer.bias
        return bias

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their own layers: in_features, embedding_dim, stride ...
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)
