"""Every kind of model trains, is saved with its head, and opens again, in the real peft too."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lamina
from tests.parity.kinds import KINDS, Kind


def outputs(kind: Kind, model: nn.Module) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        result = model(**kind.batch())
    return [result[name] for name in kind.outputs]


def train(kind: Kind, model: nn.Module) -> list[float]:
    """The losses of two steps, and the one after."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**kind.batch()).loss
        optimizer.zero_grad()
        loss.backward()
        lamina.check_gradients(model)
        losses.append(loss.item())
        if len(losses) < 3:
            optimizer.step()
    return losses


# peft can't merge grouped convolutions, and says so of ConvNext's.
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning:peft")
@pytest.mark.parametrize("name", KINDS)
def test_it_trains_and_opens_again(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    base = kind.make()
    before = outputs(kind, base)
    model = lamina.get_peft_model(base, lamina.LoraConfig(**{"r": 4, **kind.adapter}))
    for first, second in zip(outputs(kind, model), before, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    lamina.preflight(model)
    losses = train(kind, model)
    assert losses[2] < losses[0]
    trained = outputs(kind, model)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(trained, before, strict=True))
    model.save_pretrained(tmp_path)

    # Another head than the one that it was trained from: what is used is the saved one.
    opened = lamina.PeftModel.from_pretrained(kind.make(head=1), tmp_path)
    theirs = peft.PeftModel.from_pretrained(kind.make(head=1), str(tmp_path))
    for ours, again, other in zip(
        trained, outputs(kind, opened), outputs(kind, theirs), strict=True
    ):
        assert torch.equal(again, ours)
        torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-6)
    if kind.heads:
        fresh = outputs(kind, kind.make(head=1))
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(fresh, before, strict=True))


@pytest.mark.parametrize("leaf", ["out_proj", "conv1d"])
def test_what_a_fused_kernel_passes_over_is_refused(leaf: str) -> None:
    config = {"target_modules": ["in_proj", leaf]}
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.get_peft_model(KINDS["Mamba"].make(), peft.LoraConfig(**config))
    with pytest.raises(lamina.TargetError, match="incompatible with Mamba-based models") as caught:
        lamina.get_peft_model(KINDS["Mamba"].make(), lamina.LoraConfig(**config))
    # Both layers at once.
    assert sum("Mamba-based" in fault for fault in caught.value.faults) == 2


def test_all_linear_leaves_out_what_a_fused_kernel_passes_over() -> None:
    names = lamina.find_all_linear_names(KINDS["Mamba"].make())
    assert names == ["dt_proj", "in_proj", "x_proj"]
    assert "out_proj" in lamina.find_all_linear_names(KINDS["Jamba"].make())
