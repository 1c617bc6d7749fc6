from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lamina.config import LoraConfig
from lamina.errors import CheckpointError, ConfigError, LaminaError
from lamina.model import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
)
from tests import models
from tests.adapters import fill, llama_config, logits, trained


def bert(kind: type[PreTrainedModel]) -> PreTrainedModel:
    with models.seeded(0):
        return kind(BertConfig(**SMALL, num_labels=2)).eval()


def t5() -> T5ForConditionalGeneration:
    with models.seeded(0):
        config = T5Config(
            vocab_size=models.VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config).eval()


SMALL: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
KINDS: dict[str, tuple[type[AutoPeftModel], Any]] = {
    "CAUSAL_LM": (AutoPeftModelForCausalLM, models.tiny_llama),
    "SEQ_CLS": (AutoPeftModelForSequenceClassification, models.tiny_bert_classifier),
    "TOKEN_CLS": (AutoPeftModelForTokenClassification, lambda: bert(BertForTokenClassification)),
    "QUESTION_ANS": (AutoPeftModelForQuestionAnswering, lambda: bert(BertForQuestionAnswering)),
    "SEQ_2_SEQ_LM": (AutoPeftModelForSeq2SeqLM, t5),
    "FEATURE_EXTRACTION": (AutoPeftModelForFeatureExtraction, lambda: bert(BertModel)),
}


def saved(tmp_path: Path, base: PreTrainedModel, config: LoraConfig) -> tuple[Path, PeftModel]:
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config).eval()
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


@torch.no_grad()
def answer(model: PeftModel) -> torch.Tensor:
    ids = models.token_ids()
    more = {"decoder_input_ids": ids[:, :3]} if hasattr(model.config, "d_kv") else {}
    return model(input_ids=ids, **more)[0]


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("by_task", [True, False])
def test_base_and_adapter_are_found(tmp_path: Path, task: str, by_task: bool) -> None:
    auto, make = KINDS[task]
    path, model = saved(tmp_path, make(), LoraConfig(task_type=task))
    loaded = (auto if by_task else AutoPeftModel).from_pretrained(path)
    assert type(loaded) is type(model)
    assert type(loaded.get_base_model()) is type(model.get_base_model())
    assert torch.equal(answer(loaded), answer(model))
    assert trained(loaded) == set()


def test_a_config_without_a_task_names_the_class(tmp_path: Path) -> None:
    path, model = saved(tmp_path, models.tiny_llama(), LoraConfig())
    loaded = AutoPeftModel.from_pretrained(path)
    assert type(loaded) is PeftModel
    assert torch.equal(logits(loaded), logits(model))
    assert type(AutoPeftModelForCausalLM.from_pretrained(path)) is PeftModelForCausalLM


def test_options_go_where_they_belong(tmp_path: Path) -> None:
    path, model = saved(tmp_path, models.tiny_llama(), llama_config())
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        str(path), adapter_name="sft", is_trainable=True, dtype=torch.bfloat16
    )
    assert loaded.get_base_model().dtype == torch.bfloat16
    assert loaded.active_adapters == ["sft"]
    assert len(trained(loaded)) == 8
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.05, atol=0.05)


def test_a_subfolder_is_the_adapters(tmp_path: Path) -> None:
    path, model = saved(tmp_path, models.tiny_llama(), llama_config())
    model.add_adapter("sft", llama_config(r=2))
    fill(model, "sft", seed=3)
    model.set_adapter("sft")
    model.save_pretrained(path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(path, subfolder="sft")
    assert torch.equal(logits(loaded), logits(model))


def test_what_can_not_be_found_is_said(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config())
    fill(model)
    model.save_pretrained(tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="doesn't name its base model"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nameless")
    with pytest.raises(LaminaError):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"AutoPeftModelForCausalLM\.from_pretrained\(path\)"):
        AutoPeftModelForCausalLM(model)
    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path="somewhere")
    config.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ConfigError, match="neither the task nor the class"):
        AutoPeftModel.from_pretrained(tmp_path / "nameless")
