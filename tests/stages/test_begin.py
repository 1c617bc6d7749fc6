"""What a stage begun in each mode computes, trains and leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine.layers import lora_layers
from lamina.errors import FoldError
from lamina.model import PeftModel
from lamina.stages import begin_stage, lineage, load, save_stage
from tests import models
from tests.stages.chains import (
    Build,
    answer,
    distance,
    fill_trainable,
    llama_lora,
    open_with_peft,
    own_factors,
    requires_grad,
    run_chain,
    run_stage,
    save_plain_peft,
)

SECOND = {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "up_proj"]}


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "domain"
    run_stage(path, llama_lora())
    return path


def factors_named(model: nn.Module, adapter: str) -> set[str]:
    return {
        name
        for name, _ in model.named_parameters()
        if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name
    }


def test_a_fresh_stage_trains_its_adapter_and_changes_nothing_yet() -> None:
    expected = answer(models.tiny_llama())
    model = begin_stage(models.tiny_llama(), name="domain", config=llama_lora())
    assert model.active_adapters == ["domain"]
    assert requires_grad(model) == factors_named(model, "domain")
    assert len(requires_grad(model)) == 8
    assert torch.equal(answer(model), expected)


def test_continue_trains_the_parents_ranks_on(domain: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="more", parent=domain, mode="continue")
    assert model.active_adapters == ["more"]
    assert list(model.peft_config) == ["more"]
    assert requires_grad(model) == factors_named(model, "more")
    assert torch.equal(answer(model), answer(load(domain, models.tiny_llama())))


def test_continue_takes_the_parents_own_config_too(domain: Path) -> None:
    model = begin_stage(
        models.tiny_llama(), name="more", parent=domain, mode="continue", config=llama_lora()
    )
    assert len(requires_grad(model)) == 8


@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_a_new_adapter_trains_over_the_frozen_parent(domain: Path, mode: str) -> None:
    model = begin_stage(
        models.tiny_llama(), name="chat", parent=domain, mode=mode, config=llama_lora(**SECOND)
    )
    assert model.active_adapters == ["domain", "chat"]
    assert requires_grad(model) == factors_named(model, "chat")
    assert len(requires_grad(model)) == 8
    parent = answer(load(domain, models.tiny_llama()))
    assert distance(answer(model), parent) < 1e-6
    assert distance(answer(models.tiny_llama()), parent) > 1e-2


def test_continue_on_a_chain_freezes_the_older_ranks(domain: Path, tmp_path: Path) -> None:
    run_stage(tmp_path / "chat", llama_lora(**SECOND), parent=domain, mode="stack")
    model = begin_stage(models.tiny_llama(), name="more", parent=tmp_path / "chat", mode="continue")
    assert model.active_adapters == ["domain", "more"]
    assert requires_grad(model) == factors_named(model, "more")
    frozen = own_factors(model, "domain")
    fill_trainable(model, seed=3)
    save_stage(model, tmp_path / "more")
    again = begin_stage(models.tiny_llama(), name="most", parent=tmp_path / "more", mode="continue")
    for module, (a, b) in own_factors(again, "domain").items():
        assert torch.equal(a, frozen[module][0])
        torch.testing.assert_close(b, frozen[module][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_step_of_training_moves_exactly_what_should_move(domain: Path, mode: str) -> None:
    config = None if mode == "continue" else llama_lora(**SECOND)
    model = begin_stage(models.tiny_llama(), name="next", parent=domain, mode=mode, config=config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        ids = models.token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == requires_grad(model)


@pytest.mark.parametrize("keep", [True, False])
def test_merge_folds_the_parent_into_the_base(domain: Path, keep: bool) -> None:
    plain = dict(models.tiny_llama().named_parameters())
    expected = answer(models.tiny_llama())
    model = begin_stage(
        models.tiny_llama(),
        name="chat",
        parent=domain,
        mode="merge",
        config=llama_lora(**SECOND),
        keep_unfolded=keep,
    )
    changed = {
        path
        for path, layer in lora_layers(model.get_base_model())
        if not torch.equal(layer.base_layer.weight, plain[f"{path}.weight"])
    }
    assert changed == set(own_factors(model, "domain"))
    before = answer(model)
    if not keep:
        with pytest.raises(FoldError), model.disable_adapter():
            pass
        assert torch.equal(answer(model), before)
        return
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
        for path, layer in lora_layers(model.get_base_model()):
            assert torch.equal(layer.base_layer.weight, plain[f"{path}.weight"])
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("keep", [True, False])
def test_merge_saves_the_file_that_stack_saves(domain: Path, tmp_path: Path, keep: bool) -> None:
    config = llama_lora(**SECOND)
    stacked = run_stage(tmp_path / "a" / "chat", config, parent=domain, mode="stack")
    merged = run_stage(
        tmp_path / "b" / "chat", config, parent=domain, mode="merge", keep_unfolded=keep
    )
    assert distance(answer(merged), answer(stacked)) < 1e-5
    one, two = (own_factors(load(tmp_path / x / "chat", models.tiny_llama()), "chat") for x in "ab")
    assert one.keys() == two.keys()
    for module, (a, b) in one.items():
        assert torch.equal(a, two[module][0])
        assert torch.equal(b, two[module][1])


def test_the_frozen_parent_is_not_dropped_out_in_training(tmp_path: Path) -> None:
    run_stage(tmp_path / "domain", llama_lora(lora_dropout=0.5))
    config = llama_lora(**SECOND)
    model = begin_stage(
        models.tiny_llama(), name="chat", parent=tmp_path / "domain", mode="stack", config=config
    )
    fill_trainable(model)
    expected = answer(model.eval())
    assert torch.equal(answer(model.train()), expected)
    save_stage(model, tmp_path / "chat")
    assert lineage(tmp_path / "chat").laminae[0].config["lora_dropout"] == 0.5
    more = begin_stage(
        models.tiny_llama(), name="more", parent=tmp_path / "domain", mode="continue"
    )
    assert not torch.equal(answer(more.train()), answer(more.eval()))


# --- other parents and other models ----------------------------------------------------------

PLAIN: dict[str, dict[str, Any]] = {
    "linear": {
        "r": 6,
        "lora_alpha": 9,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"down_proj": 20},
        "task_type": "CAUSAL_LM",
    },
    "rslora": {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": ["k_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"], "task_type": "CAUSAL_LM"},
    "saved": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_plain_peft_adapter_as_parent(kind: str, mode: str, tmp_path: Path) -> None:
    expected = save_plain_peft(tmp_path / "plain", PLAIN[kind])
    config = None if mode == "continue" else llama_lora(**SECOND)
    model = begin_stage(
        models.tiny_llama(), name="next", parent=tmp_path / "plain", mode=mode, config=config
    ).eval()
    assert distance(answer(model), expected) < 1e-6
    fill_trainable(model)
    assert distance(answer(model), expected) > 1e-3
    save_stage(model, tmp_path / "next")
    check_file(model, tmp_path / "next", models.tiny_llama)
    record = lineage(tmp_path / "next")
    assert [(s.name, s.mode) for s in record.stages] == [("imported", "fresh"), ("next", mode)]


def check_file(model: PeftModel, path: Path, build: Build, *, with_peft: bool = True) -> None:
    expected = answer(model)
    assert distance(answer(load(path, build())), expected) < 1e-5
    if with_peft:
        assert distance(answer(open_with_peft(path, build)), expected) < 1e-5


def undilated(dimensions: int) -> Build:
    """The real peft convolves by A without the base's dilation, and fails on a dilated layer."""

    def build() -> nn.Module:
        net = models.convolution_net(dimensions)
        net.grouped.dilation = (1,) * dimensions
        return net

    return build


