"""What goes wrong elsewhere with merging large models, and what happens here instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lamina.checkpoint.stream.files import Reader
from lamina.stages.merged import save_merged
from tests import adapters, models
from tests.stages.chains import llama_lora, run_stage


def test_row_19_merging_needs_the_memory_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole chain is merged although no model can be loaded, and no more is read than a tensor.

    Elsewhere the model is loaded, merged and saved: 140 GB of memory for one of 70B.
    """
    run_stage(tmp_path / "sft", llama_lora(r=4, lora_alpha=8))
    dpo = llama_lora(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])
    chain = run_stage(tmp_path / "dpo", dpo, parent=tmp_path / "sft", mode="stack")
    expected = adapters.logits(chain.eval())
    base = tmp_path / "base"
    models.tiny_llama().save_pretrained(base, max_shard_size=20_000)
    largest = max(tensor.nbytes for tensor in models.tiny_llama().state_dict().values())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model would be loaded")

    read = []
    whole = Reader.read

    def counted(self: Reader, *args: Any) -> torch.Tensor:
        found = whole(self, *args)
        read.append(found.nbytes)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "from_pretrained", refuse)
        patched.setattr(Reader, "read", counted)
        report = save_merged(
            tmp_path / "dpo",
            tmp_path / "merged",
            base=str(base),
            verify="samples",
            allow_base_mismatch=True,
        )
    assert report.streamed
    assert 0 < max(read) <= largest
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (adapters.logits(merged) - expected).abs().max() < 1e-5
    files = [file.name for file in base.glob("*.safetensors")]
    assert len(files) > 1
    assert {*files} <= {*report.files}
