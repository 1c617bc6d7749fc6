from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import nn

from lamina.engine.fold import (
    as_base,
    check_foldable,
    fold,
    folded_adapters,
    merge_and_unload,
    unfold,
    unload,
)
from lamina.engine.inject import delete_adapter
from lamina.errors import AdapterNameError, FoldError
from tests import models
from tests.adapters import weights
from tests.engine.adapters import adapt, adapted_names, assert_same, layer_of

X = torch.linspace(-1, 1, 32).reshape(2, 16)
ALL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], torch.Tensor]] = {
    "linear": (models.perceptron, {"target_modules": ["up", "down"]}, X),
    "conv1d": (models.tiny_gpt2, {"target_modules": ["c_attn", "c_fc"]}, models.token_ids()),
    "embedding": (models.embedding_net, {"target_modules": ["embed"]}, models.token_ids()),
    **{
        f"convolution{d}": (
            lambda d=d: models.convolution_net(d),
            {"target_modules": ["stem", "strided", "pointwise"]},
            torch.linspace(-1, 1, 3 * 8**d).reshape(1, 3, *[8] * d),
        )
        for d in (1, 2, 3)
    },
}


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = model(x)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("kind", ALL)
def test_a_folded_model_computes_the_same_and_unfolds_to_the_bit(kind: str) -> None:
    make, config, x = ALL[kind]
    model = make()
    state = adapt(model, **config)
    before, expected = weights(model), outputs(model, x)
    assert fold(model, state) == ["default"]
    assert all(layer_of(model, path).merged for path in adapted_names(model))
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-4, atol=1e-5)
    assert fold(model, state) == []
    unfold(model)
    assert_same(before, weights(model))
    assert torch.equal(outputs(model, x), expected)
    plain = merge_and_unload(model, state)
    assert adapted_names(plain) == set()
    assert plain.state_dict().keys() == make().state_dict().keys()
    torch.testing.assert_close(outputs(plain, x), expected, rtol=1e-4, atol=1e-5)


def test_a_thousand_cycles_in_bf16_change_no_bit() -> None:
    model = models.perceptron().to(torch.bfloat16)
    adapt(model, "a", target_modules=["up", "down"], seed=1)
    state = adapt(model, "b", target_modules=["up"], seed=2)
    before = weights(model)
    orders = [list(order) for n in (1, 2) for order in permutations(["a", "b"], n)]
    for cycle in range(1000):
        order = orders[cycle % len(orders)]
        if cycle % 3:
            fold(model, state, order)
        else:
            for name in order:
                fold(model, state, [name])
        assert not torch.equal(model.up.base_layer.weight, before["up.base_layer.weight"])
        unfold(model)
    assert_same(before, weights(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_sum_is_rounded_once(dtype: torch.dtype, one_by_one: bool) -> None:
    model = models.perceptron().to(dtype)
    adapt(model, "a", target_modules=["up"], seed=1)
    state = adapt(model, "b", target_modules=["up"], seed=2)
    layer = layer_of(model, "up")
    exact = layer.base_layer.weight.double()
    for name in ("a", "b"):
        a, b = layer.factors(name)
        exact += layer.scaling[name] * (b.double() @ a.double())
    for names in [["a"], ["b"]] if one_by_one else [["a", "b"]]:
        fold(model, state, names)
    folded = layer.base_layer.weight
    assert folded.dtype == dtype
    # The sum in fp32 may fall on the other side of a tie, hence the small allowance.
    half_step = torch.finfo(dtype).eps / 2 * 2 ** exact.abs().log2().floor()
    assert ((folded.double() - exact).abs() <= half_step * (1 + 1e-3)).all()


def test_folding_one_by_one_or_at_once_gives_the_same_bits() -> None:
    def folded(steps: list[list[str]]) -> torch.Tensor:
        model = models.perceptron().to(torch.bfloat16)
        adapt(model, "a", target_modules=["up"], seed=1)
        state = adapt(model, "b", target_modules=["up"], seed=2)
        for names in steps:
            fold(model, state, names)
        assert folded_adapters(model) == ["a", "b"]
        return model.up.base_layer.weight.detach().clone()

    assert torch.equal(folded([["a"], ["b"]]), folded([["a", "b"]]))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e38])
