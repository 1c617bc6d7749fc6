from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.config import AdaLoraConfig
from lamina.engine.allocation import RankAllocator, orthogonality, svd_layers
from lamina.errors import (
    AllocationError,
    CheckpointError,
    ConfigError,
    KeyMismatchError,
    StageError,
    TargetError,
)
from tests import models, quantised

X = torch.linspace(-1, 1, 48).reshape(3, 16)


def adapted(**changes: Any) -> Any:
    """A perceptron under AdaLoRA, with random numbers in all factors."""
    settings: dict[str, Any] = {
        "target_modules": ["up", "down"],
        "init_r": 4,
        "target_r": 2,
        "total_step": 10,
        "init_lora_weights": False,
        **changes,
    }
    with models.seeded(7):
        return lamina.get_peft_model(models.perceptron().eval(), AdaLoraConfig(**settings))


def layer_of(model: Any, name: str = "up") -> Any:
    return dict(svd_layers(model.get_base_model(), "default"))[name]


def backward(model: Any) -> None:
    model(X).square().sum().backward()


# --- the layer ----------------------------------------------------------------------------------


def test_the_update_is_the_formula() -> None:
    model = adapted(lora_alpha=6)
    layer = layer_of(model)
    A, B, E = (getattr(layer, f"lora_{p}")["default"] for p in "ABE")
    expected = layer.base_layer(X) + 6 / (4 + 1e-5) * X @ (A * E).T @ B.T
    torch.testing.assert_close(layer(X), expected)


def test_a_new_adapter_changes_nothing() -> None:
    model = adapted(init_lora_weights=True)
    with model.disable_adapter():
        expected = model(X)
    assert torch.equal(model(X), expected)


def test_folding_is_exact_and_undone_bit_for_bit() -> None:
    model = adapted()
    before = layer_of(model).base_layer.weight.clone()
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, before)


def test_a_convolution_pads_as_its_base_does() -> None:
    base = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"))
    config = AdaLoraConfig(target_modules=["0"], total_step=3, init_lora_weights=False)
    model = lamina.get_peft_model(base, config)
    image = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    expected = model(image)
    torch.testing.assert_close(model.merge_and_unload()(image), expected, rtol=1e-4, atol=1e-4)


def test_ranks_taken_away_leave_the_output_where_they_were_zero() -> None:
    model = adapted()
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_E["default"][[0, 2]] = 0
    expected = model(X)
    layer.keep_ranks("default", [False, True, False, True])
    assert [tuple(p.shape) for p in layer.tensors("default").values()] == [(2, 16), (24, 2), (2, 1)]
    assert layer.r["default"] == 2
    torch.testing.assert_close(model(X), expected)


# --- sharing out --------------------------------------------------------------------------------


def test_the_budget_falls_with_the_cube_of_what_is_left() -> None:
    model = adapted(tinit=2, tfinal=2, deltaT=3)
    allocator = model.base_model.rankallocator
    assert (allocator.init_bgt, allocator.target_bgt) == (8, 4)
    told = [allocator.budget_schedule(step) for step in range(10)]
    expected = [4 + int(4 * (1 - (step - 2) / 6) ** 3) for step in range(3, 9)]
    assert [budget for budget, _ in told] == [8, 8, 8, *expected, 4]
    assert [step for step, (_, shares) in enumerate(told) if shares] == [3, 6, 9]


def test_importance_and_the_ranks_that_go_are_the_formula() -> None:
    model = adapted(beta1=0.6, beta2=0.3)
    allocator, base = model.base_model.rankallocator, model.get_base_model()
    smooth: dict[str, torch.Tensor] = {}
    unsure: dict[str, torch.Tensor] = {}
    for scale in (1.0, 3.0):
        model.zero_grad()
        (model(X).square().sum() * scale).backward()
        allocator.update_ipt(base)
        for name, p in base.named_parameters():
            if p.grad is None:
                continue
            now = (p * p.grad).abs().detach()
            smooth[name] = 0.6 * smooth.get(name, torch.zeros(())) + 0.4 * now
            off = (now - smooth[name]).abs()
            unsure[name] = 0.3 * unsure.get(name, torch.zeros(())) + 0.7 * off
    matters = {name: smooth[name] * unsure[name] for name in smooth}
    scores = torch.cat(
        [
            matters[f"{n}.lora_E.default"][:, 0]
            + matters[f"{n}.lora_A.default"].mean(1)
            + matters[f"{n}.lora_B.default"].mean(0)
            for n in ("up", "down")
        ]
    )
    masks = allocator.mask_to_budget(base, 3)
    kept = torch.tensor(masks["up.lora_E.default"] + masks["down.lora_E.default"])
    assert kept.sum() == 3
    assert scores[kept].min() > scores[~kept].max()
    for name in ("up", "down"):
        e = layer_of(model, name).lora_E["default"].flatten()
        assert (e != 0).tolist() == masks[f"{name}.lora_E.default"]


