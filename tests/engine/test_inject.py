from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lamina.engine.fold import fold, merge_and_unload, unfold
from lamina.engine.inject import find_state, strip
from lamina.engine.layers import LoraLayer, ModulesToSaveWrapper
from lamina.engine.names import places
from lamina.engine.trainability import declare_trainable
from lamina.errors import AdapterNameError, TargetError, UnsupportedTargetError
from tests import models
from tests.adapters import weights
from tests.engine.adapters import adapt, adapted_names, assert_same, layer_of, randomise

X = torch.linspace(-1, 1, 32).reshape(2, 16)


def delta(model: nn.Module, path: str, name: str = "default") -> torch.Tensor:
    return layer_of(model, path).delta_weight(name)


# --- shared modules ---------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear in two places, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.block = nn.ModuleList([self.first])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block[0](self.second(torch.tanh(self.first(x))))


def shared() -> Shared:
    with models.seeded(0):
        return Shared().eval()


@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second", "block.0"]])
def test_a_module_in_several_places_is_adapted_once_in_all_of_them(targets: list[str]) -> None:
    model = shared()
    state = adapt(model, target_modules=targets)
    assert isinstance(model.first, LoraLayer)
    assert model.first is model.second
    assert model.first is model.block[0]
    plain = shared()
    with torch.no_grad():
        plain.first.weight += delta(model, "first")
    torch.testing.assert_close(model(X), plain(X))
    torch.testing.assert_close(merge_and_unload(model, state)(X), plain(X))
    assert model.first is model.second is model.block[0]
    assert type(model.first) is nn.Linear


def test_a_shared_module_trained_whole_is_so_everywhere() -> None:
    model = shared()
    adapt(model, target_modules=["first"], seed=None)
    other = shared()
    other.fc = nn.Linear(2, 2)
    adapt(other, target_modules=["fc"], modules_to_save=["second"])
    assert isinstance(other.first, ModulesToSaveWrapper)
    assert other.first is other.second is other.block[0]


def test_a_module_that_lies_in_itself_is_walked_once() -> None:
    model = models.perceptron()
    model.act.owner = model
    assert [place.name for place in places(model) if "act" in place.name] == ["act"]
    adapt(model, target_modules=["up"])
    assert adapted_names(model) == {"up"}


# --- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["out_proj"], "all-linear", ["linear1", "out_proj"]])
def test_an_attentions_own_projection_is_refused_or_left_alone(targets: Any) -> None:
    with models.seeded(0):
        model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    if targets == "all-linear":
        adapt(model, target_modules=targets)
        assert adapted_names(model) == {"linear1", "linear2"}
        return
    with pytest.raises(UnsupportedTargetError, match=r"MultiheadAttention|container") as caught:
        adapt(model, target_modules=targets)
    assert any(fault.startswith("self_attn") for fault in caught.value.faults)
    assert adapted_names(model) == set()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_an_encoder_does_not_pass_the_adapter_by(masked: bool) -> None:
    with models.seeded(0):
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    kwargs = {"src_key_padding_mask": mask} if masked else {}
    keep = ~mask.unsqueeze(-1)
    with torch.no_grad():
        base = model(x, **kwargs)
        slow = copy.deepcopy(model)
        adapt(model, target_modules=["linear1", "linear2"])
        for i in (0, 1):
            for leaf in ("linear1", "linear2"):
                path = f"layers.{i}.{leaf}"
                slow.get_submodule(path).weight += delta(model, path)
        answer = model(x, **kwargs)
        torch.testing.assert_close(answer * keep, slow(x, **kwargs) * keep)
    assert not torch.allclose(answer, base, atol=1e-2)


# --- modules trained whole --------------------------------------------------------------------