def test_safe_refuses_before_anything_changes(broken: float) -> None:
    model = models.perceptron()
    state = adapt(model, target_modules=["up", "down"])
    with torch.no_grad():
        layer_of(model, "down").factors("default")[1].fill_(broken)
    before = weights(model)
    with pytest.raises(FoldError, match=r"NaN or Inf .* 1 layer") as caught:
        fold(model, state, safe=True)
    assert caught.value.faults == ("down with 'default'",)
    assert {n: t for n, t in before.items() if "up" in n}.keys()
    for name, tensor in weights(model).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert folded_adapters(model) == []
    fold(model, state)
    assert folded_adapters(model) == ["default"]


def test_safe_looks_at_what_the_stored_dtype_can_hold() -> None:
    model = models.perceptron().to(torch.float16)
    state = adapt(model, target_modules=["up"])
    with torch.no_grad():
        layer_of(model, "up").factors("default")[1].fill_(1e5)
    with pytest.raises(FoldError, match="NaN or Inf"):
        fold(model, state, safe=True)


def test_a_failed_merge_leaves_what_was_folded_folded() -> None:
    model = models.perceptron()
    state = adapt(model, "a", target_modules=["up"], seed=1)
    adapt(model, "b", target_modules=["down"], seed=2)
    fold(model, state, ["a"])
    with torch.no_grad():
        layer_of(model, "down").factors("b")[1].fill_(float("nan"))
    before = weights(model)
    with pytest.raises(FoldError):
        merge_and_unload(model, state, ["b"], safe=True)
    assert folded_adapters(model) == ["a"]
    assert torch.equal(model.up.base_layer.weight, before["up.base_layer.weight"])
    assert state.active == ("a", "b")


@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"]])
def test_merging_takes_the_adapters_named_and_no_other(names: list[str]) -> None:
    def model_with_both() -> Any:
        model = models.perceptron()
        adapt(model, "a", target_modules=["up"], seed=1)
        return model, adapt(model, "b", target_modules=["up", "down"], seed=2)

    model, state = model_with_both()
    state.activate(names)
    expected = model(X)
    model, state = model_with_both()
    fold(model, state, ["a"])
    merged = merge_and_unload(model, state, names)
    torch.testing.assert_close(merged(X), expected)


def test_quantised_layers_are_refused_all_of_them_before_any_changes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = models.tiny_llama()
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        parent, _, leaf = path.rpartition(".")
        quantised = bnb.nn.Linear4bit(32, 64, bias=False, compute_dtype=torch.float32)
        setattr(model.get_submodule(parent), leaf, quantised.to("cpu"))
    state = adapt(model, target_modules=["up_proj", "down_proj"])
    before = weights(model)
    for refused in (
        lambda: fold(model, state),
        lambda: check_foldable(model, ["default"]),
        lambda: merge_and_unload(model, state),
    ):
        with pytest.raises(FoldError, match="2 of 4 layers can't be folded into") as caught:
            refused()
        assert caught.value.faults == tuple(
            f"model.layers.{i}.mlp.up_proj: its weight is quantised (bitsandbytes fp4, double "
            "quantisation), so that the sum would be rounded again"
            for i in (0, 1)
        )
    assert_same(before, weights(model))
    assert folded_adapters(model) == []


def test_a_tied_weight_is_refused_with_the_name_of_the_other() -> None:
    model = models.embedding_net(tied=True)
    state = adapt(model, target_modules=["embed"])
    with pytest.raises(FoldError) as caught:
        fold(model, state)
    assert caught.value.faults == ("embed: its weight is tied to head, which it would change too",)
    assert torch.equal(model.head.weight, models.embedding_net(tied=True).head.weight)


def test_a_grouped_convolution_is_refused() -> None:
    model = models.convolution_net(2)
    state = adapt(model, target_modules=["grouped", "stem"])
    before = weights(model)
    with pytest.raises(FoldError, match=r"1 of 2 layers .*\n.*grouped: .* 2 groups"):
        fold(model, state)
    assert_same(before, weights(model))


