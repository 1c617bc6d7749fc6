"""Whatever is measured, a model, its tokenizer and all random states are left as they were."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lamina
from lamina.training.evaluate.measuring import measure
from tests import models
from tests.ecosystem import texts
from tests.training.evaluate.asked import prepared, score

PT = {"name": "one", "method": "pt", "datasets": "a.jsonl"}
REWARD = {"name": "two", "method": "reward", "datasets": "a.jsonl", "mode": "stack"}
ANSWERS = [{"prompt": texts.sentence(row), "completion": f" w{row}"} for row in range(5)]


def drawing(completions: Any) -> float:
    """A function that draws, and changes what it can."""
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    return 1.0


def adapted(base: Any) -> Any:
    config = lamina.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = lamina.get_peft_model(base, config)
    model.train()
    # Not all parts of a model need be in one mode.
    model.get_base_model().model.layers[1].eval()
    return model


def states() -> tuple[Any, ...]:
    return (
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("metric", ["loss", "accuracy", "exact_match", "drawing_scores:drawing"])
@pytest.mark.parametrize("head", ["language", "reward"])
def test_nothing_is_changed(
    tmp_path: Path, metric: str, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("drawing_scores")
    module.drawing = drawing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "drawing_scores", module)
    rows = texts.preferences().to_list() if metric == "accuracy" else ANSWERS
    held = prepared(tmp_path, rows, PT, REWARD, metric=metric)
    base: Any = models.tiny_llama()
    if head == "reward":
        from transformers import LlamaForSequenceClassification

        base.config.num_labels = 1
        base = LlamaForSequenceClassification(base.config)
    base.config.use_cache = False
    model, tokenizer = adapted(base), texts.tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    modes = [each.training for each in model.modules()]
    config, generation = base.config.to_dict(), getattr(base, "generation_config", None)
    own = states()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure(held, model, tokenizer, head=head, batch_size=2)
    assert (found is None) == (head == "reward" and metric != "accuracy")
    assert [each.training for each in model.modules()] == modes
    assert base.config.to_dict() == config
    assert getattr(base, "generation_config", None) is generation
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert states() == own
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_has_no_part_in_scores(tmp_path: Path) -> None:
    held = prepared(tmp_path, ANSWERS)
    model = adapted(models.tiny_llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert score(held, model).value == score(held, model.eval()).value


def test_a_stage_is_measured_with_its_adapter(tmp_path: Path) -> None:
    held = prepared(tmp_path, ANSWERS)
    base = models.tiny_llama()
    plain = score(held, base).value
    model = adapted(base)
    assert score(held, model).value == pytest.approx(plain, rel=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = score(held, model).value
    assert abs(changed - plain) > 1e-3
    with model.disable_adapter():
        assert score(held, model).value == pytest.approx(plain, rel=1e-6)
