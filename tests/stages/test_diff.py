"""Differences of adapters and stages on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lamina.errors import CheckpointError, StageError
from lamina.stages.diff import diff
from lamina.stages.diff_plot import draw, place_of
from tests.stages.chains import deltas_in, llama_lora, run_chain, run_stage, save_plain_peft

CHAIN = [
    ("domain", None, llama_lora()),
    ("chat", "stack", llama_lora(r=6, lora_alpha=6, target_modules=["q_proj", "k_proj"])),
    ("dpo", "continue", None),
]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    run_chain(tmp_path, CHAIN)
    return tmp_path


def test_norms_are_those_of_the_deltas_in_the_files(chain: Path) -> None:
    found = diff(chain / "domain", chain / "chat")
    before, after = deltas_in(chain / "domain"), deltas_in(chain / "chat")
    assert {each.module for each in found.modules} == {*before, *after}
    for each in found.modules:
        change = after[each.module] - before.get(each.module, 0)
        assert each.norm_change == pytest.approx(np.linalg.norm(change), rel=1e-5, abs=1e-5)
    assert found.config["r"] == (4, 6)
    assert (found.a.stages, found.b.stages) == (("domain",), ("domain", "chat"))
    assert found.b.rank == (4, 10)
    assert found.built_on


def test_a_stage_of_a_chain_is_what_its_own_directory_was(chain: Path) -> None:
    found = diff(f"{chain / 'dpo'}#domain", chain / "domain")
    assert found.norm_change == 0
    assert not found.built_on
    told = diff(f"{chain / 'dpo'}#domain", chain / "dpo").to_dict()
    apart = diff(chain / "domain", chain / "dpo").to_dict()
    for one, other in zip(told["modules"], apart["modules"], strict=True):
        assert one["norm_change"] == pytest.approx(other["norm_change"], rel=1e-5, abs=1e-6)


def test_a_stage_whose_ranks_were_trained_on_is_refused(chain: Path) -> None:
    with pytest.raises(StageError, match="'dpo' trained them on"):
        diff(f"{chain / 'dpo'}#chat", chain / "dpo")


def test_a_stage_that_is_not_there_names_the_nearest(chain: Path) -> None:
    with pytest.raises(StageError, match="#domain"):
        diff(f"{chain / 'dpo'}#domian", chain / "dpo")


def test_a_directory_with_the_sign_in_its_name(tmp_path: Path) -> None:
    run_stage(tmp_path / "run#1", llama_lora())
    assert diff(tmp_path / "run#1", tmp_path / "run#1").norm_change == 0


def test_plain_adapters_and_what_was_trained_whole(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    save_plain_peft(tmp_path / "a", settings)
    save_plain_peft(tmp_path / "b", {**settings, "modules_to_save": ["lm_head"]})
    found = diff(tmp_path / "a", tmp_path / "b")
    (head,) = found.tensors
    saved = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert head.name == "lm_head.weight"
    assert (head.norm_a, head.norm_change) == (None, None)
    assert head.norm_b == pytest.approx(float(saved["base_model.model.lm_head.weight"].norm()))


def test_dora_is_told_by_its_factors_and_magnitudes(tmp_path: Path) -> None:
    run_stage(tmp_path / "a", llama_lora(use_dora=True), seed=1)
    run_stage(tmp_path / "b", llama_lora(use_dora=True), seed=2)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.only_factors
    assert {each.name.rpartition(".")[2] for each in found.tensors} == {"lora_magnitude_vector"}


def test_experts(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from tests.parity.kinds import KINDS
    from tests.stages.chains import fill_trainable

    for name, seed in (("a", 1), ("b", 2)):
        config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
        model = get_peft_model(KINDS["Mixtral"].make(), config)
        fill_trainable(model, seed=seed)
        model.save_pretrained(str(tmp_path / name))
    found = diff(tmp_path / "a", tmp_path / "b")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(found.modules) == len(layers)
    for each in found.modules:
        layer = layers[f"base_model.model.{each.module}"]
        norm = float(layer.get_delta_weight("default").detach().norm())
        assert each.norm_b == pytest.approx(norm, rel=1e-5)


def test_adapters_of_different_models_are_refused_with_all_modules(tmp_path: Path) -> None:
    from tests.models import tiny_llama

    run_stage(tmp_path / "a", llama_lora())
    run_stage(tmp_path / "b", llama_lora(), build=lambda: tiny_llama(hidden_size=64))
    with pytest.raises(CheckpointError, match="can't be compared") as caught:
        diff(tmp_path / "a", tmp_path / "b")
    assert len(caught.value.faults) == 4


def test_the_plot_is_a_picture_of_layers_and_modules(chain: Path) -> None:
    draw(diff(chain / "domain", chain / "chat"), chain / "change.png")
    assert (chain / "change.png").read_bytes().startswith(b"\x89PNG")
    assert place_of("model.layers.11.self_attn.q_proj") == (11, "self_attn.q_proj")
    assert place_of("lm_head") == (None, "lm_head")


def test_factors_that_are_no_numbers_are_refused(chain: Path) -> None:
    file = chain / "chat" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0] = float("inf")
    with safe_open(file, framework="pt") as opened:
        save_file(tensors, file, opened.metadata())
    with pytest.raises(CheckpointError, match="NaN or infinity in 1 module"):
        diff(chain / "domain", chain / "chat")
