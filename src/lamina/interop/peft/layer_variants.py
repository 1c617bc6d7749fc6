"""How a layer built as peft builds it finds its variant, and obeys one that somebody else wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lamina import config as native_config
from lamina.engine import variants as native
from lamina.engine.routing import Routing
from lamina.interop.peft.standing import StandsFor

# What a field asks for, where it isn't written beside the field.
_FIELDS = frozenset(
    {
        "use_dora",
        "alora_invocation_tokens",
        "use_bdlora",
        "arrow_config",
        "monteclora_config",
        "velora_config",
        "kasa_config",
    }
)
_BEGINNINGS = ("mica",)


class LoraVariant(metaclass=StandsFor):
    """What is to be derived from for a variant of one's own: static methods, and no state."""

    stands_for: Any = native.Variant

    def supports_lora_conversion(self) -> bool:
        """Whether `convert_to_lora` can turn an adapter of this kind into plain LoRA."""
        return True

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Give the layer what the adapter has beside A and B, which are there already."""
        raise NotImplementedError

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """A new tensor: the weight with the update in it."""
        raise NotImplementedError

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Put the update into the weight itself."""

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the update."""
        raise NotImplementedError

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`result`, the base's output, with what the adapter makes of `x`."""
        raise NotImplementedError


class NamedVariant(LoraVariant):
    """One of Lamina's own variants under peft's name; `stands_for` says which."""

    stands_for: Any = ()
    native: Any = None

    def __init_subclass__(cls) -> None:
        own = cls.__dict__.get("stands_for")
        if own is not None:
            cls.native = own()

    @classmethod
    def init(cls, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Make what the variant keeps beside A and B, and give it its first values."""
        weight = module.weight_view
        with torch.device("meta"):
            cls.native.prepare(module, adapter_name, module.factors(adapter_name)[0].dtype)
        for place in cls.native.places:
            held = getattr(module, place)[adapter_name]
            if isinstance(held, torch.nn.Module):
                held.to_empty(device=weight.device)
            else:
                empty = torch.empty_like(held, device=weight.device)
                getattr(module, place)[adapter_name] = torch.nn.Parameter(empty)
        cls.native.begin(module, adapter_name)

    @classmethod
    def merge_safe(
        cls, module: Any, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A new tensor: the weight with the update in it."""
        folded: torch.Tensor = cls.native.fold(module, active_adapter, orig_weight.clone())
        return folded.to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Put the update into the weight itself."""
        orig_weight.data = cls.merge_safe(module, active_adapter, orig_weight.data)

    @classmethod
    def forward(
        cls, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`result`, the base's output, with what the adapter makes of `x`."""
        added: torch.Tensor = cls.native.add(module, active_adapter, x, result)
        return added


class ForeignVariant(native.Variant):
    """Lets the engine follow a `LoraVariant` that somebody else wrote.

    Args:
        theirs: the variant.
    """

    # Only its own methods know what it does; the layer says what it keeps.
    changes_base = True
    kinds = ("linear", "embedding", "conv")

    def __init__(self, theirs: LoraVariant) -> None:
        self.theirs = theirs

    def begin(self, layer: Any, adapter: str) -> None:
        """Let its author's code make what it needs."""
        record = layer.records[adapter]
        self.theirs.init(
            layer, adapter_name=adapter, config=record.config, target_name=record.target
        )

    def add(self, layer: Any, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` with the adapter's part, by its author's code."""
        a, _ = layer.factors(adapter)
        routing: Routing | None = layer.adapter_state.routing
        offsets = None if routing is None else routing.offsets.get(adapter)
        if x.is_floating_point():
            x = layer._cast_input_dtype(x, a.dtype)
        return self.theirs.forward(
            layer, active_adapter=adapter, x=x, result=result, alora_offsets=offsets
        )

    def fold(self, layer: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the update in it, by its author's code."""
        return self.theirs.merge_safe(layer, adapter, weight)


def engines(found: Any) -> native.Variant | None:
    """The engine's variant for what a layer has resolved; None where a config says it better."""
    theirs = isinstance(found, LoraVariant) and not isinstance(found, native.Variant)
    if not theirs or "stands_for" in type(found).__dict__:
        return None
    return ForeignVariant(found)


def _requested(config: Any) -> dict[str, bool]:
    """What may be asked for -> whether the config does."""
    asked: dict[str, bool] = {}
    ours = isinstance(config, native_config.LoraConfig)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "init_lora_weights":
            names = field.metadata.get("lora_variants", _BEGINNINGS if ours else ())
            asked |= {name: value == name for name in names}
        elif field.metadata.get("is_lora_variant", ours and field.name in _FIELDS):
            asked[field.name] = bool(value)
    return asked


def resolve(known: Mapping[tuple[str, ...], Any], config: Any) -> Any:
    """An object of the class that a layer has for what a config asks for; None for plain LoRA.

    Args:
        known: what may be asked for at once, sorted -> the class.
        config: the adapter's config.

    Raises:
        ValueError: the names are not sorted, not known to the config, or not known together.
    """
    unsorted = [names for names in known if tuple(sorted(names)) != names]
    if unsorted:
        raise ValueError(
            f"Keys in lora_variants must be sorted tuples; {unsorted} aren't: ('a', 'b') is right."
        )
    asked = _requested(config)
    strange = sorted({name for names in known for name in names} - asked.keys())
    if strange:
        raise ValueError(
            f"variant(s) {strange} found in lora_variants, but no field of {type(config).__name__} "
            "has 'is_lora_variant' in its metadata under that name, nor is it one of the "
            "'lora_variants' of init_lora_weights."
        )
    together = tuple(sorted(name for name, wanted in asked.items() if wanted))
    if together not in known:
        raise ValueError(f"Invalid or unsupported variant combination: {together}")
    kind = known[together]
    return kind() if kind is not None else None
