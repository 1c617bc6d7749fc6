"""Facades that find the base model by the name in an adapter's config."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from lamina.config import PeftConfig
from lamina.errors import CheckpointError, ConfigError, MissingFileError
from lamina.model.facade import PeftModel
from lamina.model.heads import head_options_of
from lamina.model.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from lamina.storage.source import PathOrId

_HUB = ("token", "cache_dir", "local_files_only", "force_download")


def open_model(kind: Any, name: str, *, cure: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)`, with what went wrong in one message.

    Code that comes with a model runs only if `trust_remote_code=True` is among the options; without
    that word transformers would ask on the terminal.

    Raises:
        MissingFileError: there is no such model.
        CheckpointError: it can't be read.
    """
    try:
        return kind.from_pretrained(name, **{"trust_remote_code": False, **options})
    except Exception as error:
        # A damaged file makes transformers raise whatever it likes.
        # What follows the first line is advice on the hub, also where a directory was meant.
        faults = [str(error).strip().partition("\n")[0]]
        if not os.path.isdir(name):
            faults.insert(0, f"there is no such directory, seen from {os.getcwd()!r}")
        # To transformers, what isn't there is an OSError, what it can't read a ValueError.
        kind_of = MissingFileError if isinstance(error, OSError) else CheckpointError
        raise kind_of(f"The model {name!r} can't be opened.", faults=faults, cure=cure) from error


def _class_of_transformers(name: object) -> Any:
    """The class of a model, of which a file has the name.

    Raises:
        ConfigError: it is the name of anything else.
    """
    transformers = importlib.import_module("transformers")
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    of_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if of_model or (isinstance(name, str) and name.startswith("AutoModel") and found is not None):
        return found
    raise ConfigError(
        f"auto_mapping says the base is a {str(name)[:80]!r}; transformers has no such model.",
        cure="load the base yourself and pass it, lamina.load(path, base=base)",
    )


class AutoPeftModel:
    """Loads the base model that an adapter was trained on, and the adapter over it."""

    facade: ClassVar[type[PeftModel]] = PeftModel
    auto_class: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise ConfigError(f"{name} is not built, it loads.", cure=f"{name}.from_pretrained(path)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathOrId,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base and adapter.

        Args:
            pretrained_model_name_or_path: the adapter's directory or hub id.
            adapter_name: what to call it.
            is_trainable: whether to train it on.
            config: taken in place of the file's.
            revision: of the adapter; the base's is in the config.
            kwargs: `subfolder` and hub options for the adapter; all else for the base model's
                `from_pretrained`, e.g. `dtype`, `device_map`, `quantization_config`.

        Raises:
            CheckpointError: the config doesn't name a base model, or it can't be loaded.
        """
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        where = {"subfolder": kwargs.pop("subfolder", None), "revision": revision, **hub}
        if config is None:
            config = PeftConfig.from_pretrained(
                str(pretrained_model_name_or_path), **{k: v for k, v in where.items() if v}
            )
        head = head_options_of(
            config, pretrained_model_name_or_path, **{k: v for k, v in where.items() if v}
        )
        base = cls.load_base(config, source=str(pretrained_model_name_or_path), **head | kwargs)
        return cls.facade.for_task(config.task_type).from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **{k: v for k, v in where.items() if v},
        )

    @classmethod
    def load_base(cls, config: PeftConfig, *, source: str, **kwargs: Any) -> Any:
        """The base model that a config names.

        Raises:
            CheckpointError: it names none.
            MissingFileError: what it names can't be opened.
        """
        name = config.base_model_name_or_path
        if not name:
            raise CheckpointError(
                f"The config of {source} doesn't name its base model.",
                cure="load the base yourself and pass it: lamina.load(path, base=base)",
            )
        kind = cls.base_class(config)
        cure = "give the base's directory or hub id: lamina.load(path, base=DIR), or --base DIR"
        return open_model(kind, name, cure=cure, revision=config.revision, **kwargs)

    @classmethod
    def base_class(cls, config: PeftConfig) -> Any:
        """What loads the base: a class of transformers, of one model or for a task.

        Raises:
            ConfigError: the config tells neither.
        """
        if cls.auto_class is not None:
            return getattr(importlib.import_module("transformers"), cls.auto_class)
        mapping = config.auto_mapping or {}
        kind, library = mapping.get("base_model_class"), mapping.get("parent_library")
        if isinstance(library, str) and library.split(".")[0] == "transformers":
            return _class_of_transformers(kind)
        by_task = {c.facade: c for c in AutoPeftModel.__subclasses__()}
        found = by_task.get(PeftModel.for_task(config.task_type))
        if found is None:
            raise ConfigError(
                "The config says neither the task nor the class of the base model.",
                cure="load the base yourself and pass it, lamina.load(path, base=base), or use the "
                "class for the task, e.g. AutoPeftModelForCausalLM",
            )
        return found.base_class(config)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that continue text."""

    facade = PeftModelForCausalLM
    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For models that classify whole texts."""

    facade = PeftModelForSequenceClassification
    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoder models that write text."""

    facade = PeftModelForSeq2SeqLM
    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For models that classify tokens."""

    facade = PeftModelForTokenClassification
    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find spans."""

    facade = PeftModelForQuestionAnswering
    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models whose hidden states are used."""

    facade = PeftModelForFeatureExtraction
    auto_class = "AutoModel"
