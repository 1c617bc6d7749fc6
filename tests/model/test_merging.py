from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.errors import AdapterNameError, FoldError
from lamina.model import PeftModel, get_peft_model
from tests import models
from tests.adapters import fill, flags, llama_adapter, llama_config, logits, same, weights


def two_adapters(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(models.tiny_llama().to(dtype), llama_config(), "one")
    model.add_adapter("two", llama_config(r=3, target_modules=["v_proj", "up_proj"]))
    fill(model, "one", seed=1)
    fill(model, "two", seed=2)
    return model.eval()


def test_folding_changes_the_weights_and_not_the_answers() -> None:
    model = two_adapters()
    model.set_adapter(["one", "two"])
    expected = logits(model)
    base = weights(model.get_base_model())
    model.merge_adapter()
    assert not same(weights(model.get_base_model()), base)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_folded_weight_is_the_sum_rounded_once() -> None:
    model = two_adapters(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    exact = layer.base_layer.weight.double()
    for name in ("one", "two"):
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        exact = exact + layer.scaling[name] * b @ a
    model.merge_adapter(["one", "two"])
    assert torch.equal(layer.base_layer.weight.double(), exact.bfloat16().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unfolding_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    model = two_adapters(dtype)
    before, out = weights(model), logits(model)
    for names in (["one"], ["two", "one"], None) * 5:
        model.merge_adapter(names)
        model.unmerge_adapter()
    assert same(weights(model), before)
    assert torch.equal(logits(model), out)


def test_folding_step_by_step_is_folding_at_once() -> None:
    model = two_adapters(torch.bfloat16)
    before = weights(model)
    model.merge_adapter(["one"])
    model.merge_adapter(["one", "two"])
    stepwise = weights(model)
    model.unmerge_adapter()
    assert same(weights(model), before)
    model.merge_adapter(["one", "two"])
    assert same(weights(model), stepwise)


def test_a_named_adapter_is_folded_whatever_is_active() -> None:
    model = two_adapters()
    model.set_adapter(["one", "two"])
    both = logits(model)
    model.set_adapter("one")
    model.merge_adapter(["two"])
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterNameError, match="'three'"):
        model.merge_adapter(["three"])


def test_merge_and_unload_gives_a_plain_model() -> None:
    model = two_adapters()
    model.set_adapter(["one", "two"])
    expected = logits(model)
    plain = model.merge_and_unload()
    assert type(plain) is type(models.tiny_llama())
    assert list(plain.state_dict()) == list(models.tiny_llama().state_dict())
    assert not any("lora" in type(m).__module__ for m in plain.modules())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    # And it can be adapted afresh.
    assert torch.equal(logits(get_peft_model(plain, llama_config())), logits(plain))


def test_merge_and_unload_folds_only_what_is_named() -> None:
    model = two_adapters()
    model.set_adapter("two")
    expected = logits(model)
    model.set_adapter("one")
    model.merge_adapter()
    plain = model.merge_and_unload(adapter_names=["two"])
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    untouched = models.tiny_llama().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, untouched)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite(how: str, bad: float) -> None:
    model = two_adapters()
    # Of the last layer, so that all others would have been folded before.
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.v_proj.lora_B["one"].weight[3, 1] = bad
    before, asked = weights(model), flags(model)
    with pytest.raises(FoldError, match=r"layers\.1\.self_attn\.v_proj with 'one'"):
        getattr(model, how)(safe_merge=True)
    assert list(weights(model)) == list(before)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))
    assert flags(model) == asked
    assert all(not status.merged_adapters for status in model.get_layer_status())


def test_a_safe_merge_lets_good_weights_through() -> None:
    model = llama_adapter()
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True, progressbar=True)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def overflowing() -> PeftModel:
    model = get_peft_model(models.perceptron().half(), LoraConfig(target_modules=["down"]))
    fill(model, size=300.0)
    return model


def test_a_sum_that_overflows_on_rounding_is_not_finite() -> None:
    model = overflowing()
    before = weights(model)
    with pytest.raises(FoldError, match="NaN or Inf"):
        model.merge_adapter(safe_merge=True)
    assert same(weights(model), before)


@pytest.mark.parametrize("folded", [False, True])
def test_unload_gives_the_original_back(folded: bool) -> None:
    base = models.tiny_bert_classifier().bfloat16()
    original = weights(base)
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "word_embeddings"], bias="lora_only"
    )
    model = get_peft_model(base, config)
    fill(model)
    assert not torch.equal(logits(model.eval()), logits(models.tiny_bert_classifier().bfloat16()))
    if folded:
        model.merge_adapter()
    plain = model.unload()
    assert plain is base
    assert same(weights(plain), original)


def test_merging_keeps_the_trained_head_and_biases() -> None:
    base = models.tiny_bert_classifier()
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all", lora_bias=True)
    model = get_peft_model(base, config).eval()
    fill(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(models.tiny_bert_classifier().state_dict())
    assert isinstance(merged.classifier, nn.Linear)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_bert_classifier])
def test_other_layouts_fold_and_unfold(make: type) -> None:
    base = make()
    targets = ["c_attn", "c_fc"] if make is models.tiny_gpt2 else ["query", "dense"]
    model = get_peft_model(base, LoraConfig(target_modules=targets)).eval()
    fill(model)
    before, out = weights(model), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), out, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert same(weights(model), before)


def test_tied_embeddings_are_not_folded_behind_the_heads_back() -> None:
    model = get_peft_model(models.embedding_net(tied=True), LoraConfig(target_modules=["embed"]))
    fill(model)
    before = weights(model)
    with pytest.raises(FoldError, match="tied to head"):
        model.merge_adapter()
    assert same(weights(model), before)


def test_folding_inside_autocast_is_as_exact_as_outside() -> None:
    model, other = two_adapters(), two_adapters()
    other.merge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.merge_adapter()
        with model.disable_adapter():
            pass
        delta = model.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("one")
    assert same(weights(model), weights(other))
    layer = other.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(delta, layer.get_delta_weight("one"))


def test_a_folded_adapter_may_be_deleted_while_all_are_off() -> None:
    model = two_adapters()
    want = logits(model)
    model.merge_adapter(["one", "two"])
    with model.disable_adapter():
        model.delete_adapter("two")
    assert torch.allclose(logits(model), want, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)


def biased() -> PeftModel:
    config = LoraConfig(target_modules=["c_attn"], bias="lora_only", lora_bias=True)
    model = get_peft_model(models.tiny_gpt2(), config, "one")
    model.add_adapter("two", config)
    fill(model, "one", seed=1)
    fill(model, "two", seed=2)
    return model.eval()


def test_merging_an_adapter_that_is_not_active_takes_its_biases() -> None:
    model = biased()
    model.set_adapter("two")
    want = logits(model)
    assert torch.allclose(logits(biased().merge_and_unload(adapter_names=["two"])), want, atol=1e-5)


def test_biases_that_are_switched_are_not_folded_into() -> None:
    model = biased()
    before = weights(model)
    with pytest.raises(FoldError, match="biases"):
        model.merge_adapter()
    assert same(weights(model), before)


def test_adapters_without_weights_are_not_merged() -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(), low_cpu_mem_usage=True)
    before = weights(model.get_base_model().model.embed_tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(FoldError, match="'default' has no weights yet"):
            merge()
    assert same(weights(model.get_base_model().model.embed_tokens), before)
