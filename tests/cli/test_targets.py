"""`lamina targets`: a dry run on a config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import models
from tests.cli.made import lamina


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and no weights."""
    directory = tmp_path_factory.mktemp("llama")
    models.tiny_llama().config.save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"architectures": ["LlamaForCausalLM"]})
    )
    return directory


def test_counts_each_pattern(llama: Path) -> None:
    done = lamina(
        "targets", llama, "-p", "q_proj", "-p", "layers.1.mlp.up_proj", "--r", 4, "--json"
    )
    told = json.loads(done.stdout)
    assert told["model_class"] == "LlamaForCausalLM"
    assert told["counts"] == {"q_proj": 2, "layers.1.mlp.up_proj": 1}
    # q_proj 32 -> 32, up_proj 32 -> 64
    assert told["parameters"] == 2 * 4 * (32 + 32) + 4 * (32 + 64)


def test_shows_all_linear_layers_without_a_pattern(llama: Path) -> None:
    text = " ".join(lamina("targets", llama, columns=100).stdout.split())
    assert "all-linear 14" in text
    assert "model.layers.*.self_attn.q_proj 2 Linear 32 → 32 1,024" in text
    assert "rank 8 in 14 layers: 8,192 parameters" in text
    assert "output head lm_head" in text


def test_takes_a_regular_expression_and_exclusions(llama: Path) -> None:
    done = lamina(
        "targets", llama, "--regex", r".*\.[qv]_proj", "-x", "layers.0.self_attn", "--json"
    )
    assert done.exit_code == 2
    assert "exclude_modules: 'layers.0.self_attn' matched 0 modules" in done.stderr
    done = lamina("targets", llama, "--regex", r".*\.[qv]_proj", "-x", "v_proj", "--json")
    assert json.loads(done.stdout)["counts"] == {r".*\.[qv]_proj": 2}


def test_a_pattern_that_matches_nothing_ends_with_the_nearest_name(llama: Path) -> None:
    done = lamina("targets", llama, "-p", "q_proj", "-p", "v_prj")
    assert done.exit_code == 2
    assert "'v_prj' matched 0 modules; nearest: 'v_proj'" in done.stderr
    assert "'q_proj' matched" not in done.stderr


def test_names_and_a_regular_expression_exclude_each_other(llama: Path) -> None:
    done = lamina("targets", llama, "-p", "q_proj", "--regex", ".*")
    assert done.exit_code == 2
    assert "--pattern or --regex" in done.stderr


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    done = lamina("targets", tmp_path)
    assert done.exit_code == 2
    assert "has no model config" in done.stderr
