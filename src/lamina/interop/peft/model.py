"""The facades as peft has them: Lamina's, with peft's semantics where they differ."""

from __future__ import annotations

from typing import Any

from lamina import model as native
from lamina.interop.peft.facade import PeftModel

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


class PeftModelForCausalLM(PeftModel, native.PeftModelForCausalLM):
    """For models that continue text."""

    stands_for = native.PeftModelForCausalLM


class PeftModelForSequenceClassification(PeftModel, native.PeftModelForSequenceClassification):
    """For models that classify whole texts."""

    stands_for = native.PeftModelForSequenceClassification


class PeftModelForTokenClassification(PeftModel, native.PeftModelForTokenClassification):
    """For models that classify tokens."""

    stands_for = native.PeftModelForTokenClassification


class PeftModelForQuestionAnswering(PeftModel, native.PeftModelForQuestionAnswering):
    """For models that find spans."""

    stands_for = native.PeftModelForQuestionAnswering


class PeftModelForSeq2SeqLM(PeftModel, native.PeftModelForSeq2SeqLM):
    """For encoder-decoder models that write text."""

    stands_for = native.PeftModelForSeq2SeqLM

    def generate(self, **kwargs: Any) -> Any:
        """The adapted model's generation; all inputs are named."""
        return super().generate(**kwargs)


class PeftModelForFeatureExtraction(PeftModel, native.PeftModelForFeatureExtraction):
    """For models whose hidden states are used."""

    stands_for = native.PeftModelForFeatureExtraction
