from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina import LoraConfig, PeftModel, get_peft_model
from lamina.engine.layers import lora_layers
from lamina.errors import AdapterNameError, ConfigError, FoldError, KeyMismatchError
from lamina.model.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests import models
from tests.adapters import fill, flags, rewrite, same, weights

X = torch.linspace(-1, 1, 48).reshape(3, 16)
IMAGE = torch.linspace(-2, 2, 2 * 3 * 64).reshape(2, 3, 8, 8).sin()
IDS = models.token_ids()


def saved(directory: Path, seed: int, make: Any = models.perceptron, **config: Any) -> Path:
    """An adapter on disk, under a name that tells its seed."""
    settings = {"target_modules": ["up", "down"], "r": 4, **config}
    model = get_peft_model(make(), LoraConfig(**settings))
    fill(model, seed=seed)
    model.save_pretrained(directory / str(seed))
    return directory / str(seed)


@torch.no_grad()
def answer(model: nn.Module, x: Tensor = X) -> Tensor:
    result: Tensor = model(x)
    return result


def loaded(path: Path, make: Any = models.perceptron) -> PeftModel:
    return PeftModel.from_pretrained(make(), path).eval()


CASES: dict[str, tuple[Any, Tensor, list[str]]] = {
    "linear": (models.perceptron, X, ["up", "down"]),
    "embedding": (models.embedding_net, IDS, ["embed", "head"]),
    "convolution": (lambda: models.convolution_net(2), IMAGE, ["stem", "grouped"]),
}


@pytest.mark.parametrize("prepared", [None, 8])
@pytest.mark.parametrize(("first", "second"), [(4, 4), (2, 8), (8, 2)])
@pytest.mark.parametrize("kind", CASES)
def test_there_and_back(
    kind: str, first: int, second: int, prepared: int | None, tmp_path: Path
) -> None:
    make, x, targets = CASES[kind]
    config = {"make": make, "target_modules": targets}
    one = saved(tmp_path, 1, r=first, lora_alpha=6, **config)
    other = saved(tmp_path, 2, r=second, lora_alpha=20, use_rslora=True, **config)
    model = loaded(one, make)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=prepared)
    for path in (other, one, other):
        hotswap_adapter(model, path, "default")
        torch.testing.assert_close(answer(model, x), answer(loaded(path, make), x))
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again", make)
    torch.testing.assert_close(answer(again, x), answer(loaded(other, make), x))


def test_layers_that_the_new_adapter_lacks_add_nothing(tmp_path: Path) -> None:
    one, other = saved(tmp_path, 1), saved(tmp_path, 2, target_modules=["up"])
    model = loaded(one)
    hotswap_adapter(model, other, "default")
    assert torch.equal(answer(model), answer(loaded(other)))
    assert not any(p.any() for n, p in model.named_parameters() if "down.lora" in n)
    hotswap_adapter(model, one, "default")
    assert torch.equal(answer(model), answer(loaded(one)))


def test_parameters_stay_the_same_objects_where_there_is_room(tmp_path: Path) -> None:
    one, other = saved(tmp_path, 1), saved(tmp_path, 2, r=3)
    model = PeftModel.from_pretrained(models.perceptron(), one, is_trainable=True)
    before, asked = dict(model.named_parameters()), flags(model)
    hotswap_adapter(model, other, "default")
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert flags(model) == asked


def test_a_rank_without_room_replaces_parameters_and_keeps_their_flags(tmp_path: Path) -> None:
    one, other = saved(tmp_path, 1), saved(tmp_path, 2, r=5)
    model = PeftModel.from_pretrained(models.perceptron(), one, is_trainable=True)
    asked = flags(model)
    hotswap_adapter(model, other, "default")
    assert flags(model) == asked
    assert model.base_model.model.up.lora_A["default"].out_features == 5
    assert torch.equal(answer(model.eval()), answer(loaded(other)))
    assert model.peft_config["default"].r == 5


def test_another_adapter_is_untouched(tmp_path: Path) -> None:
    one, other = saved(tmp_path, 1), saved(tmp_path, 2)
    model = loaded(one)
    model.load_adapter(one, "kept")
    hotswap_adapter(model, other, "default")
    model.set_adapter("kept")
    assert torch.equal(answer(model), answer(loaded(one)))


def test_from_tensors_by_their_names_in_the_model(tmp_path: Path) -> None:
    one, other = loaded(saved(tmp_path, 1)), loaded(saved(tmp_path, 2, r=2))
    tensors = {k: v.clone() for k, v in other.state_dict().items() if ".lora_" in k}
    assert all(".default." in key for key in tensors)
    hotswap_adapter_from_state_dict(one, tensors, "default", other.peft_config["default"])
    torch.testing.assert_close(answer(one), answer(other))
    inner = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    bare = loaded(tmp_path / "1").get_base_model()
    hotswap_adapter_from_state_dict(bare, inner, "default", other.peft_config["default"])
    torch.testing.assert_close(answer(bare), answer(other))


# --- refusals ------------------------------------------------------------------------------------


