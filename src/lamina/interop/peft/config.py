"""Configs as peft has them: Lamina's, read leniently, with the methods that scripts call."""

from __future__ import annotations

import inspect
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import PushToHubMixin

from lamina import config as native
from lamina.config.base import _HUB_ARGUMENTS
from lamina.interop.peft.standing import StandsFor
from lamina.interop.peft.types import VERSION, PeftType
from lamina.storage.source import find_config

CONFIG_NAME = native.CONFIG_NAME
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}


@dataclass
class PeftConfigMixin(PushToHubMixin, native.PeftConfig, metaclass=StandsFor):  # type: ignore[misc]
    """What every config has."""

    native = native.PeftConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_version is None:
            self.peft_version = VERSION

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write `adapter_config.json`; `auto_mapping_dict` says what the base model is."""
        if os.path.isfile(save_directory):
            raise AssertionError(f"{save_directory} is a file; a config is saved into a directory.")
        before = self.auto_mapping
        self.auto_mapping = kwargs.pop("auto_mapping_dict", None) or before
        try:
            super().save_pretrained(save_directory)
        finally:
            self.auto_mapping = before

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The config of the class that `peft_type` names; unknown settings warn and are left out.

        Raises:
            TypeError: there are unknown settings, and not even `peft_type` among them.
        """
        from lamina.interop.peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING

        kind: Any = (
            PEFT_TYPE_TO_CONFIG_MAPPING[kwargs["peft_type"]] if "peft_type" in kwargs else cls
        )
        known = inspect.signature(kind.__init__).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return kind(**kwargs)
        strange = sorted(kwargs.keys() - known.keys())
        if strange:
            if not kwargs.keys() >= MIN_EXPECTED_CONFIG_KEYS:
                raise TypeError(
                    f"The {cls.__name__} config that is trying to be loaded is missing required "
                    f"keys: {MIN_EXPECTED_CONFIG_KEYS}."
                )
            warnings.warn(
                f"Unexpected keyword arguments {strange} for class {kind.__name__}, these are "
                "ignored: a newer release has probably written the file. Lamina knows the fields "
                f"of peft {VERSION}.",
                stacklevel=3,
            )
        return kind(**{name: value for name, value in kwargs.items() if name not in strange})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a config from a directory or the hub; what the file says goes before `kwargs`."""
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS & kwargs.keys()}
        try:
            path = find_config(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        except Exception as error:
            raise ValueError(
                f"Can't find '{CONFIG_NAME}' at '{pretrained_model_name_or_path}'"
            ) from error
        own = {name: kwargs[name] for name in _field_names(cls) & kwargs.keys()}
        return cls.from_peft_type(**cls.check_kwargs(**{**own, **cls.from_json_file(path)}))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The values in a file, without those that concern the process that wrote it."""
        values = super().from_json_file(path_json_file)
        if "runtime_config" in values:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored: it "
                "concerns the process that has written it.",
                stacklevel=2,
            )
            del values["runtime_config"]
        return values

    @classmethod
    def _get_peft_type(cls, model_id: str | Path, **hub_options: Any) -> str:
        """The method of an adapter on disk or the hub."""
        subfolder = hub_options.pop("subfolder", None)
        hub = {name: hub_options[name] for name in _HUB_ARGUMENTS & hub_options.keys()}
        try:
            path = find_config(model_id, subfolder=subfolder, **hub)
        except Exception as error:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{model_id}'") from error
        return str(cls.from_json_file(path)["peft_type"])

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A place for subclasses to look at settings before they are used."""
        return kwargs


def _field_names(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


@dataclass
class PeftConfig(PeftConfigMixin):
    """The base of all configs."""

    native = native.PeftConfig


@dataclass
class PromptLearningConfig(PeftConfig):
    """The base of the configs of prompt methods, which Lamina doesn't have."""

    native = ()
    is_prompt_learning = True


@dataclass
class LoraConfig(native.LoraConfig, PeftConfig):
    """Lamina's `LoraConfig`, read as leniently as peft's."""

    native = native.LoraConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