def test_modules_to_save_are_trained_as_copies_and_the_last_active_one_counts() -> None:
    model = models.tiny_bert_classifier()
    ids = models.token_ids()
    original = model.classifier
    base = model(ids).logits
    adapt(model, "one", target_modules=["query"], modules_to_save=["classifier"], seed=None)
    assert torch.equal(model(ids).logits, base)
    assert model.classifier.original_module is original
    assert not original.weight.requires_grad
    copy_of_one = model.classifier.modules_to_save["one"]
    assert copy_of_one.weight.requires_grad
    with torch.no_grad():
        copy_of_one.weight.fill_(0)
        copy_of_one.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(model(ids).logits[0], torch.tensor([1.0, 2.0, 3.0]))
    # A second one begins where the first has come to, on its own.
    state = adapt(model, "two", target_modules=["query"], modules_to_save=["classifier"], seed=None)
    assert torch.equal(model(ids).logits[0], torch.tensor([1.0, 2.0, 3.0]))
    with torch.no_grad():
        model.classifier.modules_to_save["two"].bias.fill_(7)
    assert torch.equal(model(ids).logits[0], torch.full((3,), 7.0))
    state.activate(["two", "one"])
    assert torch.equal(model(ids).logits[0], torch.tensor([1.0, 2.0, 3.0]))
    with state.while_disabled():
        assert torch.equal(model(ids).logits, base)
    declare_trainable(model, state, ["two"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "classifier" in name} == {
        "classifier.modules_to_save.two.weight",
        "classifier.modules_to_save.two.bias",
    }


def test_the_wrapper_answers_for_the_module_in_it() -> None:
    model = models.tiny_bert_classifier()
    adapt(model, target_modules=["query"], modules_to_save=["classifier"])
    assert model.classifier.out_features == 3
    assert model.classifier.weight is model.classifier.modules_to_save["default"].weight
    assert model.bert.encoder.layer[0].attention.self.query.in_features == models.HIDDEN
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.classifier.nothing_like_it


# --- whole or not at all ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("second", {"target_modules": ["up", "nope"]}),
        ("second", {"target_modules": ["up", "drop"]}),
        ("second", {"target_modules": ["down"], "modules_to_save": ["up"]}),
        ("first", {"target_modules": ["down"]}),
        ("a.b", {"target_modules": ["down"]}),
    ],
)
def test_what_is_refused_changes_nothing(name: str, config: dict[str, Any]) -> None:
    model = models.perceptron()
    state = adapt(model, "first", target_modules=["up"])
    modules = [id(module) for module in model.modules()]
    before = weights(model)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((TargetError, AdapterNameError)):
        adapt(model, name, **config)
    assert_same(before, weights(model))
    assert [id(module) for module in model.modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert list(state.configs) == ["first"]
    assert state.active == ("first",)


def test_the_usual_targets_become_part_of_the_config() -> None:
    model = models.tiny_llama()
    state = adapt(model)
    assert state.configs["default"].target_modules == {"q_proj", "v_proj"}


def test_stripping_gives_the_very_same_modules_back() -> None:
    model = models.tiny_llama()
    before = [id(module) for module in model.modules()]
    adapt(model, "one", target_modules="all-linear", modules_to_save=["lm_head"])
    adapt(model, "two", target_modules=["embed_tokens", "q_proj"])
    assert find_state(model) is not None
    strip(model, keep_saved=False)
    assert [id(module) for module in model.modules()] == before
    assert find_state(model) is None


def test_adapters_follow_the_mode_of_their_layer() -> None:
    model = models.perceptron().train()
    adapt(model, target_modules=["up"], lora_dropout=0.5)
    layer = layer_of(model, "up")
    assert layer.training
    assert layer.lora_dropout["default"].training
    model.eval()
    adapt(model, "late", target_modules=["up"], lora_dropout=0.5)
    assert not layer.lora_dropout["late"].training


# --- copies -----------------------------------------------------------------------------------


def full_model() -> tuple[nn.Module, Any]:
    model = models.tiny_bert_classifier()
    adapt(model, "a", target_modules=["query"], modules_to_save=["classifier"], bias="all")
    return model, adapt(model, "b", target_modules=["query", "key"], seed=2)


def test_a_deep_copy_is_independent_state_included() -> None:
    model, state = full_model()
    ids = models.token_ids()
    expected = model(ids).logits
    clone = copy.deepcopy(model)
    own = find_state(clone)
    assert own is not None
    assert own is not state
    assert {id(m.adapter_state) for m in clone.modules() if hasattr(m, "adapter_state")} == {
        id(own)
    }
    assert torch.equal(clone(ids).logits, expected)
    own.activate(["b"])
    randomise(clone, "b", seed=9)
    with torch.no_grad():
        for parameter in own.biases.parameters.values():
            parameter.fill_(3)
    assert torch.equal(model(ids).logits, expected)
    assert state.active == ("a", "b")
    parameters = dict(clone.named_parameters())
    bias = "bert.encoder.layer.0.attention.self.query"
    assert own.biases.parameters[f"{bias}.bias"] is parameters[f"{bias}.base_layer.bias"]


def test_a_copy_of_a_folded_model_unfolds_on_its_own() -> None:
    model = models.perceptron()
    state = adapt(model, target_modules=["up"])
    fold(model, state)
    folded = model.up.base_layer.weight.detach().clone()
    clone = copy.deepcopy(model)
    unfold(clone)
    assert torch.equal(clone.up.base_layer.weight, models.perceptron().up.weight)
    assert torch.equal(model.up.base_layer.weight, folded)


def test_a_pickled_model_comes_back_with_its_adapters() -> None:
    model, _ = full_model()
    ids = models.token_ids()
    with models.seeded(0):
        encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    adapt(encoder, target_modules=["linear1"])
    for each, inputs in ((model, ids), (encoder, torch.randn(1, 3, 16))):
        buffer = io.BytesIO()
        torch.save(each, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        answers = [m(inputs) for m in (each, loaded)]
        first, second = (getattr(answer, "logits", answer) for answer in answers)
        assert torch.equal(first, second)
    restored = find_state(loaded)
    assert restored is not None
    restored.activate([])


def test_moving_to_another_dtype_moves_adapters_too() -> None:
    model = models.perceptron()
    adapt(model, target_modules=["up"])
    expected = model.double()(X.double())
    assert expected.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(X.bfloat16()).double(), expected, rtol=0.05, atol=0.05)


def test_a_model_on_the_meta_device_can_be_planned_and_adapted() -> None:
    with torch.device("meta"):
        model = models.Perceptron()
    adapt(model, target_modules=["up"], seed=None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.empty(2, 16, device="meta")).shape == (2, 8)


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, checkpoint_wrapper, lambda model: nn.DataParallel(model, device_ids=[])],
    ids=["compiled", "checkpointed", "parallel"],
)
def test_what_torch_wraps_around_a_module_does_not_show_in_names(wrap: Any) -> None:
    model = models.perceptron()
    wrapped = nn.ModuleDict({"net": wrap(model)})
    assert [place.name for place in places(wrapped) if "up" in place.name] == ["net.up"]
    state = adapt(wrapped, target_modules=["net.up"], bias="lora_only")
    assert isinstance(model.up, LoraLayer)
    assert list(state.biases.parameters) == ["net.up.bias"]
