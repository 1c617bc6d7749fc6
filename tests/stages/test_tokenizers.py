"""The tokenizer of a stage: recorded, and compared where another one is given."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import MismatchWarning, StageError
from lamina.stages import begin_stage, lineage, load, save_stage
from lamina.stages.tokenizers import tokenizer_digest
from tests import models
from tests.stages.chains import fill_trainable, llama_lora, rewrite_record

CHAT, OTHER = "{% for m in messages %}...{% endfor %}", "{{ messages }}"


@dataclass
class Tokenizer:
    """A vocabulary and a chat template, as transformers' tokenizers give them."""

    size: int = 64
    chat_template: Any = None
    changes: Mapping[int, str] = field(default_factory=dict)

    def get_vocab(self) -> dict[str, int]:
        return {self.changes.get(number, f"t{number}"): number for number in range(self.size)}


def stage(path: Path, tokenizer: Any, **given: Any) -> Path:
    model = begin_stage(models.tiny_llama(), name=path.name, config=llama_lora(), **given)
    fill_trainable(model)
    save_stage(model, path, tokenizer=tokenizer)
    return path


def test_what_is_recorded(tmp_path: Path) -> None:
    path = stage(tmp_path / "one", Tokenizer(chat_template=CHAT))
    base = lineage(path).newest.base
    assert base.tokenizer == tokenizer_digest(Tokenizer())
    assert base.tokenizer_size == 64
    assert base.chat_template is not None
    assert (
        base.chat_template
        == lineage(stage(tmp_path / "two", Tokenizer(chat_template=CHAT))).newest.base.chat_template
    )
    none = lineage(stage(tmp_path / "three", Tokenizer())).newest.base
    assert (none.tokenizer_size, none.chat_template) == (64, None)
    bare = lineage(stage(tmp_path / "four", None)).newest.base
    assert (bare.tokenizer, bare.tokenizer_size, bare.chat_template) == (None, None, None)


def test_the_same_tokenizer(tmp_path: Path) -> None:
    path = stage(tmp_path / "one", Tokenizer(chat_template=CHAT))
    load(path, models.tiny_llama(), tokenizer=Tokenizer(chat_template=CHAT))
    load(path, models.tiny_llama())
    load(stage(tmp_path / "two", None), models.tiny_llama(), tokenizer=Tokenizer())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Tokenizer(changes={5: "new"}), "tokens have other ids, or are others"),
        (Tokenizer(changes={5: "t6", 6: "t5"}), "tokens have other ids, or are others"),
        (Tokenizer(size=70, changes={5: "new"}), "tokens have other ids, or are others"),
        (Tokenizer(size=60), "of 64 ids it has 60"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path: Path, given: Tokenizer, words: str) -> None:
    path = stage(tmp_path / "one", Tokenizer())
    with pytest.raises(StageError, match=words) as caught:
        load(path, models.tiny_llama(), tokenizer=given)
    assert "trained with a tokenizer of another vocabulary" in str(caught.value)
    with pytest.raises(StageError, match=words):
        begin_stage(models.tiny_llama(), name="two", parent=path, mode="continue", tokenizer=given)
    load(path, models.tiny_llama(), tokenizer=given, allow_base_mismatch=True)


def test_added_tokens_are_told_and_no_error(tmp_path: Path) -> None:
    path = stage(tmp_path / "one", Tokenizer())
    with pytest.warns(MismatchWarning, match=r"has 2 token\(s\) that it was not trained with"):
        load(path, models.tiny_llama(), tokenizer=Tokenizer(66))
    with pytest.warns(MismatchWarning, match="has 2 token"):
        model = begin_stage(
            models.tiny_llama(), name="two", parent=path, mode="continue", tokenizer=Tokenizer(66)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        # It was told already.
        save_stage(model, tmp_path / "two", tokenizer=Tokenizer(66))
    assert [each.base.tokenizer_size for each in lineage(tmp_path / "two").stages] == [64, 66]
    load(tmp_path / "two", models.tiny_llama(), tokenizer=Tokenizer(66))


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (CHAT, OTHER, "has another chat template than the one that it was trained with"),
        (None, CHAT, "has a chat template, and the one that it was trained with had none"),
        (CHAT, None, "has no chat template, and the one that it was trained with had one"),
        ({"default": CHAT}, {"default": CHAT, "tool": OTHER}, "has another chat template"),
    ],
)
def test_another_chat_template_is_told(tmp_path: Path, before: Any, now: Any, words: str) -> None:
    path = stage(tmp_path / "one", Tokenizer(chat_template=before))
    given = Tokenizer(chat_template=now)
    with pytest.warns(MismatchWarning, match=words) as told:
        load(path, models.tiny_llama(), tokenizer=given)
    assert told[0].filename == __file__
    with pytest.warns(MismatchWarning, match=words):
        model = begin_stage(
            models.tiny_llama(), name="two", parent=path, mode="continue", tokenizer=given
        )
    save_stage(model, tmp_path / "two")
    assert lineage(tmp_path / "two").newest.base.chat_template != (
        lineage(path).newest.base.chat_template
    )


def test_what_is_wrong_after_training_costs_no_training(tmp_path: Path) -> None:
    path = stage(tmp_path / "one", Tokenizer())
    model = begin_stage(models.tiny_llama(), name="two", parent=path, mode="continue")
    with pytest.warns(MismatchWarning, match="another vocabulary"):
        save_stage(model, tmp_path / "two", tokenizer=Tokenizer(changes={5: "new"}))
    assert lineage(tmp_path / "two").newest.base.tokenizer_size == 64


def test_a_stage_without_a_tokenizer_is_compared_by_the_one_before(tmp_path: Path) -> None:
    path = stage(tmp_path / "one", Tokenizer())
    stage(tmp_path / "two", None, parent=path, mode="stack")
    with pytest.raises(StageError, match="another vocabulary"):
        load(tmp_path / "two", models.tiny_llama(), tokenizer=Tokenizer(changes={5: "new"}))


def test_a_record_of_an_earlier_version(tmp_path: Path) -> None:
    path = stage(tmp_path / "one", Tokenizer(chat_template=CHAT))

    def as_before(record: Any) -> None:
        for key in ("tokenizer_size", "chat_template"):
            record["stages"][-1]["base"].pop(key)

    rewrite_record(path, as_before)
    load(path, models.tiny_llama(), tokenizer=Tokenizer())
    with pytest.raises(StageError, match="another vocabulary"):
        load(path, models.tiny_llama(), tokenizer=Tokenizer(66))


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="A dict was given where a tokenizer is wanted"):
        begin_stage(models.tiny_llama(), name="one", config=llama_lora(), tokenizer={})


def test_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    def build() -> PreTrainedTokenizerFast:
        words = {f"t{number}": number for number in range(60)}
        return PreTrainedTokenizerFast(tokenizer_object=Fast(WordLevel(words, unk_token="t0")))

    path = stage(tmp_path / "one", build())
    assert lineage(path).newest.base.tokenizer_size == 60
    build().save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    load(path, models.tiny_llama(), tokenizer=again)
    again.add_special_tokens({"pad_token": "<pad>"})
    again.add_tokens(["<think>"])
    with pytest.warns(MismatchWarning, match="has 2 token"):
        load(path, models.tiny_llama(), tokenizer=again)
