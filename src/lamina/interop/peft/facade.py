"""`PeftModel` as peft has it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import PushToHubMixin

from lamina import model as native
from lamina.interop.peft import card, reading, saving, switching
from lamina.interop.peft.beginnings import warn_of_changed_base
from lamina.interop.peft.placeholders import refuse_foreign
from lamina.interop.peft.registry import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    warn_of_prefix,
)
from lamina.interop.peft.standing import StandsFor
from lamina.interop.peft.tensors import LoadResult
from lamina.interop.peft.tuner import LoraModel
from lamina.interop.peft.variants import refuse_as_peft, refuse_second_forward
from lamina.model.checkpointing import hook_inputs


class PeftModel(PushToHubMixin, native.PeftModel, metaclass=StandsFor):  # type: ignore[misc]
    """Lamina's `PeftModel` with peft's semantics; natively built ones count as instances.

    Args:
        model: any module; it is adapted in place.
        peft_config: the first adapter's config; it becomes the model's, and is completed.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters over half-precision weights in fp32.
        low_cpu_mem_usage: leave the adapter's weights on the meta device, to be loaded.
    """

    stands_for: Any = native.PeftModel
    base_model: LoraModel

    def __init__(
        self,
        model: Any,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        refuse_foreign(peft_config)
        self._complete(model, peft_config)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
        self.base_model = tuner(
            model,
            {adapter_name: peft_config},
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self._peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        if reading.recomputes(model):
            hook_inputs(model)
        settings: Any = getattr(model, "config", None)
        if hasattr(settings, "pretraining_tp"):
            settings.pretraining_tp = 1

    def _complete(self, model: Any, config: Any) -> None:
        """Add the heads that the task trains along; peft names them, whether they exist or not."""
        if self.task_heads:
            own = list(config.modules_to_save or ())
            config.modules_to_save = own + [head for head in self.task_heads if head not in own]

    # --- loading and saving ------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: Any,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put an adapter from a directory or the hub over a model; what is missing warns.

        Raises:
            ValueError: there is none, or `config` is no config.
            RuntimeError: the shapes differ.
        """
        config = reading.config_for(model_id, config, kwargs)
        config.inference_mode = not is_trainable
        config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
        kind = cls.for_task(config.task_type)
        adapted = kind(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        result = adapted.load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            config=config,
            **kwargs,
        )
        reading.warn_missing(result, adapter_name, config)
        return adapted

    def load_adapter(  # type: ignore[override]
        self,
        model_id: Any,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Load one more adapter, not active yet; the weights of one of this name are replaced.

        Returns:
            What was missing and what had no place.

        Raises:
            ConfigError: unlike peft, where the one that is there means other numbers by its config.
        """
        if adapter_name not in self.peft_config:
            config = reading.config_for(model_id, kwargs.get("config"), kwargs)
            config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
            config.inference_mode = not is_trainable
            warn_of_changed_base([config, *self.peft_config.values()])
            self.add_adapter(
                adapter_name,
                config,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
            if is_trainable:
                self.set_requires_grad(adapter_name)
        else:
            reading.refuse_other_config(self, model_id, adapter_name, kwargs)
        result = reading.overwrite(self, model_id, adapter_name, torch_device, key_mapping, kwargs)
        if not is_trainable:
            self.eval()
        return result

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters and a model card: "default" into the directory, others into folders."""
        saving.save(
            self,
            Path(save_directory),
            selected_adapters,
            safe_serialization=safe_serialization,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            initial=path_initial_model_for_weight_conversion,
            state_dict=kwargs.get("state_dict"),
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write the README.md that the hub shows, or complete the one that is there."""
        card.write(self, Path(output_dir))

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(options of a download, all others)."""
        return reading.split(kwargs)

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.get_base_model())

    @property
    def peft_config(self) -> dict[str, Any]:
        """adapter -> config."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.base_model.peft_config = value

    def get_layer_status(self) -> list[Any]:
        """The state of every adapted layer."""
        from lamina.interop.peft.status import get_layer_status

        return list(get_layer_status(self))

    def get_model_status(self) -> Any:
        """The state of the whole."""
        from lamina.interop.peft.status import get_model_status

        return get_model_status(self)

    # --- adapters ----------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter; it is not active yet.

        Raises:
            ValueError: the name is taken, the method another, or nothing matches.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        warn_of_prefix(peft_config, adapter_name)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                "Cannot combine adapters with different peft types. Found "
                f"{self.peft_type} and {peft_config.peft_type}."
            )
        self._complete(self.get_base_model(), peft_config)
        self.base_model.inject_adapter(
            self.get_base_model(),
            adapter_name,
            autocast_adapter_dtype,
            low_cpu_mem_usage,
            config=peft_config,
        )

    def set_adapter(  # type: ignore[override]
        self, adapter_name: str | Iterable[str], inference_mode: bool = False
    ) -> None:
        """Make an adapter active and, unless `inference_mode`, trainable, and no other.

        Raises:
            ValueError: there is none of this name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} not found.")
        self.base_model.set_adapter(names, inference_mode=inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Let adapters' weights ask for gradients, or not, whether they are active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: there is none of this name.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model answers as its base inside; what was switched off before stays off."""
        off = switching.disabled(self.adapter_state)
        if len(off) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. All will be enabled after the disable_adapter context.",
                stacklevel=3,
            )
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if False in off:
                self.base_model.enable_adapter_layers()

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Let gradients through to the adapters where layers are recomputed."""
        hook_inputs(model)

    def _routed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generates: bool = False
    ) -> AbstractContextManager[None]:
        refuse_as_peft(self, kwargs)
        refuse_second_forward(self)
        return super()._routed(args, kwargs, generates=generates)

    @property
    def peft_type(self) -> Any:
        """The kind of adapter."""
        return self._peft_type

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not switched off."""
        return not self.adapter_state.disabled or not self.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names that adapters train whole; None without any."""
        names = [config.modules_to_save or () for config in self.peft_config.values()]
        return {name for each in names for name in each} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base model's dtype."""
        return getattr(self.base_model, "dtype", None)

    @property
    def active_peft_config(self) -> Any:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]  # type: ignore[index]

    @property
    def _is_prompt_learning(self) -> bool:
        return False

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter into plain LoRA."""
        return self.base_model.supports_lora_conversion(adapter_name)

    @classmethod
    def for_task(cls, task: str | None) -> type[Any]:
        """The facade for a config's task."""
        from lamina.interop.peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        facade: type[Any] = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, cls)
        return facade


__all__ = ["PeftModel"]
