from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.inject import delete_adapter
from lamina.engine.layers import LoraLayer
from lamina.engine.state import AdapterState
from lamina.engine.trainability import apply_trainability, count_parameters, declare_trainable
from lamina.errors import AdapterNameError
from lamina.model import get_peft_model
from tests import models
from tests.adapters import trained, weights
from tests.engine.adapters import adapt, assert_same, layer_of

# A name that looks like an adapter's internals.
NORM = "block.base_layer_norm"
X = torch.linspace(-1, 1, 32).reshape(2, 16)


def update(model: nn.Module, path: str, name: str) -> torch.Tensor:
    return layer_of(model, path).delta_weight(name)


def two_adapters() -> tuple[nn.Module, AdapterState]:
    model = models.perceptron()
    adapt(model, "sft", target_modules=["up", "down"], seed=1)
    return model, adapt(model, "sft2", target_modules=["down"], r=3, lora_alpha=6, seed=2)


def by_hand(names: list[str]) -> torch.Tensor:
    """The two adapters' sum on dense weights of a plain model."""
    adapted, _ = two_adapters()
    plain = models.perceptron()
    with torch.no_grad():
        for path in ("up", "down"):
            for name in names:
                if name in layer_of(adapted, path).records:
                    plain.get_submodule(path).weight += update(adapted, path, name)
    return plain(X)


@pytest.mark.parametrize("names", [["sft"], ["sft2"], ["sft", "sft2"], ["sft2", "sft"], []])
def test_exactly_the_active_adapters_contribute(names: list[str]) -> None:
    model, state = two_adapters()
    state.activate(names)
    torch.testing.assert_close(model(X), by_hand(names))
    assert state.active == tuple(names)


def test_one_state_is_shared_and_switching_walks_nothing() -> None:
    model, state = two_adapters()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert all(layer.adapter_state is state for layer in layers)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    state.activate(["sft2"])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert layers[0].active_adapters == ["sft2"]


def test_names_are_compared_whole() -> None:
    model, state = two_adapters()
    with pytest.raises(AdapterNameError, match="did you mean 'sft' instead of 'sf'"):
        state.activate(["sf"])
    assert state.active == ("sft", "sft2")
    declare_trainable(model, state, ["sft"])
    assert trained(model)
    assert not any(".sft2." in name for name in trained(model))
    delete_adapter(model, "sft", state)
    assert {name.split(".")[2] for name in model.state_dict() if "lora_" in name} == {"sft2"}
    torch.testing.assert_close(model(X), by_hand(["sft2"]))


def test_a_name_that_is_taken_or_unusable_is_refused() -> None:
    _, state = two_adapters()
    for name in ("sft", "", "a.b", "keys", "__base__", "forward", "update"):
        with pytest.raises(AdapterNameError):
            state.check_new_name(name)
    for name in ("sft3", "ft", "stage 1", "default"):
        state.check_new_name(name)


def test_disabling_is_exact_nested_and_undone_by_exceptions() -> None:
    model, state = two_adapters()
    base, adapted = models.perceptron()(X), model(X)
    with state.while_disabled():
        assert torch.equal(model(X), base)
        with state.while_disabled():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
        state.activate(["sft2"])
        assert torch.equal(model(X), base)
    torch.testing.assert_close(model(X), by_hand(["sft2"]))
    state.activate(["sft", "sft2"])
    with pytest.raises(KeyboardInterrupt), state.while_disabled():
        raise KeyboardInterrupt
    assert not state.disabled
    assert torch.equal(model(X), adapted)


# --- trainability -----------------------------------------------------------------------------


def test_trainable_is_what_was_declared_and_nothing_else_changes_it() -> None:
    model = models.perceptron()
    state = adapt(model, "frozen", target_modules=["up"], trainable=False)
    adapt(model, "learns", target_modules=["up", "down"])
    expected = {f"{x}.lora_{ab}.learns.weight" for x in ("up", "down") for ab in "AB"}
    assert trained(model) == expected
    with state.while_disabled():
        assert trained(model) == expected
    assert trained(model) == expected
    state.activate(["frozen"])
    apply_trainability(model, state)
    assert state.trainable == {"learns"}
    assert trained(model) == set()
    state.activate(["frozen", "learns"])
    apply_trainability(model, state)
    assert trained(model) == expected
    adapt(model, "third", target_modules=["down"], trainable=False, active=False)
    assert trained(model) == expected
    delete_adapter(model, "third", state)
    assert trained(model) == expected


