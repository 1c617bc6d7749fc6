from __future__ import annotations

import copy
import re
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lamina.config import LoraConfig, TaskType
from lamina.errors import AdapterNameError, AlreadyAdaptedError, TargetError
from lamina.model import (
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests import models
from tests.adapters import (
    fill,
    flags,
    llama_adapter,
    llama_config,
    logits,
    same,
    trained,
    weights,
)

TASKS = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def test_a_fresh_adapter_changes_no_logit_and_only_its_factors_train() -> None:
    base = models.tiny_llama()
    plain = logits(base)
    model = get_peft_model(base, llama_config())
    assert torch.equal(logits(model), plain)
    assert all(re.search(r"\.lora_[AB]\.default\.weight$", name) for name in trained(model))
    assert len(trained(model)) == 2 * 2 * 2
    assert model.get_base_model() is base
    assert isinstance(model.base_model, LoraModel)


@pytest.mark.parametrize("task", TASKS)
def test_the_task_decides_the_class(task: str) -> None:
    config = LoraConfig(task_type=task, target_modules=["up"])
    model = get_peft_model(models.perceptron(), config)
    assert type(model) is TASKS[task]
    assert model.peft_config["default"].task_type is TaskType(task)


def test_without_a_task_the_class_of_the_base_is_recorded() -> None:
    model = get_peft_model(models.tiny_llama(), LoraConfig())
    assert type(model) is PeftModel
    mapping = model.peft_config["default"].auto_mapping
    assert mapping is not None
    assert mapping["base_model_class"] == "LlamaForCausalLM"


def test_the_callers_config_stays_as_it_was() -> None:
    config = LoraConfig(task_type="SEQ_CLS")
    before = copy.deepcopy(config)
    model = get_peft_model(models.tiny_bert_classifier(), config)
    assert config == before
    assert model.peft_config["default"].target_modules == {"query", "value"}
    assert model.peft_config["default"].modules_to_save == ["classifier"]


def test_the_base_is_recorded_by_name_and_revision() -> None:
    base = models.tiny_llama()
    base.name_or_path = "someone/tiny"
    model = get_peft_model(base, llama_config(), revision="v2")
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("someone/tiny", "v2")


def test_forward_takes_what_the_base_takes() -> None:
    model = llama_adapter()
    base = model.get_base_model()
    ids = models.token_ids()
    expected = base(ids, labels=ids)
    for out in (
        model(ids, labels=ids),
        model(input_ids=ids, labels=ids),
        model(ids, torch.ones_like(ids), labels=ids, use_cache=False),
    ):
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.loss, expected.loss)
    embedded = base.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, expected.logits)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_generate_is_the_adapted_models() -> None:
    model = llama_adapter(r=8)
    ids = models.token_ids(batch=1, length=4)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    made = model.generate(input_ids=ids, **settings)
    assert torch.equal(made, model.get_base_model().generate(input_ids=ids, **settings))
    step = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made[:, :5], step)
    with model.disable_adapter():
        base_made = model.generate(input_ids=ids, **settings)
    plain = models.tiny_llama().generate(input_ids=ids, **settings)
    assert torch.equal(base_made, plain)
    assert not torch.equal(made, base_made)