def test_a_full_budget_takes_nothing_away() -> None:
    model = adapted(target_r=4)
    backward(model)
    model.base_model.update_and_allocate(1)
    masks = model.peft_config["default"].rank_pattern
    assert all(all(mask) for mask in masks.values())


def test_after_the_last_allocation_lost_ranks_stay_zero() -> None:
    model = adapted(total_step=3)
    for step in (1, 2, 3):
        model.zero_grad()
        backward(model)
        model.base_model.update_and_allocate(step)
    masks = copy.deepcopy(model.peft_config["default"].rank_pattern)
    assert sum(sum(mask) for mask in masks.values()) == 4
    with torch.no_grad():
        for name in ("up", "down"):
            layer_of(model, name).lora_E["default"].fill_(1.0)
    model.base_model.update_and_allocate(4)
    assert model.peft_config["default"].rank_pattern == masks
    for name in ("up", "down"):
        e = layer_of(model, name).lora_E["default"].flatten()
        assert (e != 0).tolist() == masks[f"{name}.lora_E.default"]


def test_the_penalty_is_the_mean_distance_from_orthogonality_and_in_the_loss() -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=3, init_r=2, orth_reg_weight=0.25)
    model = lamina.get_peft_model(models.tiny_llama(), config)
    far = []
    for _, layer in svd_layers(model.get_base_model(), "default"):
        A, B = layer.factors("default")
        far += [(A @ A.T - torch.eye(2)).norm(), (B.T @ B - torch.eye(2)).norm()]
    expected = sum(far) / len(far)
    torch.testing.assert_close(orthogonality(model.get_base_model(), "default"), expected)
    ids = models.token_ids()
    with model.disable_adapter():
        plain = model(input_ids=ids, labels=ids).loss
    # The adapter itself changes nothing yet.
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain + 0.25 * expected)


# --- files --------------------------------------------------------------------------------------


def shared_out(tmp_path: Path) -> Any:
    model = adapted(total_step=2)
    for step in (1, 2):
        model.zero_grad()
        backward(model)
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    return model


def test_tensors_with_fewer_ranks_go_into_an_adapter_with_more(tmp_path: Path) -> None:
    model = shared_out(tmp_path)
    expected, tensors = model(X), lamina.get_peft_model_state_dict(model)
    fresh = adapted()
    lamina.set_peft_model_state_dict(fresh, tensors)
    torch.testing.assert_close(fresh(X), expected)


def test_ranks_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    tensors = lamina.get_peft_model_state_dict(shared_out(tmp_path))
    key = "base_model.model.up.lora_E"
    tensors[key] = torch.cat([tensors[key], tensors[key]])
    fresh = adapted()
    before = fresh(X)
    with pytest.raises(KeyMismatchError, match="size mismatch"):
        lamina.set_peft_model_state_dict(fresh, tensors)
    assert torch.equal(fresh(X), before)


def test_only_one_adapter_trains_and_others_may_lie_beside_it(tmp_path: Path) -> None:
    model = shared_out(tmp_path)
    with pytest.raises(AllocationError, match="only 1 trainable adapter"):
        model.load_adapter(tmp_path, "second", is_trainable=True)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path, "second")
    expected = model(X)
    model.set_adapter("second")
    torch.testing.assert_close(model(X), expected)


# --- refusals -----------------------------------------------------------------------------------


def test_everything_wrong_in_a_config_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        AdaLoraConfig(use_dora=True, use_rslora=True, total_step=5, tinit=5, beta1=1, init_r=0)
    for part in ("DoRA", "use_rslora", "budgeting phase", "beta1", "init_r"):
        assert part in str(told.value)