def refused(model: nn.Module, path: Path, error: type[Exception], match: str) -> Exception:
    before = weights(model)
    with pytest.raises(error, match=match) as caught:
        hotswap_adapter(model, path, "default")
    assert same(before, weights(model))
    return caught.value


def test_more_targets_are_refused(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, 1, target_modules=["up"]))
    error = refused(model, saved(tmp_path, 2), KeyMismatchError, "unexpected keys found")
    assert "base_model.model.down.lora_A.default.weight" in str(error)
    assert isinstance(error, RuntimeError)


def test_other_sizes_are_refused_all_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path, 2)
    rewrite(path, lambda file: {key: value[..., :3] for key, value in file.items()})
    error = refused(loaded(saved(tmp_path, 1)), path, KeyMismatchError, "2 tensor")
    assert isinstance(error, KeyMismatchError)
    assert [fault.split(":")[0].split(".")[-3] for fault in error.faults] == ["up", "down"]


@pytest.mark.parametrize("config", [{"lora_dropout": 0.5}, {"lora_bias": True}])
def test_other_kinds_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, 1))
    refused(model, saved(tmp_path, 2, **config), ConfigError, "Configs are incompatible: for lora")


def test_a_folded_adapter_is_refused_and_beside_one_it_works(tmp_path: Path) -> None:
    one, other = saved(tmp_path, 1), saved(tmp_path, 2)
    model = loaded(one)
    model.load_adapter(one, "second")
    model.merge_adapter(["second"])
    hotswap_adapter(model, other, "default")
    model.merge_adapter(["default"])
    refused(model, one, FoldError, "merged")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterNameError, match="'first'"):
        hotswap_adapter(loaded(saved(tmp_path, 1)), tmp_path / "1", "first")
    with pytest.raises(AdapterNameError):
        hotswap_adapter(models.perceptron(), tmp_path / "1", "default")


# --- making room ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_room_changes_neither_outputs_nor_flags(kind: str) -> None:
    make, x, targets = CASES[kind]
    model = get_peft_model(make(), LoraConfig(target_modules=targets, r=2, lora_alpha=6)).eval()
    fill(model)
    before, asked = answer(model, x), flags(model)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(answer(model, x), before)
    assert flags(model) == asked
    for _, layer in lora_layers(model):
        assert layer.factors("default")[0].shape[0] == 6
        assert isinstance(layer.scaling["default"], torch.Tensor)
        assert layer.scaling["default"].item() == 3.0


def test_configs_follow(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["up", "down"], r=3, rank_pattern={"down": 5}, lora_alpha=6)
    model = get_peft_model(models.perceptron(), config).eval()
    fill(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=config)
    assert config.r == 8
    assert config.rank_pattern == {"down": 8}
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(loaded(tmp_path)), answer(model))


def test_rooms_that_can_not_be_made() -> None:
    with pytest.raises(ConfigError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(models.perceptron())
    config = LoraConfig(target_modules=["stem", "grouped"], r=4)
    model = get_peft_model(models.convolution_net(2), config)
    before = weights(model)
    with pytest.raises(ConfigError) as caught:
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert len(caught.value.faults) == 3
    assert "the original rank is larger (4)" in str(caught.value)
    assert "not divisible by 2" in str(caught.value)
    assert same(before, weights(model))
    assert isinstance(model.base_model.model.stem.scaling["default"], float)


def test_a_compiled_model_is_told_of() -> None:
    model = get_peft_model(models.perceptron(), LoraConfig(target_modules=["up"]))
    compiled: Any = torch.compile(model)
    with pytest.raises(ConfigError, match="before"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.raises(ConfigError, match="'error', 'warn', or 'ignore'"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="whatever")
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")


@pytest.fixture
def compilations() -> Iterator[list[int]]:
    """Counts the graphs that are compiled; eager code runs in their place."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def test_a_prepared_model_is_compiled_once(compilations: list[int], tmp_path: Path) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(len(inputs))
        return graph.forward

    one = saved(tmp_path, 1, r=2, lora_alpha=6)
    other = saved(tmp_path, 2, r=8, lora_alpha=4, target_modules=["up"])
    model = loaded(one)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled: Any = torch.compile(model, backend=backend)
    torch.testing.assert_close(answer(compiled), answer(loaded(one)))
    first = len(compilations)
    assert first > 0
    for path in (other, one, other):
        hotswap_adapter(compiled, path, "default")
        torch.testing.assert_close(answer(compiled), answer(loaded(path)))
    assert len(compilations) == first


def test_an_unprepared_model_is_compiled_again(compilations: list[int], tmp_path: Path) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(len(inputs))
        return graph.forward

    one, other = saved(tmp_path, 1, r=2), saved(tmp_path, 2, r=8)
    compiled: Any = torch.compile(loaded(one), backend=backend)
    answer(compiled)
    first = len(compilations)
    hotswap_adapter(compiled, other, "default")
    torch.testing.assert_close(answer(compiled), answer(loaded(other)))
    assert len(compilations) > first
