"""Adapters over a base whose weights lie elsewhere: none of the adapter's values is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lamina.config import LoraConfig
from lamina.errors import CheckpointError
from lamina.model import PeftModel, get_peft_model, get_peft_model_state_dict
from tests import models
from tests.adapters import fill, llama_adapter, llama_config, rewrite, same


def empty_llama() -> LlamaForCausalLM:
    with torch.device("meta"):
        return models.tiny_llama()


def empty_gpt2() -> GPT2LMHeadModel:
    with torch.device("meta"):
        return models.tiny_gpt2()


def test_loaded_values_are_kept(tmp_path: Path) -> None:
    model = llama_adapter(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(empty_llama(), tmp_path, is_trainable=True)
    assert same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    wrapper = loaded.get_base_model().lm_head
    assert wrapper.modules_to_save["default"].weight.requires_grad


def test_values_for_the_base_itself_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(
        models.tiny_gpt2(), LoraConfig(target_modules=["c_attn"], bias="lora_only")
    )
    fill(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="meta device"):
        PeftModel.from_pretrained(empty_gpt2(), tmp_path)


def test_an_adapter_runs_on_meta_to_tell_shapes() -> None:
    model = get_peft_model(empty_llama().half(), llama_config())
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (1, 4, models.VOCABULARY)


def test_what_a_file_lacks_begins_inside_compiled_blocks_too(tmp_path: Path) -> None:
    llama_adapter().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda file: {k: v for k, v in file.items() if "layers.0" not in k})
    base = models.tiny_llama()
    base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    with pytest.warns(UserWarning, match="4 missing"):
        model = PeftModel.from_pretrained(base, tmp_path, strict=False)
    tensors = get_peft_model_state_dict(model)
    assert not any(tensor.is_meta for tensor in tensors.values())
    zero = {key for key, tensor in tensors.items() if not tensor.any()}
    assert zero == {key for key in tensors if "layers.0" in key and "lora_B" in key}
