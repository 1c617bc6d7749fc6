from __future__ import annotations

import pytest
import torch

from lamina.config import LoraConfig
from lamina.engine.layers import LoraLayer
from lamina.errors import AdapterNameError, FoldError
from lamina.model import PeftModel, get_peft_model
from tests import models
from tests.adapters import fill, flags, llama_config, logits, same, trained, weights

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(7))


def two_on_the_last_layer() -> PeftModel:
    """Adapters "sft" and "sft2" on a linear that nothing follows: their updates just add up."""
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["down"]), "sft")
    model.add_adapter("sft2", LoraConfig(r=2, lora_alpha=6, target_modules=["down"]))
    fill(model, "sft", seed=1)
    fill(model, "sft2", seed=2)
    return model.eval()


def contributions(model: PeftModel) -> dict[str, torch.Tensor]:
    """What each adapter adds, by the formula."""
    base = model.get_base_model()
    hidden = torch.nn.functional.gelu(base.up(X))
    layer = base.down
    return {
        name: layer.scaling[name]
        * hidden
        @ layer.lora_A[name].weight.T
        @ layer.lora_B[name].weight.T
        for name in layer.r
    }


def adapters_trained(model: PeftModel) -> set[str]:
    return {name.split(".")[-2] for name in trained(model)}


def test_the_first_adapter_is_active_and_others_wait() -> None:
    model = two_on_the_last_layer()
    assert model.active_adapters == ["sft"]
    assert adapters_trained(model) == {"sft"}
    added = contributions(model)
    torch.testing.assert_close(model(X), models.perceptron()(X) + added["sft"])


@pytest.mark.parametrize("names", ["sft2", ["sft2"], ("sft", "sft2"), ["sft2", "sft"]])
def test_what_is_active_adds_up(names: str | list[str]) -> None:
    model = two_on_the_last_layer()
    model.set_adapter(names)
    wanted = [names] if isinstance(names, str) else list(names)
    assert model.active_adapters == wanted
    added = contributions(model)
    expected = models.perceptron()(X) + sum(added[name] for name in wanted)
    torch.testing.assert_close(model(X), expected)


def test_switching_back_and_forth_loses_nothing() -> None:
    model = two_on_the_last_layer()
    before, first = weights(model), model(X)
    model.set_adapter("sft2")
    second = model(X)
    model.set_adapter("sft")
    assert torch.equal(model(X), first)
    assert not torch.equal(first, second)
    assert same(weights(model), before)


def test_train_says_exactly_what_trains() -> None:
    model = two_on_the_last_layer()
    model.set_adapter(["sft", "sft2"], train=["sft2"])
    assert adapters_trained(model) == {"sft2"}
    model.set_adapter(["sft", "sft2"], train="sft")
    assert adapters_trained(model) == {"sft"}
    model.set_adapter(["sft", "sft2"], train=["sft", "sft2"])
    assert adapters_trained(model) == {"sft", "sft2"}
    model.set_adapter(["sft", "sft2"], train=[])
    assert adapters_trained(model) == set()


def test_gradients_reach_what_trains_and_nothing_else() -> None:
    model = two_on_the_last_layer()
    model.set_adapter(["sft", "sft2"], train=["sft2"])
    model(X).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained(model)
    down = model.get_base_model().down
    assert down.lora_B["sft2"].weight.grad.abs().sum() > 0
    assert down.lora_A["sft2"].weight.grad.abs().sum() > 0


def test_activating_a_frozen_adapter_does_not_train_it() -> None:
    model = two_on_the_last_layer()
    model.set_adapter(["sft", "sft2"], train=["sft2"])
    model.set_adapter("sft")
    assert adapters_trained(model) == set()
    model.set_adapter("sft2")
    assert adapters_trained(model) == {"sft2"}
    model.set_adapter("sft2", inference_mode=True)
    assert adapters_trained(model) == set()


def test_training_what_is_not_active_is_refused() -> None:
    model = two_on_the_last_layer()
    before = flags(model)
    with pytest.raises(AdapterNameError, match="'sft2' would be trained without being active"):
        model.set_adapter("sft", train=["sft2"])
    assert model.active_adapters == ["sft"]
    assert flags(model) == before


def test_names_are_compared_whole() -> None:
    model = two_on_the_last_layer()
    model.add_adapter("sf", LoraConfig(target_modules=["down"]))
    with pytest.raises(AdapterNameError, match=r"did you mean 'sft2?'"):
        model.set_adapter("sft3")
    model.delete_adapter("sft")
    assert list(model.peft_config) == ["sft2", "sf"]
    names = [name for name in weights(model) if ".lora_" in name]
    assert sorted({name.split(".")[-2] for name in names}) == ["sf", "sft2"]


def test_requires_grad_is_declared_per_adapter() -> None:
    model = two_on_the_last_layer()
    model.set_requires_grad("sft", False)
    assert adapters_trained(model) == set()
    model.set_adapter(["sft", "sft2"])
    assert adapters_trained(model) == {"sft2"}
    model.set_requires_grad(["sft"], True)
    assert adapters_trained(model) == {"sft", "sft2"}


