"""QA-LoRA, VeLoRA, BD-LoRA, KaSA and MonteCLoRA against their formulas, written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.engine.ops.velora import compress, reconstruct
from lamina.engine.variants.bdlora import BlockDiagonalLinear
from lamina.engine.variants.monteclora import MontecloraSampler
from tests import models

METHODS: dict[str, dict[str, Any]] = {
    "QA-LoRA": {"use_qalora": True, "qalora_group_size": 8},
    "VeLoRA": {"velora_config": {"num_groups": 5, "init_type": "batch_average_once"}},
    "BD-LoRA A": {"use_bdlora": {"target_modules_bd_a": ["up", "down"], "nblocks": 2}},
    "BD-LoRA B": {"use_bdlora": {"target_modules_bd_b": ["up", "down"], "nblocks": 4}},
    "KaSA": {"kasa_config": {}},
    "MonteCLoRA": {"monteclora_config": {"num_samples": 3}},
}
X = torch.linspace(-1, 1, 4 * 5 * 16).reshape(4, 5, 16).sin()


def adapted(method: str, **more: Any) -> Any:
    with models.seeded(3):
        config = {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 6, **METHODS[method]}
        model = lamina.get_peft_model(models.perceptron(), lamina.LoraConfig(**config, **more))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name or "lora_diag" in name:
                    parameter.normal_(std=0.3)
    return model.eval()


def layer_of(model: Any, name: str = "up") -> Any:
    return getattr(model.get_base_model(), name)


def update(model: Any, x: Tensor) -> Tensor:
    """What the adapter adds to the output of `up`."""
    layer = layer_of(model)
    with torch.no_grad():
        return layer(x) - layer.base_layer(x)


def factors(model: Any) -> tuple[Tensor, Tensor, float]:
    layer = layer_of(model)
    a, b = layer.factors("default")
    return a.detach(), b.detach(), layer.scaling["default"]


# --- every method --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_folding_gives_the_same_answer_and_is_undone_bit_exactly(method: str) -> None:
    model = adapted(method)
    weights = [layer_of(model, name).base_layer.weight.clone() for name in ("up", "down")]
    before = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name, weight in zip(("up", "down"), weights, strict=True):
        assert torch.equal(layer_of(model, name).base_layer.weight, weight)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_right_on_the_original_base(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    if method == "VeLoRA":
        model.train()(X)
    model.eval().save_pretrained(tmp_path)
    again = lamina.PeftModel.from_pretrained(models.perceptron(), tmp_path).eval()
    torch.testing.assert_close(again(X), model(X), rtol=1e-5, atol=1e-5)
    ours, theirs = (lamina.get_peft_model_state_dict(m) for m in (model, again))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("method", METHODS)
def test_without_the_adapter_the_base_answers(method: str) -> None:
    model, base = adapted(method), models.perceptron().eval()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base(X), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(X), base(X), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_in_bf16_over_fp32_factors(method: str) -> None:
    with models.seeded(0):
        base = models.perceptron().to(torch.bfloat16)
        config = {"target_modules": ["up", "down"], "r": 4, **METHODS[method]}
        model = lamina.get_peft_model(base, lamina.LoraConfig(**config)).train()
        model(X.to(torch.bfloat16)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(parameter.dtype == torch.float32 for _, parameter in trained)
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in trained)
    assert any(p.grad.abs().sum() > 0 for n, p in trained if "lora_B" in n)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_it_is_not_made_for_is_refused(method: str) -> None:
    config = lamina.LoraConfig(target_modules=["embed"], r=4, **METHODS[method])
    with pytest.raises(lamina.TargetError, match="embed"):
        lamina.get_peft_model(models.embedding_net(), config)


# --- one by one ----------------------------------------------------------------------------------


def test_qalora_takes_means_of_groups() -> None:
    model = adapted("QA-LoRA")
    a, b, scaling = factors(model)
    assert a.shape == (4, 2)
    means = X.reshape(4, 5, 2, 8).mean(-1) * 2
    torch.testing.assert_close(update(model, X), scaling * means @ a.T @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [7, 32])
def test_groups_that_do_not_come_out_even_are_refused(size: int) -> None:
    config = lamina.LoraConfig(target_modules=["up"], use_qalora=True, qalora_group_size=size)
    with pytest.raises(lamina.TargetError, match="divisible by 'qalora_group_size'"):
        lamina.get_peft_model(models.perceptron(), config)


@pytest.mark.parametrize("method", ["BD-LoRA A", "BD-LoRA B"])
def test_bdlora_is_lora_with_a_block_diagonal_factor(method: str) -> None:
    model = adapted(method)
    layer = layer_of(model)
    parts = [layer.lora_A["default"], layer.lora_B["default"]]
    assert [isinstance(part, BlockDiagonalLinear) for part in parts].count(True) == 1
    a, b = (
        part.weight_as_blockdiagonal_matrix()
        if isinstance(part, BlockDiagonalLinear)
        else part.weight
        for part in parts
    )
    expected = layer.scaling["default"] * X @ a.detach().T @ b.detach().T
    torch.testing.assert_close(update(model, X), expected, rtol=1e-5, atol=1e-5)


def test_bdlora_refuses_targets_in_no_list_unless_told() -> None:
    def made(**more: Any) -> Any:
        settings = {"target_modules_bd_a": ["up"], "nblocks": 2, **more}
        config = lamina.LoraConfig(target_modules=["up", "down"], r=4, use_bdlora=settings)
        return lamina.get_peft_model(models.perceptron(), config)

    with pytest.raises(lamina.TargetError, match="matches neither A nor B"):
        made()
    plain = layer_of(made(match_strict=False), "down")
    assert type(plain.lora_A["default"]) is nn.Linear


def test_bdlora_refuses_blocks_that_do_not_come_out_even() -> None:
    settings = {"target_modules_bd_a": ["up"], "nblocks": 3}
    config = lamina.LoraConfig(target_modules=["up"], r=4, use_bdlora=settings)
    with pytest.raises(lamina.TargetError, match="not divisible by nblocks=3"):
        lamina.get_peft_model(models.perceptron(), config)


def test_kasa_truncates_the_base_and_scales_between_the_factors() -> None:
    base = models.perceptron()
    original = base.up.weight.detach().clone()
    model = adapted("KaSA")
    layer = layer_of(model)
    left, values, right = torch.linalg.svd(original, full_matrices=False)
    truncated = (left[:, :-4] * values[:-4]) @ right[:-4]
    torch.testing.assert_close(layer.base_layer.weight.detach(), truncated, rtol=1e-4, atol=1e-5)
    a, b, scaling = factors(model)
    diagonal = torch.diag(layer.lora_diag["default"].detach())
    torch.testing.assert_close(
        update(model, X), scaling * X @ (b @ diagonal @ a).T, rtol=1e-4, atol=1e-5
    )
    plain = copy.deepcopy(model).unload()
    assert torch.equal(plain.up.weight, original)


def test_kasa_needs_something_left_of_the_base() -> None:
    config = lamina.LoraConfig(target_modules=["up"], r=16, kasa_config={})
    with pytest.raises(lamina.TargetError, match="KaSA requires `r`"):
        lamina.get_peft_model(models.perceptron(), config)


def test_the_penalty_of_kasa_is_that_of_the_paper() -> None:
    model = adapted("KaSA")
    expected = 0.0
    for name in ("up", "down"):
        layer = layer_of(model, name)
        a, b = layer.factors("default")
        one = torch.eye(4)
        expected += 1e-4 * layer.lora_diag["default"].square().sum()
        expected += 1e-3 * ((b.T @ b - one).norm() + (a @ a.T - one).norm())
    torch.testing.assert_close(model.base_model.kasa_loss(), expected)
    assert model.base_model.monteclora_loss() == 0.0


def test_velora_answers_as_lora_and_learns_from_projections() -> None:
    model = adapted("VeLoRA").train()
    layer = layer_of(model)
    a, b, scaling = factors(model)
    x = X.clone().requires_grad_()
    output = layer(x)
    torch.testing.assert_close(output - layer.base_layer(x), scaling * x @ a.T @ b.T)
    weigh = torch.randn(output.shape)
    (output * weigh).sum().backward()
    direction = layer.lora_velora_embed["default"]
    torch.testing.assert_close(direction.norm(), torch.tensor(1.0))
    known = reconstruct(compress(X, direction, 5), direction, 16, 1.0)
    flat = weigh.reshape(-1, weigh.shape[-1])
    expected = scaling * (flat @ b).T @ known
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, expected, rtol=1e-4, atol=1e-4)
    exact = scaling * flat.T @ (X.reshape(-1, 16) @ a.T)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, exact, rtol=1e-4, atol=1e-4)
    first = direction.clone()
    layer(X + 3)
    assert torch.equal(layer.lora_velora_embed["default"], first)


def test_monteclora_averages_samples_in_training_only() -> None:
    model = adapted("MonteCLoRA")
    a, b, scaling = factors(model)
    plain = scaling * X @ a.T @ b.T
    torch.testing.assert_close(update(model, X), plain, rtol=1e-5, atol=1e-5)
    model.train()
    with models.seeded(1):
        first = update(model, X)
    with models.seeded(1):
        assert torch.equal(update(model, X), first)
    moved = (first - plain).abs().max()
    assert 0 < moved < 1e-2


def test_monteclora_draws_what_it_says() -> None:
    with models.seeded(0):
        sampler = MontecloraSampler(400, 2, num_samples=6, sample_scaler=0.1)
        deviations, weights = sampler()
    assert deviations.shape == (6, 400, 2)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    spread = sampler.gaussian_var_prior.diagonal().sqrt() * 0.1
    torch.testing.assert_close(deviations.flatten(0, 1).std(0), spread, rtol=0.1, atol=0)


def test_the_penalty_of_monteclora_is_the_divergence_in_closed_form() -> None:
    # peft 0.21.2 has the sum over the weights' own gamma functions with the wrong sign.
    model = adapted("MonteCLoRA").train()
    model(X)
    expected = []
    for name in ("up", "down"):
        s = layer_of(model, name).lora_monteclora_sampler["default"]
        weights = torch.distributions.Dirichlet(s.expert_weights_prior.exp())
        prior = torch.distributions.Dirichlet(torch.full((3,), 0.1))
        dirichlet = torch.distributions.kl_divergence(weights, prior)
        variance = s.gaussian_var_prior.diagonal()
        normal = torch.distributions.kl_divergence(
            torch.distributions.Normal(0, variance.sqrt()), torch.distributions.Normal(0, 1.0)
        ).sum()
        spread = torch.exp(2 * s.std_prior)
        wishart = 0.5 * 4 * (spread.sum() - spread.log().sum() - 4)
        expected.append(1e-5 * (dirichlet + 3 * normal + wishart))
    torch.testing.assert_close(model.base_model.monteclora_loss(), sum(expected) / 2)
    assert model.eval().base_model.monteclora_loss() == 0.0


def test_kasas_factors_wait_on_meta_for_a_file_and_the_base_is_changed_once() -> None:
    loaded = adapted("KaSA")
    settings = lamina.LoraConfig(target_modules=["up"], r=4, kasa_config={})
    waiting: Any = lamina.get_peft_model(models.perceptron(), settings, low_cpu_mem_usage=True)
    up = layer_of(waiting)
    changed = up.weight.clone()

    assert all(p.is_meta for p in up.tensors("default").values())
    assert torch.equal(changed, layer_of(loaded).weight)
    up.initialise("default", True)
    assert torch.equal(up.weight, changed)
    waiting.unload()
    assert torch.equal(waiting.get_base_model().up.weight, models.perceptron().up.weight)
