"""TRL's trainers with a reference: the base with its adapters off, or an adapter of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import lamina
from tests import models
from tests.adapters import fill
from tests.ecosystem import texts
from tests.ecosystem.kept import answer, keep
from tests.ecosystem.scenarios.tuning import SETTINGS, adapted, config, losses

# TRL's settings set what newer releases of transformers call activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

ways = pytest.mark.parametrize("how", ["config", "peft", "native"])
KINDS = {
    "dpo": (DPOTrainer, DPOConfig, texts.preferences),
    "kto": (KTOTrainer, KTOConfig, texts.judged),
}


def trainer_for(kind: str, model: Any, folder: Path, **given: Any) -> Any:
    trainer, settings, rows = KINDS[kind]
    return trainer(
        model=model,
        args=settings(output_dir=str(folder), max_length=32, **SETTINGS),
        train_dataset=rows(),
        processing_class=texts.tokenizer(),
        **given,
    )


def check(trainer: Any, kind: str) -> None:
    """Policy and reference are equal at first: DPO begins at log 2, KTO at a half; both fall."""
    assert losses(trainer)[0] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[kind], abs=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.005


def tensors(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    named = model.state_dict()
    return {name: each.clone() for name, each in named.items() if f".{adapter}." in name}


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.ecosystem)])
def test_the_base_is_the_reference_of_a_fresh_adapter(kind: str, tmp_path: Path) -> None:
    trainer = trainer_for(kind, models.tiny_llama(), tmp_path, peft_config=config())
    trainer.train()
    assert "ref" not in trainer.model.peft_config
    check(trainer, kind)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(answer(trainer.model), answer(models.tiny_llama()))
    keep(tmp_path / "checkpoint-4", "llama", answer(trainer.model))


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.ecosystem)])
@pytest.mark.parametrize("how", ["peft", "native"])
def test_a_frozen_copy_is_the_reference_of_an_adapted_model(
    kind: str, how: str, tmp_path: Path
) -> None:
    model, _ = adapted(how, models.tiny_llama())
    fill(model, size=0.05)
    before = tensors(model, "default")
    trainer = trainer_for(kind, model, tmp_path)
    trainer.train()
    check(trainer, kind)
    assert list(model.active_adapters) == ["default"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(before)
    for name, tensor in before.items():
        assert torch.equal(tensors(model, "ref")[name.replace(".default.", ".ref.")], tensor)
        assert not torch.equal(tensors(model, "default")[name], tensor)
    checkpoint = tmp_path / "checkpoint-4"
    for directory, adapter in ((checkpoint, "default"), (checkpoint / "ref", "ref")):
        again = peft.PeftModel.from_pretrained(models.tiny_llama(), directory)
        model.set_adapter(adapter)
        torch.testing.assert_close(answer(again), answer(model))
        keep(directory, "llama", answer(model))


@pytest.mark.ecosystem
@ways
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_references_computed_ahead(kind: str, how: str, tmp_path: Path) -> None:
    model, peft_config = adapted(how, models.tiny_llama())
    trainer, settings, rows = KINDS[kind]
    run = trainer(
        model=model,
        args=settings(
            output_dir=str(tmp_path), max_length=32, precompute_ref_log_probs=True, **SETTINGS
        ),
        train_dataset=rows(),
        processing_class=texts.tokenizer(),
        peft_config=peft_config,
    )
    run.train()
    check(run, kind)


@pytest.mark.ecosystem
@pytest.mark.parametrize("mode", ["stack", "merge"])
def test_dpo_as_a_stage_against_its_parent(mode: str, tmp_path: Path) -> None:
    own = config(lamina.LoraConfig)
    parent = lamina.begin_stage(models.tiny_llama(), name="sft", config=own)
    fill(parent, "sft", size=0.05)
    lamina.save_stage(parent, tmp_path / "sft")
    model = lamina.begin_stage(
        models.tiny_llama(), name="dpo", parent=tmp_path / "sft", mode=mode, config=own
    )
    # TRL's own choice, a copy of an adapter named "default", would leave the parent out.
    reference = lamina.load(tmp_path / "sft", models.tiny_llama()).merge_and_unload()
    trainer = trainer_for("dpo", model, tmp_path, ref_model=reference)
    trainer.train()
    check(trainer, "dpo")
    checkpoint = tmp_path / "checkpoint-4"
    assert [stage.name for stage in lamina.lineage(checkpoint).stages] == ["sft", "dpo"]
    keep(checkpoint, "llama", answer(model))
