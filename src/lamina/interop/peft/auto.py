"""Facades that find their base model, by peft's names."""

from __future__ import annotations

from typing import Any

from lamina import model as native
from lamina.config import TaskType
from lamina.interop.peft import model

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, Any] = {
    TaskType.SEQ_CLS: model.PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: model.PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: model.PeftModelForCausalLM,
    TaskType.TOKEN_CLS: model.PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: model.PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: model.PeftModelForFeatureExtraction,
}


class AutoPeftModel(native.AutoPeftModel):
    """Loads the base model that an adapter was trained on, and the adapter over it."""

    facade = model.PeftModel


class AutoPeftModelForCausalLM(AutoPeftModel, native.AutoPeftModelForCausalLM):
    """For models that continue text."""

    facade = model.PeftModelForCausalLM


class AutoPeftModelForSequenceClassification(
    AutoPeftModel, native.AutoPeftModelForSequenceClassification
):
    """For models that classify whole texts."""

    facade = model.PeftModelForSequenceClassification


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, native.AutoPeftModelForSeq2SeqLM):
    """For encoder-decoder models that write text."""

    facade = model.PeftModelForSeq2SeqLM


class AutoPeftModelForTokenClassification(
    AutoPeftModel, native.AutoPeftModelForTokenClassification
):
    """For models that classify tokens."""

    facade = model.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel, native.AutoPeftModelForQuestionAnswering):
    """For models that find spans."""

    facade = model.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel, native.AutoPeftModelForFeatureExtraction):
    """For models whose hidden states are used."""

    facade = model.PeftModelForFeatureExtraction
