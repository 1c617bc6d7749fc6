"""What is refused when the tensors of a file and the adapter in a model don't fit."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamina.config import LoraConfig
from lamina.errors import KeyMismatchError
from lamina.model import PeftModel, get_peft_model, set_peft_model_state_dict
from tests import models
from tests.adapters import (
    fill,
    flags,
    llama_adapter,
    llama_config,
    logits,
    renamed,
    rewrite,
    same,
    weights,
)

ATTENTION = "base_model.model.model.layers"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama_adapter().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refused(path: Path, base: nn.Module | None = None, **options: Any) -> KeyMismatchError:
    """The error of a load, after which the base is as it was."""
    base = models.tiny_llama() if base is None else base
    base.get_parameter(next(iter(flags(base)))).requires_grad_(False)
    before, asked, modules = weights(base), flags(base), [type(m) for m in base.modules()]
    with pytest.raises(KeyMismatchError) as caught:
        PeftModel.from_pretrained(base, path, **options)
    assert same(weights(base), before)
    assert flags(base) == asked
    assert [type(m) for m in base.modules()] == modules
    # And nothing of it stands in the way of another try.
    get_peft_model(base, LoraConfig(target_modules="all-linear"))
    return caught.value


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.", "base_model.model.language_model."),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.layers.", "base_model.model.transformer.h."),
        ("base_model.model.model.", "base_model.model."),
    ],
)
def test_another_prefix_is_refused_with_the_mapping_that_fits(
    saved: Path, old: str, new: str
) -> None:
    renamed(saved, old, new)
    error = refused(saved)
    assert "0 of 8 tensors matched" in error.what
    assert f"has prefix {new.rstrip('.')!r}" in error.what or new.rstrip(".") in error.what
    found = re.search(r"key_mapping=(\{.*\})", error.cure or "")
    assert found is not None
    mapping = ast.literal_eval(found[1])
    model = PeftModel.from_pretrained(models.tiny_llama(), saved, key_mapping=mapping)
    assert torch.equal(logits(model), logits(llama_adapter()))


def drop(part: str) -> Any:
    return lambda file: {key: value for key, value in file.items() if part not in key}


def test_missing_tensors_are_counted_and_named(saved: Path) -> None:
    rewrite(saved, drop("layers.1.self_attn.q_proj"))
    error = refused(saved)
    assert "6 of 8 tensors matched" in error.what
    assert "2 missing, 0 unexpected" in error.what
    assert error.faults == tuple(
        f"the model has, the file lacks: {ATTENTION}.1.self_attn.q_proj.lora_{factor}.weight"
        for factor in "AB"
    )


def test_unexpected_tensors_are_counted_and_named(saved: Path) -> None:
    extra = f"{ATTENTION}.0.self_attn.o_proj.lora_A.weight"
    rewrite(saved, lambda file: {**file, extra: torch.ones(4, 32)})
    error = refused(saved)
    assert "8 of 8 tensors matched" in error.what
    assert "0 missing, 1 unexpected" in error.what
    assert error.faults == (f"the file has, the model lacks: {extra}",)


def test_another_shape_is_refused(saved: Path) -> None:
    error = refused(saved, models.tiny_llama(hidden_size=16, intermediate_size=64))
    assert "8 tensors matched" in error.what
    assert any("[4, 32] in the file and [4, 16] in the model" in fault for fault in error.faults)
    assert "same sizes" in (error.cure or "")


def test_more_layers_than_the_file_knows(saved: Path) -> None:
    error = refused(saved, models.tiny_llama(num_hidden_layers=3))
    assert "4 missing, 0 unexpected" in str(error)


def test_a_model_that_has_none_of_the_targets(saved: Path) -> None:
    error = refused(saved, models.tiny_gpt2())
    assert "hit no module of this model" in error.what


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(models.tiny_bert_classifier(), LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    error = refused(tmp_path, models.tiny_bert_classifier(num_labels=5))
    assert any("classifier.weight is [3, 32]" in fault for fault in error.faults)


def test_one_error_tells_everything(saved: Path) -> None:
    def spoil(file: dict[str, Tensor]) -> dict[str, Tensor]:
        keys = sorted(file)
        file["base_model.model.stray.lora_A.weight"] = file.pop(keys[0])
        file[keys[1]] = torch.ones(3, 3)
        return file

    rewrite(saved, spoil)
    text = str(refused(saved))
    assert "the model has, the file lacks" in text
    assert "the file has, the model lacks: base_model.model.stray" in text
    assert "[3, 3] in the file" in text


def test_not_strict_loads_what_fits_and_says_what_it_left(saved: Path) -> None:
    extra = "base_model.model.stray.lora_A.weight"
    rewrite(saved, lambda file: {**drop("layers.1")(file), extra: torch.ones(2, 2)})
    with pytest.warns(UserWarning, match="4 of 8 tensors loaded, 4 missing, 1 unexpected"):
        model = PeftModel.from_pretrained(models.tiny_llama(), saved, strict=False)
    assert not any(p.is_meta for p in model.parameters())
    whole = llama_adapter()
    ours, theirs = weights(model), weights(whole)
    filled = [name for name in ours if ".lora_" in name and "layers.0" in name]
    assert len(filled) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in filled)
    # What the file doesn't fill begins as a fresh adapter does: without effect, but able to learn.
    fresh = [name for name in ours if ".lora_" in name and "layers.1" in name]
    assert all(bool(ours[name].any()) == (".lora_A." in name) for name in fresh)
    for layer in whole.get_base_model().model.layers[1:]:
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            nn.init.zeros_(projection.lora_B["default"].weight)
    assert torch.equal(logits(model), logits(whole))


def test_not_strict_reports_to_the_caller(saved: Path) -> None:
    rewrite(saved, drop("layers.1"))
    model = llama_adapter()
    with pytest.warns(UserWarning, match="4 missing"):
        report = model.load_adapter(saved, "second", strict=False)
    assert not report.complete
    assert len(report.loaded) == len(report.missing_keys) == 4
    assert all("layers.1" in key for key in report.missing_keys)


def test_shapes_are_skipped_only_when_asked(saved: Path) -> None:
    odd = f"{ATTENTION}.0.self_attn.q_proj.lora_A.weight"
    rewrite(saved, lambda file: {**file, odd: torch.ones(4, 31)})
    refused(saved, strict=False)
    with pytest.warns(UserWarning, match="1 of another shape"):
        model = PeftModel.from_pretrained(
            models.tiny_llama(), saved, strict=False, ignore_mismatched_sizes=True
        )
    assert logits(model).isfinite().all()


def test_a_failed_second_load_leaves_the_first_adapter_as_it_was(saved: Path) -> None:
    model = llama_adapter(seed=3, bias="none")
    model.set_adapter("default", train=["default"])
    before, asked, out = weights(model), flags(model), logits(model)
    rewrite(saved, drop("layers.1"))
    with pytest.raises(KeyMismatchError, match="4 missing"):
        model.load_adapter(saved, "second")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert same(weights(model), before)
    assert flags(model) == asked
    assert torch.equal(logits(model), out)


def test_a_failed_load_into_other_modules_leaves_no_layers_behind(saved: Path) -> None:
    model = get_peft_model(models.tiny_llama(), llama_config(target_modules=["o_proj"]))
    fill(model)
    before = weights(model)
    rewrite(saved, drop("layers.1"))
    with pytest.raises(KeyMismatchError):
        model.load_adapter(saved, "second")
    assert same(weights(model), before)


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    model = llama_adapter()
    before = weights(model)
    state = {
        key.replace(".default.", "."): 2 * value
        for key, value in model.state_dict().items()
        if ".lora_" in key
    }
    del state[min(state)]
    with pytest.raises(KeyMismatchError, match="7 of 8"):
        set_peft_model_state_dict(model, state)
    assert same(weights(model), before)
    report = set_peft_model_state_dict(model, state, strict=False)
    assert len(report.missing_keys) == 1


def test_an_adapter_without_effect_is_pointed_out(tmp_path: Path) -> None:
    get_peft_model(models.tiny_llama(), llama_config()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="all 4 B matrices are zero"):
        model = PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    assert torch.equal(logits(model), logits(models.tiny_llama()))


def test_zero_matrices_are_counted(saved: Path) -> None:
    model = llama_adapter()
    rewrite(
        saved,
        lambda file: {
            k: v.zero_() if "layers.1" in k and "lora_B" in k else v for k, v in file.items()
        },
    )
    report = model.load_adapter(saved, "second")
    assert (len(report.zero_B), report.count_B) == (2, 4)
    assert "2 of 4 B matrices all zero" in str(report)


def test_a_mapping_must_not_bring_two_tensors_under_one_name(saved: Path) -> None:
    rewrite(
        saved,
        lambda file: file | {k.replace("q_proj", "z_proj"): v + 1 for k, v in file.items()},
    )
    error = refused(saved, key_mapping={"z_proj": "q_proj"})
    assert "key_mapping gives 8 tensors" in str(error)
