"""`lamina inspect` on chains, on adapters of the real peft, on shards, and on broken files."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file

from lamina.checkpoint.adapter import write_adapter
from lamina.config import LoraConfig
from tests import models
from tests.cli.made import (
    MODULES,
    chain_config,
    chain_record,
    chain_tensors,
    key,
    lamina,
    write_chain,
)


def squeezed(text: str) -> str:
    """A text with every run of spaces and line ends made one space."""
    return " ".join(text.split())


def test_shows_stages_ranks_base_and_sizes(tmp_path: Path) -> None:
    text = squeezed(lamina("inspect", write_chain(tmp_path / "chat")).stdout)
    assert "laminated adapter, 3 stages" in text
    assert "models/small (LlamaForCausalLM, vocabulary 64, float32)" in text
    assert "2,016 parameters, F32" in text
    assert "scaling 2 " in text
    assert "domain fresh 4 6 2026-11-24 08:10" in text
    assert "more continue 4 6 - eval_loss 1.25" in text
    assert "chat stack 6 3" in text
    assert "q_proj 3 10 = 4 + 6 32 → 16 1.44K" in text
    assert "v_proj 3 4 = 4 + 0 32 → 16 576" in text
    assert "rank = domain + chat" in text
    assert "No factor is all zero" in text


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_the_terminal(tmp_path: Path, columns: int) -> None:
    text = lamina("inspect", write_chain(tmp_path / "chat"), columns=columns).stdout
    _, *rest = text.splitlines()
    assert max(map(len, rest)) <= columns


def test_json_has_everything(tmp_path: Path) -> None:
    told = json.loads(lamina("inspect", write_chain(tmp_path / "chat"), "--json").stdout)
    assert [stage["mode"] for stage in told["chain"]["stages"]] == ["fresh", "continue", "stack"]
    assert told["chain"]["groups"][0]["continued_by"] == ["more"]
    assert told["modules"][0]["ranks"] == [[4, 4], [6, 6]]
    assert told["scaling"] == [2.0]
    assert told["suspects"] == told["faults"] == []
    assert told["config"]["r"] == 10
    assert told["files"]["adapter_config.json"] > 0


def test_names_the_stage_that_learnt_nothing(tmp_path: Path) -> None:
    tensors = chain_tensors()
    for module in MODULES[::2]:
        tensors[key(module, "lora_B")][:, 4:] = 0
    text = squeezed(lamina("inspect", write_chain(tmp_path / "chat", tensors)).stdout)
    assert (
        "B of stage 'chat' is all zero (so the adapter changes nothing there) in 3 modules" in text
    )
    assert text.index("layers.1.self_attn") < text.index("layers.10.self_attn")
    assert "stage 'more'" not in text


def test_finds_nan(tmp_path: Path) -> None:
    tensors = chain_tensors(torch.bfloat16)
    tensors[key(MODULES[3], "lora_A")][0, :2] = float("nan")
    text = squeezed(lamina("inspect", write_chain(tmp_path / "chat", tensors)).stdout)
    assert f"A of stage 'more' has 2 entries of NaN or infinity in 1 module: {MODULES[3]}" in text


def test_quick_reads_headers_only(tmp_path: Path) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in chain_tensors().items()}
    done = lamina("inspect", write_chain(tmp_path / "chat", tensors), "--quick")
    assert done.exit_code == 0
    assert "zero" not in done.stdout
    assert (
        json.loads(lamina("inspect", tmp_path / "chat", "--quick", "--json").stdout)["suspects"]
        is None
    )


def test_a_plain_adapter_of_peft_is_one_stage_of_unknown_origin(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    peft.get_peft_model(models.tiny_llama(), config).save_pretrained(tmp_path)
    text = squeezed(lamina("inspect", tmp_path).stdout)
    assert "plain adapter without a stage record: one stage of unknown origin" in text
    assert "imported unknown 4 2" in text
    assert "saved whole lm_head" in text
    assert "B is all zero (so the adapter changes nothing there) in 2 modules" in text


def test_shards_are_one_adapter(tmp_path: Path) -> None:
    whole = json.loads(lamina("inspect", write_chain(tmp_path / "whole"), "--json").stdout)
    shards = tmp_path / "shards"
    shards.mkdir()
    tensors = chain_tensors()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:5], names[5:]), start=1):
        file = f"adapter_model-0000{index}-of-00002.safetensors"
        save_file(
            {name: tensors[name] for name in part}, shards / file, chain_record().to_metadata()
        )
        weight_map |= dict.fromkeys(part, file)
    index_file = shards / "adapter_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    chain_config().save_pretrained(shards)
    told = json.loads(lamina("inspect", shards, "--json").stdout)
    assert len(told["files"]) == 3
    for name in ("parameters", "chain", "modules", "suspects", "faults", "dtypes"):
        assert told[name] == whole[name]


def test_a_subfolder_is_looked_into(tmp_path: Path) -> None:
    write_chain(tmp_path / "chat")
    assert lamina("inspect", tmp_path).exit_code == 2
    assert lamina("inspect", tmp_path, "--subfolder", "chat").exit_code == 0


def test_an_adapter_that_cannot_be_opened_is_still_shown(tmp_path: Path) -> None:
    write_chain(tmp_path / "chat")
    file = tmp_path / "chat" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"megatron_config": {"x": 1}}))
    done = lamina("inspect", tmp_path / "chat")
    assert done.exit_code == 0
    assert "! the config can't be honoured: megatron_config={'x': 1}" in done.stdout


def test_a_record_that_its_tensors_contradict_is_told(tmp_path: Path) -> None:
    tensors = chain_tensors()
    del tensors[key(MODULES[0], "lora_A")], tensors[key(MODULES[0], "lora_B")]
    text = lamina("inspect", write_chain(tmp_path / "chat", tensors)).stdout
    assert f"! {MODULES[0]} has rank 0 in the file and 10 in the record" in text


def test_what_a_terminal_would_obey_is_shown_as_escapes(tmp_path: Path) -> None:
    hostile = "\x1b[2Jq\u202e"
    tensors = {key(hostile, leaf): torch.ones(1, 1) for leaf in ("lora_A", "lora_B")}
    write_adapter(tmp_path, LoraConfig(r=1, target_modules=["q"]), tensors)
    for words in (["inspect", tmp_path], ["inspect", tmp_path, "--json"], ["lineage", tmp_path]):
        result = lamina(*words)
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert "\u202e" not in result.output
    assert r"\u001b[2Jq\u202e" in lamina("inspect", tmp_path, "--json").output


def test_a_file_of_many_faults_fits_a_terminal(tmp_path: Path) -> None:
    tensors = {key(f"m.{i}", "lora_A"): torch.ones(1, 1) for i in range(100)}
    write_adapter(tmp_path, LoraConfig(r=1, target_modules=["m"]), tensors)
    shown = lamina("inspect", tmp_path).output
    assert shown.count("has no B") == 20
    assert "and 80 more" in shown
