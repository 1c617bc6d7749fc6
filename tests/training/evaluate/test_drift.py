"""Drift, beside dense matrices in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from lamina import begin_stage, load, save_stage
from lamina.config import LoraConfig
from lamina.demo.run import SHIPPED_BASE
from lamina.training.evaluate.drift import drift_of
from lamina.training.evaluate.scores import ModuleDrift
from tests import models
from tests.stages.chains import (
    CONFIG,
    Snapshot,
    deltas_in,
    fill_trainable,
    llama_lora,
    run_chain,
    run_stage,
)
from tests.stages.verifying import four_bits

CHAIN = [
    ("domain", None, llama_lora()),
    ("chat", "stack", llama_lora(r=6, lora_alpha=9, target_modules=["q_proj", "k_proj"])),
    ("dpo", "continue", None),
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    run_chain(folder, CHAIN)
    return folder


def effective_rank(matrix: np.ndarray[Any, Any]) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 1e-9] / values.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def overlaps(change: np.ndarray[Any, Any], before: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Of outputs, of inputs."""
    bases = []
    for matrix in (change, before):
        u, s, vh = np.linalg.svd(matrix)
        rank = int((s > 1e-6 * s[0]).sum())
        bases.append((u[:, :rank], vh[:rank].T))
    return tuple(  # type: ignore[return-value]
        float(np.square(one.T @ other).sum()) / min(one.shape[1], other.shape[1])
        for one, other in zip(*bases, strict=True)
    )


def by_name(found: tuple[ModuleDrift, ...]) -> dict[str, ModuleDrift]:
    assert len({each.module for each in found}) == len(found)
    return {each.module: each for each in found}


@pytest.mark.parametrize(
    ("stage", "before", "rank"),
    [("domain", None, 4), ("chat", "domain", 6), ("dpo", "chat", 12)],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_what_dense_matrices_say(
    chain: Path, stage: str, before: str | None, rank: int, adapted: bool
) -> None:
    model: Any = models.tiny_llama()
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    if adapted:
        model = load(chain / stage, model)
    seen = Snapshot(model)
    found = by_name(drift_of(chain / stage, chain / before if before else None, model))
    seen.check()
    now, old = deltas_in(chain / stage), deltas_in(chain / before) if before else {}
    changes = {name: each - old.get(name, 0) for name, each in now.items()}
    changes = {name: each for name, each in changes.items() if np.abs(each).max() > 1e-6}
    assert found.keys() == changes.keys()
    for name, each in found.items():
        change = changes[name]
        assert each.norm == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert each.weight_norm == pytest.approx(np.linalg.norm(weights[f"{name}.weight"]))
        assert each.relative == pytest.approx(each.norm / each.weight_norm)
        assert each.effective_rank == pytest.approx(effective_rank(change), rel=1e-4)
        assert each.rank == rank
        if name in old:
            outputs, inputs = overlaps(change, old[name])
            assert each.output_overlap == pytest.approx(outputs, abs=1e-4)
            assert each.input_overlap == pytest.approx(inputs, abs=1e-4)
        else:
            assert each.output_overlap is None
            assert each.input_overlap is None


def test_a_stage_that_only_used_what_was_there_overlaps_wholly(tmp_path: Path) -> None:
    run_stage(tmp_path / "a", llama_lora())
    model = begin_stage(models.tiny_llama(), name="b", parent=tmp_path / "a", mode="continue")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    save_stage(model, tmp_path / "b")
    for each in drift_of(tmp_path / "b", tmp_path / "a", model):
        assert each.input_overlap == pytest.approx(1)
        assert each.output_overlap == pytest.approx(1)


def test_a_stage_that_learnt_nothing_has_not_moved(tmp_path: Path) -> None:
    run_stage(tmp_path / "a", llama_lora())
    model = begin_stage(models.tiny_llama(), name="b", parent=tmp_path / "a", mode="continue")
    save_stage(model, tmp_path / "b")
    found = drift_of(tmp_path / "b", tmp_path / "a", model)
    assert len(found) == 4
    for each in found:
        assert (each.norm, each.effective_rank, each.input_overlap) == (0, 0, None)


def test_embeddings_and_convolutions_have_norms_too(tmp_path: Path) -> None:
    config = llama_lora(target_modules=["embed_tokens", "q_proj"])
    model = run_stage(tmp_path / "e", config)
    found = by_name(drift_of(tmp_path / "e", None, model))
    table = models.tiny_llama().model.embed_tokens.weight
    layer: Any = model.get_base_model().model.embed_tokens
    delta = layer.delta_weight("e")
    told = found["model.embed_tokens"]
    assert told.norm == pytest.approx(float(delta.detach().norm()), rel=1e-5)
    assert told.weight_norm == pytest.approx(float(table.detach().norm()), rel=1e-6)

    for dimensions in (1, 2, 3):
        build = lambda d=dimensions: models.ConvolutionNet(d)  # noqa: E731
        names = ["stem", "strided", "grouped"]
        path = tmp_path / f"c{dimensions}"
        with models.seeded(0):
            convolutions = run_stage(path, LoraConfig(r=2, target_modules=names), build=build)
            found = by_name(drift_of(path, None, convolutions))
        assert found.keys() == {*names}
        for name, each in found.items():
            layer = getattr(convolutions.get_base_model(), name)
            assert each.weight_norm == pytest.approx(
                float(layer.base_layer.weight.detach().norm()), rel=1e-6
            )
            if name != "grouped":
                delta = layer.delta_weight(path.name).detach()
                assert each.norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_weights_of_few_bits_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        str(SHIPPED_BASE), quantization_config=four_bits(), dtype=torch.float32
    )
    model = run_stage(tmp_path / "q", llama_lora(), build=lambda: base)
    import bitsandbytes

    for each in drift_of(tmp_path / "q", None, model):
        layer = model.get_base_model().get_submodule(each.module).base_layer
        dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert each.weight_norm == pytest.approx(float(dense.norm()), rel=1e-5)


