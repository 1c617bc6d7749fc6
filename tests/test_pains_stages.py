"""What goes wrong elsewhere with adapters on top of adapters, and what happens here instead."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file

from lamina import begin_stage, lineage, load, verify
from lamina.model import PeftModel
from tests import models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    answer,
    config_of,
    distance,
    fill_trainable,
    llama_lora,
    metadata_of,
    open_with_peft,
    requires_grad,
    run_stage,
    tensors_of,
)

SFT = llama_lora(r=4, lora_alpha=8)
DPO = llama_lora(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])


@pytest.fixture
def dpo(tmp_path: Path) -> tuple[PeftModel, Path]:
    run_stage(tmp_path / "sft", SFT)
    return run_stage(tmp_path / "dpo", DPO, parent=tmp_path / "sft", mode="stack"), tmp_path / "dpo"


# --- row 4: nobody knows which adapters make up the final model ---------------------------------


def test_elsewhere_the_parent_is_forgotten_at_inference(
    tmp_path: Path, dpo: tuple[PeftModel, Path]
) -> None:
    expected = answer(dpo[0])
    # The widespread way: a second adapter over the first, saved by itself.
    model = peft.PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "sft"))
    model.add_adapter(
        "dpo", peft.LoraConfig(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])
    )
    own = dict(dpo[0].named_parameters())
    for name, parameter in model.named_parameters():
        if ".dpo." in name:
            parameter.data.copy_(own[name])
    model.base_model.set_adapter(["default", "dpo"])
    assert distance(answer(model.eval()), expected) < 1e-6
    model.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["dpo"])
    alone = open_with_peft(tmp_path / "theirs" / "dpo")
    assert distance(answer(alone), expected) > 1e-2


def test_the_chain_is_in_the_file(tmp_path: Path, dpo: tuple[PeftModel, Path]) -> None:
    model, path = dpo
    shutil.rmtree(tmp_path / "sft")
    moved = path.rename(tmp_path / "anywhere")
    assert distance(answer(load(moved, models.tiny_llama())), answer(model)) < 1e-6
    assert distance(answer(open_with_peft(moved)), answer(model)) < 1e-6
    record = lineage(moved)
    assert [(stage.name, stage.mode) for stage in record.stages] == [
        ("sft", "fresh"),
        ("dpo", "stack"),
    ]
    ranks = [lamina.ranks for lamina in record.laminae]
    v_proj = "model.layers.0.self_attn.v_proj"
    assert [each[v_proj] for each in ranks] == [4, 6]
    # The older stage can be taken up again out of the newer one's file.
    again = begin_stage(models.tiny_llama(), name="kto", parent=moved, mode="continue")
    assert again.active_adapters == ["sft", "kto"]
    assert distance(answer(again), answer(model)) < 1e-6


# --- row 5: a frozen first adapter under a trainable second -------------------------------------


def test_the_second_trains_over_the_frozen_first(tmp_path: Path) -> None:
    first = run_stage(tmp_path / "sft", SFT)
    model = begin_stage(
        models.tiny_llama(), name="dpo", parent=tmp_path / "sft", mode="stack", config=DPO
    )
    assert model.active_adapters == ["sft", "dpo"]
    assert all(".dpo." in name for name in requires_grad(model))
    assert len(requires_grad(model)) == 8
    assert torch.equal(answer(model), answer(first))
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name in requires_grad(model) if "lora_B" in name}


# --- row 6: a stack can't be served, since servers take one adapter -----------------------------


def test_a_stack_opens_as_one_plain_lora(dpo: tuple[PeftModel, Path]) -> None:
    model, path = dpo
    assert {file.name for file in path.iterdir()} == {CONFIG, WEIGHTS}
    opened = open_with_peft(path)
    assert list(opened.peft_config) == ["default"]
    assert distance(answer(opened), answer(model)) < 1e-6
    config = config_of(path)
    assert config["r"] == 10
    assert config["rank_pattern"] == {"o_proj": 6, "q_proj": 4}
    # Some servers read the global numbers only: every module has the same scaling.
    tensors = tensors_of(path)
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
            rank = len(a)
            by_name = [p for p in config["rank_pattern"] if module.endswith(p)]
            assert rank == (config["rank_pattern"][by_name[0]] if by_name else config["r"])
            alpha = config["alpha_pattern"][by_name[0]] if by_name else config["lora_alpha"]
            assert math.isclose(alpha / rank, config["lora_alpha"] / config["r"])
            assert tensors[key.replace("lora_A", "lora_B")].shape[1] == rank


def test_a_stack_folds_into_one_plain_model(dpo: tuple[PeftModel, Path]) -> None:
    model, path = dpo
    merged = load(path, models.tiny_llama()).merge_and_unload()
    assert distance(answer(merged), answer(model)) < 1e-5
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_saving_an_adapter_by_its_name_is_not_a_stage(tmp_path: Path) -> None:
    model = begin_stage(models.tiny_llama(), name="one", config=SFT)
    fill_trainable(model)
    model.save_pretrained(tmp_path / "plain", selected_adapters=["one"])
    model.save_pretrained(tmp_path / "stage")
    assert [stage.name for stage in lineage(tmp_path / "stage").stages] == ["one"]
    assert [s.name for s in lineage(tmp_path / "plain" / "one").stages] == ["imported"]


# --- row 8: what was merged answers otherwise, and nobody is told --------------------------------


def test_elsewhere_an_adapter_is_laid_over_a_base_that_has_it(dpo: tuple[PeftModel, Path]) -> None:
    merged = load(dpo[1], models.tiny_llama()).merge_and_unload()
    again = open_with_peft(dpo[1], build=lambda: merged)
    assert distance(answer(again), answer(dpo[0])) > 1e-2


def test_verify_reports_the_figures_and_fails_above_a_tolerance(
    dpo: tuple[PeftModel, Path],
) -> None:
    model, path = dpo
    honest = verify(path, models.tiny_llama())
    assert honest.proved
    merged = load(path, models.tiny_llama()).merge_and_unload()
    report = verify(path, merged)
    assert not report.passed
    assert [cause.kind for cause in report.causes] == ["base already merged"]
    for found, passed in ((honest.answers, True), (report.answers, False)):
        assert found is not None
        assert found.kl is not None
        assert found.top1_agreement is not None
        assert found.tolerance is not None
        assert found.passed == passed == (found.max_difference <= found.tolerance)
    # The tolerance is as many roundings of the largest logit as there are blocks, at the root.
    asked = torch.tensor([path_tokens(path)])
    with torch.no_grad():
        largest = float(model(input_ids=asked).logits.abs().max())
    assert honest.answers is not None
    assert honest.answers.tolerance == pytest.approx(8 * 2**-17 * math.sqrt(3) * largest, rel=1e-5)


def path_tokens(path: Path) -> tuple[int, ...]:
    probe = lineage(path).newest.probe
    assert probe is not None
    return probe.tokens


# --- row 1: an adapter loads and does nothing ----------------------------------------------------


def test_an_adapter_that_does_nothing_fails_verification(
    tmp_path: Path, dpo: tuple[PeftModel, Path]
) -> None:
    path = shutil.copytree(dpo[1], tmp_path / "empty")
    tensors = {k: v * 0 if "lora_B" in k else v for k, v in tensors_of(path).items()}
    save_file(tensors, path / WEIGHTS, metadata=metadata_of(dpo[1]))
    # Elsewhere it opens without a word, and is the base.
    there = open_with_peft(path)
    assert torch.equal(answer(there), answer(models.tiny_llama()))
    report = verify(path, models.tiny_llama())
    assert not report.passed
    assert [cause.kind for cause in report.causes] == ["adapter not applied"]
