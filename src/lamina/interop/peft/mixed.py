"""`PeftMixedModel`: in peft for adapters of several methods, here of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from lamina.interop.peft.tuner import LoraModel
from lamina.interop.peft.types import PeftType

COMPATIBLE_TUNER_TYPES = (PeftType.LORA,)


class MixedModel(LoraModel):
    """The tuner of a `PeftMixedModel`."""


class PeftMixedModel(PeftModel):
    """A model several of whose adapters are active at once; it can't be saved."""

    stands_for: Any = ()

    def __init__(
        self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        _check(peft_config)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter; it is not active yet."""
        _check(peft_config)
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(  # type: ignore[override]
        self, adapter_name: str | Iterable[str], inference_mode: bool = False
    ) -> None:
        """Make one or several adapters active."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        self.base_model.set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Iterable[str]) -> None:
        """Remove one or several adapters."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        for name in names:
            self.base_model.delete_adapter(name)

    def _check_known(self, names: list[str]) -> None:
        strange = sorted(set(names) - set(self.peft_config))
        if strange:
            raise ValueError(
                f"Adapter(s) {strange} not found, available adapters: {sorted(self.peft_config)}"
            )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model answers as its base inside."""
        with super().disable_adapter():
            yield

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load one more adapter."""
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        self.set_adapter(self.active_adapters)
        return result

    @classmethod
    def for_task(cls, task: str | None) -> type[Any]:
        """This class, whatever the task."""
        return cls

    def get_layer_status(self) -> list[Any]:
        """Not for mixed models."""
        raise TypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> Any:
        """Not for mixed models."""
        raise TypeError(f"get_model_status is not supported for {type(self).__name__}.")

    def create_or_update_model_card(self, output_dir: Any) -> None:
        """Not for mixed models."""
        raise NotImplementedError(
            f"Model card creation is not supported for {type(self).__name__} (yet)."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for mixed models."""
        raise NotImplementedError(
            f"Weighted adapters are not supported for {type(self).__name__} (yet)."
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Not for mixed models."""
        raise NotImplementedError(f"Saving is not supported for {type(self).__name__} (yet).")


def _check(config: Any) -> None:
    if config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
        raise ValueError(
            f"The provided `peft_type` '{config.peft_type}' is not compatible with the "
            "`PeftMixedModel`. Lamina knows LoRA only."
        )
