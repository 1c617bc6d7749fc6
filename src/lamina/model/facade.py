"""`PeftModel`: a model with adapters that can be loaded, switched, folded and saved."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lamina.config import LoraConfig, PeftConfig
from lamina.engine import fold
from lamina.engine.inject import strip_idle
from lamina.engine.names import places
from lamina.engine.state import AdapterState
from lamina.engine.trainability import count_parameters, declare_trainable
from lamina.errors import AdapterNameError
from lamina.model import loading, replacing, saving
from lamina.model.adalora import tuner_for
from lamina.model.adapted import lora_config, refuse_adapted
from lamina.model.checkpointing import enable_checkpointing, hook_inputs, is_checkpointing
from lamina.model.describe import trainable_summary
from lamina.model.routing import routed
from lamina.model.tuner import LoraModel
from lamina.storage.source import PathOrId


class PeftModel(nn.Module):
    """A model under LoRA, with PEFT's names.

    Args:
        model: any module; it is adapted in place.
        peft_config: the first adapter's config; None for a facade without adapters yet.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters over half-precision weights in fp32.
        low_cpu_mem_usage: leave the adapter's weights on the meta device, to be loaded.
        revision: of the base model, to be recorded.

    Raises:
        AlreadyAdaptedError: the model has adapters.
        TargetError: the config doesn't fit the model; it is unchanged.
    """

    base_model: LoraModel
    # What the model is for, and the heads trained along, by the names transformers gives them.
    _task: ClassVar[str | None] = None
    task_heads: ClassVar[tuple[str, ...]] = ()
    _by_task: ClassVar[dict[str, type[PeftModel]]] = {}
    # The stage that is being trained, where one was begun; see lamina.stages.
    stage: Any = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        refuse_adapted(model)
        tuner = tuner_for(peft_config)(model)
        if peft_config is not None:
            tuner.add(
                adapter_name,
                self._own_config(model, peft_config, revision),
                initialise=not low_cpu_mem_usage,
                upcast=autocast_adapter_dtype,
                **options,
            )
        self.base_model = tuner
        self.train(model.training)
        if is_checkpointing(model):
            hook_inputs(model)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls._task is not None:
            PeftModel._by_task.setdefault(cls._task, cls)

    @classmethod
    def for_task(cls, task: str | None) -> type[PeftModel]:
        """The facade for a config's task; a class made for a task stays itself."""
        if cls is not PeftModel or task is None:
            return cls
        return cls._by_task.get(task, cls)

    def _own_config(
        self, model: nn.Module, peft_config: PeftConfig, revision: str | None = None
    ) -> LoraConfig:
        """A copy of the config with what the model and the task add to it."""
        config = copy.deepcopy(lora_config(peft_config))
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        config.revision = revision if revision is not None else config.revision
        names = dict.fromkeys(place.name.rpartition(".")[2] for place in places(model))
        # "pre_classifier" is a part of the head too, and new like it.
        heads = [name for name in names if name.endswith(self.task_heads)]
        if heads:
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
        return config

    # --- loading and saving ------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: PathOrId,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> PeftModel:
        """Put an adapter from a directory or the hub over a model.

        Args:
            model: the base model.
            model_id: the adapter's directory or hub id.
            adapter_name: what to call it.
            is_trainable: whether to train it on; False freezes it.
            config: taken in place of the file's.
            autocast_adapter_dtype: keep half-precision adapters in fp32.
            low_cpu_mem_usage: accepted; weights are never initialised before they are loaded.
            options: `strict`, `key_mapping`, `ignore_mismatched_sizes`, `torch_device`; for the
                hub `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download`; `allow_pickle` to read an old `.bin`.

        Raises:
            CheckpointError: files are missing or broken.
            KeyMismatchError: the tensors don't fit; the model is unchanged.
        """
        refuse_adapted(model)
        file, how = loading.read(model_id, config, options)
        return loading.over(
            cls.for_task(file.config.task_type),
            model,
            file,
            how,
            adapter_name,
            trainable=is_trainable,
            upcast=autocast_adapter_dtype,
        )

    def load_adapter(
        self,
        model_id: PathOrId,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> Any:
        """Load one more adapter, not active yet, or over one that is there with the same config.

        Options are those of `from_pretrained`; returns a `LoadReport`.
        """
        options = {**options, "torch_device": torch_device} if torch_device else options
        if adapter_name in self.peft_config:
            return replacing.replace(self, model_id, adapter_name, options)
        config = options.pop("config", None)
        file, how = loading.read(model_id, config, options)
        file.config.inference_mode = not is_trainable
        config = self._own_config(self.get_base_model(), file.config)
        self.base_model.add(
            adapter_name,
            config,
            trainable=is_trainable,
            initialise=False,
            upcast=autocast_adapter_dtype,
            strict=False,
        )
        try:
            return loading.fill(self, adapter_name, file, how)
        except BaseException:
            self.delete_adapter(adapter_name)
            strip_idle(self.get_base_model())
            raise

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: "default" into the directory, others into folders of their names.

        A crash leaves the old directory or the new one. Nothing but safetensors is written.

        Args:
            save_directory: the directory.
            safe_serialization: False would mean a pickle and is refused.
            selected_adapters: whole names; None means all.
            save_embedding_layers: accepted; only an adapter's own tensors are written.
            is_main_process: on other processes, nothing is done.
            state_dict: tensors gathered elsewhere, by their names in the model.
            kwargs: accepted, for callers that pass hub options along.
        """
        if is_main_process:
            saving.save(
                self, Path(save_directory), selected_adapters, state_dict, safe_serialization
            )

    # --- adapters ----------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter; it is not active yet."""
        self.base_model.add(
            adapter_name,
            self._own_config(self.get_base_model(), peft_config),
            initialise=not low_cpu_mem_usage,
            upcast=autocast_adapter_dtype,
        )

    def set_adapter(
        self,
        adapter_name: str | Iterable[str],
        inference_mode: bool = False,
        *,
        train: str | Iterable[str] | None = None,
    ) -> None:
        """Make one or several adapters active.

        Activating never makes a frozen adapter trainable: say so with `train`.

        Args:
            adapter_name: the adapters that take part in the forward, in order.
            inference_mode: freeze them all.
            train: the adapters, among these, that are trained; all others are frozen. None
                leaves every adapter as trainable as it is.
        """
        names = _names(adapter_name)
        self.adapter_state.check_known(names)
        wanted = () if inference_mode else None if train is None else _names(train)
        idle = [name for name in wanted or () if name not in names]
        if idle:
            raise AdapterNameError(
                f"{', '.join(map(repr, idle))} would be trained without being active: no gradient "
                "would reach it.",
                cure=f"set_adapter({[*names, *idle]!r}, train={list(wanted or ())!r})",
            )
        self.base_model.activate(names, wanted)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Declare adapters trainable, or frozen; others stay as they are."""
        names = set(_names(adapter_names))
        now = self.adapter_state.trainable
        declare_trainable(
            self.get_base_model(), self.adapter_state, now | names if requires_grad else now - names
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model answers as its base inside; afterwards everything is exactly as before."""
        with fold.as_base(self.get_base_model(), self.adapter_state):
            yield

    # --- the model ---------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The model that is adapted, adapters included."""
        return self.base_model.model

    def forward(
        self,
        *args: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's output.

        It names the usual inputs, because trainers look there for the columns of the data to keep;
        what is None is not passed on. `adapter_names` sends each row of the batch to an adapter of
        its own, or with `"__base__"` to none; `alora_offsets` says of each row from which token on,
        counted from the end, an aLoRA adapter acts (else it is looked up in `input_ids`).
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        given = {name: value for name, value in named.items() if value is not None} | kwargs
        with self._routed(args, given):
            return self.base_model.finish(self.get_base_model()(*args, **given))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's generation; `adapter_names` and `alora_offsets` as of `forward`."""
        base: Any = self.get_base_model()
        with self._routed(args, kwargs, generates=True):
            return base.generate(*args, **kwargs)

    def _routed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generates: bool = False
    ) -> AbstractContextManager[None]:
        """The context of a call; what it says of rows and tokens is taken out of `kwargs`."""
        return routed(self.get_base_model(), self.adapter_state, args, kwargs, generates=generates)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn checkpointing on, and let gradients through to the adapters."""
        enable_checkpointing(self.get_base_model(), *args, **kwargs)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, and if none do, why."""
        print(trainable_summary(self))  # noqa: T201

    # --- what code in the wild reads ---------------------------------------------------------

    @property
    def adapter_state(self) -> AdapterState:
        """The state that all adapted layers share."""
        return self.base_model.adapter_state

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """adapter -> config."""
        return self.adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters in order."""
        return list(self.adapter_state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter; a list if there are several."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the newest active adapter."""
        return self.peft_config[self.active_adapters[-1]]

    @property
    def peft_type(self) -> str:
        """The kind of adapter."""
        return self.base_model.peft_type

    def get_layer_status(self) -> list[Any]:
        """The state of every adapted layer; see `lamina.get_layer_status`."""
        from lamina.model.status import get_layer_status

        return list(get_layer_status(self))

    def get_model_status(self) -> Any:
        """The state of the whole; see `lamina.get_model_status`."""
        from lamina.model.status import get_model_status

        return get_model_status(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _names(names: str | Iterable[str]) -> list[str]:
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
