from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lamina
from lamina import LoraConfig, PeftModel, get_peft_model
from lamina.engine.layers import lora_layers
from lamina.engine.variants import PlainLora
from lamina.errors import AdapterNameError, ConfigError
from lamina.model.combining import CombineReport
from tests import models
from tests.adapters import fill, flags, llama_adapter, logits, same, weights


def two(**second: Any) -> PeftModel:
    """A Llama under "default" (r=4 on q and v) and "other" (r=2 on q and k, another scaling)."""
    model = llama_adapter(lora_alpha=6)
    settings = {"r": 2, "lora_alpha": 10, "target_modules": ["q_proj", "k_proj"], **second}
    model.add_adapter("other", LoraConfig(**settings))
    fill(model, "other", seed=2)
    return model


def summed(model: PeftModel, *weights: float) -> torch.Tensor:
    """Logits with the weighted sum of both adapters, through their scalings."""
    names = ["default", "other"]
    for _, layer in lora_layers(model):
        for name, weight in zip(names, weights, strict=True):
            if name in layer.records:
                layer.scaling[name] *= weight
    model.set_adapter(names)
    answer = logits(model)
    for _, layer in lora_layers(model):
        for name, weight in zip(names, weights, strict=True):
            if name in layer.records:
                layer.scaling[name] /= weight
    return answer


def test_the_exact_sum_of_adapters_with_other_targets_ranks_and_scalings() -> None:
    model = two()
    wanted = summed(model, 0.7, -1.5)
    report = model.add_weighted_adapter(
        ["default", "other"], [0.7, -1.5], "sum", combination_type="cat"
    )
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert report.exact
    assert report.relative_error == 0
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in report.layers.items()}
    assert ranks == {"q_proj": 6, "v_proj": 4, "k_proj": 2}
    assert str(report) == "'sum' by cat: exact (6 layers, rank up to 6)"


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_the_result_is_saved_so_that_lamina_and_peft_open_it(method: str, tmp_path: Path) -> None:
    model = two()
    model.add_weighted_adapter(
        ["default", "other"], [0.7, 1.5], "sum", combination_type=method, density=0.5
    )
    model.set_adapter("sum")
    wanted = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    for library in (lamina, peft):
        loaded = library.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "sum")
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-6, atol=1e-6)


def test_the_new_adapter_is_frozen_and_inactive_and_the_others_are_untouched() -> None:
    model = two()
    before, asked, active = weights(model), flags(model), model.active_adapters
    model.add_weighted_adapter(["default"], [1.0], "again")
    after = weights(model)
    assert same(before, {name: after[name] for name in before})
    assert {name: flag for name, flag in flags(model).items() if ".again." not in name} == asked
    assert not any(flag for name, flag in flags(model).items() if ".again." in name)
    assert model.active_adapters == active


def test_what_is_reported_is_the_error_over_all_layers() -> None:
    model = two(r=4, target_modules=["q_proj", "v_proj"])
    report = model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "low", svd_rank=3)
    errors, norms = [], []
    for path, layer in lora_layers(model):
        total = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        errors.append((layer.get_delta_weight("low") - total).detach().norm())
        norms.append(total.detach().norm())
        name = path.removeprefix("base_model.model.")
        assert report.layers[name].relative_error == pytest.approx(float(errors[-1] / norms[-1]))
        assert report.layers[name].rank == 3
    overall = float(torch.stack(errors).norm() / torch.stack(norms).norm())
    assert report.relative_error == pytest.approx(overall, rel=1e-5)
    assert 0.1 < report.relative_error < 1
    assert not report.exact


def test_a_density_below_one_prunes_one_adapter_too() -> None:
    model = llama_adapter()
    whole = model.add_weighted_adapter(["default"], [1.0], "whole", "magnitude_prune", density=1.0)
    pruned = model.add_weighted_adapter(
        ["default"], [1.0], "pruned", "magnitude_prune", density=0.5
    )
    assert whole.exact
    assert not pruned.exact
    for _, layer in lora_layers(model):
        a = layer.factors("pruned")[0]
        assert int((a == 0).sum()) == a.numel() // 2


def test_an_adapter_named_twice_counts_twice() -> None:
    model = two()
    model.add_weighted_adapter(["default", "default"], [0.5, 1.0], "sum", "cat")
    for _, layer in lora_layers(model):
        if "sum" in layer.records:
            expected = 1.5 * layer.get_delta_weight("default")
            torch.testing.assert_close(layer.get_delta_weight("sum"), expected)


def test_a_tuner_and_a_facade_have_it_alike() -> None:
    model = two()
    report = model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "a", "cat")
    assert isinstance(report, CombineReport)
    assert "a" in model.peft_config


# --- what is trained beside factors --------------------------------------------------------------


def classifier(**config: Any) -> PeftModel:
    model = get_peft_model(models.tiny_bert_classifier(), LoraConfig(r=2, **config))
    fill(model)
    return model.eval()


def test_a_module_trained_whole_by_one_adapter_is_copied() -> None:
    model = classifier(target_modules=["query"], modules_to_save=["classifier"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["value"]))
    fill(model, "other", seed=4)
    model.set_adapter(["other", "default"])
    wanted = logits(model)
    model.add_weighted_adapter(["other", "default"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), wanted)
    copies = model.base_model.model.classifier.modules_to_save
    assert copies["sum"].weight.data_ptr() != copies["default"].weight.data_ptr()
    assert model.peft_config["sum"].modules_to_save == ["classifier"]


