"""What every adapter's config has, and its form on disk, `adapter_config.json`.

Names and defaults are those of Hugging Face PEFT, so that a file written by either opens in the
other. Nothing here knows torch: reading a config costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamina.config.checks import is_off
from lamina.config.types import merged, set_strange_aside
from lamina.errors import CheckpointError, ConfigError, UnsupportedFieldError, nearest
from lamina.storage.source import find_config
from lamina.storage.untrusted import read_json

CONFIG_NAME = "adapter_config.json"
# The release whose file format is written; readers use it to choose a dialect.
FORMAT_VERSION = "0.21.2"


class PeftType(str, enum.Enum):
    """The kinds of adapter; Lamina knows LoRA, and AdaLoRA, which is LoRA of changing rank."""

    LORA = "LORA"
    ADALORA = "ADALORA"


class TaskType(str, enum.Enum):
    """What the model is for; it decides the facade's class and the heads that are trained."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """What every adapter's config has, and how it is read and written."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False
    # peft_type on disk -> the class that reads it.
    _kinds: ClassVar[dict[str, type[PeftConfig]]] = {}

    def __post_init__(self) -> None:
        strange = self._wrong_types()
        faults = merged([*self._settle(), *self._faults()], strange)
        if faults:
            raise ConfigError(
                f"{len(faults)} setting(s) of this {type(self).__name__} are wrong.",
                faults=faults,
                cure=f"correct them and build the {type(self).__name__} again",
            )
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)

    def _wrong_types(self) -> dict[str, str]:
        return set_strange_aside(self)

    def _settle(self) -> list[str]:
        """Bring values into the form in which they are judged; a line for each that has none."""
        return []

    def _faults(self) -> list[str]:
        known = [task.value for task in TaskType]
        if self.task_type is None or self.task_type in known:
            return []
        return [f"task_type={self.task_type!r} is none of {', '.join(known)}"]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, sets sorted; the content of `adapter_config.json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
        plain = {name: _plain(value) for name, value in fields.items()}
        plain["peft_version"] = plain["peft_version"] or FORMAT_VERSION
        return plain

    def to_json(self) -> str:
        """The text of `adapter_config.json`."""
        # The order inside a pattern counts: the first entry that matches is taken.
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2) + "\n"

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into a directory, which is made if it isn't there."""
        target = Path(save_directory)
        if target.is_file():
            raise ConfigError(f"{target} is a file; a config is saved into a directory.")
        target.mkdir(parents=True, exist_ok=True)
        staged = target / f".{CONFIG_NAME}.tmp"
        staged.write_text(self.to_json(), encoding="utf-8")
        staged.replace(target / CONFIG_NAME)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "this config") -> PeftConfig:
        """Build the config that `values` describe.

        Raises:
            UnsupportedFieldError: a field is not known, or asks for what is not supported.
            ConfigError: the adapter is not LoRA, or the values contradict each other.
        """
        told = values.get("peft_type")
        # Of any library's enumeration a member means its value.
        kind = str(told.value if isinstance(told, enum.Enum) else told)
        if told is not None and kind not in cls._kinds:
            raise ConfigError(
                f"{source} is of type {values['peft_type']!r}; Lamina adapts models by LoRA only.",
                cure="open it with a library that has this method, or train a LoRA adapter",
            )
        config_class = cls._kinds[PeftType.LORA.value if told is None else kind]
        names = {f.name for f in dataclasses.fields(config_class)}
        strange = [n for n, value in values.items() if n not in names and not is_off(value)]
        if strange:
            raise UnsupportedFieldError(
                f"{source} has {len(strange)} field(s) that Lamina doesn't know.",
                faults=[_strange(name, values[name], names) for name in sorted(strange)],
                cure="remove the fields if the adapter works without them; they are never ignored",
            )
        return config_class(**{name: value for name, value in values.items() if name in names})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfig:
        """Read a config from a directory or a hub repository.

        Args:
            pretrained_model_name_or_path: a directory with `adapter_config.json`, or a hub id.
            subfolder: where in it the adapter lies.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` are for
                the hub; the names of config fields override what the file says.

        Raises:
            MissingFileError: there is no config.
            ConfigError: the file is not a config that Lamina can honour.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS & kwargs.keys()}
        path = find_config(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        return cls.from_dict({**cls.from_json_file(path), **kwargs}, source=str(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """The values of an `adapter_config.json`, unchecked."""
        path = Path(path_json_file)
        try:
            values = read_json(path)
        except CheckpointError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}; a config is an object.")
        return values


_HUB_ARGUMENTS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}


def _strange(name: str, value: object, known: set[str]) -> str:
    close = nearest(name, known)
    return f"{name}={value!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
