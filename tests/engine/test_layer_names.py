"""What code in the wild reads from, and sets on, single layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lamina
from lamina.engine.layers import Linear, LoraLayer
from lamina.engine.weights import weight_of
from lamina.errors import FoldError, LaminaError
from tests import models
from tests.adapters import trained
from tests.engine.adapters import adapt, layer_of

X = torch.linspace(-1, 1, 32).reshape(2, 16)


def two_adapters() -> nn.Module:
    model = models.perceptron()
    adapt(model, "first", target_modules=["up"], modules_to_save=["down"], seed=1)
    adapt(model, "second", target_modules=["up"], active=False, seed=2)
    return model


def test_setting_the_active_adapter_of_a_layer_leaves_alone_what_trains() -> None:
    model = two_adapters()
    before, trains = layer_of(model, "up")(X), trained(model)
    layer = layer_of(model, "up")

    layer._active_adapter = "second"
    alone = layer(X)
    layer._active_adapter = ["first", "second"]
    assert layer.active_adapters == ["first", "second"]
    assert not torch.allclose(alone, before)
    assert torch.allclose(layer(X), before + alone - layer.base_layer(X), atol=1e-6)
    assert trained(model) == trains


def test_a_saved_module_counts_as_active_only_what_it_has() -> None:
    model = two_adapters()
    state = layer_of(model, "up").adapter_state
    saved = model.down

    assert (saved.active_adapters, saved._adapters) == (["first"], {"first"})
    state.activate(["second"])
    assert saved.active_adapters == []
    assert saved.adapter_layer_names == ("modules_to_save",)
    # Switching it off and on again does not lose who is active.
    saved.enable_adapters(False)
    saved.enable_adapters(True)
    assert saved.active_names == ("second",)


def test_what_is_put_into_an_unused_place_stays_there() -> None:
    layer = layer_of(two_adapters(), "up")
    layer.lora_embedding_A["mine"] = nn.Parameter(torch.ones(2))

    assert torch.equal(layer.lora_embedding_A["mine"], torch.ones(2))
    assert layer.delta_weight("first").shape == layer.weight.shape


def test_frozen_places_are_seen_as_they_are_now() -> None:
    model = models.perceptron()
    adapt(model, "plain", target_modules=["up"])
    adapt(model, "mica", target_modules=["up"], init_lora_weights="mica")
    frozen = layer_of(model, "up").frozen_peft_weight_names

    assert list(frozen) == ["mica"]
    assert "plain" not in frozen
    layer_of(model, "up").delete_adapter("mica")
    assert dict(frozen) == {}


def test_a_deleted_velora_adapter_leaves_nothing() -> None:
    model = models.perceptron()
    adapt(model, "gone", target_modules=["up"], velora_config={"num_groups": 4})
    layer = layer_of(model, "up")
    held = [layer.lora_velora_embed, layer.lora_velora_initialized]

    layer.delete_adapter("gone")
    assert not any("gone" in each for each in held)


class Doubled(Linear):
    """Adds twice what LoRA adds."""

    def low_rank(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().low_rank(adapter, x)


def test_a_config_may_bring_its_own_kind_of_layer() -> None:
    class Own(lamina.LoraConfig):
        layer_kinds = {nn.Linear: Doubled}  # noqa: RUF012

    usual, own = models.perceptron(), models.perceptron()
    adapt(usual, target_modules=["up"], seed=1)
    with models.seeded(0):
        lamina.get_peft_model(own, Own(target_modules=["up"], init_lora_weights=False))
    layer: LoraLayer = own.up

    assert type(layer) is Doubled
    assert type(usual.up) is Linear
    layer.lora_A, layer.lora_B = copy.deepcopy(usual.up.lora_A), copy.deepcopy(usual.up.lora_B)
    added = usual.up(X) - usual.up.base_layer(X)
    assert torch.allclose(layer(X), usual.up.base_layer(X) + 2 * added, atol=1e-6)


def test_a_weight_that_fsdp_has_gathered_is_read_and_not_written() -> None:
    layer = nn.Linear(4, 3)
    values = layer.weight.detach().clone()
    # As FSDP does for a forward: a plain view of its flat parameter.
    del layer._parameters["weight"]
    layer.weight = values.view_as(values)  # type: ignore[assignment]

    view = weight_of(layer)
    assert torch.equal(view.read(), values)
    assert view.why_not_writable is not None
    with pytest.raises(FoldError, match="gathered"):
        view.swap(values)


def test_codes_that_fsdp_has_gathered_are_not_taken_for_values() -> None:
    layer = nn.Linear(4, 3)
    del layer._parameters["weight"]
    layer.weight = torch.zeros(6, 1)  # type: ignore[assignment]
    layer.quant_state = None  # type: ignore[assignment]

    assert weight_of(layer).why_not_readable is not None


def test_the_first_argument_of_an_error_is_its_whole_message() -> None:
    error = LaminaError("it broke", faults=["here"], cure="mend it")

    assert error.args == (str(error),)
    assert error.args[0].splitlines() == ["it broke", "  - here", "To mend it: mend it"]
    assert str(copy.copy(error)) == str(error)
