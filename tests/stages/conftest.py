"""Chains that several files of tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamina import begin_stage, save_stage
from lamina.model import PeftModel
from tests import models
from tests.stages.chains import fill_trainable, llama_lora, run_chain, run_stage
from tests.stages.flattening import FOUR
from tests.stages.refusing import named
from tests.stages.verifying import CHAT, DOMAIN, words


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    return run_chain(tmp_path_factory.mktemp("four"), FOUR)


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "domain"
    run_stage(path, llama_lora(), build=named)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two stages over a tiny Llama, with a tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    run_stage(folder / "domain", DOMAIN)
    model = begin_stage(
        models.tiny_llama(), name="chat", parent=folder / "domain", mode="stack", config=CHAT
    )
    fill_trainable(model.eval(), seed=5)
    save_stage(model, folder / "chat", tokenizer=words())
    return folder
