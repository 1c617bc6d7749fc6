"""Stages to verify, and how to break them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from lamina import begin_stage, save_stage
from lamina.demo.run import SHIPPED_BASE
from lamina.stages.verify import VerifyReport
from tests import models
from tests.stages.chains import (
    CONFIG,
    WEIGHTS,
    config_of,
    fill_trainable,
    llama_lora,
    metadata_of,
    tensors_of,
)

DOMAIN = llama_lora(r=4, lora_alpha=8)


CHAT = llama_lora(r=6, lora_alpha=9, target_modules=["v_proj", "o_proj"])


V_PROJ = "base_model.model.model.layers.0.self_attn.v_proj"


Tensors = dict[str, Tensor]


def words(count: int = models.VOCABULARY, prefix: str = "w") -> PreTrainedTokenizerFast:
    vocabulary = {f"{prefix}{index}": index for index in range(count)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=f"{prefix}0"))
    )


def changed(
    path: Path,
    to: Path,
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
    record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Path:
    """A copy of an adapter in which something is different."""
    shutil.copytree(path, to)
    metadata = metadata_of(path)
    if "lamina" in metadata:
        values = json.loads(metadata["lamina"])
        record(values)
        metadata["lamina"] = json.dumps(values)
    save_file(tensors(tensors_of(path)), to / WEIGHTS, metadata=metadata)
    settings = config_of(path)
    config(settings)
    (to / CONFIG).write_text(json.dumps(settings))
    return to


def verdicts(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def blamed(report: VerifyReport, *kinds: str) -> str:
    """It failed, for exactly these causes; the sentence of the first."""
    assert not report.passed
    assert not report.proved
    assert [cause.kind for cause in report.causes] == list(kinds), report
    assert all(cause.sentence and cause.cure for cause in report.causes)
    json.dumps(report.to_dict(), allow_nan=False)
    return report.causes[0].sentence


def demo_stage(folder: Path, dtype: torch.dtype = torch.float32, size: float = 0.05) -> Path:
    base = AutoModelForCausalLM.from_pretrained(str(SHIPPED_BASE), dtype=dtype)
    model = begin_stage(base, name="sft", config=llama_lora(target_modules="all-linear"))
    fill_trainable(model.eval(), size=size)
    save_stage(model, folder / "sft")
    return folder / "sft"


def four_bits(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def qlora_stage(folder: Path, size: float = 0.05) -> Path:
    base = AutoModelForCausalLM.from_pretrained(
        str(SHIPPED_BASE), quantization_config=four_bits(), dtype=torch.float32
    )
    model = begin_stage(base, name="sft", config=llama_lora(target_modules="all-linear"))
    fill_trainable(model.eval(), size=size)
    save_stage(model, folder / "sft")
    return folder / "sft"


def double_b(tensors: Tensors) -> Tensors:
    return {key: value * 2 if "lora_B" in key else value for key, value in tensors.items()}


def double_alpha(config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {key: value * 2 for key, value in config["alpha_pattern"].items()}
