"""What one adapter is in one layer: a record, and the dict-like views that code reads it by."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lamina.config import LoraConfig
from lamina.engine.variants import PlainLora, Variant, variant_for


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter in one layer: its numbers and its variant.

    Attributes:
        r: its rank here.
        lora_alpha: the numerator of its scaling here.
        scaling: what its update is multiplied by now.
        p: probability of dropping an input.
        use_rslora: whether the scaling is by the root of the rank.
        lora_bias: whether B has a bias.
        variant: how its update is combined with the base.
        config: the config that it was made from.
        target: plain name of the layer in the model, as far as it is known.
    """

    r: int
    lora_alpha: float
    scaling: float
    p: float
    use_rslora: bool
    lora_bias: bool
    variant: Variant
    config: LoraConfig = field(compare=False, repr=False)
    target: str = field(default="", compare=False)

    @classmethod
    def of(cls, config: LoraConfig, r: int, lora_alpha: float, target: str = "") -> LayerAdapter:
        """The record for a layer where `r` and `lora_alpha` apply."""
        variant = variant_for(config)
        return cls(
            r=r,
            lora_alpha=lora_alpha,
            scaling=variant.scaling(r, lora_alpha, config.use_rslora),
            p=config.lora_dropout,
            use_rslora=config.use_rslora,
            lora_bias=config.lora_bias,
            variant=variant,
            config=config,
            target=target,
        )

    @classmethod
    def of_rows(cls, config: LoraConfig, count: int, target: str) -> LayerAdapter:
        """The record for a table of which `count` rows are replaced; there are no factors."""
        return cls(
            r=count,
            lora_alpha=float(count),
            scaling=1.0,
            p=0.0,
            use_rslora=False,
            lora_bias=False,
            variant=PlainLora(),
            config=config,
            target=target,
        )

    @property
    def natural_scaling(self) -> float:
        """The scaling that rank and alpha give, whatever it was set to since."""
        return self.variant.scaling(self.r, self.lora_alpha, self.use_rslora)

    @property
    def use_dora(self) -> bool:
        """Whether the method is DoRA."""
        return self.config.use_dora


class RecordView(MutableMapping[str, Any]):
    """One field of all adapters of a layer, as the dict that code in the wild reads and writes."""

    def __init__(self, records: dict[str, LayerAdapter], attribute: str) -> None:
        self._records = records
        self._attribute = attribute

    def __getitem__(self, name: str) -> Any:
        return getattr(self._records[name], self._attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        if self._attribute not in {f.name for f in fields(LayerAdapter)}:
            raise TypeError(f"{self._attribute} follows from the config; it can't be set")
        self._records[name] = replace(self._records[name], **{self._attribute: value})

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter is removed by delete_adapter, not field by field")

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return repr(dict(self))


class FrozenView(RecordView):
    """adapter -> its places that never train, of the adapters that have some."""

    def __init__(self, records: dict[str, LayerAdapter]) -> None:
        super().__init__(records, "variant")

    def __getitem__(self, name: str) -> list[str]:
        frozen = self._records[name].variant.frozen
        if not frozen:
            raise KeyError(name)
        return [leaf.partition(".")[0] for leaf in frozen]

    def __iter__(self) -> Iterator[str]:
        return (name for name, record in self._records.items() if record.variant.frozen)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class VariantView(RecordView):
    """adapter -> its variant, of the adapters that are more than plain LoRA."""

    def __init__(self, records: dict[str, LayerAdapter]) -> None:
        super().__init__(records, "variant")

    def __getitem__(self, name: str) -> Variant:
        variant = self._records[name].variant
        if variant.is_plain:
            raise KeyError(name)
        return variant

    def __iter__(self) -> Iterator[str]:
        return (name for name, record in self._records.items() if not record.variant.is_plain)

    def __len__(self) -> int:
        return sum(1 for _ in self)
