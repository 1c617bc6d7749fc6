"""`lamina export`: figures, faults with cures, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import models
from tests.checkpoint.export import made
from tests.cli.made import lamina
from tests.stages.chains import llama_lora, run_chain


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return made.write(tmp_path / "a", metadata=made.record().to_metadata())


def test_what_was_written_is_told_with_the_call_that_uses_it(adapter: Path, tmp_path: Path) -> None:
    done = lamina("export", adapter, "--for", "vllm", "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "5 modules, rank 2-3, float32" in done.stdout
    assert "updates within" in done.stdout
    assert "--max-lora-rank 16" in done.stdout
    assert "not compared" in done.stdout
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_answers_over_the_base_are_compared(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    _, chain = run_chain(tmp_path, [("sft", None, llama_lora())])
    done = lamina("export", chain, "--for", "gguf", "-o", tmp_path / "out", "-b", tmp_path / "base")
    assert done.exit_code == 0
    assert "same first choice at 100% of positions" in done.stdout
    assert "adapter.gguf" in done.stdout
    again = ("export", chain, "--for", "gguf", "-o", tmp_path / "more", "-b", tmp_path / "base")
    assert "not compared" in lamina(*again, "--no-probe").stdout


def test_compression_tells_what_it_costs(adapter: Path, tmp_path: Path) -> None:
    done = lamina("export", adapter, "--for", "vllm", "-o", tmp_path / "out", "--rank", 1)
    assert done.exit_code == 0
    assert "relative error 0." in done.stdout


def test_a_refusal_lists_faults_and_cures(adapter: Path, tmp_path: Path) -> None:
    done = lamina("export", adapter, "--for", "vllm", "-o", tmp_path / "out", "--max-rank", 1)
    assert done.exit_code == 2
    assert "rank 3 is over --max-lora-rank 1" in done.stderr
    assert "--max-lora-rank 8" in done.stderr
    assert not (tmp_path / "out").exists()


def test_only_checking_ends_with_0_or_1(adapter: Path) -> None:
    done = lamina("export", adapter, "--for", "vllm", "--check")
    assert done.exit_code == 0
    assert "can be written for vLLM" in done.stdout
    done = lamina("export", adapter, "--for", "ollama", "--check", "--json", "--strip-record")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert any("--from" in fault["cure"] for fault in told["faults"])


def test_json_has_the_same_figures(adapter: Path, tmp_path: Path) -> None:
    done = lamina("export", adapter, "--for", "mlx", "-o", tmp_path / "out", "--json")
    told = json.loads(done.stdout)
    assert told["rank"] == [3, 3]
    assert told["difference"] < 1e-6
    assert told["compression"] is None
    assert told["files"].keys() == {"adapter_config.json", "adapters.safetensors"}


def test_options_reach_the_file(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = lamina(
        "export", adapter, "--for", "vllm", "-o", out, "--dtype", "float16", "--strip-record"
    )
    assert "float16" in done.stdout
    with safe_open(out / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    refused = lamina("export", adapter, "--for", "vllm", "-o", out)
    assert refused.exit_code == 2
    assert lamina("export", adapter, "--for", "vllm", "-o", out, "--force").exit_code == 0


def test_a_place_to_write_is_asked_for(adapter: Path) -> None:
    done = lamina("export", adapter, "--for", "vllm")
    assert done.exit_code == 2
    assert "--output" in done.stderr


def test_ollama_gets_its_modelfile(adapter: Path, tmp_path: Path) -> None:
    base = made.base_config(tmp_path / "base")
    done = lamina(
        "export", adapter, "--for", "ollama", "-o", tmp_path / "out", "-b", base,
        "--from", "llama3.2",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "ollama create" in done.stdout
    assert "FROM llama3.2" in (tmp_path / "out" / "Modelfile").read_text()
