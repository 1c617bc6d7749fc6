"""The numbers of a layer's adapters, as dicts that its own code may fill.

peft's layer keeps a dict for each number, and a class derived from it sets them one by one.
Lamina's keeps a record of each adapter; here, setting a number makes the record.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lamina import config as native_config
from lamina.engine import layers as native
from lamina.engine.layers.outward import PeftNames
from lamina.engine.layers.record import LayerAdapter, RecordView, VariantView
from lamina.engine.variants import PlainLora
from lamina.interop.peft.layer_variants import ForeignVariant, engines
from lamina.interop.peft.standing import StandsFor

_PLACES = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


class LayerClass(StandsFor):
    """Lets a layer be derived from `nn.Module` and `LoraLayer`, in that order, as peft's are."""

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        """Leave out bases that others derive from."""
        # Ours is a module already; torch's own class before it would contradict that.
        rest = tuple(b for b in bases if not any(b is not o and b in o.__mro__ for o in bases))
        return super().__new__(mcs, name, rest, body)

    def __repr__(cls) -> str:
        # Messages name it as who reads them knows it.
        own = cls.__module__ == "lamina.interop.peft.kinds"
        return f"<class 'peft.tuners.lora.layer.{cls.__name__}'>" if own else super().__repr__()


class _Places:
    """The names of the places: on the class a tuple, for a derived one to extend."""

    def __get__(self, layer: Any, owner: type) -> tuple[str, ...]:
        if layer is None:
            return _PLACES
        names: Any = PeftNames.adapter_layer_names
        found: tuple[str, ...] = names.fget(layer)
        return found


class _Numbers(RecordView):
    """One number of all adapters of a layer; setting it makes an adapter's record."""

    def __init__(self, layer: Noted, attribute: str) -> None:
        super().__init__(layer.records, attribute)
        self._layer = layer

    def __setitem__(self, name: str, value: Any) -> None:
        self._layer.note(name)
        if self._attribute != "use_dora":
            super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        """Nothing to do: the number goes with the adapter."""


class _Variants(VariantView):
    """adapter -> its variant, as its author wrote it, where it is not plain LoRA."""

    def __init__(self, layer: Noted) -> None:
        super().__init__(layer.records)
        self._layer = layer

    def __getitem__(self, name: str) -> Any:
        variant = super().__getitem__(name)
        return variant.theirs if isinstance(variant, ForeignVariant) else variant

    def __setitem__(self, name: str, value: Any) -> None:
        self._layer.note(name)
        super().__setitem__(name, engines(value) or value)

    def __delitem__(self, name: str) -> None:
        """Nothing to do: the variant goes with the adapter."""


class Noted(native.LoraLayer, metaclass=LayerClass):
    """A layer whose own code may say what an adapter's numbers are."""

    adapter_layer_names = _Places()
    # Whether it has a state to itself, because it was built by hand.
    alone: bool = False

    def note(self, name: str) -> None:
        """Make room for an adapter that this layer's own code is about to describe."""
        if name in self.records:
            return
        self.know([name])
        self.records[name] = LayerAdapter(
            r=0,
            lora_alpha=1,
            scaling=1.0,
            p=0.0,
            use_rslora=False,
            lora_bias=False,
            variant=PlainLora(),
            config=self.adapter_state.configs.get(name) or native_config.LoraConfig(),
        )

    def know(self, names: Iterable[str]) -> None:
        """Let the state of a layer that was built by hand know its adapters."""
        for name in names if self.alone else ():
            self.adapter_state.configs.setdefault(name, native_config.LoraConfig())

    @property
    def r(self) -> RecordView:
        """adapter -> rank."""
        return _Numbers(self, "r")

    @property
    def lora_alpha(self) -> RecordView:
        """adapter -> lora_alpha."""
        return _Numbers(self, "lora_alpha")

    @property
    def scaling(self) -> RecordView:
        """adapter -> scaling."""
        return _Numbers(self, "scaling")

    @property
    def use_rslora(self) -> RecordView:
        """adapter -> whether its scaling is by the root of the rank."""
        return _Numbers(self, "use_rslora")

    @property
    def use_dora(self) -> RecordView:
        """adapter -> whether its method is DoRA; it follows from the config."""
        return _Numbers(self, "use_dora")

    @property
    def lora_bias(self) -> RecordView:
        """adapter -> whether its B has a bias."""
        return _Numbers(self, "lora_bias")

    @property
    def lora_variant(self) -> VariantView:
        """adapter -> its variant, where it is not plain LoRA."""
        return _Variants(self)

    @property
    def _active_adapter(self) -> Any:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Iterable[str]) -> None:
        told = (names,) if isinstance(names, str) else tuple(names)
        if self.alone:
            self.know(told)
            self.adapter_state.activate(told)
            return
        setter: Any = native.LoraLayer._active_adapter
        setter.fset(self, told)

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Make adapters active in this layer, and trainable unless `inference_mode`."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for layer in self._told():
            native.LoraLayer.set_adapter(layer, names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters of this layer on, making the active ones trainable, or off."""
        for layer in self._told():
            native.LoraLayer.enable_adapters(layer, enabled)

    def _told(self) -> list[Any]:
        """Who obeys: of a layer that was built by hand, the layers inside too."""
        return list(self.adapter_state.members) if self.alone else [self]
