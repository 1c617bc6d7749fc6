"""For PEFT: the same bits, a config that old releases open, and the real peft opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from lamina.checkpoint.adapter import WEIGHTS_NAME
from lamina.stages.export import export
from tests import models
from tests.adapters import llama_adapter
from tests.checkpoint.export import made
from tests.stages.chains import answer, distance, llama_lora, open_with_peft, run_chain

# The fields of peft 0.5: the oldest release with patterns.
OLD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type",
}  # fmt: skip


def test_tensors_are_the_same_and_no_field_is_empty(tmp_path: Path) -> None:
    _, path = run_chain(tmp_path, [("sft", None, llama_lora()), ("dpo", "stack", llama_lora(r=6))])
    report = export(path, tmp_path / "out", target="peft")
    assert report.difference == 0
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)
    config: dict[str, Any] = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.keys() <= OLD
    assert None not in config.values()
    model, _ = run_chain(
        tmp_path / "again", [("sft", None, llama_lora()), ("dpo", "stack", llama_lora(r=6))]
    )
    assert distance(answer(open_with_peft(tmp_path / "out")), answer(model)) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"lora_bias": True},
    ],
)
def test_peft_opens_what_no_other_program_takes(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = llama_adapter(**changes)
    model.save_pretrained(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "out", target="peft")
    expected = answer(model)
    assert distance(answer(open_with_peft(tmp_path / "out")), expected) < 1e-6
    assert distance(answer(models.tiny_llama()), expected) > 1e-3


def test_the_record_goes_along_unless_it_is_stripped(tmp_path: Path) -> None:
    adapter = made.write(tmp_path / "a", metadata=made.record().to_metadata())
    for keep in (True, False):
        export(adapter, tmp_path / "out", target="peft", keep_record=keep, force=True)
        with safe_open(tmp_path / "out" / WEIGHTS_NAME, framework="pt") as opened:
            assert ("lamina" in opened.metadata()) == keep
