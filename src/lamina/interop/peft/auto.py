"""Facades that find their base model, by peft's names."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from lamina import model as native
from lamina.config import TaskType
from lamina.interop.peft import model
from lamina.interop.peft.config import PeftConfig
from lamina.interop.peft.constants import TOKENIZER_CONFIG_NAME
from lamina.interop.peft.standing import StandsFor

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, Any] = {
    TaskType.SEQ_CLS: model.PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: model.PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: model.PeftModelForCausalLM,
    TaskType.TOKEN_CLS: model.PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: model.PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: model.PeftModelForFeatureExtraction,
}
_ALLOWED = ["diffusers", "lerobot", "megatron-core", "transformers"]


def get_default_import_allowlist() -> list[str]:
    """The libraries that a config may have imported."""
    return list(_ALLOWED)


def check_import_allowlist(allowlist: list[str], parent_name: str) -> bool:
    """Whether a module is, or lies in, one of these libraries."""
    return any(f"{parent_name}.".startswith(f"{allowed}.") for allowed in allowlist)


class AutoPeftModel(metaclass=StandsFor):
    """Loads the base model that an adapter was trained on, and the adapter over it."""

    stands_for: Any = native.AutoPeftModel
    _target_class: ClassVar[str | None] = None
    _target_peft_class: ClassVar[Any] = model.PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using "
            f"`{name}.from_pretrained(pretrained_model_name_or_path)`."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load base and adapter; embeddings grow to a tokenizer that lies beside the adapter.

        Raises:
            ValueError: the class is for another task, or the base's class can't be told.
        """
        path = pretrained_model_name_or_path
        found = PeftConfig.from_pretrained(path, revision=revision, **kwargs)
        kind = cls._base_class(found, import_allowlist or get_default_import_allowlist())
        name = found.base_model_name_or_path
        base = kind.from_pretrained(name, revision=found.revision, **kwargs)
        _grow(base, path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base,
            path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class(cls, config: Any, allowlist: list[str]) -> Any:
        if config.task_type is not None:
            return cls._class_for_task(config.task_type)
        if config.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are "
                "loading the correct model for your task type."
            )
        library = config.auto_mapping["parent_library"]
        if not check_import_allowlist(allowlist, library):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import "
                "allowlist. If you are sure that importing this library is safe, specify "
                f"`import_allowlist=['{library}']` in `from_pretrained()`."
            )
        return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"])

    @classmethod
    def _class_for_task(cls, task: str) -> Any:
        if cls._target_class is None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type, please use a specific class for your "
                "task type. (e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
            )
        wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
        if wanted is not cls._target_peft_class:
            raise ValueError(
                f"Expected target PEFT class: {wanted.__name__}, but you have asked for: "
                f"{cls._target_peft_class.__name__} make sure that you are loading the correct "
                "model for your task type."
            )
        return getattr(importlib.import_module("transformers"), cls._target_class)


def _grow(base: Any, path: Any, revision: str | None, kwargs: dict[str, Any]) -> None:
    if not hasattr(base, "get_input_embeddings"):
        return
    from lamina.interop.peft.parts import check_file_exists_on_hf_hub

    here = os.path.exists(os.path.join(path, TOKENIZER_CONFIG_NAME))
    token = kwargs.get("token")
    if not here and (
        os.path.isdir(path)
        or not check_file_exists_on_hf_hub(
            str(path), TOKENIZER_CONFIG_NAME, revision=revision, token=token
        )
    ):
        return
    from transformers import AutoTokenizer

    trust = kwargs.get("trust_remote_code", False)
    tokenizer = AutoTokenizer.from_pretrained(
        path, revision=revision, token=token, trust_remote_code=trust
    )
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that continue text."""

    _target_class = "AutoModelForCausalLM"
    _target_peft_class = model.PeftModelForCausalLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For models that classify whole texts."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = model.PeftModelForSequenceClassification


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoder models that write text."""

    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = model.PeftModelForSeq2SeqLM


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For models that classify tokens."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = model.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find spans."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = model.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models whose hidden states are used."""

    _target_class = "AutoModel"
    _target_peft_class = model.PeftModelForFeatureExtraction
