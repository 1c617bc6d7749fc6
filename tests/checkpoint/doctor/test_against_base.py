"""Checks against a base: each finding on a base that doesn't fit, none on the one that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lamina
from lamina.checkpoint.doctor import Examination, Finding, examine
from tests import models
from tests.checkpoint.doctor.made import WEIGHTS, Parts, key, plain
from tests.stages.chains import fill_trainable, llama_lora, run_chain, run_stage


def codes(found: Examination) -> list[str]:
    return [code for code in found.codes() if not code.startswith(("vllm", "probe"))]


def only(found: Examination, code: str) -> Finding:
    (finding,) = [each for each in found.findings if each.code == code]
    assert finding.what
    assert finding.cure
    return finding


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "small"
    models.tiny_llama().save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    path = plain(layers=2).write(tmp_path / "adapter")
    assert codes(examine(path, base=base)) == []
    return path


def changed(change: Callable[[Parts], object], path: Path) -> Path:
    parts = plain(layers=2)
    change(parts)
    return parts.write(path)


def renamed(old: str, new: str) -> Callable[[Parts], object]:
    def change(parts: Parts) -> None:
        parts.tensors = {name.replace(old, new): t for name, t in parts.tensors.items()}

    return change


def test_names_of_another_wrapper_of_the_same_model(adapter: Path, base: Path) -> None:
    changed(renamed("model.layers", "model.language_model.layers"), adapter)
    found = examine(adapter, base=base)
    unplaced = only(found, "keys-match-nothing")
    assert unplaced.what.startswith("No tensor of the file has a place")
    assert "key_mapping=" in unplaced.cure
    assert "language_model" in unplaced.cure
    assert only(found, "keys-missing").severity == "error"


def test_layers_that_the_base_lacks(adapter: Path, base: Path) -> None:
    plain(layers=3).write(adapter)
    found = examine(adapter, base=base)
    assert len(only(found, "keys-match-nothing").where) == 4
    assert all("layers.2." in key for key in only(found, "keys-match-nothing").where)


def test_modules_that_the_file_lacks(adapter: Path, base: Path) -> None:
    parts = plain(layers=2)
    for side in "AB":
        del parts.tensors[key(1, "v_proj", side)]
    parts.write(adapter)
    assert len(only(examine(adapter, base=base), "keys-missing").where) == 2
    parts.config["target_modules"] = ["q_proj", "v_proj", "o_proj"]
    parts.write(adapter)
    assert len(only(examine(adapter, base=base), "keys-missing").where) == 6


def test_shapes_that_dont_fit(adapter: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    models.tiny_llama(hidden_size=64).save_pretrained(wide)
    found = examine(adapter, base=wide)
    assert len(only(found, "shapes-dont-fit").where) == 8
    assert "8x32 instead of 8x64" in only(found, "shapes-dont-fit").where[0]


def test_patterns_that_match_nothing_there(adapter: Path, base: Path) -> None:
    changed(lambda parts: parts.config.update(exclude_modules=["q_prj"]), adapter)
    assert (
        "nearest: 'q_proj'" in only(examine(adapter, base=base), "pattern-matches-nothing").where[0]
    )


def test_targets_of_another_kind_of_model(adapter: Path, tmp_path: Path) -> None:
    models.tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    found = examine(adapter, base=tmp_path / "gpt2")
    assert only(found, "keys-match-nothing").severity == "error"
    changed(lambda parts: parts.config.update(target_modules=["q_proj", "drop"]), adapter)
    found = examine(adapter, base=tmp_path / "gpt2")
    assert "check-failed" not in found.codes()


def test_a_base_that_is_none(adapter: Path, tmp_path: Path) -> None:
    found = examine(adapter, base=tmp_path)
    assert only(found, "base-unreadable").severity == "error"


def test_a_base_whose_class_is_unknown(adapter: Path, base: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    models.tiny_llama().save_pretrained(strange)
    (strange / "config.json").write_text('{"model_type": "never_heard_of"}')
    found = examine(adapter, base=strange)
    assert only(found, "base-structure-unknown").severity == "note"
    assert "keys-match-nothing" not in found.codes()
    changed(renamed("self_attn", "attention"), adapter)
    assert only(examine(adapter, base=strange), "keys-match-nothing").severity == "warning"


# --- tables --------------------------------------------------------------------------------------


def save_over(model: Any, path: Path, **config: Any) -> Path:
    adapted = lamina.get_peft_model(model, llama_lora(**config))
    fill_trainable(adapted)
    adapted.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_tied_weights_that_come_apart(config: dict[str, Any], tmp_path: Path) -> None:
    for name, tied in (("tied", True), ("untied", False)):
        models.tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / name)
        path = save_over(
            models.tiny_llama(tie_word_embeddings=tied), tmp_path / f"on_{name}", **config
        )
        found = examine(path, base=tmp_path / name)
        assert ("tied-weights" in found.codes("warning")) == tied


def test_a_vocabulary_that_has_grown(base: Path, tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    path = save_over(model, tmp_path / "table", target_modules=["embed_tokens", "q_proj"])
    found = only(examine(path, base=base), "vocabulary-grown")
    assert found.severity == "error"
    assert "resize_token_embeddings(70)" in found.cure
    assert "shapes-dont-fit" not in examine(path, base=base).codes()


def test_new_rows_that_the_file_brings(base: Path, tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.resize_token_embeddings(66, mean_resizing=False)
    path = save_over(model, tmp_path / "rows", trainable_token_indices={"embed_tokens": [64, 65]})
    found = examine(path, base=base)
    assert only(found, "vocabulary-grown").severity == "note"
    assert found.healthy


def test_tables_that_are_the_bases_own(adapter: Path, base: Path) -> None:
    parts = plain(layers=2)
    own = models.tiny_llama().model.embed_tokens.weight.detach()
    name = "base_model.model.model.embed_tokens.weight"
    parts.tensors[name] = own.clone()
    parts.write(adapter)
    found = only(examine(adapter, base=base), "base-weights-copied")
    assert (found.severity, found.where) == ("note", (name,))
    parts.tensors[name][0, 0] += 1
    parts.write(adapter)
    assert "base-weights-copied" not in examine(adapter, base=base).codes()


def test_another_dtype_than_the_bases(adapter: Path, tmp_path: Path) -> None:
    models.tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    found = only(examine(adapter, base=tmp_path / "half"), "dtype-unlike-base")
    assert (found.severity, found.what) == (
        "note",
        "The adapter is stored in float32, the base in bfloat16",
    )


# --- weights on record ---------------------------------------------------------------------------


def test_another_model_of_the_same_shapes(base: Path, tmp_path: Path) -> None:
    _, last = run_chain(tmp_path, [("one", None, llama_lora()), ("two", "stack", llama_lora(r=2))])
    assert "base-differs" not in examine(last, base=base).codes()
    models.tiny_llama(seed=9).save_pretrained(tmp_path / "other")
    found = examine(last, base=tmp_path / "other")
    assert only(found, "base-differs").severity == "error"
    assert only(found, "base-differs").where


def test_a_base_that_the_adapter_is_merged_into_already(base: Path, tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    merged = lamina.load(tmp_path / "one", models.tiny_llama()).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = only(examine(tmp_path / "one", base=tmp_path / "merged"), "base-differs")
    assert found.severity == "error"


def test_another_class_of_model(tmp_path: Path) -> None:
    run_stage(tmp_path / "one", llama_lora())
    from transformers import LlamaModel

    LlamaModel(models.tiny_llama().config).save_pretrained(tmp_path / "body")
    found = examine(tmp_path / "one", base=tmp_path / "body")
    assert only(found, "base-class-differs").severity == "warning"


def test_headers_alone_are_read_of_a_base(adapter: Path, tmp_path: Path) -> None:
    # A base of many gigabytes costs its headers: these files have no values at all.
    hollow = tmp_path / "hollow"
    models.tiny_llama().save_pretrained(hollow)
    weights = {n: torch.zeros(t.shape) for n, t in models.tiny_llama().state_dict().items()}
    save_file(weights, hollow / "model.safetensors")
    assert codes(examine(adapter, base=hollow)) == []
    assert (adapter / WEIGHTS).is_file()
