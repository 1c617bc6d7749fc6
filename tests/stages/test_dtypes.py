"""Adapters in half precision and over bases in half precision, through chains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.engine.layers import lora_layers
from lamina.model import PeftModel
from lamina.stages import begin_stage, load, save_stage
from tests import models
from tests.stages.chains import (
    answer,
    distance,
    fill_trainable,
    llama_lora,
    own_factors,
    run_chain,
    tensors_of,
)


def half_llama() -> Any:
    return models.tiny_llama().bfloat16()


def test_a_bf16_base_under_fp32_adapters(tmp_path: Path) -> None:
    model, path = run_chain(
        tmp_path,
        [("one", None, llama_lora()), ("two", "stack", llama_lora(r=3, lora_alpha=5))],
        build=half_llama,
    )
    assert {tensor.dtype for tensor in tensors_of(path).values()} == {torch.float32}
    assert {f.dtype for pair in own_factors(model, "two").values() for f in pair} == {torch.float32}
    assert answer(model).dtype == torch.bfloat16
    assert distance(answer(load(path, half_llama())), answer(model)) < 1e-2


@pytest.mark.parametrize(("alpha", "dtype"), [(6, torch.bfloat16), (5, torch.float32)])
def test_bf16_adapters_are_rescaled_where_nothing_is_lost(
    tmp_path: Path, alpha: int, dtype: torch.dtype
) -> None:
    def half(model: PeftModel) -> PeftModel:
        # As autocast_adapter_dtype=False would have it.
        for _, layer in lora_layers(model):
            for name in layer.records:
                for parameter in layer.tensors(name).values():
                    parameter.data = parameter.data.bfloat16()
        return model

    model = half(begin_stage(half_llama(), name="one", config=llama_lora(lora_alpha=8)))
    fill_trainable(model)
    save_stage(model, tmp_path / "one")
    stored = tensors_of(tmp_path / "one")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = half(
        begin_stage(
            half_llama(),
            name="two",
            parent=tmp_path / "one",
            mode="stack",
            config=llama_lora(r=3, lora_alpha=alpha),
        )
    )
    save_stage(model, tmp_path / "two")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    flat = tensors_of(tmp_path / "two")[key]
    assert flat.dtype == dtype
    expected = stored[key].double() * (2 / (alpha / 3))
    assert torch.equal(flat[:, :4].double(), expected.to(dtype).double())