def test_modules_trained_whole_and_biases_are_measured_against_the_base(tmp_path: Path) -> None:
    build = lambda: models.tiny_llama(attention_bias=True)  # noqa: E731
    config = llama_lora(modules_to_save=["lm_head"], bias="lora_only", r=2)
    model = run_stage(tmp_path / "a", config, build=build)
    base = build()
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    found = by_name(drift_of(tmp_path / "a", None, model))
    before = base.lm_head.weight.detach()
    change = saved["base_model.model.lm_head.weight"] - before
    head = found["lm_head.weight"]
    assert head.norm == pytest.approx(float(change.norm()), rel=1e-5)
    assert head.weight_norm == pytest.approx(float(before.norm()), rel=1e-6)
    assert head.effective_rank == pytest.approx(effective_rank(change.double().numpy()), rel=1e-5)
    assert head.rank == min(change.shape)
    name = "model.layers.1.self_attn.v_proj.bias"
    (key,) = (k for k in saved if k.endswith("layers.1.self_attn.v_proj.base_layer.bias"))
    own = base.get_parameter(name).detach()
    assert found[name].norm == pytest.approx(float((saved[key] - own).norm()), rel=1e-6)
    assert found[name].rank == 1

    # A stage after it that leaves them alone hasn't moved them.
    later = run_stage(
        tmp_path / "b", llama_lora(), parent=tmp_path / "a", mode="stack", build=build
    )
    moved = by_name(drift_of(tmp_path / "b", tmp_path / "a", later))
    assert moved.keys() == {name for name in found if name.endswith(("q_proj", "v_proj"))}


def test_a_large_matrix_trained_whole_is_not_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.training.evaluate import drift

    monkeypatch.setattr(drift, "_DECOMPOSED", 31)
    model = run_stage(tmp_path / "a", llama_lora(modules_to_save=["lm_head"]))
    head = by_name(drift_of(tmp_path / "a", None, model))["lm_head.weight"]
    assert head.effective_rank is None
    assert head.norm > 0


def test_a_head_that_every_base_draws_anew_counts_whole(tmp_path: Path) -> None:
    def build() -> Any:
        config = models.tiny_llama().config
        config.num_labels = 1
        return LlamaForSequenceClassification(config).eval()

    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    model = run_stage(tmp_path / "reward", config, build=build)
    saved = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    (weight,) = (tensor for key, tensor in saved.items() if "score" in key)
    for judged in (model, build()):
        score = by_name(drift_of(tmp_path / "reward", None, judged))["score.weight"]
        assert score.norm == pytest.approx(float(weight.norm()), rel=1e-6)
        assert score.weight_norm is None


