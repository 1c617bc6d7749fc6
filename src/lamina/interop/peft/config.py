"""The base of all configs as peft has it: read leniently, with the methods that scripts call."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import parse
from transformers.utils import PushToHubMixin

from lamina import config as native
from lamina.config.base import _HUB_ARGUMENTS
from lamina.errors import ConfigError
from lamina.interop.peft.standing import StandsFor
from lamina.interop.peft.types import VERSION
from lamina.storage.source import find_config

CONFIG_NAME = native.CONFIG_NAME
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
__version__ = VERSION


def _is_dev_version(version: str) -> bool:
    return parse(version).is_devrelease


def _get_commit_hash(package: str) -> str | None:
    """The commit that a package was installed from; None if it wasn't."""
    try:
        told = importlib.metadata.distribution(package).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    commit = json.loads(told or "{}").get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)


@dataclass
class PeftConfigMixin(native.PeftConfig, PushToHubMixin, metaclass=StandsFor):  # type: ignore[misc]
    """What every config has."""

    stands_for: ClassVar[Any] = native.PeftConfig

    def __post_init__(self) -> None:
        self._check_task()
        super().__post_init__()
        if self.peft_version is None:
            self.peft_version = self._get_peft_version()

    def _check_task(self) -> None:
        known = [task.value for task in native.TaskType]
        if self.task_type is not None and self.task_type not in known:
            raise ConfigError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(known)}."
            )

    @staticmethod
    def _get_peft_version() -> str:
        """The release, with the commit if it is one that isn't out yet."""
        if not _is_dev_version(__version__):
            return __version__
        try:
            commit = _get_commit_hash("peft")
        except Exception:
            warnings.warn(
                "A dev version of PEFT is used but there was an error while trying to determine "
                "the commit hash.",
                stacklevel=4,
            )
            commit = None
        return f"{__version__}@{commit or 'UNKNOWN'}"

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
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
                "ignored. A newer release has probably written the file; Lamina knows the fields "
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

    stands_for: ClassVar[Any] = native.PeftConfig


@dataclass
class PromptLearningConfig(PeftConfig):
    """The base of the configs of prompt methods, which Lamina doesn't have."""

    stands_for: ClassVar[Any] = ()
    is_prompt_learning = True