def test_only_what_is_trainable_gets_a_gradient() -> None:
    model, state = two_adapters()
    declare_trainable(model, state, ["sft2"])
    model(X).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"down.lora_A.sft2.weight", "down.lora_B.sft2.weight"}
    assert count_parameters(model) == (
        3 * (24 + 8),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def test_deleting_the_last_active_adapter_hands_over_without_training_it() -> None:
    model, state = two_adapters()
    declare_trainable(model, state, ["sft2"])
    state.activate(["sft2"])
    delete_adapter(model, "sft2", state)
    assert state.active == ("sft",)
    assert trained(model) == set()
    delete_adapter(model, "sft", state)
    assert state.active == ()
    assert torch.equal(model(X), models.perceptron()(X))


# --- biases -----------------------------------------------------------------------------------


class Biased(nn.Module):
    """Three layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.block = nn.ModuleDict({"base_layer_norm": nn.LayerNorm(16)})
        self.second = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.block["base_layer_norm"](self.first(x)))


def biased() -> Biased:
    with models.seeded(3):
        return Biased().eval()


def bias_of(model: nn.Module, path: str) -> nn.Parameter:
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module).bias


@pytest.mark.parametrize(
    ("which", "paths"),
    [
        ("none", set()),
        ("lora_only", {"first"}),
        ("all", {"first", NORM, "second"}),
    ],
)
def test_the_biases_that_train_are_those_asked_for(which: str, paths: set[str]) -> None:
    model = biased()
    state = adapt(model, target_modules=["first"], bias=which)
    everywhere = ("first", NORM, "second")
    assert {path for path in everywhere if bias_of(model, path).requires_grad} == paths
    assert set(state.biases.parameters) == {f"{path}.bias" for path in paths}


def test_the_biases_of_a_frozen_adapter_are_frozen() -> None:
    model = biased()
    state = adapt(model, target_modules=["first"], bias="all", trainable=False)
    assert trained(model) == set()
    declare_trainable(model, state, ["default"])
    assert f"{NORM}.bias" in trained(model)
    state.activate([])
    apply_trainability(model, state)
    assert trained(model) == set()


def test_biases_come_and_go_with_their_adapter() -> None:
    model = biased()
    before = weights(model)
    state = adapt(model, "one", target_modules=["first"], bias="all", seed=None)
    parameter = bias_of(model, "second")
    original = parameter.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(X).sum().backward()
    optimizer.step()
    learnt = parameter.detach().clone()
    assert not torch.equal(learnt, original)
    with state.while_disabled():
        assert torch.equal(model(X), biased()(X))
        assert torch.equal(parameter, original)
    assert torch.equal(parameter, learnt)
    state.activate([])
    after = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in weights(model).items()
        if "lora_" not in name
    }
    assert_same(before, after)
    state.activate(["one"])
    assert bias_of(model, "second") is parameter
    assert torch.equal(parameter, learnt)


def test_each_adapter_has_its_own_biases_and_trains_only_what_it_asked_for() -> None:
    model = biased()
    adapt(model, "all", target_modules=["first"], bias="all", seed=None)
    with torch.no_grad():
        bias_of(model, "second").fill_(1.0)
        bias_of(model, "first").fill_(1.0)
    state = adapt(model, "only", target_modules=["first"], bias="lora_only", seed=None)
    with torch.no_grad():
        bias_of(model, "first").fill_(2.0)
    declare_trainable(model, state, ["only"])
    assert bias_of(model, "first").requires_grad
    assert not bias_of(model, "second").requires_grad
    assert bias_of(model, "second")[0] == 1.0
    state.activate(["only", "all"])
    assert bias_of(model, "first")[0] == 1.0
    state.activate(["all", "only"])
    assert bias_of(model, "first")[0] == 2.0
    delete_adapter(model, "only", state)
    assert bias_of(model, "first")[0] == 1.0
    delete_adapter(model, "all", state)
    assert torch.equal(bias_of(model, "first"), biased().first.bias)


def test_a_module_trained_whole_keeps_its_original_bias_out_of_it() -> None:
    model = models.tiny_bert_classifier()
    state = adapt(
        model, target_modules=["query"], modules_to_save=["classifier"], bias="all", seed=None
    )
    assert not model.classifier.original_module.bias.requires_grad
    assert model.classifier.modules_to_save["default"].bias.requires_grad
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in state.biases.parameters
    assert not any("original_module" in name for name in state.biases.parameters)


def test_an_adapter_without_biases_leaves_them_as_they_are() -> None:
    model = biased()
    adapt(model, "one", target_modules=["first"], bias="all", seed=None)
    with torch.no_grad():
        bias_of(model, "first").fill_(1.0)
    state = adapt(model, "plain", target_modules=["second"], seed=None)
    assert bias_of(model, "first")[0] == 1.0
    state.activate(["plain"])
    assert torch.equal(bias_of(model, "first"), biased().first.bias)


def test_the_config_is_what_is_registered() -> None:
    state = AdapterState()
    config = LoraConfig(target_modules=["up"])
    state.register("a", config, trainable=False)
    assert state.configs == {"a": config}
    assert state.active == ()
    assert state.trainable == frozenset()
    assert state.check_known(["a", "a"]) == ("a",)


def test_biases_are_swapped_in_parameters_that_were_put_in_later() -> None:
    config = LoraConfig(target_modules=["up"], bias="lora_only")
    model = get_peft_model(models.perceptron(), config).eval()
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    held = model.get_base_model().up.base_layer
    base = models.perceptron().up.bias
    with model.disable_adapter():
        assert torch.equal(held.bias, base)
    assert torch.equal(held.bias, base + 1)
    assert torch.equal(model.adapter_state.biases.of("default")["up.bias"], base + 1)
