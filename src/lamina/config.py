"""`LoraConfig`, and its form on disk, `adapter_config.json`.

Names and defaults are those of Hugging Face PEFT, so that a file written by either opens in the
other. This module knows no torch: reading a config costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lamina.errors import ConfigError, MissingFileError, UnsupportedFieldError, nearest
from lamina.storage.source import find_config

CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"
# The release whose file format is written; readers use it to choose a dialect.
FORMAT_VERSION = "0.21.2"


class PeftType(str, enum.Enum):
    """The kinds of adapter; Lamina knows LoRA."""

    LORA = "LORA"


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

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise ConfigError(
                f"{len(faults)} setting(s) of this {type(self).__name__} are wrong.",
                faults=faults,
                cure=f"correct them and build the {type(self).__name__} again",
            )
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)

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
        kind = values.get("peft_type")
        if kind not in (None, PeftType.LORA, PeftType.LORA.value):
            raise ConfigError(
                f"{source} is of type {kind!r}; Lamina adapts models by LoRA only.",
                cure="open it with a library that has this method, or train a LoRA adapter",
            )
        names = {f.name for f in dataclasses.fields(LoraConfig)}
        strange = [name for name, value in values.items() if name not in names and not _off(value)]
        if strange:
            raise UnsupportedFieldError(
                f"{source} has {len(strange)} field(s) that Lamina doesn't know.",
                faults=[_strange(name, values[name], names) for name in sorted(strange)],
                cure="remove the fields if the adapter works without them; they are never ignored",
            )
        known = {name: value for name, value in values.items() if name in names}
        return LoraConfig(**known)

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
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingFileError(f"There is no {path}.") from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}; a config is an object.")
        return values


_HUB_ARGUMENTS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}

# Fields whose feature doesn't exist here yet: the value that means "off" is the field's default.
_UNSUPPORTED = (
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)


@dataclass
class LoraConfig(PeftConfig):
    """How an adapter of low rank is laid over a model: `W' = W + scaling * B @ A`.

    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.

    Args:
        r: the rank of A (r x in) and B (out x r).
        lora_alpha: the numerator of the scaling.
        lora_dropout: probability in [0, 1) of dropping an input of A, while training only.
        target_modules: names (whole, or their last components), one regular expression for the
            whole name, or "all-linear"; None takes what is usual for the architecture.
        exclude_modules: names or one regular expression, never adapted.
        layers_to_transform: indices of the layers to adapt; None adapts all.
        layers_pattern: the name of the list of layers, where it can't be told from the names.
        rank_pattern: name or regular expression -> r, where it differs.
        alpha_pattern: name or regular expression -> lora_alpha, where it differs.
        bias: the biases trained along: "none", "all", or those of adapted layers ("lora_only").
        use_rslora: scale by the root of the rank. Source: arXiv:2312.03732.
        lora_bias: give B a bias of its own.
        fan_in_fan_out: the weight is stored (in x out); found out by itself for `Conv1D`.
        modules_to_save: modules trained whole and saved with the adapter, such as a new head.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal, B zero) or False
            (both random: for tests, since the adapter then changes the model from the start).

    Raises:
        ConfigError: one error with everything that is wrong.
        UnsupportedFieldError: a field asks for a feature that is not supported.

    Source: LoRA, arXiv:2106.09685.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        self._refuse_unsupported()
        super().__post_init__()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})

    def _refuse_unsupported(self) -> None:
        asked = [name for name in _UNSUPPORTED if not _off(getattr(self, name))]
        if asked:
            raise UnsupportedFieldError(
                f"{len(asked)} field(s) ask for something that Lamina doesn't do yet.",
                faults=[f"{name}={getattr(self, name)!r}" for name in asked],
                cure="leave them at their defaults; they are refused rather than ignored",
            )
        for name in ("loftq_config",):
            setattr(self, name, getattr(self, name) or {})

    def _faults(self) -> list[str]:
        return [
            *super()._faults(),
            *self._faults_of_numbers(),
            *self._faults_of_choices(),
            *self._faults_of_targets(),
        ]

    def _faults_of_numbers(self) -> list[str]:
        faults = []
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in _items(self.rank_pattern)}}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
                faults.append(f"{name}={rank!r}: a rank is a positive integer")
        alphas = {f"alpha_pattern[{k!r}]": v for k, v in _items(self.alpha_pattern)}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            if not _is_number(alpha) or alpha == 0 or not math.isfinite(alpha):
                faults.append(f"{name}={alpha!r}: a number other than 0 (0 would switch LoRA off)")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout={self.lora_dropout!r}: a probability from 0 to below 1")
        return faults

    def _faults_of_choices(self) -> list[str]:
        faults = []
        if self.bias not in ("none", "all", "lora_only"):
            faults.append(f"bias={self.bias!r}: one of 'none', 'all', 'lora_only'")
        for name in ("fan_in_fan_out", "use_rslora", "lora_bias", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name}={getattr(self, name)!r}: True or False")
        if not isinstance(self.init_lora_weights, (bool, str)):
            faults.append(f"init_lora_weights={self.init_lora_weights!r}: True, False or a name")
        elif self.lora_bias and isinstance(self.init_lora_weights, str):
            # PEFT would not open the file.
            faults.append("lora_bias=True goes with init_lora_weights=True or False only")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "layers_pattern":
                faults.extend(_regex_faults(name, value))
            elif value is not None and not _is_names(value) and not isinstance(value, str):
                faults.append(f"{name}={value!r}: a string or a list of strings")
        if self.modules_to_save is not None and not _is_names(self.modules_to_save):
            faults.append(f"modules_to_save={self.modules_to_save!r}: a list of strings")
        return faults + self._faults_of_patterns()

    def _faults_of_patterns(self) -> list[str]:
        faults = []
        for name in ("rank_pattern", "alpha_pattern"):
            table = getattr(self, name)
            if table is not None and not isinstance(table, dict):
                faults.append(f"{name}={table!r}: a dict from names to numbers")
            for key, _ in _items(table):
                faults.extend(_regex_faults(f"{name}[{key!r}]", key))
        return faults

    def _faults_of_targets(self) -> list[str]:
        faults = []
        if not _is_indices(self.layers_to_transform):
            faults.append(
                f"layers_to_transform={self.layers_to_transform!r}: an index from 0 up, or a list"
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) not in (None, [], "", ()):
                    faults.append(f"{name} can't be combined with a string as target_modules")
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern says where layers are, layers_to_transform which: set it")
        if self.target_modules is not None and not self.target_modules:
            faults.append("target_modules is empty; leave it at None for the usual ones")
        return faults


def _items(pattern: Any) -> list[tuple[str, Any]]:
    return list(pattern.items()) if isinstance(pattern, dict) else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(name, str) for name in value
    )


def _is_indices(value: object) -> bool:
    indices = value if isinstance(value, (list, tuple)) else [value]
    return value is None or all(
        isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices
    )


def _regex_faults(name: str, pattern: object) -> list[str]:
    if not isinstance(pattern, str):
        return [f"{name}: {pattern!r} is not a string"]
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name}: {pattern!r} is not a regular expression: {error}"]
    return []


def _off(value: object) -> bool:
    return value is None or value is False or value in ({}, [], ())


def _strange(name: str, value: object, known: set[str]) -> str:
    close = nearest(name, known)
    return f"{name}={value!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
