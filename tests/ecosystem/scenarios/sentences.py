"""sentence-transformers over a tiny BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel

from tests import models
from tests.ecosystem import texts

# What peft says of every adapter after the first.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
SENTENCES = [texts.sentence(row) for row in range(4)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny BERT with a tokenizer, on disk."""
    with models.seeded(0):
        model = BertModel(
            BertConfig(
                vocab_size=models.VOCABULARY,
                hidden_size=models.HIDDEN,
                intermediate_size=2 * models.HIDDEN,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        )
    model.save_pretrained(tmp_path / "base")
    texts.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base: Path) -> SentenceTransformer:
    transformer = Transformer(str(base))
    return SentenceTransformer(modules=[transformer, Pooling(models.HIDDEN)], device="cpu")


def config(**changes: Any) -> Any:
    settings = {"r": 4, "target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    return peft.LoraConfig(**settings | changes)


def test_adapters_are_added_switched_and_deleted(base: Path) -> None:
    model = build(base)
    plain = model.encode(SENTENCES)
    torch.manual_seed(1)
    for name in ("one", "two"):
        model.add_adapter(config(init_lora_weights=False), adapter_name=name)
    assert model.active_adapters() == ["two"]
    two = model.encode(SENTENCES)
    model.set_adapter("one")
    one = model.encode(SENTENCES)
    assert abs(one - two).max() > 1e-3 < abs(one - plain).max()
    assert len(model.get_adapter_state_dict("one")) == 8
    model.disable_adapters()
    assert abs(model.encode(SENTENCES) - plain).max() < 1e-6
    model.enable_adapters()
    assert abs(model.encode(SENTENCES) - one).max() < 1e-6
    model.delete_adapter("two")
    assert model.active_adapters() == ["one"]


def test_its_trainer_trains_the_adapter_which_is_saved_and_loaded(
    base: Path, tmp_path: Path
) -> None:
    model = build(base)
    model.add_adapter(config())
    before = {name: each.clone() for name, each in model.state_dict().items()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=4,
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=texts.rows(
            anchor=texts.sentence, positive=lambda row: texts.sentence(row + 1)
        ),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < found[0] - 0.01
    changed = {
        name for name, each in model.state_dict().items() if not torch.equal(each, before[name])
    }
    assert changed == {name for name in before if ".lora_" in name}
    expected = model.encode(SENTENCES)

    model.save_pretrained(str(tmp_path / "saved"))
    assert list((tmp_path / "saved").rglob("adapter_model.safetensors"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(again.encode(SENTENCES) - expected).max() < 1e-5

    fresh = build(base)
    fresh.load_adapter(str(tmp_path / "saved"))
    assert abs(fresh.encode(SENTENCES) - expected).max() < 1e-5
