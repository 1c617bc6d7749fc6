"""What is no model, no config or no name is refused in words, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from lamina import PeftConfig
from lamina.config import BdLoraConfig, KasaConfig, LoraConfig
from lamina.errors import AdapterNameError, ConfigError, NoModelError, TargetError
from lamina.model import get_peft_model
from tests import models
from tests.adapters import flags, llama_adapter, llama_config, same, weights

CONFIGS: list[Any] = [None, {"r": 8}, 5, LoraConfig, peft.LoraConfig(target_modules=["q_proj"])]
NAMES: list[Any] = [None, 5, "", "a.b", "..", "/x", "train", ["x"], b"x", "__base__"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda value: type(value).__name__)
def test_what_is_no_config_is_refused(config: Any) -> None:
    base = models.tiny_llama()
    before = weights(base), flags(base)
    with pytest.raises(ConfigError, match=r"a lamina\.LoraConfig is wanted") as caught:
        get_peft_model(base, config)
    assert caught.value.cure
    assert same(weights(base), before[0])
    assert flags(base) == before[1]
    model = llama_adapter()
    with pytest.raises(ConfigError, match=r"a lamina\.LoraConfig is wanted"):
        model.add_adapter("next", config)
    assert list(model.peft_config) == ["default"]


def test_a_config_of_peft_is_taken_the_way_that_the_error_says() -> None:
    theirs = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)
    config = PeftConfig.from_dict(theirs.to_dict())
    assert isinstance(config, LoraConfig)
    assert (config.r, config.target_modules, config.use_dora) == (3, {"q_proj"}, True)
    assert get_peft_model(models.tiny_llama(), config)


@pytest.mark.parametrize("model", [None, "gpt2", {"a": torch.zeros(1)}, type])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(NoModelError, match="a model is wanted"):
        get_peft_model(model, llama_config())


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_what_is_no_name_is_refused(name: Any) -> None:
    base = models.tiny_llama()
    before = flags(base)
    with pytest.raises(AdapterNameError, match="can't be an adapter's name"):
        get_peft_model(base, llama_config(), adapter_name=name)
    assert flags(base) == before
    model = llama_adapter()
    with pytest.raises(AdapterNameError):
        model.add_adapter(name, llama_config())
    with pytest.raises(AdapterNameError):
        model.set_adapter(name)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("weight", ["a", None, float("nan"), float("inf"), True, [1.0]])
def test_a_weight_of_a_sum_is_a_number(weight: Any) -> None:
    with pytest.raises(ConfigError, match="is not a finite number"):
        llama_adapter().add_weighted_adapter(["default"], [weight], "sum")


# --- what doesn't fit a model -------------------------------------------------------------------

UNFIT: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "half of the ranks": (
        {"rank_pattern": {"q_proj": 2, "v_prj": 1, "nope": 3}},
        ["rank_pattern: 'nope' matched 0", "rank_pattern: 'v_prj' matched 0 modules; nearest"],
        "correct rank_pattern",
    ),
    "half of the parameters": (
        {"target_parameters": ["o_proj.weight", "nope.weight"]},
        ["target_parameters: 'nope.weight' matched 0"],
        "correct target_parameters",
    ),
    "rows out of range": (
        {"trainable_token_indices": [1, 64, 99]},
        ["trainable_token_indices: model.embed_tokens has 64 rows, not [64, 99]"],
        "correct trainable_token_indices",
    ),
    "a row twice": (
        {"trainable_token_indices": [1, 1]},
        ["trainable_token_indices: model.embed_tokens has some index twice"],
        "correct trainable_token_indices",
    ),
    "no such table": (
        {"trainable_token_indices": {"nope": [1], "embed_tokens": [1]}},
        ["trainable_token_indices: Target modules {'nope'} not found"],
        "correct trainable_token_indices",
    ),
    "a layer that isn't there": (
        {"layers_to_transform": [0, 7]},
        ["layers_to_transform has [7]; the targets lie in layers 0 to 1"],
        "correct layers_to_transform",
    ),
    "blocks that don't divide": (
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], nblocks=5)},
        ["model.layers.0.self_attn.q_proj: r=4"],
        "exclude_modules",
    ),
    "a rank that leaves nothing": (
        {"kasa_config": KasaConfig(), "r": 40},
        ["model.layers.0.self_attn.q_proj: KaSA requires `r` (40)"],
        "exclude_modules",
    ),
    "all of it": (
        {
            "target_modules": ["q_proj", "nope"],
            "exclude_modules": ["ee"],
            "modules_to_save": ["nn"],
            "rank_pattern": {"rr": 1},
            "alpha_pattern": {"aa": 1},
            "target_parameters": ["x.y"],
            "trainable_token_indices": [99],
        },
        [
            "target_modules: ",
            "exclude_modules: ",
            "modules_to_save: ",
            "rank_pattern: ",
            "alpha_pattern: ",
            "target_parameters: ",
            "trainable_token_indices: ",
        ],
        "choose target_modules that exist",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_doesnt_fit_is_told_at_once_and_nothing_is_changed(case: str) -> None:
    changes, told, cure = UNFIT[case]
    base = models.tiny_llama()
    before = weights(base), flags(base), [(n, type(m)) for n, m in base.named_modules()]
    with pytest.raises(TargetError) as caught:
        get_peft_model(base, llama_config(**changes))
    for line in told:
        assert any(fault.startswith(line) for fault in caught.value.faults), line
    assert cure in (caught.value.cure or "")
    assert same(weights(base), before[0])
    assert (flags(base), [(n, type(m)) for n, m in base.named_modules()]) == before[1:]


def test_a_rank_above_the_weights_own_is_taken_as_peft_takes_it() -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(r=40))
    assert isinstance(model, torch.nn.Module)
    theirs = peft.get_peft_model(
        models.tiny_llama(), peft.LoraConfig(r=40, target_modules=["q_proj", "v_proj"])
    )
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
