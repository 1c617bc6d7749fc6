"""Modules trained whole, biases of the base, and biases of B, through chains of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.config import LoraConfig
from lamina.errors import FoldError, TargetError
from lamina.stages import begin_stage, lineage, load, save_stage
from tests import models
from tests.stages.chains import (
    Snapshot,
    answer,
    distance,
    fill_trainable,
    llama_lora,
    open_with_peft,
    requires_grad,
    run_chain,
    run_stage,
    tensors_of,
)

HEAD = "base_model.model.lm_head.weight"


def check(model: nn.Module, path: Path, build: Any) -> None:
    assert distance(answer(load(path, build())), answer(model)) < 1e-5
    assert distance(answer(open_with_peft(path, build)), answer(model)) < 1e-5


def test_a_module_whose_name_ends_the_names_of_others(tmp_path: Path) -> None:
    # To peft, "norm" is the end of "input_layernorm" too.
    model = run_stage(tmp_path / "one", llama_lora(modules_to_save=["norm"]))
    check(model, tmp_path / "one", models.tiny_llama)


@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_the_newest_copy_of_a_module_wins(tmp_path: Path, mode: str) -> None:
    build = models.tiny_llama
    with_head = llama_lora(modules_to_save=["lm_head"])
    first = run_stage(tmp_path / "one", with_head)
    assert lineage(tmp_path / "one").saved_modules == {"lm_head": "one"}
    own = first.get_base_model().lm_head.modules_to_save["one"].weight
    assert torch.equal(tensors_of(tmp_path / "one")[HEAD], own)

    # A stage without a head of its own leaves the parent's in the file.
    plain = run_stage(tmp_path / "two", llama_lora(r=3), parent=tmp_path / "one", mode=mode)
    assert lineage(tmp_path / "two").saved_modules == {"lm_head": "one"}
    assert torch.equal(tensors_of(tmp_path / "two")[HEAD], own)
    check(plain, tmp_path / "two", build)

    third = run_stage(tmp_path / "three", with_head, parent=tmp_path / "two", mode=mode)
    assert lineage(tmp_path / "three").saved_modules == {"lm_head": "three"}
    newest = tensors_of(tmp_path / "three")[HEAD]
    assert not torch.equal(newest, own)
    check(third, tmp_path / "three", build)

    more = run_stage(tmp_path / "four", parent=tmp_path / "three", mode="continue")
    assert lineage(tmp_path / "four").saved_modules == {"lm_head": "four"}
    assert not torch.equal(tensors_of(tmp_path / "four")[HEAD], newest)
    check(more, tmp_path / "four", build)


def test_continue_of_a_stage_whose_parent_owns_the_head(tmp_path: Path) -> None:
    model, path = run_chain(
        tmp_path,
        [
            ("one", None, llama_lora(modules_to_save=["lm_head"])),
            ("two", "stack", llama_lora(r=3)),
            ("three", "continue", None),
        ],
    )
    assert lineage(path).saved_modules == {"lm_head": "one"}
    assert not any("lm_head" in name for name in requires_grad(model))
    check(model, path, models.tiny_llama)


def test_a_stage_keeps_its_own_targets_when_a_newer_one_owns_its_module(tmp_path: Path) -> None:
    build = models.tiny_bert_classifier
    # "dense" lies in the pooler too, which the first stage trains whole.
    first = LoraConfig(r=4, target_modules=["dense"], modules_to_save=["pooler"])
    second = LoraConfig(r=3, target_modules=["query"], modules_to_save=["pooler"])
    third = LoraConfig(r=2, target_modules=["key"])
    model, path = run_chain(
        tmp_path,
        [("one", None, first), ("two", "stack", second), ("three", "stack", third)],
        build=build,
    )
    assert lineage(path).saved_modules == {"bert.pooler": "two"}
    check(model, path, build)


def test_a_module_that_would_be_covered_is_refused(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    config = llama_lora(target_modules=["o_proj"], modules_to_save=["q_proj"])
    with pytest.raises(TargetError, match="would cover"):
        begin_stage(
            models.tiny_llama(), name="two", parent=tmp_path / "one", mode="stack", config=config
        )


class Biased(nn.Module):
    """Three linears with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.mid = nn.Linear(24, 24)
        self.down = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def biased() -> Biased:
    with models.seeded(0):
        return Biased().eval()


def reply(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 64).view(4, 16))


def mlp_lora(bias: str = "none", **changes: Any) -> LoraConfig:
    return LoraConfig(bias=bias, **{"r": 4, "target_modules": ["up", "mid"]} | changes)


def check_reply(model: nn.Module, path: Path) -> None:
    assert distance(reply(load(path, biased())), reply(model)) < 1e-5
    assert distance(reply(open_with_peft(path, biased)), reply(model)) < 1e-5


def owners(path: Path) -> dict[str, str]:
    return lineage(path).biases


