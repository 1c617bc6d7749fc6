from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.config import LoraConfig
from lamina.engine.routing import BASE, Routing
from lamina.errors import AdapterNameError, RoutingError
from tests import models
from tests.adapters import fill
from tests.engine.adapters import adapt, layer_of
from tests.engine.test_layers_forward import LAYERS

NAMES = ["b", BASE, "a", "b"]
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}


def batch(kind: str) -> Tensor:
    """Four rows that a layer of this kind takes."""
    x = LAYERS[kind][1]
    return torch.cat([x, x.roll(1, -1), x.flip(0), x.roll(2, -1)])[:4]


@contextmanager
def active(model: Any, name: str) -> Iterator[None]:
    """Only this adapter acts inside; for the base, none."""
    state = model.adapter_state
    before = state.active
    state.activate([] if name == BASE else [name])
    yield
    state.activate(before)


def assert_rows(model: Any, mixed: Tensor, alone: Any, names: list[str] = NAMES) -> None:
    """Each row is what its adapter alone gives."""
    for row, name in enumerate(names):
        with active(model, name):
            torch.testing.assert_close(mixed[row], alone()[row])


# --- a layer by itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(LAYERS))
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_gets_its_adapter(kind: str, variant: str) -> None:
    model = nn.ModuleDict({"layer": LAYERS[kind][0]().double()}).eval()
    settings = VARIANTS[variant]
    adapt(model, "a", target_modules=["layer"], r=2, **settings)
    adapt(model, "b", seed=2, target_modules=["layer"], r=3, lora_alpha=5)
    layer, x = layer_of(model, "layer"), batch(kind)
    mixed = layer(x, adapter_names=NAMES)
    assert_rows(layer, mixed, lambda: layer(x))
    assert not torch.allclose(mixed, layer(x), atol=1e-2)
    assert torch.equal(mixed[1], layer.base_layer(x)[1])


def test_a_row_whose_adapter_is_not_here_is_the_bases() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 3), "two": nn.Linear(4, 3)})
    adapt(model, "a", target_modules=["one"])
    adapt(model, "b", target_modules=["two"])
    layer, x = layer_of(model, "one"), torch.ones(2, 4)
    mixed = layer(x, adapter_names=["b", "a"])
    assert torch.equal(mixed[0], layer.base_layer(x)[0])
    assert not torch.equal(mixed[1], mixed[0])


def test_rows_reach_alora_with_their_own_offsets() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    adapt(model, "a", target_modules=["layer"], alora_invocation_tokens=[1])
    adapt(model, "b", seed=2, target_modules=["layer"])
    layer = layer_of(model, "layer")
    with models.seeded(4):
        x = torch.randn(4, 5, 6)
    offsets = [1, 2, 3, None]
    mixed = layer(x, adapter_names=["a", "b", "a", "a"], alora_offsets=offsets)
    base, lora, other = (
        layer.base_layer(x),
        layer.base_layer(x) + layer.update("a", x),
        layer.base_layer(x) + layer.update("b", x),
    )
    assert torch.equal(mixed[0], torch.cat([base[0, :4], lora[0, 4:]]))
    torch.testing.assert_close(mixed[1], other[1])
    assert torch.equal(mixed[2], torch.cat([base[2, :2], lora[2, 2:]]))
    assert torch.equal(mixed[3], base[3])


def test_rows_get_back_what_an_initialisation_took_from_the_base() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    with models.seeded(4):
        x = torch.randn(3, 6)
    before = model["layer"](x)
    adapt(model, "a", seed=None, target_modules=["layer"], r=2, init_lora_weights="pissa")
    adapt(model, "b", seed=2, target_modules=["layer"], r=2)
    layer = layer_of(model, "layer")
    mixed = layer(x, adapter_names=["a", BASE, "b"])
    torch.testing.assert_close(mixed[:2], before[:2], rtol=1e-5, atol=1e-5)
    assert_rows(layer, mixed, lambda: layer(x), ["a", BASE, "b"])


def test_rows_are_counted() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    adapt(model, "a", target_modules=["layer"])
    layer = layer_of(model, "layer")
    said = "Length of `adapter_names` should be the same as the number of inputs, but got 2 and 3"
    with pytest.raises(RoutingError, match=said):
        layer(torch.ones(3, 6), adapter_names=["a", "a"])
    assert layer.adapter_state.routing is None


# --- a whole model -------------------------------------------------------------------------------


def llama(**config: Any) -> lamina.PeftModel:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}
    model = lamina.get_peft_model(models.tiny_llama(), LoraConfig(**settings | config), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=16, target_modules=["v_proj", "q_proj"]))
    for seed, name in enumerate(("a", "b")):
        fill(model, name, seed)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("places", [["q_proj", "up_proj"], ["embed_tokens"]])
def test_a_model_answers_each_row_by_its_adapter(variant: str, places: list[str]) -> None:
    model, ids = llama(target_modules=places, **VARIANTS[variant]), models.token_ids(4)
    mixed = model(input_ids=ids, adapter_names=NAMES).logits
    assert_rows(model, mixed, lambda: model(input_ids=ids).logits)
    assert torch.equal(model(ids, adapter_names=tuple(NAMES)).logits, mixed)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}],
)
def test_each_row_is_generated_by_its_adapter(variant: str, how: dict[str, Any]) -> None:
    model, ids = llama(**VARIANTS[variant]), models.token_ids(4)
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, max_new_tokens=6, **how)
    answers = how.get("num_return_sequences", 1)
    assert len(mixed) == 4 * answers
    for row, name in enumerate(NAMES):
        with active(model, name):
            alone = model.generate(input_ids=ids[row : row + 1], max_new_tokens=6, **how)[0]
        for copy in mixed[row * answers : (row + 1) * answers]:
            assert torch.equal(copy[: len(alone)], alone)