def test_a_plain_module_is_adapted_too() -> None:
    base = models.perceptron()
    x = torch.randn(3, 16)
    plain = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["up", "down"], lora_alpha=16))
    assert torch.equal(model(x), plain)
    fill(model)

    def through(layer: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(x) + 2 * x @ a.T @ b.T

    expected = through(base.down, nn.functional.gelu(through(base.up, x)))
    torch.testing.assert_close(model(x), expected)


def test_what_the_facade_lacks_is_the_base_models() -> None:
    model = llama_adapter()
    base = model.get_base_model()
    assert model.config is base.config
    assert model.device == base.device
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.model is base
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_what_code_in_the_wild_reads() -> None:
    model = llama_adapter(lora_alpha=8)
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.base_model.peft_config is model.peft_config
    assert model.peft_type == "LORA"
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert dict(layer.r) == {"default": 4}
    assert dict(layer.scaling) == {"default": 2.0}
    model.add_adapter("other", llama_config())
    model.set_adapter(["default", "other"])
    assert model.active_adapter == ["default", "other"]


def test_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_adapter()
    # q: 32 -> 32, v: 32 -> 16 (two key/value heads of 8), r = 4, in two layers.
    adapter = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    total = sum(p.numel() for p in models.tiny_llama().parameters()) + adapter
    assert model.get_nb_trainable_parameters() == (adapter, total)
    model.print_trainable_parameters()
    share = 100 * adapter / total
    assert capsys.readouterr().out == (
        f"trainable params: {adapter:,d} || all params: {total:,d} || trainable%: {share:.4f}\n"
    )


def test_modes_pass_through() -> None:
    model = get_peft_model(models.tiny_llama().train(), llama_config(lora_dropout=0.5))
    assert model.training
    fill(model)
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = llama_adapter()
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    fill(twin, seed=9)
    twin.add_adapter("other", llama_config())
    twin.set_adapter("other", train=[])
    assert torch.equal(logits(model), expected)
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    assert len(trained(model)) == 8
    assert trained(twin) == set()


@pytest.mark.parametrize("inner", [False, True])
def test_an_adapted_model_is_refused(inner: bool) -> None:
    model = llama_adapter()
    before = weights(model)
    given = model.get_base_model() if inner else model
    with pytest.raises(AlreadyAdaptedError, match="'default'"):
        get_peft_model(given, llama_config())
    assert same(weights(model), before)


def test_a_model_that_peft_adapted_is_refused() -> None:
    theirs = peft.get_peft_model(
        models.tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="sft"
    )
    with pytest.raises(AlreadyAdaptedError, match="'sft'"):
        get_peft_model(theirs, llama_config())


def test_a_config_that_does_not_fit_changes_nothing() -> None:
    base = models.tiny_llama()
    base.model.norm.weight.requires_grad_(False)
    before, asked = weights(base), flags(base)
    with pytest.raises(TargetError, match="q_prj"):
        get_peft_model(base, llama_config(target_modules=["v_proj", "q_prj"]))
    assert same(weights(base), before)
    assert flags(base) == asked


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys", "/tmp/x"])
def test_adapter_names_that_cannot_be(name: str) -> None:
    model = llama_adapter()
    before = weights(model)
    with pytest.raises(AdapterNameError):
        model.add_adapter(name, llama_config(target_modules=["o_proj"]))
    assert same(weights(model), before)


def test_state_dicts_go_out_and_in() -> None:
    model = llama_adapter(seed=1)
    taken = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    assert all(key.startswith("base_model.model.model.layers.") for key in taken)
    other = llama_adapter(seed=2)
    report = set_peft_model_state_dict(other, taken)
    assert report.complete
    assert len(report.loaded) == 8
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(AdapterNameError, match="no adapters"):
        get_peft_model_state_dict(models.tiny_llama())
    with pytest.raises(AdapterNameError, match="'sft'"):
        get_peft_model_state_dict(model, adapter_name="sft")


def test_a_state_dict_can_be_given() -> None:
    model = llama_adapter()
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    taken = get_peft_model_state_dict(model, state_dict=doubled)
    own = get_peft_model_state_dict(model)
    assert taken.keys() == own.keys()
    assert all(torch.equal(taken[key], 2 * own[key]) for key in own)


def test_adapters_go_into_a_model_without_a_facade() -> None:
    base = models.tiny_llama()
    injected = inject_adapter_in_model(llama_config(), base)
    assert injected is base
    facade = llama_adapter(seed=3)
    prefix = "base_model.model."
    bare = {
        key.removeprefix(prefix): tensor
        for key, tensor in get_peft_model_state_dict(facade).items()
    }
    assert get_peft_model_state_dict(base).keys() == bare.keys()
    set_peft_model_state_dict(base, bare)
    assert torch.equal(logits(base), logits(facade))
    again = inject_adapter_in_model(llama_config(), models.tiny_llama(), state_dict=bare)
    assert torch.equal(logits(again), logits(facade))
    inject_adapter_in_model(llama_config(), base, "second")
    fill(base, "second", seed=4)
    assert not torch.equal(logits(base), logits(facade))
