"""`peft.tuners.trainable_tokens`: rows of a table that are trained without any low-rank update."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from lamina import config as native
from lamina import model as native_model
from lamina.config.expressions import fullmatch
from lamina.engine.layers import TrainableTokensLayer
from lamina.engine.names import adapted_layers, places, suffixes
from lamina.engine.ties import input_embedding
from lamina.interop.peft import ties
from lamina.interop.peft.config import PeftConfig
from lamina.interop.peft.lora_config import LoraConfig
from lamina.interop.peft.tuner import LoraModel, extend
from lamina.interop.peft.types import NoMatchingPeftModuleError, PeftType

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"]


@dataclass
class TrainableTokensConfig(LoraConfig):
    """Which rows of which tables are trained.

    Args:
        token_indices: the rows.
        target_modules: the tables; None means the input embedding.
        init_weights: begin as the table's rows, else as noise.
    """

    stands_for: ClassVar[Any] = ()
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """The settings of this method; those of LoRA, which it derives from, are no part of it."""
        own = {f.name for f in fields(PeftConfig)} | {"token_indices", "target_modules"}
        values = super().to_dict()
        return {name: values[name] for name in values if name in own | {"init_weights"}}


@dataclass
class _Rows(native.LoraConfig):
    """What the engine is told: rows, and no layers around them."""

    rows_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS


class TrainableTokensModel(LoraModel):
    """A model of which some rows are trained."""

    stands_for: Any = ()
    prefix = "trainable_tokens_"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Any] | None = None,
        *,
        config: Any = None,
    ) -> None:
        """Add an adapter; it is not active yet. An old one of this name is replaced.

        Raises:
            NoMatchingPeftModuleError: its config matches nothing.
        """
        config = self._make_room(adapter_name, config)
        rows = _Rows(
            target_modules=[],
            trainable_token_indices=dict.fromkeys(_tables(model, config), config.token_indices),
            init_lora_weights=config.init_weights,
            bias="all" if config.bias == "all" else "none",
            inference_mode=config.inference_mode,
        )
        with ties.told_shortly():
            native_model.LoraModel.add(
                self,
                adapter_name,
                rows,
                initialise=not low_cpu_mem_usage,
                upcast=autocast_adapter_dtype,
                strict=False,
            )
        self.adapter_state.configs[adapter_name] = config
        here = [name for name, layer in adapted_layers(model) if adapter_name in layer.records]
        extend(self.targeted_module_names, here)


def _tables(model: nn.Module, config: Any) -> list[str]:
    """Whole names of the tables; the usual target is written into the config, as peft does."""
    everything = list(places(model))
    if config.target_modules is None:
        config.target_modules = input_embedding(model, everything) or "embed_tokens"
    targets = config.target_modules
    if isinstance(targets, str):
        found = [place.name for place in everything if fullmatch(targets, place.name)]
    else:
        wanted = set(targets)
        found = [p.name for p in everything if p.name and wanted & set(suffixes(p.name))]
    if not found:
        told = targets if isinstance(targets, str) else list(targets)
        raise NoMatchingPeftModuleError(
            f"Target modules {told} not found in the base model. Please check the target modules "
            "and try again."
        )
    return found
