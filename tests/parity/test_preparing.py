"""Models prepared for training, and adapters rescaled, as the real peft does it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import helpers as helpers_of_peft
from torch import nn

from lamina.interop.peft.kbit import prepare_model_for_kbit_training
from lamina.interop.peft.parts import cast_mixed_precision_params
from lamina.interop.peft.scripts import rescale_adapter_scale
from tests import models
from tests.parity.pairs import answer, pair

# Newer releases of transformers call it activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def loaded(**marks: Any) -> nn.Module:
    """A bf16 model that says of itself that it is quantised."""
    model = models.tiny_llama().bfloat16()
    for name, value in marks.items():
        setattr(model, name, value)
    return model


def parameters(model: nn.Module) -> dict[str, tuple[torch.dtype, bool]]:
    return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("marks", [{}, {"is_loaded_in_8bit": True}, {"quantization_method": "hqq"}])
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_a_quantised_model(marks: dict[str, Any], options: dict[str, Any] | None) -> None:
    ours, theirs = (
        prepare(loaded(**marks), gradient_checkpointing_kwargs=options)
        for prepare in (prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training)
    )
    assert parameters(ours) == parameters(theirs)
    assert ours.is_activation_checkpointing == theirs.is_activation_checkpointing == bool(marks)
    embedded = [m.get_input_embeddings()(models.token_ids()).requires_grad for m in (ours, theirs)]
    assert embedded[0] == embedded[1]


def test_mixed_precision() -> None:
    ours, theirs = pair(models.tiny_llama, target_modules=["q_proj"])
    cast_mixed_precision_params(ours, torch.float16)
    peft.cast_mixed_precision_params(theirs, torch.float16)
    assert parameters(ours) == parameters(theirs)
    assert {dtype for dtype, _ in parameters(ours).values()} == {torch.float16, torch.float32}


@torch.no_grad()
def test_rescaled() -> None:
    ours, theirs = pair(models.tiny_llama, target_modules=["q_proj", "v_proj"])
    before = answer(ours, models.token_ids())
    with rescale_adapter_scale(ours, 0.5), helpers_of_peft.rescale_adapter_scale(theirs, 0.5):
        inside = answer(ours, models.token_ids())
        torch.testing.assert_close(inside, answer(theirs, models.token_ids()))
    assert not torch.allclose(inside, before)
    assert torch.equal(answer(ours, models.token_ids()), before)
