from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lamina
from lamina import extract_lora
from lamina.errors import AlreadyAdaptedError, ConversionError, MissingFileError, TargetError
from tests import models
from tests.adapters import llama_adapter, logits


def llama(change: float = 0.0, **config: Any) -> nn.Module:
    """A Llama; with a change, that much noise lies over all its weights."""
    model = models.tiny_llama(**config)
    with torch.no_grad(), models.seeded(5):
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=change)
    return model


def test_a_merged_adapter_comes_back(tmp_path: Path) -> None:
    adapted = llama_adapter(r=4, lora_alpha=6)
    wanted = logits(adapted)
    found = extract_lora(adapted.merge_and_unload(), models.tiny_llama(), rank=4)
    assert found.relative_error < 1e-5
    assert found.config.target_modules == {"q_proj", "v_proj"}
    assert len(found.layers) == 4
    assert len(found.unchanged) == 10
    assert found.left_out == ()
    found.save(tmp_path)
    for library in (lamina, peft):
        loaded = library.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 0.6, 1.0])
def test_the_error_is_that_of_the_best_approximation(rank: int | float) -> None:
    tuned, base = llama(0.02), llama()
    found = extract_lora(tuned, base, rank=rank)
    squares = torch.zeros(2)
    for name, report in found.layers.items():
        change = tuned.get_submodule(name).weight - base.get_submodule(name).weight
        singular = torch.linalg.svdvals(change.detach())
        tail, whole = singular[report.rank :].square().sum(), singular.square().sum()
        assert report.relative_error == pytest.approx(float((tail / whole).sqrt()), abs=1e-5)
        if isinstance(rank, float):
            assert report.relative_error**2 <= 1 - rank + 1e-4
        squares += torch.stack([tail, whole])
    assert found.relative_error == pytest.approx(float((squares[0] / squares[1]).sqrt()), abs=1e-5)
    ranks = {report.rank for report in found.layers.values()}
    assert ranks == {3} if rank == 3 else len(ranks) > 1


def test_what_is_left_out_is_told() -> None:
    found = extract_lora(llama(0.02), llama(), target_modules=["q_proj"])
    assert "model.norm.weight" in found.left_out
    assert "model.layers.0.self_attn.v_proj.weight" in found.left_out
    assert not any("q_proj" in key for key in found.left_out)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (models.tiny_gpt2, ["c_attn", "c_proj"]),
        (lambda: models.convolution_net(2), ["stem", "pointwise"]),
        (models.embedding_net, ["embed", "head"]),
    ],
)
def test_all_kinds_of_layers(make: Any, targets: list[str], tmp_path: Path) -> None:
    tuned, base = make(), make()
    for name, module in tuned.named_modules():
        if name.rpartition(".")[2] in targets:
            with models.seeded(1), torch.no_grad():
                module.weight += 0.1 * torch.randn_like(module.weight)
    found = extract_lora(tuned, base, rank=1.0, target_modules=targets)
    assert found.relative_error < 1e-5
    found.save(tmp_path)
    merged = lamina.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for key, value in tuned.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_directories_are_read_tensor_by_tensor(
    shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base = llama(0.02), llama()
    for name, model in (("tuned", tuned), ("base", base)):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > (shard == "20KB")
    wanted = extract_lora(tuned, base, rank=4)
    monkeypatch.setattr(type(base), "from_pretrained", None)
    found = extract_lora(tmp_path / "tuned", tmp_path / "base", rank=4)
    assert found.config.base_model_name_or_path == str(tmp_path / "base")
    assert found.tensors.keys() == wanted.tensors.keys()
    assert found.left_out == wanted.left_out
    for key, tensor in wanted.tensors.items():
        assert torch.equal(found.tensors[key], tensor)


def test_factors_in_half_precision_and_their_error() -> None:
    tuned, base = llama(0.02), llama()
    exact = extract_lora(tuned, base, rank=1.0)
    half = extract_lora(tuned, base, rank=1.0, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.bfloat16}
    assert exact.relative_error < 1e-5 < half.relative_error < 1e-2


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -2, 1.5, 0.0, True])
def test_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises(ConversionError, match="neither a positive integer nor a share"):
        extract_lora(llama(0.1), llama(), rank=rank)


def test_models_that_do_not_fit_together() -> None:
    other = llama(num_hidden_layers=1, hidden_size=64)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    with pytest.raises(ConversionError, match="8 targeted layer") as caught:
        extract_lora(other, llama(), target_modules=targets)
    assert "is not in the tuned model" in str(caught.value)
    assert "is [64, 64] in the tuned model, [32, 32] in the base" in str(caught.value)


def test_nothing_to_extract() -> None:
    with pytest.raises(ConversionError, match="the same in all 14 targeted layers"):
        extract_lora(llama(), llama())
    with pytest.raises(TargetError):
        extract_lora(llama(0.1), llama(), target_modules=["nothing"])
    with pytest.raises(AlreadyAdaptedError):
        extract_lora(llama_adapter(), llama())


def test_a_directory_without_weights(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match=r"neither model\.safetensors"):
        extract_lora(llama(0.1), tmp_path)
