from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lamina.model import PeftModel
from tests import models
from tests.adapters import llama_adapter, logits
from tests.cli.made import lamina


@pytest.fixture
def directories(tmp_path: Path) -> list[str]:
    """--tuned DIR --base DIR of a Llama with an adapter of rank 4 folded in."""
    llama_adapter().merge_and_unload().save_pretrained(tmp_path / "tuned")
    models.tiny_llama().save_pretrained(tmp_path / "base")
    return ["--tuned", str(tmp_path / "tuned"), "--base", str(tmp_path / "base")]


def test_an_adapter_is_extracted_and_told_of(directories: list[str], tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = lamina("convert", *directories, "--rank", 4, out)
    assert result.exit_code == 0, result.output
    assert "4 layers, rank 4" in result.output
    loaded = PeftModel.from_pretrained(models.tiny_llama(), out)
    torch.testing.assert_close(logits(loaded), logits(llama_adapter()), rtol=1e-5, atol=1e-5)


def test_as_json_with_a_share_and_targets(directories: list[str], tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = lamina("convert", *directories, "--rank", "0.9", "-t", "q_proj", "--json", out)
    told = json.loads(result.stdout)
    assert set(told["layers"]) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert told["relative_error"] ** 2 <= 0.1
    assert len(told["left_out"]) == 2


def test_errors_end_in_a_message(directories: list[str], tmp_path: Path) -> None:
    occupied = lamina("convert", *directories, tmp_path)
    assert occupied.exit_code == 2
    assert "is not empty" in occupied.output
    wrong = lamina("convert", *directories, "--rank", "many", tmp_path / "out")
    assert wrong.exit_code == 2
    assert "--rank many is not a number" in wrong.output
    assert not (tmp_path / "out").exists()
    forced = lamina("convert", *directories, "--force", "--dtype", "bfloat16", tmp_path / "base")
    assert forced.exit_code == 0, forced.output