def test_a_module_trained_whole_by_two_is_refused() -> None:
    model = classifier(target_modules=["query"], modules_to_save=["classifier"])
    model.add_adapter("other", LoraConfig(target_modules=["value"], modules_to_save=["classifier"]))
    before = weights(model)
    with pytest.raises(ConfigError, match=r"found 1 such\s+instance\(s\)"):
        model.add_weighted_adapter(["other", "default"], [1.0, 1.0], "sum", "cat")
    assert same(before, weights(model))
    assert "sum" not in model.peft_config


def test_trained_biases_are_summed_from_the_base() -> None:
    model = classifier(target_modules=["query"], bias="lora_only")
    base = models.tiny_bert_classifier()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], bias="none"))
    fill(model, "other", seed=5)
    model.add_weighted_adapter(["default", "other"], [0.5, 1.0], "sum", "cat")
    name = "bert.encoder.layer.0.attention.self.query"
    trained = model.get_submodule(f"base_model.model.{name}").base_layer.bias.detach().clone()
    own = base.get_submodule(name).bias.detach()
    assert not torch.equal(trained, own)
    model.set_adapter("sum")
    shown = model.get_submodule(f"base_model.model.{name}").base_layer.bias
    torch.testing.assert_close(shown, own + 0.5 * (trained - own))
    model.set_adapter("other")
    assert torch.equal(shown, own)


def test_rows_that_adapters_replace_are_summed_from_the_table(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "r": 2}
    model = get_peft_model(
        models.tiny_llama(), LoraConfig(trainable_token_indices=[5, 2], **config)
    )
    model.add_adapter("other", LoraConfig(trainable_token_indices=[7, 5], **config))
    fill(model)
    fill(model, "other", seed=2)
    layer = model.base_model.model.model.embed_tokens.token_adapter
    own = models.tiny_llama().model.embed_tokens.weight.detach()
    one, other = layer.rows("default").detach(), layer.rows("other").detach()
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "cat")
    assert layer.token_indices["sum"] == [2, 5, 7]
    wanted = [
        own[2] + 0.5 * (one[1] - own[2]),
        own[5] + 0.5 * (one[0] - own[5]) + 2 * (other[1] - own[5]),
        own[7] + 2 * (other[0] - own[7]),
    ]
    torch.testing.assert_close(layer.rows("sum").detach(), torch.stack(wanted))
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "sum")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_adapters_that_act_from_the_same_tokens_on_are_combined() -> None:
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        models.tiny_llama(), LoraConfig(alora_invocation_tokens=[3, 4], **config)
    )
    model.add_adapter("other", LoraConfig(alora_invocation_tokens=[3, 4], r=2, **config))
    model.add_adapter("else", LoraConfig(alora_invocation_tokens=[5], **config))
    for name in ("default", "other"):
        fill(model, name)
    assert model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", "cat").exact
    assert model.peft_config["sum"].alora_invocation_tokens == [3, 4]
    for _, layer in lora_layers(model):
        wanted = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted)
    with pytest.raises(ConfigError, match="act on different tokens"):
        model.add_weighted_adapter(["default", "else"], [1.0, 0.5], "mixed", "cat")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"adapters": ["default", "nobody"]}, "nobody does not exist"),
        ({"adapters": []}, "empty"),
        ({"adapter_name": "other"}, "already has an adapter 'other'"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, "of 'other' is not a finite number"),
        ({"combination_type": "sum"}, "Invalid combination_type"),
        ({"combination_type": "ties_svd"}, "density is needed"),
        ({"combination_type": "dare_linear_svd", "density": 0.0}, "density=0.0"),
        ({"combination_type": "ties_svd", "density": 1.5}, "density=1.5"),
        ({"majority_sign_method": "most"}, "'total' or 'frequency'"),
        ({"svd_rank": 0}, "svd_rank=0"),
        ({"svd_clamp": 1.5}, "svd_clamp=1.5"),
        ({"combination_type": "linear"}, "adapters must have the same r value"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], expected: str) -> None:
    model = two()
    before = weights(model)
    given = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "sum"}
    with pytest.raises((ConfigError, AdapterNameError), match=expected):
        model.add_weighted_adapter(**{**given, **arguments})
    assert same(before, weights(model))
    assert list(model.peft_config) == ["default", "other"]


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        two().add_weighted_adapter(
            ["default", "other"], [1.0], "sum", "ties_svd", svd_rank=-1, density=2
        )
    assert len(caught.value.faults) == 3


class Doubling(PlainLora):
    """Adds its update twice, which the factors don't tell."""

    is_plain = False
    is_sum = False

    def fold(self, layer: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.add_(2 * layer.delta_weight(adapter))


@pytest.fixture
def special() -> nn.Module:
    """A perceptron under an adapter of another kind than plain LoRA."""
    model = get_peft_model(
        models.perceptron(), LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=3)
    )
    fill(model)
    for _, layer in lora_layers(model):
        for name, record in layer.records.items():
            layer.records[name] = replace(record, variant=Doubling())
    return model


def test_another_kind_of_lora_is_refused_by_name(special: nn.Module) -> None:
    for method in ("cat", "linear", "ties"):
        with pytest.raises(ConfigError, match="'default' is Doubling") as caught:
            special.add_weighted_adapter(["default"], [1.0], "sum", method, density=1.0)
        assert len(caught.value.faults) == 2


def test_another_kind_of_lora_is_taken_by_its_dense_update(special: nn.Module) -> None:
    report = special.add_weighted_adapter(["default"], [0.5], "sum")
    assert report.relative_error < 1e-5
    for _, layer in lora_layers(special):
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
