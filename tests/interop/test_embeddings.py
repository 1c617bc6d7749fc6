"""Which embeddings of the base the drop-in saves beside an adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lamina.interop.peft.adapting import get_peft_model
from lamina.interop.peft.facade import PeftModel
from lamina.interop.peft.lora_config import LoraConfig
from tests import models
from tests.adapters import logits

TABLE = "base_model.model.model.embed_tokens.weight"
ADAPTED = "base_model.model.model.embed_tokens.base_layer.weight"


def adapted(*targets, base=None):
    base = base or models.tiny_llama(tie_word_embeddings=False)
    return get_peft_model(base, LoraConfig(target_modules=[*targets], init_lora_weights=False))


def saved(model, path, wanted="auto"):
    model.save_pretrained(path, save_embedding_layers=wanted)
    return load_file(path / "adapter_model.safetensors")


def test_an_adapted_table_is_saved_with_its_adapter(tmp_path):
    model = adapted("embed_tokens", "q_proj")

    with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
        found = saved(model, tmp_path)
    own = model.get_base_model().model.embed_tokens.base_layer.weight
    assert torch.equal(found[ADAPTED], own)
    assert ADAPTED not in saved(model, tmp_path, False)


def test_a_table_that_no_adapter_is_on_is_saved_on_request_and_loaded_into_the_base(tmp_path):
    model = adapted("q_proj")
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(2)

    assert TABLE not in saved(model, tmp_path)
    assert TABLE in saved(model, tmp_path, True)
    again = PeftModel.from_pretrained(models.tiny_llama(tie_word_embeddings=False), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


def test_a_table_of_another_size_than_the_saved_base_has_is_saved(tmp_path):
    models.tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    base = models.tiny_llama(tie_word_embeddings=False)
    base.name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3)
    model = adapted("q_proj", base=base)

    with pytest.warns(UserWarning, match="resized during finetuning"):
        found = saved(model, tmp_path / "adapter")
    assert len(found[TABLE]) == base.config.vocab_size
    assert "base_model.model.lm_head.weight" in found


def test_a_model_that_does_not_tell_its_embeddings_warns(tmp_path):
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["up"]))

    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        found = saved(model, tmp_path, True)
    assert sorted(found) == [f"base_model.model.up.lora_{x}.weight" for x in "AB"]