def test_rows_are_measured_where_a_stage_trained_them(tmp_path: Path) -> None:
    config = llama_lora(trainable_token_indices={"embed_tokens": [5, 9]})
    model = run_stage(tmp_path / "a", config)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (rows,) = (tensor for key, tensor in saved.items() if "trainable_tokens" in key)
    table = models.tiny_llama().model.embed_tokens.weight.detach()
    told = by_name(drift_of(tmp_path / "a", None, model))["model.embed_tokens"]
    assert told.norm == pytest.approx(float((rows - table[[5, 9]]).norm()), rel=1e-5)
    assert told.weight_norm == pytest.approx(float(table.norm()), rel=1e-6)
    assert told.rank == 2

    config = llama_lora(trainable_token_indices={"embed_tokens": [9, 11]})
    later = run_stage(tmp_path / "b", config, parent=tmp_path / "a", mode="stack")
    now = load_file(tmp_path / "b" / "adapter_model.safetensors")
    (own,) = (tensor for key, tensor in now.items() if "trainable_tokens" in key)
    order = config_rows(tmp_path / "b")
    change = [own[order.index(9)] - rows[1], own[order.index(11)] - table[11]]
    told = by_name(drift_of(tmp_path / "b", tmp_path / "a", later))["model.embed_tokens"]
    assert told.norm == pytest.approx(float(torch.stack(change).norm()), rel=1e-5)


def config_rows(path: Path) -> list[int]:
    import json

    rows = json.loads((path / CONFIG).read_text())["trainable_token_indices"]
    return list(next(iter(rows.values()))) if isinstance(rows, dict) else list(rows)


def test_magnitudes_of_dora_are_told_beside_its_factors(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "a", llama_lora(use_dora=True))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    found = by_name(drift_of(tmp_path / "a", None, model))
    for module, delta in deltas_in(tmp_path / "a").items():
        assert found[module].norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        weight = models.tiny_llama().get_submodule(module).weight.detach()
        magnitude = saved[f"base_model.model.{module}.lora_magnitude_vector"]
        told = found[f"{module}.lora_magnitude_vector"]
        assert told.norm == pytest.approx(float((magnitude - weight.norm(dim=1)).norm()), rel=1e-5)
        assert told.weight_norm == pytest.approx(float(weight.norm()), rel=1e-6)
    begun = begin_stage(models.tiny_llama(), name="new", config=llama_lora(use_dora=True))
    save_stage(begun, tmp_path / "new")
    untrained = by_name(drift_of(tmp_path / "new", None, begun))
    for name, each in untrained.items():
        assert each.norm == pytest.approx(0, abs=1e-5), name


def test_biases_of_B_are_told(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "a", llama_lora(lora_bias=True, r=4, lora_alpha=8))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.lora_B.bias"
    told = by_name(drift_of(tmp_path / "a", None, model))[name]
    bias = saved[f"base_model.model.{name}"]
    assert told.norm == pytest.approx(2 * float(bias.norm()), rel=1e-6)


def test_a_base_with_folded_updates_is_read_as_it_is_without(tmp_path: Path) -> None:
    model = run_stage(tmp_path / "a", llama_lora())
    expected = drift_of(tmp_path / "a", None, models.tiny_llama())
    model.merge_adapter()
    assert drift_of(tmp_path / "a", None, model) == expected


def test_experts_are_measured_all_together(tmp_path: Path) -> None:
    from lamina import PeftModel, get_peft_model
    from tests.parity.kinds import KINDS

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=names)
    model = get_peft_model(KINDS["Mixtral"].make(), config)
    fill_trainable(model)
    model.save_pretrained(str(tmp_path / "a"))
    opened = PeftModel.from_pretrained(KINDS["Mixtral"].make(), tmp_path / "a")
    root = opened.get_base_model()
    found = by_name(drift_of(tmp_path / "a", None, opened))
    assert len(found) == 2 * len(root.model.layers)
    for name, each in found.items():
        layer: Any = root
        for part in name.split("."):
            layer = getattr(layer, part)
        parameter = layer.get_param().detach()
        assert each.weight_norm == pytest.approx(float(parameter.norm()), rel=1e-6)
        delta = layer.delta_weight("default").detach()
        assert each.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        ranks = [effective_rank(one.double().numpy()) for one in delta]
        assert each.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
        assert each.rank == 2
