"""A facade for each task, and the function that chooses among them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from lamina.config import PeftConfig, TaskType
from lamina.model.adapted import lora_config
from lamina.model.facade import PeftModel


class _TransformersModel(PeftModel):
    """A facade over a transformers model; its forward takes the usual inputs by place too."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model's output; what is None is not passed on."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            **kwargs,
        )


class PeftModelForCausalLM(_TransformersModel):
    """For models that continue text."""

    _task = TaskType.CAUSAL_LM


class PeftModelForSequenceClassification(_TransformersModel):
    """For models that classify whole texts; their head is trained and saved."""

    _task = TaskType.SEQ_CLS
    task_heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForTokenClassification(_TransformersModel):
    """For models that classify tokens; their head is trained and saved."""

    _task = TaskType.TOKEN_CLS
    task_heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForQuestionAnswering(_TransformersModel):
    """For models that find spans; their head is trained and saved."""

    _task = TaskType.QUESTION_ANS
    task_heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)


class PeftModelForSeq2SeqLM(_TransformersModel):
    """For encoder-decoder models that write text."""

    _task = TaskType.SEQ_2_SEQ_LM


class PeftModelForFeatureExtraction(_TransformersModel):
    """For models whose hidden states are used."""

    _task = TaskType.FEATURE_EXTRACTION


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt a model that has no adapters yet.

    Args:
        model: any module; it is adapted in place.
        peft_config: what to adapt and how; it is copied.
        adapter_name: the adapter's name.
        mixed: accepted; there is one kind of adapter.
        autocast_adapter_dtype: keep adapters over half-precision weights in fp32.
        revision: of the base model, to be recorded.
        low_cpu_mem_usage: leave the adapter's weights on the meta device, to be loaded.

    Raises:
        NoModelError, ConfigError: what was given is no model, or no config of Lamina's.
        AlreadyAdaptedError: the model has adapters; the message names the three ways on.
        TargetError: the config doesn't fit the model.
    """
    facade = PeftModel.for_task(lora_config(peft_config).task_type)(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        revision=revision,
    )
    if peft_config.task_type is None:
        facade.peft_config[adapter_name].auto_mapping = base_class(model)
    return facade


def base_class(model: nn.Module) -> dict[str, Any]:
    """The class of a base model as a config has it (`auto_mapping`), where it has no task."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
