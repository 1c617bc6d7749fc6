"""Layers that are built by hand, or derived from, as peft's are.

peft's layer is a mixin beside `nn.Module`, is built together with its first adapter, and merges
itself. Lamina's is a module, and gets its adapters from the engine, which folds them in.
`BuiltLayer` is the one to the caller and the other to the engine.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamina.engine.dtypes import adapter_dtype, to_adapter_input
from lamina.engine.layers.record import LayerAdapter
from lamina.engine.state import AdapterState
from lamina.interop.peft import layer_variants
from lamina.interop.peft.layer_numbers import Noted
from lamina.interop.peft.layer_variants import ForeignVariant
from lamina.interop.peft.matching import get_in_out_features
from lamina.interop.peft.types import PeftWarning

# The shared state of the model that is being adapted; a layer built by hand has one of its own.
_state: ContextVar[AdapterState | None] = ContextVar("state", default=None)
# What a module keeps its children and tensors in.
_HELD = ("_parameters", "_buffers", "_modules")


@contextmanager
def _adapting(state: AdapterState) -> Iterator[None]:
    """Let layers that are built inside share a model's state, and leave what it says alone."""
    token = _state.set(state)
    before = (state.active, state.trainable, state.disabled)
    told = {member: member.override for member in state.members}
    try:
        yield
    finally:
        _state.reset(token)
        state.active, state.trainable, state.disabled = before
        for member in state.members:
            member.override = told.get(member)
        state.overridden = sum(member.override is not None for member in state.members)


def _own_state() -> AdapterState:
    # As in the drop-in's models.
    return AdapterState(requantise=True, changes_stay=True, copies_begin_as_base=True)