def test_beams_of_the_models_own_config_count_too() -> None:
    model, ids = llama(), models.token_ids(4)
    wanted = model.generate(ids, adapter_names=NAMES, max_new_tokens=4, num_beams=2)
    model.get_base_model().generation_config.num_beams = 2
    assert torch.equal(model.generate(ids, adapter_names=NAMES, max_new_tokens=4), wanted)


def test_rows_are_sorted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    tensor = torch.tensor
    model, ids = llama(), models.token_ids(4)
    monkeypatch.setattr(
        "lamina.engine.routing.torch.tensor", lambda *a, **k: made.append(a) or tensor(*a, **k)
    )
    model(input_ids=ids, adapter_names=NAMES)
    # transformers makes empty ones.
    assert sorted(indices for (indices,) in made if indices) == [[0, 3], [2]]


def test_modules_trained_whole_are_taken_row_by_row() -> None:
    ids = models.token_ids(4)
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = lamina.get_peft_model(models.tiny_bert_classifier(), config, "a").eval()
    model.add_adapter("b", config)
    model.add_adapter("without", LoraConfig(target_modules=["query"]))
    for seed, name in enumerate(("a", "b", "without")):
        fill(model, name, seed)
    names = ["without", "b", BASE, "a"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    assert_rows(model, mixed, lambda: model(input_ids=ids).logits, names)


def test_gradients_reach_each_adapter_from_its_rows_alone() -> None:
    model, ids = llama(), models.token_ids(4)
    model.set_adapter(["a", "b"], train=["a", "b"])
    model(input_ids=ids, adapter_names=[BASE, "a", "a", BASE]).logits.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is None or not grad.any() for name, grad in grads.items() if ".b." in name)
    assert any(grad is not None and grad.any() for name, grad in grads.items() if ".a." in name)


def test_a_model_that_is_compiled_mixes_too() -> None:
    model = models.perceptron()
    state = adapt(model, "a", target_modules=["up", "down"])
    adapt(model, "b", seed=2, target_modules=["up"], use_dora=True)
    x = torch.linspace(-1, 1, 64).reshape(4, 16)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for names in (NAMES, ["a", "a", BASE, "b"]):
            with state.routed(Routing(tuple(names))):
                torch.testing.assert_close(compiled(x), model(x))
            torch.testing.assert_close(compiled(x), model(x))


# --- what is refused -----------------------------------------------------------------------------


def test_names_are_checked_before_anything_is_computed() -> None:
    model, ids = llama(), models.token_ids(4)
    model.get_base_model().forward = lambda *a, **k: pytest.fail("it was called")  # type: ignore[method-assign]
    with pytest.raises(AdapterNameError, match=r"non-existing adapter\(s\): aa, c") as caught:
        model(input_ids=ids, adapter_names=["c", "a", BASE, "aa"])
    assert "did you mean 'a' instead of 'aa'?" in caught.value.faults
    with pytest.raises(RoutingError, match="but got 3 and 4 respectively"):
        model(input_ids=ids, adapter_names=["a"] * 3)
    for names in ("aaaa", [0, 1, 2, 3]):
        with pytest.raises(RoutingError, match="is no list of names"):
            model(input_ids=ids, adapter_names=names)
    with pytest.raises(RoutingError, match="when the model is in training mode"):
        model.train()(input_ids=ids, adapter_names=NAMES)


def test_with_adapters_folded_in_all_rows_would_have_them() -> None:
    model, ids = llama(), models.token_ids(4)
    model.merge_adapter(["b"])
    with pytest.raises(RoutingError, match="please call `unmerge_adapter` first") as caught:
        model(input_ids=ids, adapter_names=["a"] * 4)
    assert caught.value.faults == ("'b' is folded into the base weights",)
    model.unmerge_adapter()
    model(input_ids=ids, adapter_names=["a"] * 4)


def test_off_is_off_whatever_rows_ask_for() -> None:
    model, ids = llama(), models.token_ids(4)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, adapter_names=NAMES).logits, base)


def test_a_module_that_mixes_its_rows_is_refused() -> None:
    model = nn.ModuleDict({"gru": nn.GRU(4, 4), "layer": nn.Linear(4, 4)})
    adapt(model, "a", target_modules=["layer"], modules_to_save=["gru"])
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following"):
        model["gru"](torch.ones(2, 3, 4), adapter_names=["a", BASE])


def test_rows_go_their_ways_for_one_call_only() -> None:
    model, ids = llama(), models.token_ids(4)
    before = model(input_ids=ids).logits
    model(input_ids=ids, adapter_names=NAMES)
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(IndexError):
        model(input_ids=ids + models.VOCABULARY, adapter_names=NAMES)
    assert model.adapter_state.routing is None


def test_rows_whose_adapters_train_biases_apart_are_refused() -> None:
    config = LoraConfig(target_modules=["up", "down"], bias="lora_only")
    model = lamina.get_peft_model(models.perceptron(), config, "a").eval()
    model.add_adapter("b", config)
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up.base_layer.bias"):
                parameter.add_(1)
        torch.testing.assert_close(model(x, adapter_names=["a", "a"]), model(x))
        with pytest.raises(RoutingError, match="share the base's biases") as caught:
            model(x, adapter_names=["a", "b"])
        with pytest.raises(RoutingError, match="'__base__' has other values in 1 biases"):
            model(x, adapter_names=["a", BASE])
    assert "'b' has other values" in str(caught.value)
    assert "'a' has" not in str(caught.value)
