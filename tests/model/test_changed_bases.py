"""Adapters whose initialisation takes a part out of the base: loading, switching, saving, going."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lamina
from lamina.errors import InitialisationError, KeyMismatchError, TargetError
from tests import models

X = torch.linspace(-2, 2, 60).reshape(5, 12).sin()
CHANGING = ["pissa", "olora", "pissa_niter_2"]
theirs_warn = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def net() -> nn.Module:
    with models.seeded(0):
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


def config(init: Any = "pissa", **changes: Any) -> lamina.LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": init}
    return lamina.LoraConfig(**{**settings, **changes})


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    with models.seeded(5):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, atol=3e-6, rtol=0)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [model[0].weight.detach(), model[2].weight.detach()]


@pytest.mark.parametrize("init", CHANGING)
def test_the_base_answers_as_before_wherever_the_adapter_is_off(init: str) -> None:
    model = trained(lamina.get_peft_model(net(), config(init)))
    with model.disable_adapter():
        close(model(X), net()(X))
    model.add_adapter("other", config("gaussian"))
    model.set_adapter("other")
    close(model(X), net()(X))


@pytest.mark.parametrize("init", CHANGING)
def test_the_base_gets_its_weight_back_bit_for_bit(init: str) -> None:
    for take in (lambda m: m.unload(), lambda m: (m.delete_adapter("default"), m.unload())[1]):
        plain = take(trained(lamina.get_peft_model(net(), config(init))))
        for mine, original in zip(weights(plain), weights(net()), strict=True):
            assert torch.equal(mine, original)


def test_of_two_that_took_something_each_goes_by_itself() -> None:
    model = lamina.get_peft_model(net(), config("pissa"))
    model.add_adapter("other", config("olora", r=2))
    model.set_adapter(["default", "other"])
    close(model(X), net()(X))
    trained(model)
    model.set_adapter("other")
    before = model(X)
    model.delete_adapter("default")
    close(model(X), before)
    model.delete_adapter("other")
    for mine, original in zip(weights(model.unload()), weights(net()), strict=True):
        assert torch.equal(mine, original)


def test_folding_goes_over_what_was_taken_out() -> None:
    model = trained(lamina.get_peft_model(net(), config("pissa")))
    model.add_adapter("other", config("olora", r=2), autocast_adapter_dtype=True)
    model.set_adapter(["default", "other"])
    expected = model(X)
    model.merge_adapter()
    close(model(X), expected)
    model.unmerge_adapter()
    close(model(X), expected)
    model.set_adapter("default")
    alone = model(X)
    close(copy.deepcopy(model).merge_and_unload()(X), alone)
    close(model.merge_and_unload(adapter_names=["other"])(X), net()(X))


@theirs_warn
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"2": 3}, "alpha_pattern": {"0": 5}}])
def test_peft_reads_what_is_saved_on_the_original_base(
    init: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(lamina.get_peft_model(net(), config(init, **changes)))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    close(theirs(X), model(X))
    assert theirs.peft_config["default"].init_lora_weights is True
    assert torch.equal(theirs.base_model.model[0].base_layer.weight, net()[0].weight)
    close(lamina.PeftModel.from_pretrained(net(), tmp_path)(X), model(X))


@theirs_warn
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_file_of_peft_changes_the_base_as_it_was_changed(init: str, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": init}
    theirs = trained(peft.get_peft_model(net(), peft.LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lamina.PeftModel.from_pretrained(net(), tmp_path / "theirs")
    close(ours(X), theirs(X))
    for i in (0, 2):
        close(
            ours.base_model.model[i].base_layer.weight,
            theirs.base_model.model[i].base_layer.weight,
        )
    # Saved by us it is right on the original base.
    ours.save_pretrained(tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(net(), tmp_path / "ours")(X), theirs(X))


@theirs_warn
def test_a_file_that_does_not_fit_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": "pissa"}
    peft.get_peft_model(net(), peft.LoraConfig(**settings)).save_pretrained(tmp_path)
    wider = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))
    before = [weight.clone() for weight in weights(wider)]
    with pytest.raises(KeyMismatchError):
        lamina.PeftModel.from_pretrained(wider, tmp_path)
    for mine, original in zip(weights(wider), before, strict=True):
        assert torch.equal(mine, original)


def test_bf16_bases_are_decomposed_in_fp32() -> None:
    model = lamina.get_peft_model(net().to(torch.bfloat16), config("pissa"))
    layer = model.base_model.model[0]
    W = net()[0].weight.detach().to(torch.bfloat16).float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(layer.delta_weight("default"), best, atol=1e-5, rtol=1e-5)
    expected = (W - best).to(torch.bfloat16)
    torch.testing.assert_close(layer.base_layer.weight.data, expected, atol=2e-3, rtol=0)
    assert layer.lora_A["default"].weight.dtype == torch.float32


def test_all_that_keeps_layers_from_beginning_is_told_at_once() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    before = [weight.clone() for weight in weights(model)]
    with pytest.raises(InitialisationError) as caught:
        lamina.get_peft_model(model, config("pissa", r=9))
    assert isinstance(caught.value, (TargetError, TypeError))
    text = str(caught.value)
    assert "0: its weight has NaN" in text
    assert "2: PiSSA requires `r` <= min(in_features, out_features) = 7" in text
    for mine, original in zip(weights(model), before, strict=True):
        assert torch.equal(mine.nan_to_num(), original.nan_to_num())


@pytest.mark.parametrize(
    ("init", "changes", "told"),
    [
        ("orthogonal", {"r": 3}, "even, got 3"),
        ("mica", {"r": 8}, "MiCA requires `r` <= min"),
        ("corda", {"corda_config": {}}, "run `preprocess_corda` first"),
    ],
)
def test_what_a_method_needs_is_told(init: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lamina.get_peft_model(net(), config(init, **changes))


def test_a_tied_weight_is_not_changed_behind_the_others_back() -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    with pytest.raises(InitialisationError, match="lm_head: its weight is tied to"):
        lamina.get_peft_model(model, config("pissa", target_modules=["lm_head"]))


def test_quantised_numbers_are_no_matrix_to_factorise() -> None:
    class Packed(nn.Module):
        in_features, out_features = 4, 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(TypeError, match="Please initialize PiSSA under float32, float16"):
        lamina.get_peft_model(nn.Sequential(Packed()), config("pissa", r=2, target_modules=["0"]))


def test_loftq_makes_up_for_four_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64))
    W = model[0].weight.detach().clone()
    asked = config("loftq", r=8, lora_alpha=8, target_modules=["0"], loftq_config={"loftq_bits": 4})
    layer = lamina.get_peft_model(model, asked).base_model.model[0]
    stored, state = bnb.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=False)
    Q = bnb.functional.dequantize_4bit(stored, state)
    torch.testing.assert_close(layer.base_layer.weight.data, Q)
    U, S, Vh = torch.linalg.svd(W - Q)
    torch.testing.assert_close(
        layer.delta_weight("default"), (U[:, :8] * S[:8]) @ Vh[:8], atol=1e-5, rtol=1e-4
    )


def test_mica_trains_a_alone() -> None:
    model = lamina.get_peft_model(net(), config("mica"))
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A"}
    model.set_requires_grad("default", False)
    model.set_requires_grad("default", True)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_B" in n)


@torch.no_grad()
def answer(model: Any, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    answered: torch.Tensor = model(X)
    return answered


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_dora_rests_on_the_base_as_it_was_whatever_another_took(dropout: float) -> None:
    changes = {"use_dora": True, "lora_dropout": dropout}
    model = trained(lamina.get_peft_model(net(), config(True, **changes), "own"))
    wanted = answer(model, "own")
    model.add_adapter("taker", config("pissa"))
    model.set_adapter("taker", train=["taker"])
    trained(model)
    close(answer(model, "own"), wanted)
    with torch.no_grad():
        close(model(X, adapter_names=["own"] * len(X)), wanted)
    close(answer(model.train(), "own"), wanted)
    model.eval().merge_adapter(["own"])
    close(answer(model, "own"), wanted)
    model.unmerge_adapter()
    model.add_weighted_adapter(["own"], [1.0], "same", "svd", svd_rank=12)
    close(answer(model, "same"), wanted)


@pytest.mark.parametrize(
    ("method", "changes"), [("cat", {}), ("svd", {}), ("svd", {"use_dora": True})]
)
def test_a_combination_is_without_what_its_parts_took(method: str, changes: Any) -> None:
    model = trained(lamina.get_peft_model(net(), config("pissa", **changes)))
    wanted = answer(model, "default")
    rank = None if method == "cat" else 12
    model.add_weighted_adapter(["default"], [1.0], "same", method, svd_rank=rank)
    close(answer(model, "same"), wanted)


def test_factors_alone_are_not_combined_where_a_part_was_taken_out() -> None:
    model = trained(lamina.get_peft_model(net(), config("pissa")))
    with pytest.raises(lamina.errors.ConfigError, match="took a part out of the base"):
        model.add_weighted_adapter(["default"], [1.0], "same", "linear")


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_plain_lora_made_of_it_is_for_the_base_as_it_was(tmp_path: Path) -> None:
    model = trained(lamina.get_peft_model(net(), config("pissa")))
    lamina.save_as_lora(tmp_path, model, 1.0)
    loaded = lamina.PeftModel.from_pretrained(net(), tmp_path).eval()
    close(loaded(X), model(X))


@pytest.mark.parametrize("how", ["hotswap", "load"])
def test_other_weights_in_its_place_get_the_base_that_they_are_for(
    how: str, tmp_path: Path
) -> None:
    other = trained(lamina.get_peft_model(net(), config(True)))
    other.save_pretrained(tmp_path)
    model = trained(lamina.get_peft_model(net(), config("pissa")))
    if how == "hotswap":
        lamina.hotswap_adapter(model, str(tmp_path), "default")
    else:
        model.load_adapter(tmp_path, "default")
    close(model(X), other(X))
    with model.disable_adapter():
        close(model(X), net()(X))
    model.save_pretrained(tmp_path / "again")
    close(lamina.PeftModel.from_pretrained(net(), tmp_path / "again").eval()(X), other(X))


@pytest.mark.parametrize("how", ["hotswap", "load"])
def test_weights_for_a_changed_base_do_not_go_over_one_that_is_not(
    how: str, tmp_path: Path
) -> None:
    peft_model: Any = peft.get_peft_model(
        net(),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights="pissa"),
    )
    peft_model.save_pretrained(tmp_path)
    model = trained(lamina.get_peft_model(net(), config(True)))
    before = model(X)
    with pytest.raises(lamina.errors.ConfigError, match="init_lora_weights='pissa' has changed"):
        if how == "hotswap":
            lamina.hotswap_adapter(model, str(tmp_path), "default")
        else:
            model.load_adapter(tmp_path, "default")
    assert torch.equal(model(X), before)
