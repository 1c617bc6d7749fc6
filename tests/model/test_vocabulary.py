"""Adapters of models whose vocabulary was resized: small files that bring the base to its size."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lamina
from lamina.errors import CheckpointError, KeyMismatchError, MismatchWarning
from tests import models
from tests.adapters import WEIGHTS, fill, flags, llama_config, same, weights

NEW = list(range(models.VOCABULARY, models.VOCABULARY + 6))
BOTH = {"embed_tokens": NEW, "lm_head": NEW}


def resized(**changes: Any) -> LlamaForCausalLM:
    """A base with six more rows."""
    base = models.tiny_llama(**changes)
    with models.seeded(5):
        base.resize_token_embeddings(NEW[-1] + 1, mean_resizing=False)
    return base


def answer(model: nn.Module) -> Tensor:
    ids = torch.tensor([[3, NEW[0], 9, NEW[-1]]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def saved(path: Path, base: nn.Module, **config: Any) -> Tensor:
    """Save a filled adapter; returns what it answers."""
    model = lamina.get_peft_model(base, llama_config(**config))
    fill(model)
    model.eval().save_pretrained(path)
    return answer(model)


def test_the_new_rows_alone_are_stored_and_the_size_is_told(tmp_path: Path) -> None:
    saved(tmp_path, resized(), trainable_token_indices=BOTH)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        rows = {key: file.get_slice(key).get_shape() for key in file.keys() if "delta" in key}  # noqa: SIM118
        assert json.loads(file.metadata()["lamina_vocabulary"]) == {"size": 70}
    assert list(rows.values()) == [[6, models.HIDDEN]] * 2


@pytest.mark.parametrize("tied", [False, True])
def test_loading_resizes_the_base(tied: bool, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": tied}
    indices = NEW if tied else BOTH
    wanted = saved(tmp_path, resized(**changes), trainable_token_indices=indices)
    for opened in (
        lamina.PeftModel.from_pretrained(models.tiny_llama(**changes), tmp_path),
        lamina.load(tmp_path, models.tiny_llama(**changes)),
    ):
        assert opened.config.vocab_size == 70
        torch.testing.assert_close(answer(opened), wanted, rtol=0, atol=1e-6)
    # A base that is large enough is left as it is, and the real peft opens the file over it.
    again = lamina.PeftModel.from_pretrained(resized(**changes), tmp_path)
    torch.testing.assert_close(answer(again), wanted, rtol=0, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(resized(**changes), str(tmp_path)).eval()
    torch.testing.assert_close(answer(theirs), wanted, rtol=0, atol=1e-6)


def test_whole_tables_resize_too(tmp_path: Path) -> None:
    base = resized()
    model = lamina.begin_stage(
        base, name="one", config=llama_config(modules_to_save=["embed_tokens", "lm_head"])
    )
    fill(model, "one")
    lamina.save_stage(model, tmp_path)
    opened = lamina.load(tmp_path, models.tiny_llama())
    torch.testing.assert_close(answer(opened), answer(model.eval()), rtol=0, atol=1e-6)


def test_rows_that_are_not_in_the_file_are_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, resized(), trainable_token_indices=NEW)
    base = models.tiny_llama()
    before = weights(base), flags(base)
    with pytest.raises(CheckpointError, match="trained with a vocabulary of 70") as caught:
        lamina.PeftModel.from_pretrained(base, tmp_path)
    assert caught.value.faults == ("lm_head: 6 of the 6 new rows are not in the file",)
    assert "resize_token_embeddings(70)" in (caught.value.cure or "")
    assert same(weights(base), before[0])
    assert flags(base) == before[1]
    # The cure, with the head's rows as they were.
    assert lamina.PeftModel.from_pretrained(resized(), tmp_path)


def staged(path: Path, **config: Any) -> Tensor:
    """Save a stage over a tied base of six more rows; returns what it answers."""
    base = resized(tie_word_embeddings=True)
    model = lamina.begin_stage(base, name="one", config=llama_config(**config))
    fill(model, "one")
    lamina.save_stage(model, path)
    return answer(model.eval())


def test_a_tied_head_keeps_its_own_rows_where_the_embedding_is_trained_whole(
    tmp_path: Path,
) -> None:
    wanted = staged(tmp_path, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError) as caught:
        lamina.load(tmp_path, models.tiny_llama(tie_word_embeddings=True))
    assert caught.value.faults == ("lm_head: 6 of the 6 new rows are not in the file",)
    opened = lamina.load(tmp_path, resized(tie_word_embeddings=True))
    torch.testing.assert_close(answer(opened), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tied", "config", "lacking"),
    [
        (False, {}, ("model.embed_tokens", "lm_head")),
        (False, {"trainable_token_indices": NEW}, ("lm_head",)),
        (True, {"modules_to_save": ["embed_tokens"]}, ("lm_head",)),
        (False, {"trainable_token_indices": BOTH}, ()),
        (True, {"trainable_token_indices": NEW}, ()),
    ],
)
def test_saving_tells_of_new_rows_that_are_not_in_the_file(
    tied: bool, config: dict[str, Any], lacking: tuple[str, ...], tmp_path: Path
) -> None:
    models.tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(NEW[-1] + 1, mean_resizing=False)
    model = lamina.begin_stage(base, name="one", config=llama_config(**config))
    fill(model, "one")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lamina.save_stage(model, tmp_path / "one")
    told = [str(each.message) for each in caught if each.category is MismatchWarning]
    assert len(told) == len(lacking)
    for name, message in zip(lacking, told, strict=True):
        assert f"{name}: 6 of the 6 rows by which the base was resized" in message


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": NEW},
    ],
)
def test_a_tied_head_is_in_the_file_where_it_is_trained_too(
    config: dict[str, Any], tmp_path: Path
) -> None:
    wanted = staged(tmp_path, **config)
    opened = lamina.load(tmp_path, models.tiny_llama(tie_word_embeddings=True))
    torch.testing.assert_close(answer(opened), wanted, rtol=0, atol=1e-6)


def test_the_base_gets_its_own_size_back_if_loading_fails(tmp_path: Path) -> None:
    saved(tmp_path, resized(), trainable_token_indices=BOTH)
    base = models.tiny_llama(hidden_size=16)
    before = weights(base), flags(base)
    with pytest.raises(KeyMismatchError):
        lamina.PeftModel.from_pretrained(base, tmp_path)
    assert base.config.vocab_size == models.VOCABULARY
    assert same(weights(base), before[0])
    assert flags(base) == before[1]


def test_an_adapted_embedding_of_another_size_says_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path, resized(), target_modules=["embed_tokens"])
    with pytest.raises(KeyMismatchError, match=r"resize_token_embeddings\(70\) first"):
        lamina.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)


class Words:
    """All of a tokenizer that is looked at."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def test_a_stage_knows_its_tokenizer(tmp_path: Path) -> None:
    model = lamina.begin_stage(models.tiny_llama(), name="one", config=llama_config())
    fill(model, "one")
    record = lamina.save_stage(model, tmp_path, tokenizer=Words("a", "b"))
    assert record.newest.base.vocab_size == models.VOCABULARY
    assert lamina.lineage(tmp_path) == record
    assert len(record.newest.base.tokenizer or "") == 64
    assert lamina.load(tmp_path, models.tiny_llama(), tokenizer=Words("a", "b"))
    assert lamina.load(tmp_path, models.tiny_llama())
    with pytest.raises(lamina.StageError, match="another base") as caught:
        lamina.load(tmp_path, models.tiny_llama(), tokenizer=Words("b", "a"))
    assert "tokenizer of another vocabulary" in caught.value.faults[0]
    with pytest.raises(lamina.StageError, match="where a tokenizer is wanted"):
        lamina.save_stage(model, tmp_path, tokenizer="gpt2")
    # Without one the record is as it ever was.
    assert lamina.save_stage(model, tmp_path).newest.base.tokenizer is None