@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_the_newest_biases_win(tmp_path: Path, mode: str) -> None:
    every = {"up.bias", "mid.bias", "down.bias"}
    run_stage(tmp_path / "one", mlp_lora("all"), build=biased)
    assert owners(tmp_path / "one") == dict.fromkeys(every, "one")

    narrow = mlp_lora("lora_only", target_modules=["mid"], r=3, lora_alpha=5)
    options: dict[str, Any] = {"build": biased, "parent": tmp_path / "one"}
    second = run_stage(tmp_path / "two", narrow, mode=mode, **options)
    assert {name.split(".")[-2] for name in requires_grad(second) if "lora_" not in name} == {
        "base_layer"
    }
    assert owners(tmp_path / "two") == {"up.bias": "one", "mid.bias": "two", "down.bias": "one"}
    check_reply(second, tmp_path / "two")

    options["parent"] = tmp_path / "two"
    third = run_stage(tmp_path / "three", mode="continue", **options)
    assert owners(tmp_path / "three") == {
        "up.bias": "one",
        "mid.bias": "three",
        "down.bias": "one",
    }
    # It goes on with what the second stage trained, and no more.
    trained = [name for name in requires_grad(third) if name.endswith("bias")]
    assert len(trained) == 1
    assert ".mid." in trained[0]
    check_reply(third, tmp_path / "three")

    options["parent"] = tmp_path / "three"
    fourth = run_stage(tmp_path / "four", mlp_lora(r=2), mode=mode, **options)
    assert owners(tmp_path / "four") == owners(tmp_path / "three")
    check_reply(fourth, tmp_path / "four")

    options["parent"] = tmp_path / "four"
    last = run_stage(tmp_path / "five", mlp_lora("all", r=1), mode=mode, **options)
    assert owners(tmp_path / "five") == dict.fromkeys(every, "five")
    check_reply(last, tmp_path / "five")


def test_a_new_stage_begins_with_the_parents_biases(tmp_path: Path) -> None:
    first = run_stage(tmp_path / "one", mlp_lora("all"), build=biased)
    for mode in ("stack", "merge"):
        call: dict[str, Any] = {"parent": tmp_path / "one", "mode": mode}
        model = begin_stage(biased(), name="two", config=mlp_lora("all"), **call)
        assert distance(reply(model), reply(first)) < 1e-6
        with model.disable_adapter():
            assert torch.equal(reply(model), reply(biased()))


@pytest.mark.parametrize("last", ["stack", "merge", "continue"])
def test_biases_of_B_are_summed(tmp_path: Path, last: str) -> None:
    stages: list[tuple[str, str | None, LoraConfig | None]] = [
        ("one", None, mlp_lora(lora_bias=True)),
        ("two", "stack", mlp_lora(r=3, lora_alpha=5, target_modules=["down", "mid"])),
        ("three", "stack", mlp_lora(r=2, lora_alpha=7, lora_bias=True, target_modules=["mid"])),
        ("four", last, None if last == "continue" else mlp_lora(r=2)),
    ]
    model, path = run_chain(tmp_path, stages, build=biased)
    check_reply(model, path)
    stored = tensors_of(path)
    prefix = "base_model.model"
    # A file has a bias in every module or in none.
    assert not stored[f"{prefix}.down.lora_B.bias"].any()
    assert stored[f"{prefix}.mid.lora_B.bias"].any()
    again = begin_stage(biased(), name="five", parent=path, mode="continue").eval()
    assert distance(reply(again), reply(model)) < 1e-5
    fill_trainable(again, seed=4)
    save_stage(again, tmp_path / "five")
    check_reply(again, tmp_path / "five")


def test_biases_of_adapted_layers_where_only_one_stage_trains_them(tmp_path: Path) -> None:
    stages: list[tuple[str, str | None, LoraConfig | None]] = [
        ("one", None, mlp_lora("lora_only", target_modules=["mid"])),
        ("two", "stack", mlp_lora(target_modules=["up", "down"])),
        ("three", "continue", None),
        ("four", "merge", mlp_lora(r=2, target_modules=["down"])),
    ]
    model, path = run_chain(tmp_path, stages, build=biased)
    check_reply(model, path)
    assert owners(path) == {"mid.bias": "one"}
    # To a reader the config means the biases of all adapted layers: they are there.
    stored = tensors_of(path)
    for module in ("up", "down"):
        key = f"base_model.model.{module}.base_layer.bias"
        assert torch.equal(stored[key], getattr(biased(), module).bias)


def test_biases_of_a_layer_that_is_adapted_later(tmp_path: Path) -> None:
    stages: list[tuple[str, str | None, LoraConfig | None]] = [
        ("one", None, mlp_lora("all", target_modules=["mid"])),
        ("two", "stack", mlp_lora(target_modules=["up", "down"])),
        ("three", "continue", None),
        ("four", "stack", mlp_lora("lora_only", r=2, target_modules=["down"])),
    ]
    model, path = run_chain(tmp_path, stages, build=biased)
    check_reply(model, path)
    assert owners(path) == {"mid.bias": "one", "up.bias": "one", "down.bias": "four"}
    again = begin_stage(biased(), name="five", parent=path, mode="continue")
    assert distance(reply(again), reply(model)) < 1e-5


@pytest.mark.parametrize("second", ["none", "all", "lora_only"])
def test_biases_of_B_are_not_folded_into_trained_biases(tmp_path: Path, second: str) -> None:
    first = mlp_lora("lora_only" if second == "none" else "none", lora_bias=True)
    parent = run_stage(tmp_path / "one", first, build=biased)
    base = biased()
    before = Snapshot(base)
    call: dict[str, Any] = {"name": "two", "parent": tmp_path / "one"}
    with pytest.raises(FoldError, match='mode="stack"'):
        begin_stage(base, mode="merge", config=mlp_lora(second), **call)
    before.check()
    model = begin_stage(base, mode="stack", config=mlp_lora(second), **call).eval()
    assert distance(reply(model), reply(parent)) < 1e-6
    fill_trainable(model)
    save_stage(model, tmp_path / "two")
    check_reply(model, tmp_path / "two")
