"""What every test starts from: no network, one thread, a fixed seed, tiny models at hand."""

from __future__ import annotations

import os
from collections.abc import Callable

# Read when the libraries are imported, so set before that.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from tests import models

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A factory: every call gives a fresh model, with the same weights for the same seed."""
    return models.tiny_llama


@pytest.fixture
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """A factory of fresh models whose linears are Conv1D."""
    return models.tiny_gpt2


@pytest.fixture
def tiny_bert_classifier() -> Callable[..., BertForSequenceClassification]:
    """A factory of fresh classifiers."""
    return models.tiny_bert_classifier