@pytest.mark.parametrize(
    ("make", "target", "why"),
    [
        (models.embedding_net, "embed", "linear and conv"),
        (lambda: models.convolution_net(1), "stem", "two dimensions"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0", "groups"),
    ],
)
def test_layers_that_it_is_not_made_for_are_refused(make: Any, target: str, why: str) -> None:
    model = make()
    with pytest.raises(TargetError, match=why):
        lamina.get_peft_model(model, AdaLoraConfig(target_modules=[target], total_step=3))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_one_layer_has_adapters_of_one_method() -> None:
    model = lamina.inject_adapter_in_model(
        lamina.LoraConfig(target_modules=["up"]), models.perceptron(), "plain"
    )
    with pytest.raises(TargetError, match="up can't have LoRA and AdaLoRA"):
        lamina.inject_adapter_in_model(
            AdaLoraConfig(target_modules=["up"], total_step=3), model, "shared"
        )


def test_a_layer_left_empty_takes_up_another_method() -> None:
    model = lamina.inject_adapter_in_model(
        AdaLoraConfig(target_modules=["up"], total_step=3), models.perceptron(), "shared"
    )
    expected = model.up.base_layer
    from lamina.engine.inject import delete_adapter, find_state

    state = find_state(model)
    assert state is not None
    delete_adapter(model, "shared", state)
    lamina.inject_adapter_in_model(lamina.LoraConfig(target_modules=["up"]), model, "plain")
    assert model.up.base_layer is expected
    assert list(model.up.lora_A) == ["plain"]


def test_no_gradients_no_importance() -> None:
    model = adapted()
    with pytest.raises(AllocationError, match=r"after loss\.backward"):
        model.base_model.update_and_allocate(1)


def test_a_frozen_adapter_has_nothing_to_share_out(tmp_path: Path) -> None:
    shared_out(tmp_path)
    model: Any = lamina.PeftModel.from_pretrained(models.perceptron(), tmp_path)
    with pytest.raises(AllocationError, match="None of the adapters trains"):
        model.base_model.update_and_allocate(1)


def test_stages_and_weighted_sums_are_refused_with_a_way_on(tmp_path: Path) -> None:
    model = shared_out(tmp_path)
    config = AdaLoraConfig(target_modules=["up"], total_step=3)
    with pytest.raises(StageError, match="AdaLoraConfig"):
        lamina.begin_stage(models.perceptron(), name="one", config=config)
    with pytest.raises(CheckpointError, match="save_as_lora"):
        lamina.begin_stage(models.perceptron(), name="one", parent=tmp_path, mode="continue")
    with pytest.raises(AllocationError, match="convert_to_lora"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    plain, tensors = lamina.convert_to_lora(model, rank=4)
    other = lamina.get_peft_model(models.perceptron().eval(), plain)
    lamina.set_peft_model_state_dict(other, tensors)
    torch.testing.assert_close(other(X), model(X), rtol=1e-4, atol=1e-4)


def test_an_allocator_stands_alone() -> None:
    model = adapted()
    allocator = RankAllocator(model.get_base_model(), model.peft_config["default"], "default")
    allocator.set_total_step(20)
    assert model.peft_config["default"].total_step == 20


# --- quantised bases ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bnb4", "bnb8"])
def test_over_a_quantised_base_the_update_is_added_to_its_output(kind: str) -> None:
    layer = getattr(quantised, kind)(quantised.dense())
    x = torch.linspace(-1, 1, 2 * quantised.IN).reshape(2, quantised.IN)
    before = layer(x)
    config = AdaLoraConfig(
        target_modules=["0"], init_r=4, target_r=1, total_step=3, init_lora_weights=False
    )
    model = lamina.get_peft_model(nn.Sequential(layer), config)
    adapted = dict(svd_layers(model.get_base_model(), "default"))["0"]
    A, B, E = (getattr(adapted, f"lora_{p}")["default"] for p in "ABE")
    expected = before + 8 / (4 + 1e-5) * (x @ (A * E).T @ B.T)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    model.base_model.update_and_allocate(1)
    assert sum(model.peft_config["default"].rank_pattern["0.lora_E.default"]) < 4