def test_disabling_gives_the_base_and_restores_everything() -> None:
    model = two_on_the_last_layer()
    model.set_adapter(["sft2", "sft"], train=["sft"])
    before, asked, out = weights(model), flags(model), model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), models.perceptron()(X))
        with model.disable_adapter():
            assert torch.equal(model(X), models.perceptron()(X))
        assert torch.equal(model(X), models.perceptron()(X))
    assert torch.equal(model(X), out)
    assert model.active_adapters == ["sft2", "sft"]
    assert flags(model) == asked
    assert same(weights(model), before)


def test_an_error_while_disabled_restores_everything_too() -> None:
    model = two_on_the_last_layer()
    out = model(X)
    with pytest.raises(ZeroDivisionError):
        with model.disable_adapter():
            _ = 1 / 0
    assert torch.equal(model(X), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabling_while_folded(dtype: torch.dtype) -> None:
    base = models.tiny_llama().to(dtype)
    plain, base_weights = logits(base), weights(base)
    model = get_peft_model(base, llama_config(target_modules="all-linear"))
    fill(model)
    model.eval().merge_adapter()
    folded, out = weights(model), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), out)
    assert same(weights(model), folded)
    model.unmerge_adapter()
    assert same(weights(model.unload()), base_weights)


def test_deleting_the_active_adapter_falls_back_to_the_first() -> None:
    model = two_on_the_last_layer()
    first = model(X)
    model.set_adapter("sft2")
    model.delete_adapter("sft2")
    assert model.active_adapters == ["sft"]
    assert torch.equal(model(X), first)
    with pytest.raises(AdapterNameError, match="'sft2'"):
        model.set_adapter("sft2")


def test_a_folded_adapter_is_not_deleted() -> None:
    model = two_on_the_last_layer()
    model.merge_adapter()
    with pytest.raises(FoldError, match="unmerge_adapter"):
        model.delete_adapter("sft")
    assert list(model.peft_config) == ["sft", "sft2"]


def test_a_deleted_name_can_be_used_again() -> None:
    model = two_on_the_last_layer()
    model.delete_adapter("sft2")
    model.add_adapter("sft2", LoraConfig(r=3, target_modules=["up"]))
    model.set_adapter("sft2")
    assert torch.equal(model(X), models.perceptron()(X))
    assert adapters_trained(model) == {"sft2"}


def test_adapters_of_different_shape_and_place_work_together() -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(), "one")
    fill(model, "one", seed=1)
    alone = logits(model.eval())
    model.add_adapter("two", llama_config(r=7, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), alone)
    fill(model, "two", seed=2)
    assert torch.equal(logits(model), alone)
    model.set_adapter(["one", "two"], train=["two"])
    assert not torch.equal(logits(model), alone)
    assert adapters_trained(model) == {"two"}


def test_each_adapter_has_its_own_copy_of_a_saved_module() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    model = get_peft_model(models.tiny_bert_classifier(), config, "one").eval()
    model.add_adapter("two", config)
    fill(model, "one", seed=1)
    fill(model, "two", seed=2)
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    assert not torch.equal(one, two)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(models.tiny_bert_classifier()))
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    assert "two" not in " ".join(trained(model)).split(".")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_belong_to_their_adapter(bias: str) -> None:
    base = models.perceptron()
    plain = base(X)
    model = get_peft_model(base, LoraConfig(target_modules=["up"], bias=bias)).eval()
    assert "base_model.model.up.base_layer.bias" in trained(model)
    with torch.no_grad():
        base.up.base_layer.bias.add_(1.0)
    changed = model(X)
    assert not torch.equal(changed, plain)
    with model.disable_adapter():
        assert torch.equal(model(X), plain)
    assert torch.equal(model(X), changed)
    model.add_adapter("other", LoraConfig(target_modules=["up"]))
    model.set_adapter("other")
    assert torch.equal(model(X), plain)
    assert not any(name.endswith("bias") for name in trained(model))
    model.set_adapter("default")
    assert torch.equal(model(X), changed)


def test_biases_train_only_if_the_adapter_they_are_of_does() -> None:
    config = LoraConfig(target_modules=["c_attn"], bias="lora_only")
    model = get_peft_model(models.tiny_gpt2(), config, "one")
    model.add_adapter("two", config)
    model.set_adapter("one", train="one")
    alone = trained(model)
    assert any(name.endswith("bias") for name in alone)
    # Now they hold the values of "two", which is frozen.
    model.set_adapter(["one", "two"])
    assert trained(model) == {name for name in alone if not name.endswith("bias")}
    model.set_adapter(["two", "one"])
    assert trained(model) == alone


def test_deleting_an_idle_adapter_activates_none() -> None:
    model = two_on_the_last_layer()
    model.set_adapter([])
    model.delete_adapter("sft2")
    assert model.active_adapters == []


@pytest.mark.parametrize("how", ["set_adapter", "enable_adapters"])
def test_switching_a_whole_model_undoes_what_single_layers_were_told(how: str) -> None:
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["up", "down"]), "sft")
    model.add_adapter("sft2", LoraConfig(target_modules=["up", "down"]))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    if how == "set_adapter":
        layer.set_adapter("sft2")
    else:
        layer.enable_adapters(False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} != before
    model.set_adapter("sft")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