def test_a_layer_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = models.Perceptron()
    state = adapt(model, target_modules=["up"], seed=None)
    with pytest.raises(FoldError, match="up: it is on the meta device"):
        fold(model, state)


def test_the_bias_of_B_goes_into_the_base_bias_or_is_refused() -> None:
    model = models.perceptron()
    state = adapt(model, target_modules=["up"], lora_bias=True)
    expected, before = model(X), weights(model)
    fold(model, state)
    torch.testing.assert_close(model(X), expected)
    assert not torch.equal(model.up.base_layer.bias, before["up.base_layer.bias"])
    unfold(model)
    assert_same(before, weights(model))
    adapt(model, "unbiased", target_modules=["down"])
    adapt(model, "biased", target_modules=["down"], lora_bias=True)
    with pytest.raises(FoldError, match=r"down: .* the base layer has no bias"):
        fold(model, state)
    assert fold(model, state, ["unbiased"]) == ["unbiased"]


def test_as_base_takes_folded_adapters_out_and_puts_them_back_to_the_bit() -> None:
    model = models.perceptron().to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    base = model(x)
    adapt(model, "a", target_modules=["up", "down"], seed=1)
    state = adapt(model, "b", target_modules=["down"], seed=2)
    fold(model, state, ["a"])
    before, expected = weights(model), model(x)
    with pytest.raises(RuntimeError, match="on purpose"), as_base(model, state):
        assert torch.equal(model(x), base)
        with as_base(model, state):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        raise RuntimeError("on purpose")
    assert_same(before, weights(model))
    assert torch.equal(model(x), expected)
    assert layer_of(model, "down").merged_adapters == ["a"]
    unfold(model)
    assert torch.equal(model.up.base_layer.weight, models.perceptron().bfloat16().up.weight)


def test_what_was_not_kept_can_not_be_unfolded_and_nothing_changes() -> None:
    model = models.perceptron()
    state = adapt(model, "a", target_modules=["up", "down"], seed=1)
    adapt(model, "b", target_modules=["up"], seed=2)
    fold(model, state, ["a"], keep_unfolded=False)
    fold(model, state, ["b"])
    before = weights(model)
    with pytest.raises(FoldError, match="2 layers were folded without keeping"):
        unfold(model)
    with pytest.raises(FoldError), as_base(model, state):
        pytest.fail("the base can't be had")
    assert_same(before, weights(model))
    assert folded_adapters(model) == ["a", "b"]


def test_a_folded_adapter_can_not_be_deleted() -> None:
    model = models.perceptron()
    state = adapt(model, target_modules=["up", "down"])
    fold(model, state)
    with pytest.raises(FoldError, match="folded into 2 layers"):
        delete_adapter(model, "default", state)
    with pytest.raises(AdapterNameError, match="no adapter 'other'"):
        fold(model, state, ["other"])
    unfold(model)
    delete_adapter(model, "default", state)
    assert torch.equal(model(X), models.perceptron()(X))


def test_unload_gives_the_base_back() -> None:
    model = models.tiny_bert_classifier()
    before = weights(model)
    state = adapt(model, target_modules=["query"], modules_to_save=["classifier"], bias="lora_only")
    with torch.no_grad():
        for parameter in state.biases.parameters.values():
            parameter.add_(1)
    fold(model, state)
    unload(model, state)
    assert adapted_names(model) == set()
    assert_same(before, weights(model))


def test_merge_keeps_the_modules_trained_whole_and_the_biases() -> None:
    model = models.tiny_bert_classifier()
    ids = models.token_ids()
    state = adapt(model, target_modules=["query"], modules_to_save=["classifier"], bias="lora_only")
    with torch.no_grad():
        for parameter in state.biases.parameters.values():
            parameter.add_(1)
    expected = model(ids).logits
    merged = merge_and_unload(model, state)
    assert merged.state_dict().keys() == models.tiny_bert_classifier().state_dict().keys()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_moving_the_model_while_folded_still_unfolds() -> None:
    model = models.perceptron()
    state = adapt(model, target_modules=["up"])
    before = model.up.base_layer.weight.detach().clone()
    fold(model, state)
    model.to(torch.float64)
    unfold(model)
    assert torch.equal(model.up.base_layer.weight, before.double())
