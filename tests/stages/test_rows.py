"""Rows of tables through chains of stages: new tokens cost their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.errors import StageError
from lamina.stages import begin_stage, lineage, load, save_stage
from lamina.stages.rows import tables
from tests import models
from tests.stages.chains import (
    Snapshot,
    answer,
    config_of,
    distance,
    fill_trainable,
    llama_lora,
    open_with_peft,
    run_chain,
    run_stage,
    save_plain_peft,
    tensors_of,
)

EMBED = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
ROWS = [3, 9]


def with_rows(rows: Any = None, **changes: Any) -> LoraConfig:
    return llama_lora(trainable_token_indices=rows or {"embed_tokens": ROWS}, **changes)


def check(model: nn.Module, path: Path, build: Any = models.tiny_llama) -> None:
    expected = answer(model)
    assert distance(answer(load(path, build())), expected) < 1e-5
    assert distance(answer(open_with_peft(path, build)), expected) < 1e-5


def own_rows(model: Any, adapter: str, table: str = "model.embed_tokens") -> torch.Tensor:
    return tables(model.get_base_model())[table].rows(adapter).detach().clone()


@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_a_parents_rows_stay_under_a_stage_without_any(tmp_path: Path, mode: str) -> None:
    first = run_stage(tmp_path / "one", with_rows())
    model = run_stage(tmp_path / "two", llama_lora(r=3), parent=tmp_path / "one", mode=mode)
    record = lineage(tmp_path / "two")
    assert record.token_rows == {"model.embed_tokens": {"one": (3, 9)}}
    assert config_of(tmp_path / "two")["trainable_token_indices"] == {"model.embed_tokens": ROWS}
    assert torch.equal(tensors_of(tmp_path / "two")[EMBED], own_rows(first, "one"))
    check(model, tmp_path / "two")


@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_a_stage_takes_rows_over_and_the_others_stay(tmp_path: Path, mode: str) -> None:
    first = run_stage(tmp_path / "one", with_rows())
    before = own_rows(first, "one")
    config = with_rows({"embed_tokens": [12, 9], "lm_head": [5]}, r=3)
    model = begin_stage(
        models.tiny_llama(), name="two", parent=tmp_path / "one", mode=mode, config=config
    ).eval()
    # The row that both train begins as the parent left it, the other as the base has it.
    base = models.tiny_llama().get_input_embeddings().weight.detach()
    assert torch.equal(own_rows(model, "two"), torch.stack([base[12], before[1]]))
    assert distance(answer(model), answer(load(tmp_path / "one", models.tiny_llama()))) < 1e-6
    fill_trainable(model, seed=3)
    save_stage(model, tmp_path / "two")
    assert lineage(tmp_path / "two").token_rows == {
        "model.embed_tokens": {"one": (3,), "two": (9, 12)},
        "lm_head": {"two": (5,)},
    }
    after = own_rows(model, "two")
    saved = tensors_of(tmp_path / "two")
    assert torch.equal(saved[EMBED], torch.stack([before[0], after[1], after[0]]))
    assert torch.equal(saved[HEAD], own_rows(model, "two", "lm_head"))
    check(model, tmp_path / "two")


def test_continue_trains_the_newest_rows_on(tmp_path: Path) -> None:
    model, path = run_chain(
        tmp_path,
        [
            ("one", None, with_rows()),
            ("two", "stack", with_rows({"embed_tokens": [20]}, r=3)),
            ("three", "continue", None),
        ],
    )
    assert lineage(path).token_rows == {"model.embed_tokens": {"one": (3, 9), "three": (20,)}}
    saved = tensors_of(path)[EMBED]
    assert torch.equal(saved[:2], tensors_of(tmp_path / "one")[EMBED])
    assert torch.equal(saved[2:], own_rows(model, "three"))
    assert not torch.equal(saved[2:], tensors_of(tmp_path / "two")[EMBED][2:])
    check(model, path)


def test_a_plain_adapter_of_peft_as_the_parent(tmp_path: Path) -> None:
    settings = {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [9, 3],
        "task_type": "CAUSAL_LM",
    }
    expected = save_plain_peft(tmp_path / "plain", settings)
    model = begin_stage(
        models.tiny_llama(),
        name="two",
        parent=tmp_path / "plain",
        mode="stack",
        config=with_rows({"embed_tokens": [9]}, r=2),
    ).eval()
    assert distance(answer(model), expected) < 1e-6
    fill_trainable(model, seed=1)
    save_stage(model, tmp_path / "two")
    assert lineage(tmp_path / "two").token_rows == {
        "model.embed_tokens": {"imported": (3,), "two": (9,)}
    }
    check(model, tmp_path / "two")


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_cost_their_rows_and_the_base_grows_again(tmp_path: Path, tied: bool) -> None:
    def base() -> Any:
        return models.tiny_llama(tie_word_embeddings=tied)

    new = [models.VOCABULARY, models.VOCABULARY + 1]

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=torch.tensor([[1, *new, 5]])).logits

    def grown() -> Any:
        model = base()
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
        return model

    rows = {"embed_tokens": new} if tied else {"embed_tokens": new, "lm_head": new}
    first = run_stage(tmp_path / "one", with_rows(rows), build=grown)
    table = (new[-1] + 1) * models.HIDDEN
    saved = tensors_of(tmp_path / "one")
    assert sum(x.numel() for key, x in saved.items() if "tokens" in key) < table / 4
    # A base with the old vocabulary: every way to open the stage gives it its rows back.
    assert torch.equal(logits(load(tmp_path / "one", base())), logits(first))
    second = run_stage(
        tmp_path / "two", llama_lora(r=2), parent=tmp_path / "one", mode="stack", build=base
    )
    assert second.config.vocab_size == new[-1] + 1
    assert lineage(tmp_path / "two").newest.base.vocab_size == new[-1] + 1
    assert distance(logits(load(tmp_path / "two", base())), logits(second)) < 1e-6


def test_a_stage_that_can_not_be_begun_leaves_the_vocabulary_as_it_was(tmp_path: Path) -> None:
    def grown() -> Any:
        model = models.tiny_llama()
        model.resize_token_embeddings(models.VOCABULARY + 1, mean_resizing=False)
        return model

    new = [models.VOCABULARY]
    run_stage(tmp_path / "one", with_rows({"embed_tokens": new, "lm_head": new}), build=grown)
    base = models.tiny_llama()
    before = Snapshot(base)
    with pytest.raises(StageError, match="already has a stage"):
        begin_stage(base, name="one", parent=tmp_path / "one", mode="stack", config=llama_lora(r=2))
    before.check()
    assert base.config.vocab_size == models.VOCABULARY


def test_a_checkpoint_is_resumed_with_its_rows(tmp_path: Path) -> None:
    def begun() -> Any:
        return begin_stage(
            models.tiny_llama(),
            name="two",
            parent=tmp_path / "one",
            mode="stack",
            config=with_rows({"embed_tokens": [4, 9]}, r=2),
        ).eval()

    run_stage(tmp_path / "one", with_rows())
    model = begun()
    fill_trainable(model, seed=5)
    model.save_pretrained(tmp_path / "checkpoint-1")
    again = begun()
    again.load_adapter(tmp_path / "checkpoint-1", "two", is_trainable=True)
    assert torch.equal(own_rows(again, "two"), own_rows(model, "two"))
    assert torch.equal(answer(again), answer(model))


def test_ranks_and_rows_in_one_table_are_refused(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", with_rows())
    base = models.tiny_llama()
    before = Snapshot(base)
    with pytest.raises(StageError, match="rows of its own and a low-rank update"):
        begin_stage(
            base,
            name="two",
            parent=tmp_path / "one",
            mode="stack",
            config=llama_lora(target_modules=["embed_tokens"]),
        )
    before.check()


def test_rows_that_the_record_contradicts_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from lamina.errors import RecordError
    from tests.stages.chains import WEIGHTS, metadata_of

    run_stage(tmp_path / "one", with_rows())
    tensors, metadata = tensors_of(tmp_path / "one"), metadata_of(tmp_path / "one")
    tensors[EMBED] = tensors[EMBED][:1].clone()
    save_file(tensors, tmp_path / "one" / WEIGHTS, metadata=metadata)
    with pytest.raises(RecordError, match="1 replaced rows in the file, 2 in the record"):
        load(tmp_path / "one", models.tiny_llama())
