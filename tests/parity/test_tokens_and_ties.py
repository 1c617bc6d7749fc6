"""Replaced rows, tied adapters and repeated layers, against the real peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lamina
from lamina.errors import ConfigError, FoldError, TargetError
from tests import models
from tests.parity.pairs import answer, assert_close, gradients, pair

IDS = torch.tensor([[1, 3, 5, 7, 9, 3], [2, 4, 6, 5, 1, 0]])
TOKENS = [
    [3, 5, 9],
    {"embed_tokens": [5, 3]},
    {"embed_tokens": [5, 3], "lm_head": [5, 3]},
    {"embed_tokens": [5, 3], "lm_head": [7]},
    {"lm_head": [3, 4]},
]


def make(tied: bool) -> nn.Module:
    return models.tiny_llama(tie_word_embeddings=tied)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("tied", [False, True])
def test_rows_answer_learn_and_save_as_in_peft(tmp_path: Path, tied: bool, tokens: Any) -> None:
    config: dict[str, Any] = {
        "r": 3,
        "target_modules": ["q_proj"],
        "trainable_token_indices": tokens,
    }
    ours, theirs = pair(lambda: make(tied), **config)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    expected = answer(theirs, IDS)
    assert_close(answer(ours, IDS), expected, 1e-5)
    mine, other = gradients(ours, IDS), gradients(theirs, IDS)
    for name, gradient in other.items():
        assert_close(mine[name], gradient, 1e-4)
    on_disk = lamina.get_peft_model_state_dict(ours)
    assert on_disk.keys() == peft.get_peft_model_state_dict(theirs).keys()
    rows = [tensor for name, tensor in on_disk.items() if "trainable_tokens_delta" in name]
    assert all(tensor.shape[0] <= 3 for tensor in rows)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    opened = lamina.PeftModel.from_pretrained(make(tied), tmp_path / "theirs").eval()
    assert_close(answer(opened, IDS), expected, 1e-5)
    reopened = peft.PeftModel.from_pretrained(make(tied), tmp_path / "ours").eval()
    assert_close(answer(reopened, IDS), expected, 1e-5)


def random_rows(model: Any) -> Any:
    with models.seeded(5), torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_rows_fold_and_unfold_exactly_and_keep_the_tie(tied: bool) -> None:
    config = lamina.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = random_rows(lamina.get_peft_model(make(tied), config))
    expected = answer(model, IDS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert_close(answer(model, IDS), expected, 1e-5)
    with model.disable_adapter():
        assert torch.equal(answer(model, IDS), answer(make(tied), IDS))
    assert_close(answer(model, IDS), expected, 1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    bare: Any = model.merge_and_unload()
    assert_close(answer(bare, IDS), expected, 1e-5)
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) == tied


def test_rows_under_low_rank_updates_of_the_same_tables(tmp_path: Path) -> None:
    config = lamina.LoraConfig(
        r=2,
        target_modules=["embed_tokens", "lm_head"],
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [7, 8]},
    )
    model = random_rows(lamina.get_peft_model(make(False), config))
    base: Any = model.get_base_model()
    embedding = base.model.embed_tokens.token_adapter
    lora, row = embedding.base_layer, embedding.rows("default")[0]
    a, b = lora.factors("default")
    update = lora.scaling["default"] * (b @ a[:, 3])
    assert_close(embedding(torch.tensor([3]))[0], row + update, 1e-5)
    expected = answer(model, IDS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert_close(answer(model, IDS), expected, 1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    opened = lamina.PeftModel.from_pretrained(make(False), tmp_path).eval()
    assert torch.equal(answer(opened, IDS), expected)


def test_the_same_row_of_two_adapters_is_refused() -> None:
    config = lamina.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = lamina.get_peft_model(make(False), config).eval()
    model.add_adapter("other", copy.deepcopy(config))
    model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="already defined"):
        model(IDS)
    model.add_adapter(
        "apart", lamina.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4])
    )
    model.set_adapter(["default", "apart"])
    model(IDS)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ({"nothing": [1]}, "Target modules {'nothing'} not found"),
        ([64], "has 64 rows"),
        ([1, 1], "twice"),
        ({"q_proj": [99]}, "has 32 rows"),
    ],
)
def test_rows_that_are_not_there_are_refused(tokens: Any, told: str) -> None:
    config = lamina.LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens)
    with pytest.raises(TargetError, match=told):
        lamina.get_peft_model(make(False), config)


# --- ties --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_tied_adapters_train_save_and_fold_as_one(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = random_rows(
        lamina.get_peft_model(
            make(True), lamina.LoraConfig(r=2, ensure_weight_tying=True, **copy.deepcopy(config))
        )
    )
    sgd = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(IDS, labels=IDS).loss.backward()
    sgd.step()
    expected = answer(ours, IDS)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(True), tmp_path).eval()
    assert_close(answer(theirs, IDS), expected, 1e-5)
    opened = lamina.PeftModel.from_pretrained(make(True), tmp_path).eval()
    assert torch.equal(answer(opened, IDS), expected)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.merge_adapter()
    assert_close(answer(ours, IDS), expected, 1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    bare: Any = ours.merge_and_unload()
    assert bare.lm_head.weight is bare.model.embed_tokens.weight
    assert_close(answer(bare, IDS), expected, 1e-5)


def test_one_of_two_tied_modules_is_folded_into_only_when_untied() -> None:
    model = random_rows(
        lamina.get_peft_model(make(True), lamina.LoraConfig(r=2, target_modules=["lm_head"]))
    )
    expected = answer(model, IDS)
    with pytest.raises(FoldError, match="tied to"):
        model.merge_and_unload()
    bare: Any = model.merge_and_unload(untie=True)
    assert_close(answer(bare, IDS), expected, 1e-5)
    assert not bare.config.tie_word_embeddings


def test_what_can_not_be_folded_is_tied_again() -> None:
    model: Any = random_rows(
        lamina.get_peft_model(make(True), lamina.LoraConfig(r=2, target_modules=["lm_head"]))
    )
    model.get_base_model().lm_head.lora_B["default"].weight.data[0] = torch.nan
    with pytest.raises(FoldError, match="NaN"):
        model.merge_and_unload(untie=True, safe_merge=True)
    base = model.get_base_model()
    assert base.lm_head.get_base_layer().weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("tied", "targets", "told"),
    [(False, ["lm_head"], "no tied modules were found"), (True, ["q_proj"], "no tied modules are")],
)
def test_a_tie_that_is_not_there_is_told(tied: bool, targets: list[str], told: str) -> None:
    config = lamina.LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True)
    with pytest.warns(UserWarning, match=told):
        lamina.get_peft_model(make(tied), config)


# --- repeated layers ---------------------------------------------------------------------------

RANGES = [[0, 1], [0, 2], [1, 2]]


@pytest.mark.parametrize(
    ("build", "target"),
    [(models.tiny_llama, "down_proj"), (models.tiny_bert_classifier, "query")],
)
def test_repeated_layers_answer_and_save_as_in_peft(
    tmp_path: Path, build: Any, target: str
) -> None:
    ours, theirs = pair(build, r=2, target_modules=[target], layer_replication=RANGES)
    expected = answer(theirs, IDS)
    assert_close(answer(ours, IDS), expected, 1e-6)
    ours.save_pretrained(tmp_path)
    reopened = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert_close(answer(reopened, IDS), expected, 1e-6)
    with pytest.raises(FoldError, match="tied to"):
        ours.merge_adapter()
    bare: Any = ours.unload()
    assert torch.equal(answer(bare, IDS), answer(build(), IDS))
    assert bare.config.num_hidden_layers == 2


def test_layers_that_are_not_there_leave_the_model_as_it_was() -> None:
    model: Any = models.tiny_llama()
    layers = model.model.layers
    for ranges, target in (([[0, 3]], "down_proj"), (RANGES, "nothing")):
        config = lamina.LoraConfig(target_modules=[target], layer_replication=ranges)
        with pytest.raises(TargetError):
            lamina.get_peft_model(model, config)
        assert model.model.layers is layers
        assert model.config.num_hidden_layers == 2