class BuiltLayer(Noted):
    """What all layers of the drop-in have in common, beside the engine's own.

    Args:
        base_layer: the layer that is adapted; without it, only the module is made, as it is by
            `super().__init__()` in a class that derives from `nn.Module` and this.
        ephemeral_gpu_offload: kept for callers; nothing is moved.
        kwargs: kept as they are.
    """

    # A class says it of itself: it stands where the engine's own would, and gets its adapters
    # from the engine. One that is derived from it may have its own way with them.
    standing = False
    kwargs: dict[str, Any]
    _asked_by_author = False

    def __init__(
        self,
        base_layer: nn.Module | None = None,
        ephemeral_gpu_offload: bool = False,
        **kwargs: Any,
    ) -> None:
        if base_layer is None:
            nn.Module.__init__(self)
            return
        self._stand(base_layer)
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.kwargs = kwargs

    def _stand(self, base_layer: nn.Module, *more: Any) -> None:
        """Become a layer around `base_layer`; what the module holds already stays."""
        kept = [(key, dict(self.__dict__.get(key, ()))) for key in _HELD]
        told = _state.get()
        state = _own_state() if told is None else told
        super(Noted, self).__init__(base_layer, state, *more)
        self.alone = told is None
        for key, before in kept:
            self.__dict__[key].update(before)

    @classmethod
    def made_for(
        cls, base_layer: nn.Module, state: AdapterState, name: str, record: LayerAdapter
    ) -> Any:
        """A layer in a model that is being adapted; it may bring its first adapter with it."""
        with _adapting(state):
            if cls.__dict__.get("standing"):
                layer = cls.__new__(cls)
                layer._stand(base_layer)
                offloads = getattr(record.config, "runtime_config", None)
                layer.ephemeral_gpu_offload = getattr(offloads, "ephemeral_gpu_offload", False)
                layer.kwargs = {"target_name": record.target}
                return layer
            made: Any = cls
            options: dict[str, Any] = {"r": record.r, "lora_alpha": record.lora_alpha}
            layer = made(
                base_layer, name, config=record.config, target_name=record.target, **options
            )
            # One that has made nothing of it so far has an adapter without weights.
            layer.note(name)
            return layer

    # --- variants ----------------------------------------------------------------------------

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """What a config may ask for at once, sorted -> the class of the variant."""
        return {(): None}

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        """The variant that a config asks for; None for plain LoRA.

        Raises:
            ValueError: this layer has none for what the config asks for at once.
        """
        return layer_variants.resolve(self.lora_variants, config)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter of this layer into plain LoRA."""
        asked = getattr(self.lora_variant.get(adapter_name), "supports_lora_conversion", None)
        return True if asked is None else bool(asked())

    def _resolved(self, record: LayerAdapter) -> LayerAdapter:
        """The record, with the variant that a derived class has of its own."""
        if not (self._authored("lora_variants") or self._authored("resolve_lora_variant")):
            return record
        theirs = layer_variants.engines(self.resolve_lora_variant(config=record.config))
        return record if theirs is None else replace(record, variant=theirs)

    def _authored(self, name: str) -> bool:
        """Whether a derived class, or a patch, has its own code for this."""
        found = inspect.getattr_static(type(self), name)
        code = getattr(found, "fget", found)
        theirs = not str(getattr(code, "__module__", "")).startswith("lamina.")
        return theirs or hasattr(code, "__wrapped__")

    # --- adapters ----------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        record: LayerAdapter,
        *,
        init: bool | str | None = True,
        upcast: bool = True,
    ) -> None:
        """Add an adapter, by this layer's own code where it has some."""
        if name not in self.records and not self._authored("update_layer"):
            record = self._resolved(record)
            if init is None and isinstance(record.variant, ForeignVariant):
                init = record.config.init_lora_weights
            super().add_adapter(name, record, init=init, upcast=upcast)
            return
        if name not in self.records:
            with _adapting(self.adapter_state):
                self.update_layer(
                    name,
                    record.r,
                    lora_alpha=record.lora_alpha,
                    config=record.config,
                    target_name=record.target,
                )
        self.note(name)
        here = self.records[name]
        self.records[name] = replace(here, config=record.config, target=record.target)
        self._cast(name, upcast)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: Any, **options: Any
    ) -> None:
        """Add an adapter to this layer alone, or begin it anew.

        Args:
            adapter_name: its name.
            r: its rank in this layer.
            lora_alpha: the numerator of its scaling.
            config: all other settings.
            options: `target_name`, the layer's name in the model.

        Raises:
            ValueError: the rank is not positive, or the layer can't have what is asked for.
        """
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self._check_bias(config)
        record = LayerAdapter.of(config, r, lora_alpha, options.get("target_name") or "")
        record = self._resolved(record)
        base = self.get_base_layer()
        reason = record.variant.why_not(self.kind, base, config, record.target or "this layer")
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}")
        if adapter_name in self.records:
            super().delete_adapter(adapter_name)
        if self.alone:
            self.adapter_state.configs[adapter_name] = config
        super().add_adapter(adapter_name, record, init=config.init_lora_weights, upcast=False)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter's weights; a layer that was built by hand goes on with another one."""
        super().delete_adapter(name)
        if not self.alone:
            return
        active = [other for other in self.active_adapters if other != name]
        was_last = not active and name in self.active_adapters
        self.adapter_state.configs.pop(name, None)
        if was_last and self.records:
            active = self._all_available_adapter_names()[:1]
            warnings.warn(
                f"Adapter {name} was active which is now deleted. Setting active adapter to "
                f"{active[0]}.",
                stacklevel=2,
            )
        if active != self.active_adapters:
            self.set_adapter(active)

    def _check_bias(self, config: Any) -> None:
        if not config.lora_bias:
            return
        if self.kind in ("embedding", "experts", "attention"):
            raise ValueError(f"lora_bias=True is not supported for {type(self).__name__}.")
        base = self.get_base_layer()
        if getattr(base, "bias", None) is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(base).__name__} "
                "has no bias. This means that merging LoRA weights won't be possible.",
                PeftWarning,
                stacklevel=4,
            )

    def _cast(self, name: str, upcast: bool) -> None:
        """Bring an adapter that the layer's own code has made into the dtype it should have."""
        view = self.weight_view
        dtype = adapter_dtype(view.dtype, upcast=upcast)
        for parameter in self.tensors(name).values():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(view.device, dtype)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by their names on disk, from wherever this layer has them."""
        if type(self).__dict__.get("standing"):
            return super().tensors(name)
        spelling = self.records[name].variant.spelling
        found: dict[str, nn.Parameter] = {}
        own = [place for place in self._modules if place.startswith("lora_")]
        for place in dict.fromkeys((*self.factor_names, *self.adapter_layer_names, *own)):
            holder: Any = self._modules.get(place)
            held = holder[name] if holder is not None and name in holder else None
            if isinstance(held, nn.Parameter):
                found[place] = held
            elif isinstance(held, nn.Module):
                for attribute, parameter in held.named_parameters():
                    leaf = f"{place}.{attribute}"
                    found[spelling.get(leaf, leaf)] = parameter
        return found

    def buffers_of(self, name: str) -> dict[str, torch.Tensor]:
        """What an adapter has beside parameters, of what the engine knows of."""
        variant = self.records[name].variant
        return {} if isinstance(variant, ForeignVariant) else super().buffers_of(name)

    # --- folding -----------------------------------------------------------------------------

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A`, shaped like the base's weight, by own code where there is some."""
        if self._authored("get_delta_weight") and not self._asked_by_author:
            return self.get_delta_weight(adapter)
        return self._plain_delta(adapter)

    def _plain_delta(self, adapter: str) -> torch.Tensor:
        engines: Any = super()
        delta: torch.Tensor = engines.delta_weight(adapter)
        return delta

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`scaling * B @ A` in the factors' dtype, shaped like the base's weight."""
        before, self._asked_by_author = self._asked_by_author, True
        try:
            return super().get_delta_weight(adapter)
        finally:
            self._asked_by_author = before

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        """None if these adapters can be folded in; who merges by own code can always try."""
        return None if self._authored("merge") else super().why_not_foldable(names)

    def is_finite(self, names: Sequence[str]) -> bool:
        """Whether neither NaN nor infinity comes out, as far as it can be told before."""
        return True if self._authored("merge") else super().is_finite(names)

    def fold(self, names: Sequence[str], *, keep_unfolded: bool = True) -> None:
        """Add adapters to the base weight, by this layer's own code where it has some."""
        if not self._authored("merge") or self._asked_by_author:
            super().fold(names, keep_unfolded=keep_unfolded)
            return
        before, self._asked_by_author = self._asked_by_author, True
        was = len(self.merged_adapters)
        try:
            self.merge(adapter_names=list(names))
        finally:
            self._asked_by_author = before
        if not was and self.merged_adapters and "weight" not in self._unfolded:
            self.adapter_state.folded_layers += 1

    @property
    def can_unfold(self) -> bool:
        """Whether `unfold` has what it needs."""
        return self._authored("unmerge") or super().can_unfold

    def unfold(self) -> None:
        """Give the base its weight back, by this layer's own code where it has some."""
        if not self._authored("unmerge") or self._asked_by_author:
            super().unfold()
            return
        was = len(self.merged_adapters)
        before, self._asked_by_author = self._asked_by_author, True
        try:
            self.unmerge()
        finally:
            self._asked_by_author = before
        if was and not self.merged_adapters and not self._unfolded:
            self.adapter_state.folded_layers -= 1

    # --- what derived classes call -----------------------------------------------------------

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """`x` as an adapter with weights of `dtype` takes it."""
        if x is None or not self.cast_input_dtype_enabled:
            return x
        return to_adapter_input(x, dtype)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int | None, int | None]:
        return get_in_out_features(module)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Put an adapter where the base's weight is, in the base's dtype."""
        view = self.weight_view
        for parameter in self.tensors(adapter_name).values():
            dtype = adapter_dtype(view.dtype, upcast=False)
            parameter.data = parameter.data.to(view.device if device is None else device, dtype)

    def _check_forward_args(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: what can't be routed is refused where it is routed."""
