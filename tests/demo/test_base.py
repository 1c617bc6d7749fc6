from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamina.demo
from lamina.demo.blocks import blocks, perplexity
from lamina.demo.corpus import base_text, stage_texts

BASE = Path(lamina.demo.__file__).parent / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE)


def test_the_base_fits_in_a_package() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8_000_000


def test_the_base_loads_in_float32_with_its_head_tied(model) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert json.loads((BASE / "config.json").read_text())["dtype"] == "float32"


def test_the_tokenizer_gives_any_text_back_unchanged(tokenizer) -> None:
    text = "def f(x):\n        return “é” \t 漢字 \U0001f600\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.slow
def test_the_base_has_learned_its_text_and_left_the_stages_room_to_learn(tokenizer, model) -> None:
    def score(text: str) -> float:
        return perplexity(model, blocks(tokenizer, text, length=128, limit=64))

    prose, code, docstrings = (score(text.held_out) for text in stage_texts())
    assert score(base_text().held_out) < 40
    # An untrained model is at 4,096; a base that knew the stages' texts would be near 10.
    assert 50 < prose < 120
    assert 18 < code < 40
    assert 50 < docstrings < 120