def conv_chain(build: Build) -> tuple[Build, list[LoraConfig]]:
    every = ["stem", "strided", "grouped", "pointwise"]
    return build, [
        LoraConfig(r=4, lora_alpha=6, target_modules=every),
        LoraConfig(r=6, lora_alpha=5, target_modules=["grouped", "stem"]),
        LoraConfig(r=2, lora_alpha=3, target_modules=every, rank_pattern={"grouped": 8}),
    ]


KINDS: dict[str, Callable[[], tuple[Build, list[LoraConfig]]]] = {
    "gpt2": lambda: (
        models.tiny_gpt2,
        [
            LoraConfig(r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"),
            LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], task_type="CAUSAL_LM"),
            LoraConfig(r=2, target_modules=["wte", "c_proj"], task_type="CAUSAL_LM"),
        ],
    ),
    "conv1d": lambda: conv_chain(undilated(1)),
    "conv2d": lambda: conv_chain(undilated(2)),
    "conv3d": lambda: conv_chain(undilated(3)),
    "dilated": lambda: conv_chain(lambda: models.convolution_net(2)),
    "embedding": lambda: (
        models.embedding_net,
        [
            LoraConfig(r=4, target_modules=["embed", "head"]),
            LoraConfig(r=3, lora_alpha=5, target_modules=["embed"]),
            LoraConfig(r=2, target_modules=["head"]),
        ],
    ),
    "perceptron": lambda: (
        models.perceptron,
        [
            LoraConfig(r=4, target_modules=["up", "down"]),
            LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["up"]),
            LoraConfig(r=2, target_modules="all-linear"),
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_chains_on_other_kinds_of_model(kind: str, tmp_path: Path) -> None:
    build, (first, second, third) = KINDS[kind]()
    # A grouped convolution or tied weights can't be folded into.
    mode = "merge" if kind == "perceptron" else "stack"
    model, path = run_chain(
        tmp_path,
        [
            ("one", None, first),
            ("two", "stack", second),
            ("three", "continue", None),
            ("four", mode, third),
        ],
        build=build,
    )
    assert model.active_adapters == ["one", "three", "four"]
    assert distance(answer(model), answer(build())) > 1e-3
    check_file(model, path, build, with_peft=kind != "dilated")


def test_the_heads_of_a_task_go_along(tmp_path: Path) -> None:
    build = models.tiny_bert_classifier
    first = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    second = LoraConfig(r=3, lora_alpha=5, target_modules=["value"], task_type="SEQ_CLS")
    run_stage(tmp_path / "one", first, build=build)
    model = begin_stage(
        build(), name="two", parent=tmp_path / "one", mode="stack", config=second
    ).eval()
    heads = {name for name in requires_grad(model) if "lora_" not in name}
    assert heads == {
        f"base_model.model.classifier.modules_to_save.two.{leaf}" for leaf in ("weight", "bias")
    }
    # The new head begins as the parent's.
    assert torch.equal(answer(model), answer(load(tmp_path / "one", build())))
    fill_trainable(model)
    save_stage(model, tmp_path / "two")
    check_file(model, tmp_path / "two", build)
    assert lineage(tmp_path / "two").saved_modules == {"classifier": "two"}
    more = run_stage(tmp_path / "more", parent=tmp_path / "two", mode="continue", build=build)
    check_file(more, tmp_path / "more", build)
    assert type(load(tmp_path / "more", build())).__name__ == "PeftModelForSequenceClassification"
