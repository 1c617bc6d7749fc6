"""The adapter methods that transformers' own models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lamina
from tests import models
from tests.adapters import llama_adapter
from tests.ecosystem.kept import answer, keep
from tests.ecosystem.scenarios.trainer import Texts

# What peft says of every adapter after the first.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def config(**changes: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**settings | changes)


def added(*names: str, **changes: Any) -> Any:
    """A model with adapters that change what it answers, the last of them active."""
    model = models.tiny_llama()
    torch.manual_seed(3)
    for name in names:
        model.add_adapter(config(**changes), adapter_name=name)
    return model.eval()


def reference(model: Any, name: str) -> torch.Tensor:
    """What the base answers with `B A` of one adapter added to its weights."""
    base = models.tiny_llama()
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            base.get_submodule(path).weight.data += layer.scaling[name] * b @ a
    return answer(base)


def test_adapters_are_added_and_activated_by_name() -> None:
    model = added("one", "two")
    assert set(model.peft_config) == {"one", "two"}
    assert model.active_adapters() == ["two"]
    torch.testing.assert_close(answer(model), reference(model, "two"))
    model.set_adapter("one")
    torch.testing.assert_close(answer(model), reference(model, "one"))
    model.set_adapter(["one", "two"])
    assert model.active_adapters() == ["one", "two"]
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(config(), adapter_name="one")
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("three")
    with pytest.raises(TypeError, match="PeftConfig"):
        model.add_adapter({"r": 4})


def test_adapters_are_switched_off_and_on() -> None:
    model = added("one")
    on = answer(model)
    model.disable_adapters()
    assert torch.equal(answer(model), answer(models.tiny_llama()))
    model.enable_adapters()
    assert torch.equal(answer(model), on)


def test_adapters_are_deleted() -> None:
    model = added("one", "two")
    expected = reference(model, "one")
    model.set_adapter("one")
    model.delete_adapter("two")
    assert set(model.peft_config) == {"one"}
    assert not [name for name, _ in model.named_parameters() if ".two." in name]
    torch.testing.assert_close(answer(model), expected)
    with pytest.raises(ValueError, match="not present"):
        model.delete_adapter("two")
    model.delete_adapter("one")
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(answer(model), answer(models.tiny_llama()))


def test_a_state_dict_is_of_one_adapter() -> None:
    model = added("one", "two")
    state = model.get_adapter_state_dict("one")
    assert len(state) == 8
    assert all(".one" not in key and ".two" not in key for key in state)
    a = state["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(a, model.model.layers[0].self_attn.q_proj.lora_A["one"].weight)
    active = model.get_adapter_state_dict()
    assert not torch.equal(active["model.layers.0.self_attn.q_proj.lora_A.weight"], a)


def test_saving_writes_the_active_adapter_and_loading_brings_it_back(tmp_path: Path) -> None:
    model = added("default")
    model.save_pretrained(tmp_path / "saved")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "saved").iterdir()
    }
    again = models.tiny_llama()
    again.load_adapter(str(tmp_path / "saved"))
    torch.testing.assert_close(answer(again), answer(model))
    wrapped = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "saved")
    torch.testing.assert_close(answer(wrapped), answer(model))
    native = lamina.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "saved")
    torch.testing.assert_close(answer(native), answer(model))
    keep(tmp_path / "saved", "llama", answer(model))


def test_an_adapter_of_lamina_is_loaded_under_any_name(tmp_path: Path) -> None:
    wrapped = llama_adapter()
    wrapped.save_pretrained(tmp_path / "saved")
    model = models.tiny_llama()
    info = model.load_adapter(str(tmp_path / "saved"), adapter_name="mine")
    assert not info.missing_keys
    assert model.active_adapters() == ["mine"]
    torch.testing.assert_close(answer(model), answer(wrapped))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    model.load_adapter(str(tmp_path / "saved"), adapter_name="other", is_trainable=True)
    model.set_adapter("other")
    assert any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(tmp_path / "saved"), adapter_name="mine")


def test_tensors_are_loaded_with_a_config() -> None:
    model = added("one", r=3)
    again = models.tiny_llama()
    again.load_adapter(
        adapter_state_dict=model.get_adapter_state_dict("one"),
        peft_config=config(r=3),
        adapter_name="again",
    )
    torch.testing.assert_close(answer(again), answer(model))


def test_an_adapter_is_hotswapped(tmp_path: Path) -> None:
    first, second = added("default"), added("default")
    for model, name, factor in ((first, "first", 2), (second, "second", -1)):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_A" in key:
                    parameter.mul_(factor)
        model.save_pretrained(tmp_path / name)
    model = models.tiny_llama()
    model.load_adapter(str(tmp_path / "first"), adapter_name="default")
    torch.testing.assert_close(answer(model), answer(first))
    model.load_adapter(str(tmp_path / "second"), adapter_name="default", hotswap=True)
    torch.testing.assert_close(answer(model), answer(second))
    assert set(model.peft_config) == {"default"}


def test_a_base_beside_its_adapter_is_opened_whole(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(3)
    base.add_adapter(config(task_type="CAUSAL_LM"))
    base.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert set(again.peft_config) == {"default"}
    torch.testing.assert_close(answer(again), answer(base.eval()))
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(answer(opened), answer(base))


def test_modules_trained_whole_go_along(tmp_path: Path) -> None:
    model = added("default", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "saved")
    assert any("lm_head" in key for key in load_file(tmp_path / "saved/adapter_model.safetensors"))
    again = models.tiny_llama()
    again.load_adapter(str(tmp_path / "saved"))
    torch.testing.assert_close(answer(again), answer(model))
    model.disable_adapters()
    torch.testing.assert_close(answer(model), answer(models.tiny_llama()))
    keep(tmp_path / "saved", "llama", answer(again))


def test_rows_of_new_tokens_go_along(tmp_path: Path) -> None:
    model = added("default", trainable_token_indices={"embed_tokens": [3, 60]})
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.add_(0.5)
    model.save_pretrained(tmp_path / "saved")
    again = models.tiny_llama()
    again.load_adapter(str(tmp_path / "saved"))
    torch.testing.assert_close(answer(again), answer(model))
    keep(tmp_path / "saved", "llama", answer(again))


def test_the_trainer_trains_saves_and_resumes_such_a_model(tmp_path: Path) -> None:
    def train(folder: Path, **changes: Any) -> Any:
        torch.manual_seed(0)
        model = models.tiny_llama()
        model.add_adapter(config(init_lora_weights=True))
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            save_strategy="steps",
            save_steps=2,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=Texts()).train(**changes)
        return model

    model = train(tmp_path / "run")
    assert not torch.allclose(answer(model), answer(models.tiny_llama()), atol=1e-4)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    again = models.tiny_llama()
    again.load_adapter(str(checkpoint))
    torch.testing.assert_close(answer(again), answer(model))
    keep(checkpoint, "llama", answer(model))
